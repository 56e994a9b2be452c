"""Transformers and mixers: positions, attention, mixing, and arguments that do not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spamprune.errors import ModelError
from spamprune.models import create
from spamprune.models.patches import sincos_positions


def test_positions() -> None:
    table = sincos_positions(3, 16)
    assert table.shape == (9, 16)
    for row in range(9):
        y, x = divmod(row, 3)
        for k in range(4):
            frequency = 10_000 ** (-k / 3)
            expected = [f(p * frequency) for p in (x, y) for f in (math.sin, math.cos)]
            found = table[row, k::4].tolist()
            assert found == pytest.approx(expected, abs=1e-6)


def test_simple_vit_by_hand() -> None:
    torch.manual_seed(0)
    model: Any = create("simple_vit_mnist", embed_dim=16, num_heads=2, head_dim=5).double()
    image = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    patches = image.unfold(2, 7, 7).unfold(3, 7, 7).reshape(2, 16, 49)
    x = patches @ model.patch_embed.weight.reshape(16, 49).T + model.positions
    (block,) = model.blocks
    queries, keys, values = (x @ block.qkv.weight.T).split(10, dim=2)
    heads = []
    for h in (slice(0, 5), slice(5, 10)):
        logits = queries[..., h] @ keys[..., h].mT / 5**0.5
        heads.append(logits.softmax(-1) @ values[..., h])
    x = x + torch.cat(heads, -1) @ block.proj.weight.T
    hidden = F.gelu(x @ block.mlp.fc1.weight.T)
    x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    torch.testing.assert_close(model(image), x.mean(1) @ model.head.weight.T)


def test_the_paper_s_biases() -> None:
    names = [n for n, _ in create("simple_vit_mnist").named_parameters() if n.endswith("bias")]
    assert names == ["blocks.0.mlp.fc2.bias"]


@pytest.mark.parametrize(("name", "blocks"), [("mixer_mnist", 2), ("mixer_s_cifar", 8)])
def test_mixers_mix_tokens(name: str, blocks: int) -> None:
    model: Any = create(name).eval()
    assert len(model.blocks) == blocks
    side = 28 if name == "mixer_mnist" else 32
    image = torch.randn(1, 1 if name == "mixer_mnist" else 3, side, side)
    other = image.clone()
    other[..., :4, :4] += 1  # the first patch
    moved = (model.forward_features(image) - model.forward_features(other)).abs().amax((0, 2))
    assert len(moved) == (side // 4) ** 2
    assert moved.min() > 0


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [({"patch_size": 5}, "patch_size 5"), ({"embed_dim": 30}, "embed_dim 30")],
)
def test_sizes_that_do_not_fit(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        create("simple_vit_mnist", **kwargs)
