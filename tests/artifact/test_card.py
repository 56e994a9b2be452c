"""The model card says what a person must know, and the hub can read its head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from spamprune.artifact import save
from spamprune.models import create
from tests.artifact.cases import COLOUR, Net, halve


def read_card(folder: Path) -> tuple[dict[str, object], str]:
    """Return the metadata and the text of a card."""
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_pruned_network(tmp_path: Path) -> None:
    model = halve(net := create("test_resnet", num_classes=5), COLOUR, net.get_classifier())
    folder = save(
        model,
        tmp_path / "net",
        metrics={"accuracy | top 1": {"dense": 93.456, "pruned": 92.5}, "macs": 10**9},
        licence="apache-2.0",
        base_model="timm/test_resnet.r160_in1k",
        extra={"criterion": "opd", "plan": {"long": [1, 2]}},
    )
    metadata, text = read_card(folder)
    assert metadata == {
        "library_name": "spamprune",
        "license": "apache-2.0",
        "base_model": "timm/test_resnet.r160_in1k",
        "pipeline_tag": "image-classification",
        "tags": ["spamprune", "pruning", "timm"],
    }
    before = sum(p.numel() for p in create("test_resnet", num_classes=5).parameters())
    after = sum(p.numel() for p in model.parameters())
    assert f"with {after / before:.1%} of the {before:,} parameters it was built with" in text
    assert "|  | as built | dense | pruned | saved |" in text
    assert f"| parameters | {before:,} |  |  | {after:,} |" in text
    assert r"| accuracy \| top 1 |  | 93.46 | 92.5 |  |" in text
    assert "| macs |  |  |  | 1,000,000,000 |" in text
    assert "| tensor | as built | saved |" in text
    assert "- criterion: opd" in text
    assert "plan" not in text
    assert "| `conv1.0.weight` | 16 × 3 × 3 × 3 | 8 × 3 × 3 × 3 |" in text
    assert "sp.load(" in text
    assert "160 × 160 pixels, 3 channels" in text


def test_a_network_of_measurements_is_not_said_to_classify_images(tmp_path: Path) -> None:
    metadata, _ = read_card(save(create("fc_cancer"), tmp_path / "net"))
    assert "pipeline_tag" not in metadata
    images = {"input_size": (1, 5, 6), "mean": [0.5], "std": [0.5]}
    metadata, _ = read_card(save(create("lenet"), tmp_path / "lenet", preprocessing=images))
    assert metadata["pipeline_tag"] == "image-classification"


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_masked_network_and_users_class(share: float, tmp_path: Path) -> None:
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
        model.inner.weight[: int(share * 8)] = 0
    metadata, text = read_card(save(model, tmp_path / "net"))
    assert metadata == {"library_name": "spamprune", "tags": ["spamprune", "pruning"]}
    assert ("parameters that are not zero" in text) == (share > 0)
    assert "factory=build" in text
    assert "was not recorded" in text
    assert "licence: not stated" in text


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(create("test_vit", num_classes=5), tmp_path / "PATH")
    _, text = read_card(tmp_path / "PATH")
    code = "\n".join(part.split("```")[0] for part in text.split("```python\n")[1:])
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert callable(names["transform"])
