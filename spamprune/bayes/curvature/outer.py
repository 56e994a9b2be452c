"""Sums of outer products over samples and positions, the makings of Kronecker factors.

A convolution's inputs have ``A[i, j] = Σ_p x[p + i] x[p + j]ᵀ``, p over output pixels, i and j over
the kernel. Unfolded images (:class:`Columns`) hold each pixel once for each element of the kernel,
and multiply the same pixels again and again. Two other ways lead to that very matrix, and
:func:`inputs_of` takes the cheapest: :class:`Slid` multiplies each pixel of a small image with each
other once, and sums at the end what A wants; :class:`Offsets` uses that A depends on i and j only
through ``j − i``, as an autocorrelation does, but for the borders, which it sums apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from spamprune.bayes.curvature.rules import Convolution, Linear, pad
from spamprune.bayes.curvature.squares import COLUMNS, at_least_single, slices

#: Features up to which a symmetric product is computed whole; torch has no routine for a half.
_BLOCK = 96
#: Features at which a product takes twice its arithmetic's time, as narrow matrices do.
_NARROW = 32
#: Bytes that products of all pixels may take.
_PIXELS = 2**24

T = TypeVar("T")


class Inputs(Protocol):
    """A sum of outer products of a layer's inputs."""

    def add(self, data: Tensor) -> None:
        """Add a batch, split: (samples, folded, *rest)."""
        ...

    def total(self) -> Tensor:
        """Return the sum, shape (groups, in, in), once nothing more is to come."""
        ...


def inputs_of(rule: Linear | Convolution, data: Tensor) -> Inputs:
    """Return an empty sum for inputs of this size, by the way that takes the least time."""
    if isinstance(rule, Linear) or rule.copies == 1:
        return Columns(rule, 1)
    channels = data.shape[2] // rule.groups
    axes = [_Axis.of(rule, axis, n) for axis, n in enumerate(data.shape[3:])]
    ways: list[tuple[float, Inputs]] = []
    for slid in product((True, False), repeat=len(axes)):
        way = Slid(rule, axes, slid)
        width = channels * way.unfolded.copies
        if not any(slid) or rule.groups * width**2 * 4 < _PIXELS:
            upper = min(1, (1 + _BLOCK / width) / 2)
            ways.append((way.positions * width * (width + _NARROW) * upper, way))
    if channels >= _NARROW and rule.groups == 1 and set(rule.stride) == {1}:
        offsets = Offsets(rule, axes)
        ways.append((offsets.products * channels * (channels + _NARROW), offsets))
    return min(ways, key=lambda way: way[0])[1]


def add_products(total: Tensor | None, columns: Tensor) -> Tensor:
    """Add ``columns columnsᵀ`` in place, of large matrices only blocks at and above the diagonal.

    Args:
        total: Shape (groups, features, features); None is zero. :func:`mirror` fills in the rest.
        columns: Shape (groups, features, positions).
    """
    groups, features, _ = columns.shape
    if total is None:
        total = columns.new_zeros(groups, features, features)
    if features <= _BLOCK:
        return total.baddbmm_(columns, columns.mT)
    first, last = _halves(features)
    total[:, first, last].baddbmm_(columns[:, first], columns[:, last].mT)
    for half in (first, last):
        add_products(total[:, half, half], columns[:, half])
    return total


def mirror(total: Tensor) -> Tensor:
    """Fill in, in place, what :func:`add_products` leaves out below the diagonal."""
    if total.shape[-1] > _BLOCK:
        first, last = _halves(total.shape[-1])
        total[:, last, first] = total[:, first, last].mT
        for half in (first, last):
            mirror(total[:, half, half])
    return total


def _halves(features: int) -> tuple[slice, slice]:
    return slice(0, features // 2), slice(features // 2, features)


def whole(rule: Linear | Convolution, found: Tensor) -> Tensor:
    """Give the inputs that only ever meet padding, which a sum leaves out, their zeros."""
    if isinstance(rule, Linear) or not any(map(any, rule.margins)):
        return found
    pairs = list(zip(rule.kernel, rule.margins, strict=True))
    kernel = [before + size + after for size, (before, after) in pairs]
    met: list[Any] = [slice(before, before + size) for size, (before, _) in pairs]
    blocks = found.unflatten(2, (-1, *rule.kernel)).unflatten(1, (-1, *rule.kernel))
    channels = blocks.shape[1]
    result = found.new_zeros(len(found), channels, *kernel, channels, *kernel)
    result[(..., *met, slice(None), *met)] = blocks
    return result.flatten(2 + len(kernel)).flatten(1, 1 + len(kernel))


def pieces(data: Tensor, copies: int) -> Iterator[Tensor]:
    """Cut a batch so that so many copies of a piece fit the budget of unfolded inputs."""
    width = copies * data[0].numel() * max(data.itemsize, 4)
    for part in slices(len(data), width, COLUMNS):
        yield at_least_single(data[part])


class Columns:
    """All inputs of a position side by side in a column: unfolded images, or tokens.

    Args:
        rule: Makes the columns.
        copies: How many times they hold each number of the data.
    """

    def __init__(self, rule: Linear | Convolution, copies: int):
        self._rule, self._copies = rule, copies
        self._sum: Tensor | None = None

    def add(self, data: Tensor) -> None:
        """Add a batch."""
        for piece in pieces(data, self._copies):
            self._sum = add_products(self._sum, self._rule.columns(piece))

    def total(self) -> Tensor:
        """Return the sum."""
        assert self._sum is not None, "nothing was added"
        return mirror(self._sum)


class Slid:
    """Columns of whole images along some axes, along which the kernel slides at the end.

    Args:
        rule: The convolution.
        axes: What its kernel meets along each axis of the images.
        slid: Along which of them columns hold all pixels; the images are unfolded along the others.

    Attributes:
        slid: As given.
        unfolded: The convolution that makes the columns, its kernel whole axes where it slides.
    """

    def __init__(self, rule: Convolution, axes: Sequence[_Axis], slid: Sequence[bool]):
        self._rule, self._axes, self.slid = rule, axes, slid
        one = (1,) * len(axes)
        self.unfolded = replace(
            rule,
            kernel=_choice(slid, [axis.size for axis in axes], rule.kernel),
            stride=_choice(slid, one, rule.stride),
            dilation=_choice(slid, one, rule.dilation),
            padding=_choice(slid, [_cut(pair) for pair in rule.padding], rule.padding),
        )
        copies = math.prod(_choice(slid, one, rule.kernel))
        self._columns = Columns(self.unfolded, copies)

    @property
    def positions(self) -> int:
        """Return how many columns an image makes."""
        pairs = zip(self._axes, self.slid, strict=True)
        return math.prod(axis.positions for axis, slid in pairs if not slid)

    def add(self, data: Tensor) -> None:
        """Add a batch."""
        self._columns.add(data)

    def total(self) -> Tensor:
        """Return the sum."""
        size, dims = self.unfolded.kernel, len(self._axes)
        found = self._columns.total().unflatten(2, (-1, *size)).unflatten(1, (-1, *size))
        for axis in range(dims):
            if self.slid[axis]:
                found = self._slide(found, axis)
        return found.flatten(2 + dims).flatten(1, 1 + dims)

    def _slide(self, products: Tensor, axis: int) -> Tensor:
        """Sum what the kernel meets at each of its positions along one axis of both pixels."""
        rule, places = self._rule, (2 + axis, 3 + len(self._axes) + axis)
        step = rule.dilation[axis]
        span = step * (rule.kernel[axis] - 1) + 1
        padding = [(0, 0)] * products.dim()
        for place in places:
            padding[place] = _padded(rule.padding[axis])
        windows = pad(products, tuple(padding))
        for place in places:
            windows = windows.unfold(place, span, rule.stride[axis])
        met = windows[..., ::step, ::step].diagonal(0, *places).sum(-1)
        return met.movedim((-2, -1), places)


class _Run(NamedTuple):
    """Along one axis, the pixels in ``range(start, stop)``, each with the one ``shift`` further."""

    shift: int
    start: int
    stop: int


class _Axis(NamedTuple):
    """What a kernel meets along one axis of an image.

    Attributes:
        size: Of the part of the image that the kernel meets.
        positions: Of the output.
        met: For each pair of the kernel's elements, which pixels they meet at a time with stride 1.
        parts: For each shift, the disjoint runs that those of ``met`` are made of.
    """

    size: int
    positions: int
    met: dict[tuple[int, int], _Run]
    parts: dict[int, list[_Run]]

    @classmethod
    def of(cls, rule: Convolution, axis: int, size: int) -> _Axis:
        size += sum(_cut(rule.padding[axis]))
        kernel, step = rule.kernel[axis], rule.dilation[axis]
        before, after = _padded(rule.padding[axis])
        moves = size + before + after - step * (kernel - 1)
        met: dict[tuple[int, int], _Run] = {}
        ends: dict[int, set[int]] = {}
        for i, j in product(range(kernel), repeat=2):
            first, shift = i * step - before, (j - i) * step
            start = max(first, 0, -shift)
            stop = min(first + moves, size, size - shift)
            met[i, j] = _Run(shift, start, max(start, stop))
            if start < stop:
                ends.setdefault(shift, set()).update((start, stop))
        parts = {s: [_Run(s, *run) for run in pairwise(sorted(cuts))] for s, cuts in ends.items()}
        return cls(size, (moves - 1) // rule.stride[axis] + 1, met, parts)


class Offsets:
    """Products of pixels at each offset from each other, for a convolution of stride 1.

    ``A[i, j]`` is the sum of ``x[u] x[u + j − i]ᵀ`` over the pixels u that element i of the kernel
    meets while j meets the image too. On each axis these make a few different runs for an offset,
    which are cut into parts that do not overlap, so that no product is formed twice.

    Args:
        rule: The convolution, with one group.
        axes: What its kernel meets along each axis of the images.
    """

    def __init__(self, rule: Convolution, axes: Sequence[_Axis]):
        self._rule, self._axes = rule, axes
        none = (0,) * len(axes)
        runs = product(*([run for parts in axis.parts.values() for run in parts] for axis in axes))
        # of the others this one is the transpose
        self._runs = [run for run in runs if tuple(part.shift for part in run) >= none]
        self._sums: dict[tuple[_Run, ...], Tensor] = {}

    @property
    def products(self) -> int:
        """Return how many pairs of an image's pixels are multiplied."""
        return sum(math.prod(part.stop - part.start for part in run) for run in self._runs)

    def add(self, data: Tensor) -> None:
        """Add a batch."""
        for piece in pieces(data, 1):
            # samples next to columns of the image: both are summed over, without another copy
            images = pad(piece.flatten(0, 1), tuple(map(_cut, self._rule.padding)))
            images = images.movedim((0, 1), (-2, -1)).contiguous()
            for run in self._runs:
                there = images[tuple(slice(p.start, p.stop) for p in run)]
                other = images[tuple(slice(p.start + p.shift, p.stop + p.shift) for p in run)]
                shape = (-1, there.shape[-3] * there.shape[-2], there.shape[-1])
                found = (there.reshape(shape).mT @ other.reshape(shape)).sum(0)
                self._sums[run] = self._sums[run].add_(found) if run in self._sums else found

    def total(self) -> Tensor:
        """Return the sum."""
        some, kernel = next(iter(self._sums.values())), self._rule.kernel
        elements = list(product(*map(range, kernel)))
        result = some.new_zeros(len(some), len(elements), len(some), len(elements))
        for (row, i), (column, j) in product(enumerate(elements), repeat=2):
            pairs = zip(i, j, strict=True)
            met = [axis.met[pair] for axis, pair in zip(self._axes, pairs, strict=True)]
            for run in product(*map(self._parts, self._axes, met)):
                if run in self._sums:
                    result[:, row, :, column] += self._sums[run]
                    if row != column:
                        result[:, column, :, row] += self._sums[run].mT
        return result.flatten(2).flatten(0, 1)[None]

    @staticmethod
    def _parts(axis: _Axis, met: _Run) -> list[_Run]:
        """Return the parts that a run is made of."""
        parts = axis.parts.get(met.shift, [])
        return [part for part in parts if met.start <= part.start and part.stop <= met.stop]


def _cut(padding: tuple[int, int]) -> tuple[int, int]:
    """Return what negative padding cuts off."""
    return min(padding[0], 0), min(padding[1], 0)


def _padded(padding: tuple[int, int]) -> tuple[int, int]:
    """Return the zeros that positive padding puts before and after."""
    return max(padding[0], 0), max(padding[1], 0)


def _choice(chosen: Sequence[bool], yes: Sequence[T], no: Sequence[T]) -> tuple[T, ...]:
    """Return for each axis the one or the other."""
    return tuple(y if c else n for c, y, n in zip(chosen, yes, no, strict=True))
