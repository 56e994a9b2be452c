"""Saved models come back bit for bit, and nothing else comes back at all."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spamprune.artifact import artifact_bytes, load, read_config, save
from spamprune.errors import ArtifactError, OutputError
from spamprune.models import Source, create
from tests.artifact.cases import COLOUR, GREY, Net, assert_same, edit, halve, small_lenet

# -- round trips


def test_pruned_lenet(tmp_path: Path) -> None:
    model = small_lenet()
    folder = save(model, tmp_path / "deep" / "small", extra={"accuracy": 98.5})
    loaded = load(folder)
    assert loaded.conv2.in_channels == 3
    assert loaded.conv2.weight.shape == (8, 3, 3, 3)
    assert not any(module.training for module in loaded.modules())
    assert all(p.requires_grad for p in loaded.parameters())
    assert_same(model, loaded, GREY)
    assert read_config(folder).extra == {"accuracy": 98.5}
    files = [folder / "config.json", folder / "model.safetensors"]
    assert artifact_bytes(folder) == sum(len(path.read_bytes()) for path in files)
    assert files[0].stat().st_mode == files[1].stat().st_mode
    assert_same(loaded, load(save(loaded, tmp_path / "again")), GREY)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_pruned_timm_model(name: str, tmp_path: Path) -> None:
    model = create(name, num_classes=5)
    dense = sum(p.numel() for p in model.parameters())
    model(torch.randn(8, *COLOUR[1:]))  # statistics that a fresh model lacks
    halve(model, COLOUR, model.get_classifier())
    loaded = load(save(model, tmp_path / "small"))
    assert sum(p.numel() for p in loaded.parameters()) < 0.5 * dense
    assert_same(model, loaded, COLOUR)
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_unpruned_model_records_no_change(tmp_path: Path) -> None:
    model = create("test_vit", num_classes=5, img_size=32)
    config = read_config(save(model, tmp_path / "vit"))
    assert (config.shapes, config.attributes, config.modules) == ({}, {}, {})
    assert_same(model, load(tmp_path / "vit"), COLOUR)


def test_removed_heads_and_biases_and_added_ones(tmp_path: Path) -> None:
    model = create("test_vit", num_classes=5, img_size=32)
    attention = model.blocks[0].attn
    if not hasattr(attention, "attn_dim"):
        pytest.skip("attention of this timm cannot lose heads")
    attention.num_heads, attention.attn_dim = 1, 32
    attention.qkv.weight = nn.Parameter(attention.qkv.weight[:96].clone())
    attention.qkv.out_features = 96
    attention.qkv.bias = None
    attention.proj.weight = nn.Parameter(attention.proj.weight[:, :32].clone())
    attention.proj.in_features = 32
    folder = save(model, tmp_path / "vit")
    assert read_config(folder).shapes["blocks.0.attn.qkv.bias"] is None
    loaded = load(folder)
    assert loaded.blocks[0].attn.qkv.bias is None
    assert_same(model, loaded, COLOUR)

    folded = create("test_resnet")
    folded.conv1[0].bias = nn.Parameter(torch.randn(folded.conv1[0].out_channels))
    assert_same(folded, load(save(folded, tmp_path / "folded")), COLOUR)


def test_half_precision_and_source_given(tmp_path: Path) -> None:
    model = timm.create_model("lenet", num_classes=3).bfloat16()
    loaded = load(save(model, tmp_path / "a", source=Source("lenet", {"num_classes": 3})))
    assert loaded.head.weight.dtype == torch.bfloat16
    x = torch.randn(GREY).bfloat16()
    assert torch.equal(model.eval()(x), loaded(x))


def test_users_class(tmp_path: Path) -> None:
    model = Net(6)
    model(torch.randn(20, 4))
    model.order = torch.tensor([5, 4, 3, 2, 1, 0])
    folder = save(model, tmp_path / "net")
    loaded = load(folder, factory=Net)  # eight units, as before pruning
    assert_same(model, loaded, (3, 4))
    assert loaded.width == 6
    assert loaded.tied.weight is loaded.inner.weight
    assert set(load_file(folder / "model.safetensors")) == {
        "inner.weight",
        "inner.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "outer.weight",
        "outer.bias",
        "order",
    }
    with pytest.raises(ArtifactError, match=r"Net.*factory"):
        load(folder)
    with pytest.raises(ArtifactError, match=r"has a Net as 'the model'.*has a Linear"):
        load(folder, factory=lambda: nn.Linear(1, 1))


def test_factory_on_both_sides_records_changes_only(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        model = create("lenet")
        model.act = nn.GELU()
        return model

    model = factory()
    halve(model, GREY, model.head)
    folder = save(model, tmp_path / "net", factory=factory)
    config = read_config(folder)
    assert config.architecture is None
    assert "conv1.weight" in config.shapes
    assert "kernel_size" not in config.attributes["conv1"]
    assert_same(model, load(folder, factory=factory), GREY)
    with pytest.raises(ArtifactError, match=r"GELU as 'act'.*has a ReLU"):
        load(folder, factory=lambda: create("lenet"))


def test_model_that_timm_made_needs_no_source(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet.r160_in1k", num_classes=5, in_chans=1)
    halve(model, (2, 1, 32, 32), model.get_classifier())
    folder = save(model, tmp_path / "net")
    config = read_config(folder)
    assert config.architecture is not None
    assert config.architecture.name == "test_resnet.r160_in1k"
    assert config.preprocessing is None  # the means of three channels say nothing of one
    assert_same(model, load(folder), (2, 1, 32, 32))


def test_preprocessing_and_other_facts(tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "metrics": {"accuracy": {"dense": 93.5, "pruned": 92.25}, "macs": 10**9},
        "licence": "apache-2.0",
        "base_model": "timm/test_vit.r160_in1k",
    }
    folder = save(create("test_vit", img_size=32, num_classes=7), tmp_path / "net", **facts)
    config = read_config(folder)
    assert config.model_dump(include=set(facts)) == facts
    assert config.num_classes == 7
    loaded = load(folder)
    resolved = timm.data.resolve_model_data_config(loaded)
    assert resolved["input_size"] == [3, 32, 32]
    assert resolved["mean"] == [0.5, 0.5, 0.5]
    timm.data.create_transform(**resolved)
    again = read_config(save(loaded, tmp_path / "again"))
    assert again.preprocessing == config.preprocessing

    own = {"input_size": (1, 28, 28), "mean": (0.29,), "std": (0.35,)}
    loaded = load(save(create("lenet"), tmp_path / "own", preprocessing=own))
    assert loaded.pretrained_cfg["mean"] == [0.29]


def test_version_1_still_loads(small: Path) -> None:
    expected = load(small)

    def age(config: dict[str, Any]) -> None:
        newer = ["library_name", "base_model", "licence", "num_classes", "preprocessing", "metrics"]
        for field in newer:
            del config[field]
        config["version"] = 1

    edit(small, age)
    (small / "README.md").unlink()
    assert_same(expected, load(small), GREY)
    save(expected, small)
    assert read_config(small).version == 3


class Lazy(nn.Module):
    """Attributes that were None, and sequences within sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = None
        self.splits = [(4, 4), (2, 2)]

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.head_dim or 1) + sum(map(sum, self.splits))


def test_attributes_of_every_kind(tmp_path: Path) -> None:
    model = Lazy()
    model.head_dim, model.splits = 3, [(4, 3), (2, 1), (5, 5)]
    folder = save(model, tmp_path / "net", factory=Lazy)
    loaded = load(folder, factory=Lazy)
    assert (loaded.head_dim, loaded.splits) == (model.head_dim, model.splits)
    edit(folder, lambda config: config["attributes"][""].update(head_dim="text"))
    with pytest.raises(ArtifactError, match="'head_dim'"):
        load(folder, factory=Lazy)


def test_configuration_is_readable(small: Path) -> None:
    text = (small / "config.json").read_text()
    assert '"conv2.weight": [8, 3, 3, 3]' in text
    assert json.loads(text) == read_config(small).model_dump()


def test_untied_weights_stay_untied(tmp_path: Path) -> None:
    model = Net()
    model.tied.weight = nn.Parameter(torch.randn(8, 4))
    loaded = load(save(model, tmp_path / "net"), factory=Net)
    assert loaded.tied.weight is not loaded.inner.weight
    assert_same(model, loaded, (3, 4))


def test_loaded_model_is_independent_of_the_file(small: Path) -> None:
    model = load(small)
    before = model.conv3.weight.clone()
    path = small / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(model.conv3.weight, before)


def test_random_state_is_untouched(tmp_path: Path) -> None:
    model = small_lenet()
    state = torch.get_rng_state()
    load(save(model, tmp_path / "small"))
    assert torch.equal(torch.get_rng_state(), state)


# -- what cannot be saved


def _exchange(model: nn.Module) -> None:
    model.act = nn.GELU()


def _add(model: nn.Module) -> None:
    model.conv1.register_parameter("weight_orig", nn.Parameter(torch.zeros(1)))


def _patch(model: nn.Module) -> None:
    model.conv1.forward = lambda x: x


def _rewrite(model: nn.Module) -> None:
    model.conv1.padding_mode = "circular"


def _retype(model: nn.Module) -> None:
    model.conv1.groups = None


def _overflow(model: nn.Module) -> None:
    model.conv1.groups = math.inf


def _hook(model: nn.Module) -> None:
    model.conv1.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_exchange, "'act' is GELU, not ReLU"),
        (_add, "'conv1.weight_orig' was added"),
        (_patch, "'conv1' has its own 'forward'"),
        (_rewrite, "'conv1' has padding_mode = 'circular'"),
        (_retype, "'conv1' has groups = None, built with 1"),
        (_overflow, "'conv1' has groups = inf, built with 1"),
        (_hook, "'conv1' has forward hooks, which are code"),
    ],
)
def test_changes_that_cannot_be_recorded(
    change: Callable[[nn.Module], None], words: str, tmp_path: Path
) -> None:
    model = create("lenet")
    change(model)
    with pytest.raises(ArtifactError) as caught:
        save(model, tmp_path / "small")
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Opaque(nn.Module):
    """Attributes that an artifact cannot hold."""

    def __init__(self, act: Callable[..., Any] = torch.relu, limit: float = math.inf):
        super().__init__()
        self.act, self.limit, self.table = act, limit, torch.arange(3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (partial(Opaque, act=torch.tanh), "act = "),
        (partial(Opaque, limit=-math.inf), "limit = -inf"),
    ],
)
def test_opaque_attributes(changed: Callable[[], nn.Module], words: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        save(changed(), tmp_path / "net", factory=Opaque)
    assert words in str(caught.value)
    model = Opaque()
    save(model, tmp_path / "net", factory=Opaque)
    model.table = torch.arange(1, 4)
    with pytest.raises(ArtifactError, match="has table = "):
        save(model, tmp_path / "net", factory=Opaque)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"extra": {"x": torch.zeros(1)}}, r"extra cannot be saved.*Tensor"),
        ({"extra": {"x": math.nan}}, r"extra cannot be saved.*finite"),
        ({"metrics": {"accuracy": math.nan}}, r"metrics cannot be saved.*finite"),
        ({"metrics": {"accuracy": "high"}}, r"metrics.accuracy"),
        ({"preprocessing": {"mean": [0.5]}}, r"preprocessing"),
        ({"licence": 3}, r"licence"),
        ({"source": Source("lenet"), "factory": Net}, r"a source and a factory"),
    ],
)
def test_what_is_said_must_fit(said: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=words):
        save(create("lenet"), tmp_path / "small", **said)
    assert list(tmp_path.iterdir()) == []


# -- where it may be written


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("replace", [False, True])
def test_interrupted_save_leaves_what_was(
    error: BaseException, replace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "small"
    model = small_lenet()
    if replace:
        save(model, folder)

    def fail(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(sys.modules[save.__module__], "save_file", fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        save(create("lenet"), folder)
    assert list(tmp_path.iterdir()) == ([folder] if replace else [])
    if replace:
        assert_same(model, load(folder), GREY)


def test_failed_replacement_restores_the_old(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (small / "model.safetensors").read_bytes()
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.suffix == ".new":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="cannot be written"):
        save(create("lenet"), small)
    assert (small / "model.safetensors").read_bytes() == before
    assert list(small.parent.iterdir()) == [small]


def test_replaces_an_artifact_and_fills_an_empty_folder(small: Path) -> None:
    model = create("lenet", num_classes=3)
    save(model, small)
    assert_same(model, load(small), GREY)
    empty = small.parent / "empty"
    empty.mkdir()
    assert_same(model, load(save(model, empty)), GREY)
    assert sorted(path.name for path in small.parent.iterdir()) == ["empty", "small"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("thesis.tex", "years of work", "holds 'thesis.tex'"),
        ("config.json", "{}", "no artifact"),
        ("config.json", "[", "no artifact"),
    ],
)
def test_foreign_folder_is_left_alone(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(OutputError, match=words):
        save(create("lenet"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == text


def test_file_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_text("")
    with pytest.raises(OutputError, match="is a file"):
        save(create("lenet"), path)
    with pytest.raises(OutputError, match="small"):
        save(create("lenet"), path / "below")
