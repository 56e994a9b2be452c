"""Small models, pruned, and ways to tamper with their artifacts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spamprune.artifact import load
from spamprune.errors import ArtifactError
from spamprune.models import create

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


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
