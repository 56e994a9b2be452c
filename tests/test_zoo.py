from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spamprune import zoo
from spamprune.errors import ModelError, OutputError, PruningError
from spamprune.recipe import library


@pytest.fixture(scope="module")
def card() -> zoo.Card:
    return zoo.check("test_resnet", ratio=0.5)


def test_a_card_tells_all(card: zoo.Card) -> None:
    assert card.outcome == "full"
    assert card.family == "resnet"
    assert card.command == "spamprune zoo check test_resnet --ratio 0.5"
    assert card.must_agree
    assert card.difference is not None
    assert card.difference <= 1e-5
    assert card.parameters is not None
    assert card.parameters.remain == pytest.approx(
        card.parameters.pruned / card.parameters.dense, abs=1e-4
    )
    assert card.parameters.remain < 0.4
    assert card.macs is not None
    assert card.macs.remain < 0.4
    assert card.reloads == "bit-identical in a fresh process"
    assert card.trains == "forward and backward run"
    assert set(card.units) == {"width", "hidden"}
    assert all(kind.pruned == kind.units // 2 for kind in card.units.values())
    assert "platform" not in card.environment


def test_a_card_is_read_back(card: zoo.Card, tmp_path: Path) -> None:
    zoo.write(card, tmp_path / "x.yaml")
    assert zoo.cards(tmp_path) == [card]


def test_attention_agrees_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "_reloads", lambda *_: zoo._SAME)  # another card really reloads
    found = zoo.check("test_vit", kinds=("heads", "head_dims"), ratio=0.5)
    assert found.command.endswith(" --kinds heads --kinds head_dims")
    assert found.must_agree
    assert found.difference is not None
    assert found.difference <= zoo.AGREEMENT
    assert set(found.units) == {"heads", "head_dims"}
    assert found.outcome == "partial"  # attention holds less than 40 % of the parameters


def test_what_cannot_be_pruned_is_unsupported_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.only(x)  # type: ignore[no-any-return]

    monkeypatch.setattr(zoo, "disturbed", lambda name: (Odd(), torch.randn(1, 3)))
    found = zoo.check("odd")
    assert found.outcome == "unsupported"
    assert found.why is not None
    assert found.why.startswith("nothing of Odd can be pruned")


def test_a_network_that_differs_after_reloading_is_partial(
    card: zoo.Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, example = zoo.disturbed("test_resnet")
    save = zoo.save_file

    def spoiled(tensors: dict[str, Tensor], path: Path) -> None:
        save({**tensors, "0": tensors["0"] + 1e-6}, path)

    monkeypatch.setattr(zoo, "save_file", spoiled)
    assert zoo._reloads(model, example).endswith("the outputs of the reloaded network differ")
    assert zoo._outcome(card.model_copy(update={"reloads": "no"})) == "partial"


def test_training_that_fails_is_told() -> None:
    good, bad = nn.Linear(3, 2), nn.Linear(4, 2)
    batch = torch.randn(2, 3)
    assert zoo._trains(good, good, batch) == "forward and backward run"
    assert zoo._trains(bad, good, batch).startswith("RuntimeError: ")
    assert zoo._trains(bad, bad, batch).startswith("no more than the whole network: RuntimeError")
    assert good.weight.grad is None


def test_damaged_cards_are_named(tmp_path: Path) -> None:
    for text in ("model: [", "model: x\n", "- 1\n"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(OutputError, match=r"bad\.yaml is no card"):
            zoo.cards(tmp_path)


def test_mistakes_are_errors_not_cards() -> None:
    with pytest.raises(ModelError, match="unknown model"):
        zoo.check("resnett")
    with pytest.raises(PruningError, match="out of range"):
        zoo.check("test_resnet", ratio=2)


def test_the_bundled_cards_are_named_after_their_models() -> None:
    paths = sorted(library.folder("zoo").glob("*.yaml"))
    assert [path.stem for path in paths] == [card.model for card in zoo.cards()]
    assert {"resnet10t", "test_vit", "mobilenetv3_small_050"} <= {path.stem for path in paths}
