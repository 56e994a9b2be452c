"""Fixup: what the initialisation sets, what it is for, and where the scalars stand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spamprune.errors import ModelError
from spamprune.models import create
from spamprune.models.fixup import FixupBlock, FixupWideBlock, ZeroPadShortcut

NETWORKS = {"fixup_resnet18": 8, "fixup_wrn16_4": 6}  # residual branches
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_start_at_zero(name: str) -> None:
    assert torch.equal(create(name)(IMAGES), torch.zeros(4, 10))


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_values(name: str) -> None:
    torch.manual_seed(0)
    model: Any = create(name)
    branches = NETWORKS[name]
    assert len(model.blocks) == branches
    for block in model.blocks:
        out, _, *kernel = block.conv1.weight.shape
        expected = math.sqrt(2 / (out * math.prod(kernel))) * branches**-0.5
        assert block.conv1.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert abs(block.conv1.weight.mean().item()) < 0.05 * expected
        assert not block.conv2.weight.any()
        if isinstance(block.shortcut, nn.Conv2d):  # outside of the branch: not scaled
            expected = math.sqrt(2 / block.shortcut.out_channels)
            assert block.shortcut.weight.std().item() == pytest.approx(expected, rel=0.05)
    scalars = {n: p for n, p in model.named_parameters() if p.shape == (1,)}
    assert len(scalars) == 5 * branches + 2
    assert all(p.item() == n.endswith("scale") for n, p in scalars.items())
    assert not any(p.requires_grad is False for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "narrow", "depths"),
    [
        ("fixup_resnet18", {"width": 8}, (10, 34, 66)),
        ("fixup_wrn16_4", {"widen": 1}, (10, 40, 64)),
    ],
)
def test_a_step_changes_the_function_alike_at_any_depth(
    name: str, narrow: dict[str, int], depths: tuple[int, ...]
) -> None:
    """Fixup's aim: an SGD step of rate η moves the outputs by Θ(η), whatever the depth."""
    changes = []
    targets = torch.arange(4)
    for depth in depths:
        torch.manual_seed(0)
        model = create(name, depth=depth, **narrow)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        outputs = model(IMAGES[..., :16, :16])
        for _ in range(4):  # the classifier moves first, then the branches' ends, then the rest
            F.cross_entropy(outputs, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            outputs = model(IMAGES[..., :16, :16])
        changes.append(outputs.detach().norm().item())
    assert max(changes) < 1.3 * min(changes)


def test_shortcut_is_a_strided_pooling_and_zeros() -> None:
    found = ZeroPadShortcut(stride=2, extra=5)(IMAGES)
    pooled = F.avg_pool2d(IMAGES, 1, 2)
    assert torch.equal(found, F.pad(pooled, (0, 0, 0, 0, 0, 5)))


def test_a_shortcut_that_pads_takes_the_biased_input() -> None:
    block: Any = FixupBlock(3, 5, 2)
    with torch.no_grad():
        block.bias1a.fill_(0.7)
        block.scale.zero_()  # of the branch
    expected = F.relu(block.shortcut(IMAGES + 0.7))
    torch.testing.assert_close(block(IMAGES), expected)


@pytest.mark.parametrize("block", [FixupBlock, FixupWideBlock])
def test_where_the_scalars_stand(block: type[nn.Module]) -> None:
    """A kernel that is one in its middle leaves pixels alone, so that a branch is arithmetic."""
    made: Any = block(1, 1, 1).double()
    nn.init.dirac_(made.conv1.weight)
    nn.init.dirac_(made.conv2.weight)
    scalars = [p for p in made.parameters() if p.shape == (1,)]
    with torch.no_grad():
        for scalar in scalars:
            scalar.normal_()
    before, middle, last, scale, after = (p.item() for p in scalars)
    if block is FixupBlock:
        names = ["bias1a", "bias1b", "bias2a", "scale", "bias2b"]
    else:
        names = ["bias1", "bias2", "bias3", "scale", "bias4"]
    assert [n for n, p in made.named_parameters() if p.shape == (1,)] == names
    x = IMAGES[:1, :1].double()
    entering = x + before if block is FixupBlock else F.relu(x + before)
    expected = (F.relu(entering + middle) + last) * scale + after + x
    expected = F.relu(expected) if block is FixupBlock else expected
    torch.testing.assert_close(made(x), expected)


@pytest.mark.parametrize(
    ("name", "depth", "nearest"),
    [("fixup_resnet18", 20, 18), ("fixup_resnet18", 2, 10), ("fixup_wrn16_4", 18, 16)],
)
def test_depths_that_there_are_not(name: str, depth: int, nearest: int) -> None:
    with pytest.raises(ModelError, match=rf"depth {depth} is not .* is {nearest}$"):
        create(name, depth=depth)
