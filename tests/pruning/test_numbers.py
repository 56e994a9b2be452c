"""Sizes that code computes with: a plan that changes them cannot be compared with its mask."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spamprune.pruning import cost
from spamprune.pruning.axes.trace import trace
from spamprune.pruning.compaction import apply, difference, masked, outputs_of
from spamprune.pruning.plan import Target, plan
from tests.pruning.test_trace import disturbed, inputs, random_scores


class Scaled(nn.Module):
    """A layer whose outputs are changed by a function of the network and them."""

    def __init__(self, change, **sizes):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.d, self.n = 16, 16
        self.change = change

    def forward(self, x):
        x = self.change(self, self.a(x).relu())
        return self.c(self.b(x).relu())


def halved(model, example, kinds=None):
    """Return the plan without half of the units, and how far mask and compaction are apart."""
    options = {} if kinds is None else {"kinds": kinds}
    found = plan(model, example, random_scores(model), Target(ratio=0.5), **options)
    outputs = [outputs_of(m, example) for m in (masked(model, found), apply(model, found))]
    return found, difference(*outputs)


NUMBERS = {
    "root": lambda m, x: x.view(-1, m.d) * math.sqrt(m.d),
    "numpy's root": lambda m, x: x.view(-1, m.d) * float(np.sqrt(m.d)),
    "power": lambda m, x: x.view(-1, m.d) * m.d**-0.5,
    "inverse": lambda m, x: x.view(-1, m.d) * m.d**-1,
    "before it is bound": lambda m, x: (m.d**-0.5 * x).view(-1, m.d),
    "of what follows another": lambda m, x: x.view(-1, m.d // 2, 2).flatten(1) / m.d,
    "divisor": lambda m, x: x.view(-1, m.d) / m.d,
    "divisor from a shape": lambda m, x: x / x.shape[1],
    "divisor in place": lambda m, x: x.div_(x.shape[1]),
    "dividend": lambda m, x: x.size(-1) / (1 + x),
    "factor": lambda m, x: x * x.size(-1),
    "factor on the left": lambda m, x: x.size(-1) * x,
    "float behind": lambda m, x: x * (x.shape[1] * 0.5),
    "addend": lambda m, x: x + x.shape[1],
    "elements": lambda m, x: x / x[0].numel(),
    "length": lambda m, x: x / len(x[0]),
    "of a layer": lambda m, x: x / m.a.out_features,
    "fill value": lambda m, x: x + torch.full_like(x, 1 / x.shape[1]),
    "value of a tensor": lambda m, x: x / torch.tensor([x.shape[1]]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes_cannot_be_compared(name):
    model = disturbed(Scaled(NUMBERS[name]))
    found, apart = halved(model, inputs((4, 8)))
    assert set(found.widths()) == {"a", "b"}
    assert not found.comparable
    assert apart > 1e-3


NO_NUMBERS = {
    "in layouts": lambda m, x: x.view(-1, m.d).expand(len(x), m.d).reshape(x.shape[0], -1),
    "in cuts": lambda m, x: torch.cat(x.split(m.d // 2, 1), 1),
    "of samples": lambda m, x: x.view(-1, m.d) / x.shape[0] / len(x),
    "of nothing that goes": lambda m, x: x.view(-1, m.d) * math.sqrt(m.n),
    "of the input": lambda m, x: x * m.a.in_features,
    "elements": lambda m, x: x.reshape(x.shape[0], x[0].numel()),
    "in a shape": lambda m, x: x + torch.full(x.shape, 0.0) + x.new_full((4, x.shape[1]), 0.0),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_sizes_that_are_no_numbers_can_be_compared(name):
    model = disturbed(Scaled(NO_NUMBERS[name]))
    found, apart = halved(model, inputs((4, 8)))
    assert set(found.widths()) == {"a", "b"}
    assert found.comparable
    assert apart < 1e-10


class Eager(nn.Module):
    """Attention whose logits are scaled by a function of the module and its queries."""

    def __init__(self, scale):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.num_heads, self.head_dim = 4, 6
        self.scale_of = scale

    def forward(self, x):
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.mT * self.scale_of(self, q)).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], self.num_heads * self.head_dim))


class Fused(Eager):
    def forward(self, x):
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale_of(self, q))
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Eager(lambda m, q: 1 / math.sqrt(m.head_dim)),
        lambda: Eager(lambda m, q: m.head_dim**-0.5),
        lambda: Eager(lambda m, q: q.shape[-1] ** -0.5),
        lambda: Fused(lambda m, q: 1 / m.head_dim),
        lambda: Fused(lambda m, q: m.head_dim),
    ],
)
def test_the_root_of_the_depth_tells_of_the_depth_and_not_of_heads(make):
    model = disturbed(make())
    example = inputs((2, 5, 24))
    depth, apart = halved(model, example, ("head_dims",))
    assert depth.widths() == {"q:head_dims": 3}
    assert not depth.comparable
    assert apart > 1e-6
    heads, apart = halved(model, example, ("heads",))
    assert heads.widths() == {"q:heads": 2}
    assert heads.comparable
    assert apart < 1e-10


def test_convolutions_that_are_left_whole_cost_what_they_did():
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.Conv2d(12, 12, 3, padding=1, groups=3),
        nn.ConvTranspose2d(12, 8, 2, groups=2),  # channels that are 3 groups are not 2
        nn.Conv2d(8, 16, 1),
        nn.Conv2d(16, 3, 1),
    ).double()
    example = inputs((2, 3, 8, 8))
    dense = cost.macs(model, example)
    assert trace(model, example).macs({}) == dense
    found = plan(model, example, random_scores(model), Target(macs=0.6))
    achieved = cost.macs(apply(model, found), example) / dense
    assert achieved <= 0.6
    assert found.achieved["macs"] == pytest.approx(achieved, rel=1e-12)
