"""Axes: the positions along a dimension, and what they have in common with those of others.

A dimension of a tensor is a *leaf* (units of one kind), a row-major *product* of axes (heads ×
dimensions of a head) or a *concatenation* of axes (what ``torch.cat`` joined). Operations tie axes
to each other and lay them open: splitting 192 channels into 3 heads turns a leaf into a product
wherever that leaf occurs. What are leaves in the end are the kinds of units that can be removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Form = Literal["leaf", "product", "concat"]


class Axis:
    """The positions along a dimension.

    Tied axes become one: work with :meth:`root`.

    Attributes:
        size: How many positions.
        form: What it is made of.
        parts: The factors of a product, the pieces of a concatenation.
        fixed: Of a leaf, why its positions cannot be removed; empty if they can.
        joint: Of a leaf, which operation mixes its positions, so that a unit's zeros count.
        roles: Of a leaf, what attention and residual connections use it for.
    """

    __slots__ = ("_tied", "fixed", "form", "joint", "parts", "roles", "size")

    def __init__(self, size: int, *, fixed: str = ""):
        self.size = size
        self.form: Form = "leaf"
        self.parts: list[Axis] = []
        self.fixed = fixed
        self.joint = ""
        self.roles: set[str] = set()
        self._tied: Axis | None = None

    def root(self) -> Axis:
        """Return the axis that stands for all that this one is tied to."""
        axis = self
        while axis._tied is not None:
            axis = axis._tied
        while self._tied is not None:  # shorten the way for the next time
            self._tied, self = axis, self._tied
        return axis

    def __repr__(self) -> str:
        """Show the structure, such as ``(3·64)`` or ``[32|32]``."""
        axis = self.root()
        if axis.form == "leaf":
            return f"{axis.size}{'!' if axis.fixed else ''}"
        sign, ends = ("·", "()") if axis.form == "product" else ("|", "[]")
        return ends[0] + sign.join(map(repr, axis.parts)) + ends[1]

    def _become(self, form: Form, parts: list[Axis]) -> None:
        """Give a leaf structure; the parts of a leaf inherit what is known of it."""
        self.form, self.parts = form, parts
        for part in parts:
            _inform(part, self)


def product(parts: Iterable[Axis]) -> Axis:
    """Return the row-major product of axes, the slowest first."""
    return _composed("product", [p for part in parts for p in factors(part) if p.size != 1], 1)


def concat(parts: Iterable[Axis]) -> Axis:
    """Return the concatenation of axes."""
    return _composed("concat", [p for part in parts for p in pieces(part) if p.size != 0], 0)


def _composed(form: Form, parts: list[Axis], empty: int) -> Axis:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Axis(empty)
    sizes = [p.size for p in parts]
    axis = Axis(math.prod(sizes) if form == "product" else sum(sizes))
    axis.form, axis.parts = form, parts
    return axis


def factors(axis: Axis) -> list[Axis]:
    """Return the factors of a product; any other axis is its own."""
    axis = axis.root()
    if axis.form != "product":
        return [axis]
    return [f for part in axis.parts for f in factors(part)]


def pieces(axis: Axis) -> list[Axis]:
    """Return the pieces of a concatenation; any other axis is its own."""
    axis = axis.root()
    if axis.form != "concat":
        return [axis]
    return [p for part in axis.parts for p in pieces(part)]


def leaves(axis: Axis) -> Iterator[Axis]:
    """Yield every leaf that an axis is made of, repeated ones as often as they occur."""
    axis = axis.root()
    if axis.form == "leaf":
        yield axis
    for part in axis.parts:
        yield from leaves(part)


def fix(axis: Axis, why: str) -> None:
    """Forbid the removal of any position."""
    for leaf in leaves(axis):
        leaf.fixed = leaf.fixed or why


def mix(axis: Axis, how: str) -> None:
    """Note that an operation mixes the positions, so that masked ones are not without effect."""
    for leaf in leaves(axis):
        leaf.joint = leaf.joint or how


def mark(axis: Axis, role: str) -> None:
    """Note what an axis is used for."""
    for leaf in leaves(axis):
        leaf.roles.add(role)


def _inform(axis: Axis, source: Axis) -> None:
    """Hand on to ``axis`` what is known of a leaf."""
    for leaf in leaves(axis):
        leaf.fixed = leaf.fixed or source.fixed
        leaf.joint = leaf.joint or source.joint
        leaf.roles |= source.roles


def tie(first: Axis, second: Axis) -> None:
    """Make two axes one: position i of the one goes exactly when position i of the other goes.

    Where their structures contradict each other, both are fixed.
    """
    a, b = first.root(), second.root()
    if a is b:
        return
    if a.size != b.size:
        raise ValueError(f"axes of {a.size} and {b.size} positions cannot be tied")
    if a.form != "leaf" and b.form == "leaf":
        a, b = b, a
    if a.form == "leaf":
        _inform(b, a)
    elif not _match(a, b):
        why = f"laid out in two ways that do not agree, {a!r} and {b!r}"
        fix(a, why)
        fix(b, why)
        return
    if a.root() is not b.root():
        a._tied = b


def _match(a: Axis, b: Axis) -> bool:
    """Tie the parts of two structured axes, refining both; tell whether that can be done."""
    if a.form == b.form == "product":
        return _match_products(factors(a), factors(b))
    if a.form == b.form == "concat":
        return _match_concats(pieces(a), pieces(b))
    if a.form == "concat":
        a, b = b, a
    outer, *rest = factors(a)
    inner = product(rest)
    runs: list[list[Axis]] = [[]]
    for piece in pieces(b):  # runs of pieces that fill whole rows of the product
        if runs[-1] and sum(p.size for p in runs[-1]) % inner.size == 0:
            runs.append([])
        runs[-1].append(piece)
    lengths = [sum(p.size for p in run) for run in runs]
    if len(runs) == 1 or lengths[-1] % inner.size:
        return False
    rows = cut(outer, [length // inner.size for length in lengths])
    if rows is None:
        return False
    for row, run in zip(rows, runs, strict=True):
        tie(product([row, inner]), concat(run))
    return True


def _match_products(a: list[Axis], b: list[Axis]) -> bool:
    while a and b:
        if a[0].size < b[0].size:
            a, b = b, a
        if a[0].size > b[0].size:
            if a[0].size % b[0].size:
                return False
            split = factor(a[0], [b[0].size, a[0].size // b[0].size])
            if split is None:
                return False
            a = [f for part in split for f in factors(part)] + a[1:]
            b = [f for part in b for f in factors(part)]
            if a[0].size != b[0].size:
                continue
        tie(a[0], b[0])
        a, b = a[1:], b[1:]
    return True


def _match_concats(a: list[Axis], b: list[Axis]) -> bool:
    while a and b:
        if a[0].size < b[0].size:
            a, b = b, a
        if a[0].size > b[0].size:
            split = cut(a[0], [b[0].size, a[0].size - b[0].size])
            if split is None:
                return False
            a = [*split, *a[1:]]
        tie(a[0], b[0])
        a, b = a[1:], b[1:]
    return True


def factor(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Lay an axis open as a row-major product of axes of these sizes, None if that cannot be."""
    found = []
    rest = axis
    for size in sizes[:-1]:
        pair = _factor_once(rest.root(), size)
        if pair is None:
            return None
        found.append(pair[0])
        rest = pair[1]
    return [*found, rest]


def _factor_once(axis: Axis, outer: int) -> tuple[Axis, Axis] | None:
    if outer == 1:
        return Axis(1), axis
    if outer == axis.size:
        return axis, Axis(1)
    if axis.size % outer:
        return None
    if axis.form == "leaf":
        pair = (Axis(outer), Axis(axis.size // outer))
        axis._become("product", list(pair))
        return pair
    if axis.form == "product":
        return _factor_product(factors(axis), outer)
    return _factor_concat(axis, axis.size // outer)


def _factor_product(parts: list[Axis], outer: int) -> tuple[Axis, Axis] | None:
    taken: list[Axis] = []
    for i, part in enumerate(parts):
        if outer == 1:
            return product(taken), product(parts[i:])
        if outer % part.size == 0:
            taken.append(part)
            outer //= part.size
            continue
        pair = _factor_once(part, outer)
        if pair is None:
            return None
        return product([*taken, pair[0]]), product([pair[1], *parts[i + 1 :]])
    return product(taken), Axis(1)


def _factor_concat(axis: Axis, inner: int) -> tuple[Axis, Axis] | None:
    """Turn ``[ab|ac]`` into ``[b|c]·a``: the pieces share their inner factor."""
    outers: list[Axis] = []
    common: Axis | None = None
    for piece in pieces(axis):
        if piece.size % inner:
            return None
        pair = _factor_once(piece, piece.size // inner)
        if pair is None:
            return None
        outers.append(pair[0])
        if common is None:
            common = pair[1]
        else:
            tie(common, pair[1])
    assert common is not None
    # unit pieces keep their identity: they are different things, such as query, key and value
    axis.form, axis.parts = "product", [_joined(outers), common]
    return axis.parts[0], common


def _joined(parts: list[Axis]) -> Axis:
    axis = concat(parts)
    if all(part.size == 1 for part in parts):
        fix(axis, "its positions have different meanings")
    return axis


def cut(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Lay an axis open as a concatenation of axes of these sizes, None if that cannot be."""
    found = []
    rest = axis
    for size in sizes[:-1]:
        pair = _cut_once(rest.root(), size)
        if pair is None:
            return None
        found.append(pair[0])
        rest = pair[1]
    return [*found, rest]


def _cut_once(axis: Axis, first: int) -> tuple[Axis, Axis] | None:
    if first == 0:
        return Axis(0), axis
    if first == axis.size:
        return axis, Axis(0)
    if axis.form == "leaf":
        pair = (Axis(first), Axis(axis.size - first))
        axis._become("concat", list(pair))
        return pair
    if axis.form == "product":
        outer, *rest = factors(axis)
        inner = product(rest)
        if first % inner.size:
            return None
        rows = _cut_once(outer, first // inner.size)
        return rows and (product([rows[0], inner]), product([rows[1], inner]))
    taken: list[Axis] = []
    parts = pieces(axis)
    for i, part in enumerate(parts):
        if first < part.size:
            split = _cut_once(part, first)
            if split is None:
                return None
            return concat([*taken, split[0]]), concat([split[1], *parts[i + 1 :]])
        taken.append(part)
        first -= part.size
        if first == 0:
            return concat(taken), concat(parts[i + 1 :])
    raise AssertionError("a cut beyond the axis")


def indices(axis: Axis, part: Axis) -> Tensor:
    """Return, for each position of ``axis``, its position in ``part``; -1 where it has none.

    ``part`` is any axis that ``axis`` is made of, on whatever level. Shape ``(axis.size,)``.
    """
    axis, part = axis.root(), part.root()
    if axis is part:
        return torch.arange(axis.size)
    if axis.form == "concat":
        return torch.cat([indices(p, part) for p in axis.parts])
    result = torch.full((axis.size,), -1)
    if axis.form == "product":
        before, after = 1, axis.size
        for p in axis.parts:
            after //= p.size
            inside = indices(p, part).repeat_interleave(after).repeat(before)
            result = torch.where(result < 0, inside, result)
            before *= p.size
    return result


def count(axis: Axis, kept: Mapping[Axis, int]) -> int:
    """Return how many positions remain where each leaf keeps ``kept`` of its own (default all)."""
    axis = axis.root()
    if axis.form == "leaf":
        return kept.get(axis, axis.size)
    counts = [count(p, kept) for p in axis.parts]
    return math.prod(counts) if axis.form == "product" else sum(counts)
