"""Axes against tensors whose entries are labels: pruning before the operations or after is one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spamprune.pruning.axes.axis import (
    Axis,
    concat,
    count,
    cut,
    factor,
    fix,
    indices,
    leaves,
    pieces,
    product,
    tie,
)


class Program:
    """Tensors of labels, their axes, and how each was made.

    ``steps`` make each tensor anew from those before it; sizes come from what axes keep.
    """

    def __init__(self, shapes):
        self.axes = [[Axis(n) for n in shape] for shape in shapes]
        start = 0
        self.labels = []
        for shape in shapes:
            n = int(torch.tensor(shape).prod())
            self.labels.append(torch.arange(start, start + n).reshape(shape))
            start += n
        self.bases = len(shapes)
        self.steps = []

    def add(self, axes, step):
        """Append what ``step(tensors, size)`` makes; ``size`` tells what an axis keeps."""
        self.axes.append(axes)
        self.steps.append(step)
        self.labels.append(step(self.labels, lambda axis: axis.size))

    def repeats(self):
        """Tell whether positions of a product have two units of one kind, as in ``x ⊗ x``."""
        return any(repeats_in_product(axis) for axes in self.axes for axis in axes)

    def sizes_alike(self):
        """Return pairs of tensors of the same shape."""
        n = range(len(self.labels))
        return [(a, b) for a in n for b in n if self.labels[a].shape == self.labels[b].shape]


def reshape(i, axes):
    return lambda tensors, size: tensors[i].reshape([size(a) for a in axes])


def split_dimension(program, draw):
    i, d = place(program, draw)
    axis = program.axes[i][d]
    outer = draw(st.sampled_from([n for n in range(1, axis.size + 1) if axis.size % n == 0]))
    parts = factor(axis.root(), [outer, axis.size // outer])
    if parts is None:
        fix(axis, "cannot be split")
    else:
        axes = [*program.axes[i][:d], *parts, *program.axes[i][d + 1 :]]
        program.add(axes, reshape(i, axes))


def merge_dimensions(program, draw):
    i, d = place(program, draw)
    old = program.axes[i]
    if d + 1 < len(old):
        axes = [*old[:d], product(old[d : d + 2]), *old[d + 2 :]]
        if axes[d].size:
            program.add(axes, reshape(i, axes))


def permute(program, draw):
    i, _ = place(program, draw)
    order = draw(st.permutations(range(len(program.axes[i]))))
    axes = [program.axes[i][d] for d in order]
    program.add(axes, lambda tensors, size: tensors[i].permute(order))


def take_part(program, draw):
    i, d = place(program, draw)
    axis = program.axes[i][d]
    first = draw(st.integers(0, axis.size))
    parts = cut(axis.root(), [first, axis.size - first])
    if parts is None:
        fix(axis, "cannot be cut")
        return
    second = draw(st.booleans())
    if not parts[second].size:
        return
    axes = [*program.axes[i][:d], parts[second], *program.axes[i][d + 1 :]]

    def step(tensors, size):
        return tensors[i].split([size(parts[0]), size(parts[1])], d)[second]

    program.add(axes, step)


def join(program, draw):
    i, j = draw(st.sampled_from(program.sizes_alike()))
    d = draw(st.integers(0, len(program.axes[i]) - 1))
    for k, (a, b) in enumerate(zip(program.axes[i], program.axes[j], strict=True)):
        if k != d:
            tie(a, b)
    axes = list(program.axes[i])
    axes[d] = concat([program.axes[i][d], program.axes[j][d]])
    program.add(axes, lambda tensors, size: torch.cat([tensors[i], tensors[j]], d))


def meet(program, draw):
    """Tie two tensors position by position, as a sum does."""
    i, j = draw(st.sampled_from(program.sizes_alike()))
    for a, b in zip(program.axes[i], program.axes[j], strict=True):
        tie(a, b)


def expand(program, draw):
    i, d = place(program, draw)
    j, _ = place(program, draw)
    axis = program.axes[i][d]
    program.add(
        [axis, *program.axes[j]],
        lambda tensors, size: tensors[j].expand(size(axis), *tensors[j].shape),
    )


def place(program, draw):
    i = draw(st.integers(0, len(program.axes) - 1))
    return i, draw(st.integers(0, len(program.axes[i]) - 1))


OPERATIONS = [split_dimension, merge_dimensions, permute, take_part, join, meet, expand]


def repeats_in_product(axis):
    axis = axis.root()
    if axis.form == "product":
        inside = [leaf for part in axis.parts for leaf in dict.fromkeys(leaves(part))]
        if len(inside) != len(set(inside)):
            return True
    return any(repeats_in_product(part) for part in axis.parts)


def kept_positions(axis, gone):
    """Return which positions of an axis have no unit that goes."""
    keep = torch.ones(axis.size, dtype=torch.bool)
    for leaf in dict.fromkeys(leaves(axis)):
        unit = indices(axis, leaf)
        keep &= (unit < 0) | ~torch.isin(unit, torch.tensor(gone.get(leaf, [])))
    return keep


def select(labels, axes, gone):
    for d, axis in enumerate(axes):
        labels = labels.index_select(d, kept_positions(axis, gone).nonzero()[:, 0])
    return labels


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_units_can_be_removed_before_or_after_any_operations(data):
    shape = st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=3)
    program = Program(data.draw(st.lists(shape, min_size=1, max_size=3)))
    for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), max_size=10)):
        if sum(t.numel() for t in program.labels) < 20_000:
            operation(program, data.draw)
        if program.repeats():
            return
    gone = {}
    for leaf in dict.fromkeys(x for axes in program.axes for a in axes for x in leaves(a)):
        if not leaf.fixed and leaf.size > 1:
            gone[leaf] = data.draw(
                st.lists(st.integers(0, leaf.size - 1), unique=True, max_size=leaf.size - 1)
            )
    kept = {leaf: leaf.size - len(units) for leaf, units in gone.items()}
    tensors = [select(t, a, gone) for t, a in zip(program.labels, program.axes, strict=True)]
    made = tensors[: program.bases]
    for step, expected in zip(program.steps, tensors[program.bases :], strict=True):
        made.append(step(made, lambda axis: count(axis, kept)))
        assert torch.equal(made[-1], expected)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_meets_loses_the_same_positions(data):
    """A sum of two tensors needs equal axes afterwards, or both are fixed."""
    program = Program([[12], [12]])
    for operation in data.draw(
        st.lists(st.sampled_from([split_dimension, merge_dimensions, take_part, join]), max_size=6)
    ):
        operation(program, data.draw)
        if program.repeats():
            return
    i, j = data.draw(st.sampled_from(program.sizes_alike()))
    for a, b in zip(program.axes[i], program.axes[j], strict=True):
        tie(a, b)
        if a.root() is b.root():
            continue
        assert all(leaf.fixed for axis in (a, b) for leaf in leaves(axis))


def test_a_split_shows_wherever_the_axis_occurs():
    axis, other = Axis(12), Axis(12)
    tie(axis, other)
    heads, depth = factor(axis.root(), [3, 4])
    assert repr(other) == "(3·4)"
    assert indices(other, heads).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert indices(other, depth).tolist() == [0, 1, 2, 3] * 3
    assert count(other, {heads: 2, depth: 3}) == 6


def test_a_third_of_a_joint_projection_is_one_head_wide():
    """``qkv.reshape(3, heads, depth)`` where q, k and v were concatenated before."""
    heads, depth = Axis(2), Axis(4)
    joint = concat([product([heads, depth])] * 3)
    three, inner = factor(joint, [3, 8])
    assert all(leaf.fixed for leaf in leaves(three))
    assert indices(joint, heads).tolist() == ([0] * 4 + [1] * 4) * 3
    assert repr(inner) == "(2·4)"


def test_pieces_that_are_stacked_share_what_is_inside():
    first, second = Axis(8), Axis(4)
    stacked = concat([first, second])
    outer, inner = factor(stacked, [3, 4])
    assert repr(outer) == "[2|1]"
    for axis, positions in ((first, [0, 1, 2, 3] * 2), (second, [0, 1, 2, 3])):
        assert indices(axis, inner).tolist() == positions


def test_a_product_that_meets_pieces_is_cut_between_rows():
    rows, depth = Axis(4), Axis(3)
    joint = product([rows, depth])
    first, second = Axis(6), Axis(6)
    tie(joint, concat([first, second]))
    assert indices(first, depth).tolist() == indices(second, depth).tolist() == [0, 1, 2] * 2
    assert set(leaves(rows)) < set(leaves(concat([first, second])))
    assert count(joint, {depth.root(): 2}) == count(concat([first, second]), {depth.root(): 2}) == 8


def test_layouts_that_contradict_each_other_are_fixed_and_say_why():
    a, b = Axis(6), Axis(6)
    factor(a, [2, 3])
    factor(b, [3, 2])
    tie(a, b)
    for axis in (a, b):
        assert all("two ways that do not agree" in leaf.fixed for leaf in leaves(axis))


def test_pieces_that_do_not_fill_rows_contradict_a_product():
    a, b = Axis(4), Axis(4)
    factor(a, [2, 2])
    cut(b, [1, 3])
    tie(a, b)
    assert all(leaf.fixed for axis in (a, b) for leaf in leaves(axis))


def test_pieces_that_overlap_are_refined():
    a, b = Axis(6), Axis(6)
    cut(a, [2, 4])
    cut(b, [4, 2])
    tie(a, b)
    assert [p.size for p in pieces(a)] == [p.size for p in pieces(b)] == [2, 2, 2]
    assert len(set(leaves(a))) == 3
    assert set(leaves(a)) == set(leaves(b))


def test_what_is_known_of_a_leaf_is_known_of_its_parts():
    axis = Axis(12, fixed="an input")
    parts = cut(axis, [4, 8])
    assert [leaf.fixed for part in parts for leaf in leaves(part)] == ["an input"] * 2


def test_axes_of_different_sizes_cannot_be_tied():
    with pytest.raises(ValueError, match="axes of 3 and 4 positions"):
        tie(Axis(3), Axis(4))


@pytest.mark.parametrize("parts", [[], [1], [1, 5, 1]])
def test_dimensions_of_one_position_do_not_count(parts):
    assert product([Axis(n) for n in parts]).size == max([1, *parts])
    assert product([Axis(n) for n in parts]).form == "leaf"
