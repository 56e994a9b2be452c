"""Positions that code addresses by number, in its source or in its data, keep their numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spamprune.pruning.units import DEFAULT_KINDS
from tests.pruning.test_trace import ROW, Net, disturbed, inputs, pruned


def selected(index):
    return lambda m, x: (lambda h: m.b(h) + h[:, index, None])(m.a(x))


def assigned(key):
    def forward(m, x):
        h = m.a(x).clone()
        h[:, key] = 0.0
        return m.b(h)

    return forward


def assigned_up_to_half(m, x):
    h = m.a(x).clone()
    h[:, : h.shape[1] // 2] = 0.0
    return m.b(h)


def parted(split, *where, **named):
    def forward(m, x):
        first, *others = split(m.a(x), *where, **named)
        return m.b(torch.cat([*(part.relu() for part in others), first], 1))

    return forward


def left(forward, **options):
    """Return what is left of 8 units where half may go, once mask and network agree."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 4), "c": nn.Linear(4, 2)}
    model = disturbed(Net(lambda m, x: m.c(forward(m, x)), **layers))
    found, _ = pruned(model, inputs(ROW), kinds=DEFAULT_KINDS, **options)
    assert found.comparable
    return {layer: width for layer, width in found.widths().items() if layer != "b"}


@pytest.mark.parametrize(("index", "width"), [(0, 4), (2, 3), (-3, 3), (-1, 4)])
def test_what_lies_before_a_position_stays_with_it(index, width):
    assert left(selected(index)) == {"a": width}


@pytest.mark.parametrize(
    ("forward", "widths"),
    [
        (assigned(2), {"a": 3}),
        (assigned(slice(4)), {"a": 2}),
        (assigned(slice(-4, None)), {"a": 2}),
    ],
)
def test_assignments_to_parts_hit_the_same_units(forward, widths):
    assert left(forward) == widths


def test_an_assignment_to_one_half_keeps_halves_equal():
    assert left(assigned_up_to_half, ratios={"a": 0.75}) == {"a": 1, "a#2": 1}


@pytest.mark.parametrize(
    ("forward", "widths"),
    [
        (parted(torch.tensor_split, (3,), dim=1), {"a": 3}),
        (parted(torch.Tensor.tensor_split, indices=[3, -2], dim=1), {"a": 2}),
        (parted(torch.hsplit, [3]), {"a": 3}),
        (parted(torch.tensor_split, 2, dim=1), {"a": 2}),
        (parted(torch.hsplit, 2), {"a": 2}),
        (parted(torch.tensor_split, 3, -1), {}),
        (parted(torch.tensor_split, torch.tensor([3]), dim=1), {}),
    ],
)
def test_parts_between_given_boundaries_keep_them(forward, widths):
    assert left(forward) == widths


def scores_and_labels(m, x):
    best = m.b(m.a(x).relu()).max(-1)
    return {"scores": best.values, "labels": best.indices}


def test_classes_stay_where_the_output_says_which_is_the_largest():
    model = disturbed(Net(scores_and_labels, a=nn.Linear(6, 8), b=nn.Linear(8, 5)))
    found, _ = pruned(model, inputs(ROW))
    assert (found.widths(), found.comparable) == ({"a": 4}, True)


def routed(m, x):
    weight, expert = m.gate(x).max(-1)
    made = torch.stack([expert(x) for expert in m.experts], 1)
    return m.b(weight[:, None] * made[torch.arange(len(x)), expert])


def looked_up(m, x):
    return m.b(m.e(m.gate(x).median(-1).indices))


def read_by_python(m, x):
    places = m.gate(x).min(-1).indices.tolist()
    return m.b(torch.stack([m.e.weight[place] for place in places]))


@pytest.mark.parametrize("forward", [routed, looked_up, read_by_python])
def test_what_is_looked_up_by_the_place_of_the_largest_stays(forward):
    layers = {"gate": nn.Linear(6, 8), "e": nn.Embedding(8, 10), "b": nn.Linear(10, 2)}
    layers["experts"] = nn.ModuleList(nn.Linear(6, 10) for _ in range(8))
    found, _ = pruned(disturbed(Net(forward, **layers)), inputs(ROW))
    assert "gate" not in found.widths()
    assert found.comparable
    assert any(n.startswith("gate: 8 channels left whole: m") for n in found.notes)


def test_units_whose_largest_is_taken_go_where_nobody_asks_which_it_is():
    def forward(m, x):
        h = m.a(x)
        return m.b(h * h.max(1, keepdim=True)[0])

    model = disturbed(Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 4)))
    assert pruned(model, inputs(ROW))[0].widths() == {"a": 4}
