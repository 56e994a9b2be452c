"""Folders from strangers: whatever is wrong with one, it is refused and the reason named."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spamprune.artifact import artifact_bytes, load, save
from spamprune.errors import ArtifactError
from tests.artifact.cases import edit, edit_weights, refuse


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_file_of_another_kind(name: str, small: Path) -> None:
    (small / name).unlink()
    os.mkfifo(small / name)  # opening it would wait for ever
    refuse(small, name, "is missing")


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
        ('{"format": "spamprune-artifact", "version": 4}', "upgrade spamprune"),
        ('{"format": "spamprune-artifact", "version": "x"}', "damaged at 'version'"),
        (" " * (16 * 2**20 + 1), "larger than 16 MiB"),
        (
            '{"format": "spamprune-artifact", "version": 2, "version": 1}',
            "'version' is there twice",
        ),
        ('{"format": "spamprune-artifact", "extra": {"x": NaN}}', "NaN is no number"),
        ('{"format": "spamprune-artifact", "extra": {"x": -Infinity}}', "-Infinity is no number"),
        (f'{{"x": {"9" * 5000}}}', "cannot be read"),
    ],
    ids=[
        *["empty", "bad", "deep", "list", "foreign", "newer", "version", "huge"],
        *["twice", "not a number", "infinite", "long number"],
    ],
)
def test_wrong_configuration(text: str, words: str, small: Path) -> None:
    (small / "config.json").write_text(text)
    refuse(small, "config.json", words)


def test_configuration_that_is_no_text(small: Path) -> None:
    (small / "config.json").write_bytes(b"\xff\xfe\x00")
    refuse(small, "config.json", "cannot be read")


ABSURD = [10**9, 10**9]


def nested(depth: int) -> list[Any]:
    """Return a list in a list in a list …, ``depth`` deep."""
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value]
    return value


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
        ("attributes", {"conv1": {"kernel_size": nested(200)}}, ("'kernel_size'",)),
        ("attributes", {"conv1": {"groups": 10**30}}, ("'groups'",)),
        ("attributes", {"conv1": {"groups": None}}, ("'groups'",)),
        ("attributes", {"conv1": {"groups": "1"}}, ("'groups'",)),
        ("attributes", {"conv1": {"_forward_hooks": [1]}}, ("'_forward_hooks'",)),
        ("attributes", {"conv1": {"weight": 1}}, ("'weight'",)),
        ("attributes", {"": {"conv1": 1}}, ("'conv1'",)),
        ("attributes", {"": {"pretrained_cfg": {"url": "x"}}}, ("'pretrained_cfg'",)),
        ("shared", {"conv1.bias": "conv2.bias"}, ("ties 'conv1.bias'",)),
        ("shared", {"conv1.bias": "conv1.bias"}, ("ties 'conv1.bias'",)),
        ("shared", {"conv1.bias": "/etc/passwd"}, ("'/etc/passwd'", "no place")),
        ("modules", {"act": "GELU"}, ("'act'", "GELU", "ReLU")),
        ("architecture", {"name": "lenett"}, ("'lenett'", "'lenet'")),
        ("architecture", {"name": "hf-hub:someone/net"}, ("unknown model",)),
        ("architecture", {"name": "local-dir:."}, ("unknown model",)),
        ("architecture", {"kwargs": {"checkpoint_path": "x.pth"}}, ("'checkpoint_path'",)),
        ("architecture", {"kwargs": {"pretrained": True}}, ("'pretrained'",)),
        ("architecture", {"kwargs": {"pretrained_cfg": {"file": "x"}}}, ("'pretrained_cfg'",)),
        ("architecture", {"kwargs": {"pretrained_cfg_overlay": {}}}, ("'pretrained_cfg_overlay'",)),
        ("architecture", {"kwargs": {"cache_dir": "/"}}, ("'cache_dir'",)),
        ("architecture", {"kwargs": {"device": "cuda"}}, ("'device'",)),
        ("architecture", {"kwargs": {"num_classes": 10**12}}, ("GiB", "memory")),
        ("architecture", {"kwargs": {"num_classes": 10**30}}, ("cannot be built",)),
        ("architecture", {"kwargs": {"num_classes": nested(200)}}, ("cannot be built",)),
        ("architecture", {"name": "../lenet"}, ("unknown model",)),
        ("architecture", {"name": "/etc/passwd"}, ("unknown model",)),
        ("architecture", {"name": "https://example.org/net"}, ("unknown model",)),
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
        ({"facts": {"conv1": 3}}, "facts.conv1"),
        ({"facts": {"conv1": {"padding_mode": "\n'x'"}}}, "has padding_mode = 'x' in 'conv1'"),
        ({"facts": {"conv1": {"__class__": "x"}}}, "has __class__ = x in 'conv1'"),
        ({"preprocessing": {"input_size": [3, 8], "mean": [0.0], "std": [1.0]}}, "input_size"),
        (
            {"preprocessing": {"input_size": [3, 8, 8], "mean": [0.0], "std": [1.0]}},
            "mean and std need 3 values",
        ),
        (
            {"preprocessing": {"input_size": [1, 8, 8], "mean": [0.0], "std": [1.0], "url": "x"}},
            "preprocessing.url",
        ),
        ({"metrics": {"accuracy": "high"}}, "metrics.accuracy"),
        ({"library_name": "other"}, "library_name"),
    ],
)
def test_edited_sections(change: dict[str, Any], words: str, small: Path) -> None:
    edit(small, lambda config: config.update(change))
    refuse(small, words)


def test_infinite_attribute(small: Path) -> None:
    path = small / "config.json"
    edit(small, lambda config: config["attributes"].update({"conv1": {"groups": 12345}}))
    path.write_text(path.read_text().replace("12345", "1e999"))
    refuse(small, "'groups'", "inf")


def test_declared_sizes_allocate_nothing(tmp_path: Path) -> None:
    entries = 10**12
    header = b'{"weight":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (
        entries,
        4 * entries,
    )
    folder = save(nn.PReLU(), tmp_path / "net")
    edit(folder, lambda config: config["shapes"].update(weight=[entries]))
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ArtifactError, match=r"model.safetensors is damaged"):
        load(folder, factory=nn.PReLU)
    try:
        os.truncate(path, 8 + len(header) + 4 * entries)  # sparse: it takes no room on the disk
    except OSError:
        pytest.skip("no sparse files here")
    with pytest.raises(ArtifactError, match=r"model.safetensors needs 3725 GiB"):
        load(folder, factory=nn.PReLU)


def test_pickles_beside_an_artifact_are_left_alone(small: Path) -> None:
    pickle = b"cos\nsystem\n(S'false'\ntR."
    (small / "pytorch_model.bin").write_bytes(pickle)
    load(small)
    assert (small / "pytorch_model.bin").read_bytes() == pickle
