"""Networks of many families come back bit for bit in another process, changed attributes and all.

A narrower member of a family, saved as if it had been pruned from a wider one, changes what
pruning changes: shapes, heads, groups, splits, and buffers of positions.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spamprune.artifact import read_config, save
from spamprune.models import Source, create
from tests.artifact.cases import COLOUR, halve

SHORT = {"img_size": 64, "depth": 2}
WINDOWS = {"img_size": 64, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32}


@dataclass(frozen=True)
class Case:
    """A timm model, the arguments of its wider form, and what the narrower one has instead."""

    name: str
    wide: dict[str, Any]
    narrow: dict[str, Any]
    changed: set[str]  # some of the attributes that must be recorded
    buffers: int = 0  # non-persistent ones that must be saved
    size: int = 64
    kwargs: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kwargs", {"num_classes": 5, **self.wide, **self.narrow})


CASES = {
    "vit": Case(
        "vit_tiny_patch16_224",
        SHORT,
        {"embed_dim": 96, "num_heads": 2, "mlp_ratio": 2},
        {"num_heads", "head_dim", "attn_dim", "scale", "normalized_shape"},
    ),
    "eva": Case(
        "eva02_tiny_patch14_224",
        {"img_size": 56, "depth": 2},
        {"embed_dim": 96, "num_heads": 2},
        {"num_heads", "scale"},
        buffers=4,  # tables of rotary positions, which follow the head's width
        size=56,
    ),
    "beit": Case(
        "beit_base_patch16_224", SHORT, {"embed_dim": 96, "num_heads": 2}, {"num_heads"}, buffers=2
    ),
    "swin": Case(
        "swin_tiny_patch4_window7_224",
        {**WINDOWS, "window_size": 8},
        {"window_size": 4},
        {"window_size", "shift_size", "window_area"},
        buffers=6,  # indices of relative positions, and masks of shifted windows
    ),
    "swin v2": Case(
        "swinv2_tiny_window8_256",
        {**WINDOWS, "window_size": 4},
        {"embed_dim": 16, "num_heads": (1, 2)},
        {"num_heads", "dim"},
        buffers=4,
    ),
    "levit": Case(
        "levit_128s",
        {"img_size": 64},
        {"embed_dim": (32, 64, 96), "key_dim": 8},
        {"key_dim", "val_dim", "key_attn_dim"},
    ),
    "coat": Case(
        "coat_lite_tiny",
        {"img_size": 64},
        {"embed_dims": (32, 64, 96, 128)},
        {"channel_splits", "groups"},
    ),
    "inception-next": Case(
        "inception_next_atto", {}, {"dims": (24, 32, 64, 128)}, {"split_indexes", "groups"}
    ),
    "convnext": Case(
        "convnext_atto",
        {"depths": (1, 1, 1, 1)},
        {"dims": (8, 16, 24, 32)},
        {"normalized_shape", "in_channels"},
    ),
}
LOADER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from spamprune.artifact import load

for folder in map(Path, sys.argv[1:]):
    x = load_file(folder.with_suffix(".x"))["x"]
    with torch.no_grad():
        save_file({"y": load(folder)(x)}, folder.with_suffix(".y"))
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Save all cases and a pruned network, load them in one fresh process.

    Returns their folders and expected outputs.
    """
    root = tmp_path_factory.mktemp("families")
    saved = {}

    def add(name: str, model: nn.Module, x: torch.Tensor, source: Source | None = None) -> None:
        folder = save(model.eval(), root / str(len(saved)), source=source)
        save_file({"x": x}, folder.with_suffix(".x"))
        with torch.no_grad():
            saved[name] = folder, model(x)

    for name, case in CASES.items():
        source = Source(case.name, {"num_classes": 5, **case.wide})
        x = torch.randn(2, 3, case.size, case.size)
        add(name, create(case.name, **case.kwargs), x, source)
    model = create("test_resnet", num_classes=5)
    add("pruned", halve(model, COLOUR, model.get_classifier()), torch.randn(COLOUR))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    folders = [str(folder) for folder, _ in saved.values()]
    subprocess.run([sys.executable, "-c", LOADER, *folders], check=True, env=environment)
    return saved


@pytest.mark.parametrize("name", CASES)
def test_fresh_process(name: str, outputs: dict[str, tuple[Path, torch.Tensor]]) -> None:
    folder, expected = outputs[name]
    assert torch.equal(load_file(folder.with_suffix(".y"))["y"], expected)
    config = read_config(folder)
    recorded = {key for attributes in config.attributes.values() for key in attributes}
    assert recorded >= CASES[name].changed
    assert len(config.buffers) == CASES[name].buffers


def test_a_pruned_network_in_a_fresh_process(
    outputs: dict[str, tuple[Path, torch.Tensor]],
) -> None:
    folder, expected = outputs["pruned"]
    assert torch.equal(load_file(folder.with_suffix(".y"))["y"], expected)
