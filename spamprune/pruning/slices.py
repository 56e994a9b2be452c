"""Entries of parameters that belong to units, and sums of scores over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass

import einops
import torch
from torch import Tensor

from spamprune.errors import PruningError


@dataclass(frozen=True)
class Slice:
    """Entries of one tensor that go with the units of a group.

    Attributes:
        name: The tensor's name in the model.
        dim: The dimension that is cut.
        index: Positions along ``dim``, shape ``(n,)``.
        unit: For each position, the unit that it belongs to, shape ``(n,)``.
        groups: Groups of a grouped convolution whose *input* is cut channel by channel; positions
            then count over all groups.
    """

    name: str
    dim: int
    index: Tensor
    unit: Tensor
    groups: int = 1


def owner(name: str) -> tuple[str, str]:
    """Return the path of the layer that a tensor belongs to, and what it is called there.

    All that a parametrised layer makes its ``weight`` of is ``weight``.
    """
    path, found, own = f".{name}".partition(".parametrizations.")
    if not found:
        path, _, own = path.rpartition(".")
    return path[1:], own.partition(".")[0]


def sum_over_units(
    pieces: Iterable[Slice], scores: Mapping[str, Tensor], units: int, dtype: torch.dtype
) -> Tensor:
    """Return for each unit the sum of scores over the union of its entries, each counted once.

    Args:
        pieces: The slices of one group.
        scores: A score tensor for each tensor that ``pieces`` names, shaped like it.
        units: How many units there are.
        dtype: In which the sums are taken.

    Returns:
        A tensor of shape ``(units,)``.
    """
    pieces = list(pieces)
    device = scores[pieces[0].name].device
    totals = torch.zeros(units, dtype=dtype, device=device)
    for piece in pieces:
        sums = _sums(scores[piece.name], piece, dtype)
        totals.index_add_(0, piece.unit.to(device), sums)
    # A square weight whose rows and columns are both cut has entries that were counted twice.
    for i, one in enumerate(pieces):
        for other in pieces[i + 1 :]:
            if one.name == other.name and one.dim != other.dim:
                totals -= _crossing(scores[one.name].to(dtype), one, other, units)
    return totals


def _sums(score: Tensor, piece: Slice, dtype: torch.dtype) -> Tensor:
    """Return, for each position of ``piece``, the sum of the scores found there."""
    if piece.groups == 1:
        # torch sums pairwise, so that single precision is enough here, and several times as fast
        own = torch.promote_types(score.dtype, torch.float32)
        # long sums first: torch is slow at many short ones, such as those over a kernel's pixels
        before, after = score.shape[: piece.dim], score.shape[piece.dim + 1 :]
        table = score.reshape(math.prod(before), score.shape[piece.dim], math.prod(after))
        table = table.sum(0, dtype=own) if before else table[0]
        totals = table.sum(1, dtype=own).to(dtype)
    else:
        totals = einops.reduce(score.to(dtype), "(g o) i ... -> (g i)", "sum", g=piece.groups)
    return totals[piece.index.to(score.device)]


def _crossing(score: Tensor, one: Slice, other: Slice, units: int) -> Tensor:
    """Return per unit the scores at the crossing of its rows and columns."""
    if one.groups != 1 or other.groups != 1:
        raise PruningError(f"{one.name}: a grouped convolution is coupled with itself")
    matrix = score.movedim((one.dim, other.dim), (0, 1))
    matrix = matrix.reshape(*matrix.shape[:2], -1).sum(2)

    def membership(piece: Slice, size: int) -> Tensor:
        table = score.new_zeros(units, size)
        table[piece.unit.to(score.device), piece.index.to(score.device)] = 1
        return table

    rows = membership(one, matrix.shape[0])
    columns = membership(other, matrix.shape[1])
    return ((rows @ matrix) * columns).sum(1)


@torch.no_grad()
def zero_units(
    pieces: Iterable[Slice], tensors: MutableMapping[str, Tensor], units: Iterable[int]
) -> None:
    """Set every entry that belongs to one of ``units`` to zero, in place.

    Args:
        pieces: The slices of one group.
        tensors: The tensors to change, by name.
        units: Units to zero.
    """
    chosen = torch.tensor(sorted(units), dtype=torch.long)
    for piece in pieces:
        where = piece.index[torch.isin(piece.unit, chosen)]
        tensor = tensors[piece.name]
        if piece.groups == 1:
            tensor.index_fill_(piece.dim, where.to(tensor.device), 0)
        else:
            inputs = tensor.shape[1]
            outputs = tensor.shape[0] // piece.groups
            for channel in where.tolist():
                g, j = divmod(channel, inputs)
                tensor[g * outputs : (g + 1) * outputs, j] = 0
