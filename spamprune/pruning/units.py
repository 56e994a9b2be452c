"""The units that can be removed from a network, and what goes with each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from spamprune.errors import PosteriorError, PruningError, nearest
from spamprune.pruning.axes.axis import Axis, factors, indices, leaves
from spamprune.pruning.axes.call import SPACE
from spamprune.pruning.axes.trace import Trace
from spamprune.pruning.block import BlockOPD
from spamprune.pruning.slices import Slice, owner, sum_over_units

#: What units are scored by: a score for every trainable parameter by name, or block OPD.
Scores = Mapping[str, Tensor] | BlockOPD

#: What units are: whole attention heads, dimensions of a head, whole groups of grouped
#: convolutions, channels of a group, channels that a residual stream carries, and all others.
Kind = Literal["heads", "head_dims", "groups", "group_dims", "width", "hidden"]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: Pruning heads and the dimensions within them by the same ratio would cut attention twice.
DEFAULT_KINDS: tuple[Kind, ...] = ("heads", "groups", "width", "hidden")


@dataclass(frozen=True)
class Group:
    """Units of one kind, and everything that goes with them.

    Attributes:
        layer: The layer whose outputs the units are, with a suffix where it has several kinds.
        kind: What the units are.
        axis: Their axis in the trace.
        pieces: The entries of parameters and buffers that go with them.
        joint: Which operation mixes the units, so that compaction and mask differ; often empty.
        positions: How many channels a unit is made of.
        shape: Equal for groups that hold the same kinds of layers.
    """

    layer: str
    kind: Kind
    axis: Axis
    pieces: tuple[Slice, ...]
    joint: str
    positions: int
    shape: tuple[object, ...]

    @property
    def units(self) -> int:
        """How many units there are."""
        return self.axis.size


def groups(
    model: nn.Module, trace: Trace, *, kinds: Sequence[Kind] = KINDS, ignored: Iterable[str] = ()
) -> tuple[list[Group], list[str]]:
    """Return the prunable groups in the model's order, and notes on layers that are left whole.

    Args:
        model: The traced model.
        trace: Its trace.
        kinds: Which kinds of units to return.
        ignored: Names of layers whose outputs stay, or patterns such as ``"stem.*"``.

    Raises:
        PruningError: A name to ignore is not a layer's.
    """
    pieces = _pieces(trace)
    kept = _matching(model, ignored)
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    found: list[Group] = []
    notes: list[str] = []
    names: set[str] = set()
    primary = _primary(trace)
    for axis, slices in pieces.items():
        if axis.size < 2 or not any(s.name in parameters for s in slices):
            continue
        if len(slices) == 1 and not slices[0].name.endswith(("weight", "bias")):
            continue  # tokens or queries that are learned: no layer's units
        producer = _producer(slices, parameters, modules)
        layer = owner(producer.name)[0] or producer.name
        kind = _kind(axis, primary.get(axis))
        if axis.fixed:
            if (
                kind in kinds
                and _is_made(producer, modules)
                and _is_output(modules.get(layer), axis)
            ):
                notes.append(f"{layer}: {axis.size} {_WORDS[kind]} left whole: {axis.fixed}")
            continue
        if kind not in kinds or any(
            owner(s.name)[0] in kept and _is_made(s, modules) for s in slices
        ):
            continue
        name = _unique(layer if kind in ("hidden", "width") else f"{layer}:{kind}", names)
        shape = (kind, *sorted(_sort(modules, s, parameters) for s in slices))
        found.append(
            Group(name, kind, axis, tuple(slices), axis.joint, _positions(axis, slices), shape)
        )
    return found, notes + _idle(model, trace.unread)


#: Modules whose outputs a user would expect to be prunable.
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase)

_WORDS: dict[Kind, str] = {
    "heads": "heads",
    "head_dims": "dimensions of heads",
    "groups": "groups",
    "group_dims": "channels of groups",
    "width": "channels",
    "hidden": "channels",
}


def _idle(model: nn.Module, unread: Set[str]) -> list[str]:
    """Return notes on modules no parameter of which was read, each with all that it holds."""
    read = (name for name, _ in model.named_parameters() if name not in unread)
    busy = {path for name in read for path in _above(name)}
    idle = (path for name, _ in model.named_parameters() for path in _above(name))
    outermost = {path: None for path in idle if path not in busy and busy.issuperset(_above(path))}
    return [
        f"{path}: did not run in evaluation mode, and still expects all of its inputs: drop it, or "
        "ignore the layers that feed it"
        for path in outermost
    ]


def _above(name: str) -> list[str]:
    """Return the paths of the modules that hold a tensor or module, the model itself left out."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _pieces(trace: Trace) -> dict[Axis, list[Slice]]:
    """Return the slices of every leaf axis, in the order of the tensors."""
    found: dict[Axis, list[Slice]] = {}
    for name, axes in trace.tensors.items():
        for dim, axis in enumerate(axes):
            for leaf in dict.fromkeys(leaves(axis)):
                if leaf.size < 2:
                    continue
                unit = indices(axis, leaf)
                index = (unit >= 0).nonzero()[:, 0]
                found.setdefault(leaf, []).append(Slice(name, dim, index, unit[index]))
    return found


def _is_made(piece: Slice, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a piece belongs to the outputs of its layer."""
    layer, own = owner(piece.name)
    transposed = isinstance(
        modules.get(layer), (nn.modules.conv._ConvTransposeNd, nn.Embedding, nn.EmbeddingBag)
    )
    return piece.dim == int(transposed and own.endswith("weight"))


def _producer(
    slices: Sequence[Slice], parameters: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> Slice:
    """Return the slice that best says whose outputs the units are."""
    weights = [s for s in slices if s.name in parameters and _is_matrix(parameters[s.name])]
    made = [s for s in weights if _is_made(s, modules)]
    vectors = [s for s in slices if s.name in parameters]
    # a weight that is computed from others may not go with them: then the layer's bias does
    biases = [s for s in vectors if isinstance(modules.get(owner(s.name)[0]), _LAYERS)]
    biases = [s for s in biases if _is_made(s, modules)]
    return (made or biases or weights or vectors)[0]


def _is_matrix(parameter: Tensor) -> bool:
    """Tell a weight from a vector, which may be stored as ``(C, 1, 1)``."""
    return sum(n > 1 for n in parameter.shape) > 1


def _is_output(module: nn.Module | None, axis: Axis) -> bool:
    """Tell whether a user would expect the units of a layer to be prunable."""
    inherent = axis.fixed in ("the model's output", "the model's input", SPACE)
    return isinstance(module, _LAYERS) and not inherent


def _primary(trace: Trace) -> dict[Axis, Axis]:
    """Return, for each leaf inside a product, the leaf beside it that is pruned in its stead.

    Where a dimension is heads × depth or groups × channels, removing a fraction of both would
    remove it twice. First come heads and groups, then the factor with the most positions.
    """
    found: dict[Axis, Axis] = {}
    for axes in trace.tensors.values():
        for axis in axes:
            parts = factors(axis)
            free = [p for p in parts if any(not leaf.fixed for leaf in leaves(p))]
            if len(parts) < 2 or not free:
                continue
            first = max(free, key=_priority)
            for part in parts:
                if part is not first:
                    found |= dict.fromkeys(leaves(part), next(leaves(first)))
    return found


def _priority(axis: Axis) -> tuple[bool, bool, int]:
    roles = {role for leaf in leaves(axis) for role in leaf.roles}
    return "heads" in roles, "groups" in roles, axis.size


def _kind(axis: Axis, primary: Axis | None) -> Kind:
    if "heads" in axis.roles:
        return "heads"
    if primary is not None:
        return "head_dims" if "heads" in primary.roles else "group_dims"
    if "groups" in axis.roles:
        return "groups"
    return "width" if "residual" in axis.roles else "hidden"


def _unique(name: str, names: set[str]) -> str:
    count = 1
    result = name
    while result in names:
        count += 1
        result = f"{name}#{count}"
    names.add(result)
    return result


def _sort(
    modules: Mapping[str, nn.Module], piece: Slice, parameters: Mapping[str, Tensor]
) -> tuple[str, str, int]:
    """Return the class of a piece's layer, its own name there and the dimension."""
    path, own = owner(piece.name)
    return type(modules.get(path)).__name__, own, piece.dim


def _positions(axis: Axis, slices: Sequence[Slice]) -> int:
    """Return the greatest number of positions that goes with a unit in every tensor."""
    return math.gcd(*(len(s.index) // axis.size for s in slices))


def _matching(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    names = [name for name, _ in model.named_modules()]
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise PruningError(
                f"no layer {pattern!r} to ignore: {nearest(pattern, filter(None, names))}"
            )
        inside = tuple(f"{m}." for m in matches)
        found |= matches | {name for name in names if name.startswith(inside)}
    return found


@torch.no_grad()
def importance(trainable: Mapping[str, Tensor], group: Group, scores: Scores) -> Tensor | None:
    """Return the importance of each unit: the sum of the scores of all that goes with it.

    Args:
        trainable: The network's trainable parameters by name.
        group: One of its groups.
        scores: A score for every trainable parameter, by name, or block OPD.

    Returns:
        Shape ``(units,)``, None where nothing of the group is trainable.

    Raises:
        PosteriorError: A parameter has no score, or one of another shape.
        PruningError: A score is not a number.
    """
    pieces = [piece for piece in group.pieces if piece.name in trainable]
    if not pieces:
        return None
    if isinstance(scores, BlockOPD):
        total = scores.over(pieces, group.units, torch.float64).cpu()
    else:
        for name in {piece.name for piece in pieces}:
            _check_score(name, scores, trainable[name])
        total = sum_over_units(pieces, scores, group.units, torch.float64).cpu()
    if total.isnan().any():
        raise PruningError(f"scores of {group.layer!r} are not numbers: is the posterior finite?")
    return total


def _check_score(name: str, scores: Mapping[str, Tensor], parameter: Tensor) -> None:
    if name not in scores:
        raise PosteriorError(f"the scores lack parameter {name!r}: compute them anew")
    if scores[name].shape != parameter.shape:
        raise PosteriorError(
            f"the scores have shape {tuple(scores[name].shape)} for {name!r}, the model has "
            f"{tuple(parameter.shape)}: compute them anew after each pruning"
        )
