"""Saved models come back bit for bit, and nothing else comes back at all."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spamprune.artifact import artifact_bytes, load, read_config, save
from spamprune.errors import ArtifactError, OutputError
from spamprune.models import Source, create

GREY = (2, 1, 28, 28)
COLOUR = (2, 3, 32, 32)


def halve(model: nn.Module, shape: tuple[int, ...], head: nn.Module) -> nn.Module:
    """Remove half of the units of every layer but the head, by magnitude."""
    pruner = tp.pruner.BasePruner(
        model.eval(),
        torch.zeros(shape),
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[head],
        # the defaults of these are shared between pruners
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )
    pruner.step()
    return model


def small_lenet() -> nn.Module:
    model = create("lenet")
    return halve(model, GREY, model.head)


class Net(nn.Module):
    """A class of a user's: tied weights, no bias, a buffer outside the state dict."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.width = width
        self.inner = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.outer = nn.Linear(width, 4)
        self.tied = nn.Linear(4, width, bias=False)
        self.tied.weight = self.inner.weight
        self.register_buffer("order", torch.arange(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.inner(x))[:, self.order] * self.width + self.tied(x)
        return self.outer(torch.relu(x))


@pytest.fixture(scope="module", autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """An artifact of a pruned LeNet."""
    return save(small_lenet(), tmp_path / "small")


def assert_same(first: nn.Module, second: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(first.eval()(x), second(x))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the ``config.json`` of an artifact."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of an artifact."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


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
    import timm

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


def test_untied_weights_stay_untied(tmp_path: Path) -> None:
    model = Net()
    model.tied.weight = nn.Parameter(torch.randn(8, 4))
    loaded = load(save(model, tmp_path / "net"), factory=Net)
    assert loaded.tied.weight is not loaded.inner.weight
    assert_same(model, loaded, (3, 4))


def test_fresh_process(tmp_path: Path) -> None:
    model = create("test_resnet", num_classes=5)
    save(halve(model, COLOUR, model.get_classifier()), tmp_path / "small")
    x = torch.randn(COLOUR)
    save_file({"x": x}, tmp_path / "x.safetensors")
    script = (
        "import sys\n"
        "from safetensors.torch import load_file, save_file\n"
        "from spamprune.artifact import load\n"
        "folder, x, y = sys.argv[1:]\n"
        "model = load(folder)\n"
        "save_file({'y': model(load_file(x)['x']).detach()}, y)\n"
    )
    paths = [str(tmp_path / name) for name in ("small", "x.safetensors", "y.safetensors")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", script, *paths], check=True, env=environment)
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], model(x))


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_exchange, "'act' is GELU, not ReLU"),
        (_add, "'conv1.weight_orig' was added"),
        (_patch, "'conv1' has its own 'forward'"),
        (_rewrite, "'conv1' has padding_mode = 'circular'"),
        (_retype, "'conv1' has groups = None, built with 1"),
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


def test_extra_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"extra cannot be saved.*Tensor"):
        save(create("lenet"), tmp_path / "small", extra={"x": torch.zeros(1)})


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


# -- what is refused


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_and_link(name: str, small: Path) -> None:
    moved = (small / name).rename(small.parent / "moved")
    refuse(small, name, "is missing")
    with pytest.raises(ArtifactError, match="is missing"):
        artifact_bytes(small)
    (small / name).symlink_to(moved)
    refuse(small, name, "is a link")


def test_missing_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "none/config.json", "is missing")


def test_pickles_are_named_and_not_read(small: Path) -> None:
    (small / "model.safetensors").rename(small / "pytorch_model.bin")
    refuse(small, "'pytorch_model.bin'", "pickles")


def _weights_of(header: int, body: bytes) -> bytes:
    return struct.pack("<Q", header) + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95",
        _weights_of(10, b"{"),
        _weights_of(2**63, b"{}"),
        _weights_of(100_000_001, b"{}"),
        _weights_of(2, b"[]"),
        _weights_of(4, b"\xff\xff\xff\xff"),
    ],
    ids=["empty", "pickle", "past the end", "absurd", "oversized", "no table", "no text"],
)
def test_corrupt_weights(content: bytes, small: Path) -> None:
    (small / "model.safetensors").write_bytes(content)
    refuse(small, "model.safetensors is damaged")


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.999])
def test_truncated_weights(fraction: float, small: Path) -> None:
    path = small / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    refuse(small, "model.safetensors is damaged")


def test_wrong_tensors(small: Path) -> None:
    path = small / "model.safetensors"
    good = path.read_bytes()
    edit_weights(small, lambda tensors: tensors.pop("conv1.bias"))
    refuse(small, "lacks tensor 'conv1.bias'", "(3,)")
    path.write_bytes(good)
    edit_weights(small, lambda tensors: tensors.update(spy=torch.zeros(2)))
    refuse(small, "tensor 'spy'", "(2,)", "no place")
    path.write_bytes(good)
    edit_weights(small, lambda tensors: tensors.update({"conv1.bias": torch.zeros(4)}))
    refuse(small, "tensor 'conv1.bias'", "(4,)", "(3,)")
    path.write_bytes(good)
    edit_weights(small, lambda tensors: tensors.update({"conv1.bias": torch.zeros(3).int()}))
    refuse(small, "tensor 'conv1.bias'", "int32", "float32")
    path.write_bytes(good)
    load(small)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "not written by spamprune.save"),
        ('{"model_type": "bert"}', "not written by spamprune.save"),
        ('{"format": "spamprune-artifact", "version": 2}', "upgrade spamprune"),
        ('{"format": "spamprune-artifact", "version": "x"}', "damaged at 'version'"),
        (" " * (16 * 2**20 + 1), "larger than 16 MiB"),
    ],
    ids=["empty", "bad", "deep", "list", "foreign", "newer", "version", "huge"],
)
def test_wrong_configuration(text: str, words: str, small: Path) -> None:
    (small / "config.json").write_text(text)
    refuse(small, "config.json", words)


def test_configuration_that_is_no_text(small: Path) -> None:
    (small / "config.json").write_bytes(b"\xff\xfe\x00")
    refuse(small, "config.json", "cannot be read")


ABSURD = [10**9, 10**9]


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("shapes", {"conv1.weight": ABSURD}, ("'conv1.weight'", "1000000000")),
        ("shapes", {"conv1.weight": [-1]}, ("shapes.conv1.weight",)),
        ("shapes", {"conv1.weight": None}, ("'conv1.weight'", "no place")),
        ("shapes", {"conv9.weight": [1]}, ("'conv9.weight'", "no place")),
        ("shapes", {"../../etc/passwd": [1]}, ("'../../etc/passwd'", "no place")),
        ("attributes", {"conv9": {"groups": 1}}, ("'conv9'", "lacks")),
        ("attributes", {"conv1": {"nope": 1}}, ("'nope'", "no such attribute")),
        ("attributes", {"conv1": {"__class__": 1}}, ("'__class__'",)),
        ("attributes", {"conv1": {"a-b": 1}}, ("'a-b'",)),
        ("attributes", {"conv1": {"forward": 1}}, ("'forward'",)),
        ("attributes", {"conv1": {"training": True}}, ("'training'",)),
        ("attributes", {"conv1": {"_parameters": []}}, ("'_parameters'",)),
        ("attributes", {"conv1": {"padding_mode": "circular"}}, ("'padding_mode'",)),
        ("attributes", {"conv1": {"groups": True}}, ("'groups'",)),
        ("attributes", {"conv1": {"kernel_size": [5, {}]}}, ("'kernel_size'",)),
        ("shared", {"conv1.bias": "conv2.bias"}, ("ties 'conv1.bias'",)),
        ("shared", {"conv1.bias": "conv1.bias"}, ("ties 'conv1.bias'",)),
        ("shared", {"conv1.bias": "/etc/passwd"}, ("'/etc/passwd'", "no place")),
        ("modules", {"act": "GELU"}, ("'act'", "GELU", "ReLU")),
        ("architecture", {"name": "lenett"}, ("'lenett'", "'lenet'")),
        ("architecture", {"name": "hf-hub:someone/net"}, ("unknown model",)),
        ("architecture", {"name": "local-dir:."}, ("unknown model",)),
        ("architecture", {"kwargs": {"checkpoint_path": "x.pth"}}, ("'checkpoint_path'",)),
        ("architecture", {"kwargs": {"pretrained": True}}, ("'pretrained'",)),
        ("architecture", {"kwargs": {"nope": 1}}, ("'nope'",)),
        ("architecture", {"path": "../other"}, ("architecture.path",)),
    ],
)
def test_edited_configuration(
    section: str, change: dict[str, Any], words: tuple[str, ...], small: Path
) -> None:
    edit(small, lambda config: config[section].update(change))
    refuse(small, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": "../other.safetensors"}, "'weights'"),
        ({"buffers": ["nope"]}, "'nope'"),
        ({"shapes": 3}, "'shapes'"),
    ],
)
def test_edited_sections(change: dict[str, Any], words: str, small: Path) -> None:
    edit(small, lambda config: config.update(change))
    refuse(small, words)
