"""Which entries of which parameters belong to a unit of a torch-pruning group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import einops
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.ops import OPTYPE

from spamprune.errors import PruningError

#: Operations without parameters: they only pass indices on.
_PASSIVE = {
    OPTYPE.CONCAT,
    OPTYPE.SPLIT,
    OPTYPE.ELEMENTWISE,
    OPTYPE.RESHAPE,
    OPTYPE.UNBIND,
    OPTYPE.EXPAND,
    OPTYPE.SLICE,
    OPTYPE.OUTPUT,
}
_VECTORS = {OPTYPE.BN, OPTYPE.LN, OPTYPE.GN, OPTYPE.IN, OPTYPE.PRELU, OPTYPE.DEPTHWISE_CONV}


@dataclass(frozen=True)
class Slice:
    """Entries of one parameter that go with the units of a group.

    Attributes:
        name: The parameter's name in the model.
        parameter: The parameter.
        dim: The dimension that is cut.
        index: Positions along ``dim``.
        unit: For each position, the unit that it belongs to.
        groups: Groups of a grouped convolution whose *input* is cut; positions then count over
            all groups.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    index: list[int]
    unit: list[int]
    groups: int = 1


def slices(group: tp.dependency.Group) -> Iterator[Slice]:
    """Yield every slice of parameters that goes with the units of ``group``.

    Raises:
        PruningError: The group reaches a module whose parameters are of no known layout.
    """
    graph = group._DG  # torch-pruning has no public way from a group to its names
    seen: set[tuple[str, int, tuple[int, ...]]] = set()
    for item in group.items:
        node = item.dep.target
        if node.type in _PASSIVE:
            continue
        out = graph.is_out_channel_pruning_fn(item.dep.handler)
        index, unit = list(item.idxs), list(item.root_idxs)
        if any(u is None for u in unit):
            raise PruningError(f"{node.name}: torch-pruning lost track of its coupled units")
        for name, parameter, dim, groups in _layout(graph, node, out):
            key = (name, dim, tuple(index))
            size = parameter.shape[dim] * groups
            if max(index) >= size:
                raise PruningError(
                    f"{name.rpartition('.')[0]}: torch-pruning couples channel {max(index)} of "
                    f"its {size}: it cannot follow the network here; leave this layer out"
                )
            if key not in seen:  # a module reached along two paths counts once
                seen.add(key)
                yield Slice(name, parameter, dim, index, unit, groups)


def _layout(
    graph: tp.DependencyGraph, node: tp.dependency.Node, out: bool
) -> Iterator[tuple[str, nn.Parameter, int, int]]:
    """Yield name, parameter, dimension and groups for each parameter that ``node`` cuts."""
    module = node.module
    if node.type is OPTYPE.PARAMETER:
        yield graph._param_to_name[module], module, node.pruning_dim, 1
        return
    path = graph._module2name[module]
    prefix = f"{path}." if path else ""
    if node.type in (OPTYPE.CONV, OPTYPE.LINEAR):
        transposed = bool(getattr(module, "transposed", False))
        groups = 1 if out else getattr(module, "groups", 1)
        yield prefix + "weight", module.weight, int(out == transposed), groups
        if out and module.bias is not None:
            yield prefix + "bias", module.bias, 0, 1
    elif node.type is OPTYPE.EMBED:
        yield prefix + "weight", module.weight, 1, 1
    elif node.type in _VECTORS:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.numel() > 1:  # a PReLU may share one slope among all units
                yield prefix + name, parameter, 0, 1
    else:
        raise PruningError(
            f"{path or 'the model'}: cannot score a {type(module).__name__}; add it to "
            "ignored_layers"
        )


def _sums(score: Tensor, piece: Slice) -> Tensor:
    """Return, for each position of ``piece``, the sum of the scores found there."""
    if piece.groups == 1:
        totals = score.movedim(piece.dim, 0).reshape(score.shape[piece.dim], -1).sum(1)
    else:
        totals = einops.reduce(score, "(g o) i ... -> (g i)", "sum", g=piece.groups)
    return totals[torch.tensor(piece.index, device=score.device)]


def sum_over_units(pieces: list[Slice], scores: dict[str, Tensor], units: list[int]) -> Tensor:
    """Return for each unit the sum of scores over the union of its entries, each counted once.

    Args:
        pieces: The slices of one group.
        scores: A score tensor for each parameter that ``pieces`` names, shaped like it.
        units: The units to report, in this order.

    Returns:
        A tensor of shape ``(len(units),)``.
    """
    first = next(iter(scores.values()))
    position = {unit: i for i, unit in enumerate(units)}
    totals = torch.zeros(len(units), dtype=first.dtype, device=first.device)
    for piece in pieces:
        where = torch.tensor([position[u] for u in piece.unit], device=first.device)
        totals.index_add_(0, where, _sums(scores[piece.name], piece))
    # A square weight whose rows and columns are both cut has entries that were counted twice.
    for i, one in enumerate(pieces):
        for other in pieces[i + 1 :]:
            if one.name == other.name and one.dim != other.dim:
                totals -= _shared(scores[one.name], one, other, position)
    return totals


def _shared(score: Tensor, one: Slice, other: Slice, position: dict[int, int]) -> Tensor:
    """Return per unit the scores at the crossing of its rows and columns."""
    if one.groups != 1 or other.groups != 1:
        raise PruningError(f"{one.name}: a grouped convolution is coupled with itself")
    matrix = score.movedim((one.dim, other.dim), (0, 1))
    matrix = matrix.reshape(*matrix.shape[:2], -1).sum(2)

    def membership(piece: Slice, size: int) -> Tensor:
        table = score.new_zeros(len(position), size)
        rows = torch.tensor([position[u] for u in piece.unit], device=score.device)
        table[rows, torch.tensor(piece.index, device=score.device)] = 1
        return table

    rows = membership(one, matrix.shape[0])
    columns = membership(other, matrix.shape[1])
    return ((rows @ matrix) * columns).sum(1)


@torch.no_grad()
def zero_units(pieces: list[Slice], tensors: dict[str, Tensor], units: set[int]) -> None:
    """Set every entry that belongs to one of ``units`` to zero, in place.

    Args:
        pieces: The slices of one group.
        tensors: The tensors to change, by parameter name.
        units: Units to zero.
    """
    for piece in pieces:
        chosen = [i for i, u in zip(piece.index, piece.unit, strict=True) if u in units]
        if not chosen:
            continue
        tensor = tensors[piece.name]
        where = torch.tensor(chosen, device=tensor.device)
        if piece.groups == 1:
            tensor.index_fill_(piece.dim, where, 0)
        else:
            inputs = tensor.shape[1]
            outputs = tensor.shape[0] // piece.groups
            for channel in chosen:
                g, j = divmod(channel, inputs)
                tensor[g * outputs : (g + 1) * outputs, j] = 0
