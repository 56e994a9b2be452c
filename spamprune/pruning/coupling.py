"""Which entries of which parameters go with the units of a torch-pruning group.

torch-pruning knows which channels of which layers belong together; this module knows where their
parameters lie, and refuses what torch-pruning 1.6.1 is known to follow or to cut wrongly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping, shape_infer
from torch_pruning.ops import OPTYPE
from torch_pruning.pruner.function import DepthwiseConvPruner

from spamprune.errors import PruningError
from spamprune.pruning.provenance import reading, shape_of, sources
from spamprune.pruning.slices import Slice

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

#: For each operation of a group, the pairs of a position and a unit that reaches it.
_Reached = dict[tuple[tp.dependency.Node, Callable], set[_HybridIndex]]


@dataclass(frozen=True)
class Coupling:
    """The parameters of a group, and which of its units cannot go without each other.

    Attributes:
        pieces: Slices in torch-pruning's order; their units are *bundles*: units that go together.
        bundle: For each unit at the group's root, its bundle, shape ``(units,)``. Most units are
            their own; the two halves of a gated linear unit are not.
        parameters: The parameters that the pieces name.
    """

    pieces: list[Slice]
    bundle: Tensor
    parameters: dict[str, nn.Parameter]


@dataclass(frozen=True)
class Remainder:
    """What remains of a parameter when a group is pruned.

    Attributes:
        name: The parameter's name, by the path of the module that holds it.
        dim: The dimension that is cut.
        size: Its size before the cut.
        kept: Positions that remain, in order.
    """

    name: str
    dim: int
    size: int
    kept: Tensor


@dataclass(frozen=True)
class _Part:
    """A parameter of a module, and how channels lie along one of its dimensions.

    Attributes:
        name: Its name in the module; empty where the parameter is itself the graph's node.
        dim: The dimension.
        groups: As in :class:`Slice`.
        offsets: Where each copy of the channels begins: queries, keys, values in one matrix.
    """

    name: str
    dim: int
    groups: int = 1
    offsets: tuple[int, ...] = (0,)


def couple(group: tp.dependency.Group) -> Coupling:
    """Return the parameters that go with the units of ``group``.

    Raises:
        PruningError: torch-pruning cannot follow the network here, or a layer's parameters are of
            no known layout; the layer is named.
    """
    graph = group._DG  # torch-pruning has no public way from a group to its graph
    units = list(dict.fromkeys(group.items[0].root_idxs))
    root = layer_name(group)
    reached = _walk(group.items[0].dep, units)
    if any(i.root_idx is None for indices in reached.values() for i in indices):
        raise PruningError(
            f"{root}: some channels belong to several of its units, as in grouped-query "
            "attention, and torch-pruning does not trace to which; add the attention's layers to "
            "ignored_layers"
        )
    bundles = _bundles(units, reached.values())
    lost = next(_lost(graph, reached, bundles), None)
    if lost:
        raise PruningError(
            f"{root}: on the way of its channels torch-pruning loses {lost}, so it would cut "
            f"wrong ones; add {root} to ignored_layers"
        )
    canonical = {p: name for name, p in graph.model.named_parameters()}
    pieces: list[Slice] = []
    parameters: dict[str, nn.Parameter] = {}
    for item in group.items:
        node = item.dep.target
        owners = {i.idx: bundles[i.root_idx] for i in reached[node, item.dep.handler]}
        positions = sorted(owners)
        index, unit = torch.tensor(positions), torch.tensor([owners[i] for i in positions])
        for part in _layout(graph, item.dep):
            path, parameter = _find(graph, node, part)
            size = parameter.shape[part.dim] * part.groups
            if positions[-1] + part.offsets[-1] >= size:
                raise PruningError(
                    f"{path.rpartition('.')[0]}: torch-pruning couples channel {positions[-1]} of "
                    f"its {size} with {root}: it cannot follow the network here; add {root} to "
                    "ignored_layers"
                )
            name = canonical[parameter]  # tied parameters have several paths
            parameters[name] = parameter
            where = torch.cat([index + o for o in part.offsets])
            pieces.append(Slice(name, part.dim, where, unit.repeat(len(part.offsets)), part.groups))
    return Coupling(_distinct(pieces), torch.tensor([bundles[u] for u in units]), parameters)


def remainders(group: tp.dependency.Group) -> list[Remainder]:
    """Return what pruning ``group`` leaves of the parameters whose layout is known."""
    graph = group._DG
    found = []
    for dep, idxs in group.items:
        try:
            parts = _layout(graph, dep)
        except PruningError:
            continue  # such a layer cannot be scored either
        for part in parts:
            name, parameter = _find(graph, dep.target, part)
            size = parameter.shape[part.dim]
            gone = {i + offset for i in idxs for offset in part.offsets}
            kept = [i for i in range(size * part.groups) if i not in gone]
            # torch-pruning keeps in every group of a convolution what it keeps in the first.
            kept = kept[: len(kept) // part.groups]
            found.append(Remainder(name, part.dim, size, torch.tensor(kept, dtype=torch.long)))
    return found


def layer_name(group: tp.dependency.Group) -> str:
    """Return the name of the layer at the root of ``group``."""
    return group._DG._module2name[group.items[0].dep.target.module]


def _walk(root: tp.dependency.Dependency, units: list[int]) -> _Reached:
    """Follow ``units`` through the graph, as torch-pruning does.

    Its groups name one unit per position only; where a network adds or multiplies two halves of a
    layer, a position has several.
    """
    reached: _Reached = defaultdict(set)
    stack = [(root, [_HybridIndex(idx=u, root_idx=u) for u in units])]
    while stack:
        dep, indices = stack.pop()
        node, handler = dep.target, dep.handler
        new = [i for i in indices if i not in reached[node, handler]]
        reached[node, handler].update(new)
        for edge in node.dependencies if new else ():
            if edge.is_triggered_by(handler):
                mapped = new
                for mapping in edge.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)
                if mapped:
                    stack.append((edge, mapped))
    return reached


def _bundles(units: list[int], reached: Iterable[set[_HybridIndex]]) -> dict[int, int]:
    """Number the sets of units that meet at some position, and return the number of each unit."""
    parent = {u: u for u in units}

    def head(unit: int) -> int:
        while parent[unit] != unit:
            parent[unit] = unit = parent[parent[unit]]
        return unit

    for indices in reached:
        first: dict[int, int] = {}
        for i in indices:
            parent[head(i.root_idx)] = head(first.setdefault(i.idx, i.root_idx))
    number: dict[int, int] = {}
    return {u: number.setdefault(head(u), len(number)) for u in units}


def _distinct(pieces: list[Slice]) -> list[Slice]:
    """Drop repeated entries: tied parameters are reached once by each layer that shares them."""
    distinct = []
    seen: dict[tuple[str, int], set[int]] = defaultdict(set)
    for piece in pieces:
        known = seen[piece.name, piece.dim]
        fresh = [k for k, i in enumerate(piece.index.tolist()) if i not in known]
        known.update(piece.index.tolist())
        if fresh:
            distinct.append(
                Slice(piece.name, piece.dim, piece.index[fresh], piece.unit[fresh], piece.groups)
            )
    return distinct


def _lost(graph: tp.DependencyGraph, reached: _Reached, bundles: dict[int, int]) -> Iterator[str]:
    """Yield what torch-pruning has lost on the way of a group's channels."""
    for (node, _), indices in reached.items():
        yield from filter(None, [_check_offsets(graph, node), _check_order(node, indices, bundles)])
    yield from _check_sources(graph, reached, bundles)


def _check_offsets(graph: tp.DependencyGraph, node: tp.dependency.Node) -> str | None:
    """Return what is wrong if torch-pruning lacks the offsets of channels at ``node``.

    Along another dimension (tokens, pixels) there are none to know: all parts are equally wide.
    """
    before = shape_infer.infer_out_channels_recursively
    after = shape_infer.infer_in_channels_recursively
    if node.type is OPTYPE.CONCAT:
        kind, where, neighbours = index_mapping._ConcatIndexMapping, 1, node.inputs
        parts = [shape_infer.infer_channels_between(graph, n, node) for n in neighbours]
        whole = after(graph, node, [0])
    elif node.type in (OPTYPE.SPLIT, OPTYPE.SLICE):
        kind, where, neighbours = index_mapping._SplitIndexMapping, 0, node.outputs
        if node.type is OPTYPE.SLICE:
            kind, neighbours = index_mapping._SliceIndexMapping, node.inputs
            if min(node.module.start, node.module.end) < 0 or node.module.step != 1:
                return "a slice from the end, or with a step"
        parts = [after(graph, n, [0]) for n in node.outputs]
        whole = before(graph, node, [0])
    else:
        return None
    edges = [dep for dep in node.dependencies if dep.target in neighbours]
    lost = any(not isinstance(dep.index_mapping[where], kind) for dep in edges)
    if node.inputs and lost and any(part not in (None, whole) for part in parts):
        return f"the offsets of {parts} channels within {whole}"
    return None


def _check_order(
    node: tp.dependency.Node, reached: set[_HybridIndex], bundles: dict[int, int]
) -> str | None:
    """Return what is wrong if torch-pruning mistakes one part of a split for another.

    It takes the parts in the order in which its trace meets them. That does no harm where the same
    bundles have the same places in both parts, as with queries, keys and values.
    """
    offsets = getattr(node.module, "offsets", None)
    # A split without inputs is one of a module's own parameters, inside an attention.
    if node.type not in (OPTYPE.SPLIT, OPTYPE.UNBIND) or not offsets or not node.inputs:
        return None
    parts = [
        {(i.idx - start, bundles[i.root_idx]) for i in reached if start <= i.idx < end}
        for start, end in pairwise(offsets)
    ]
    for assumed, reader in enumerate(node.outputs):
        actual = {k for fn, k in reader.grad_fn.next_functions if fn is node.grad_fn}
        mistaken = set() if assumed in actual else actual or set(range(len(parts)))
        if any(parts[k] != parts[assumed] for k in mistaken):
            return "the order of the parts of a split"
    return None


def _check_sources(
    graph: tp.DependencyGraph, reached: _Reached, bundles: dict[int, int]
) -> Iterator[str]:
    """Yield what is wrong where a layer reads other channels than torch-pruning assumes.

    It passes indices unchanged through transposes, flips, rolls, shuffles. Autograd knows better,
    of layers as they were when the graph was built: only those of that width are compared.
    """
    other = len(bundles) + 1  # the label of channels outside the group

    def labels(indices: set[_HybridIndex], size: int) -> Tensor:
        found = torch.full((size,), other, dtype=torch.int32)
        for i in indices:
            if i.idx < size:
                found[i.idx] = bundles[i.root_idx] + 1
        return found

    made, read = {}, []
    for (node, handler), indices in reached.items():
        dim = _channel_dim(node)
        if dim is not None and graph.is_out_channel_pruning_fn(handler):
            size = shape_of(node.grad_fn)[dim]
            if size == graph.get_out_channels(node):
                made[node.grad_fn] = node, dim, labels(indices, size)
        if graph.is_in_channel_pruning_fn(handler):
            found = reading(node.grad_fn)
            if found and graph.get_in_channels(node) in (None, found.shape[found.dim]):
                read.append((found, labels(indices, found.shape[found.dim])))
    parameters = set(graph.model.parameters())
    ends = {n.grad_fn for n in graph.module2node.values() if _channel_dim(n) is not None}
    for found, assumed in read:
        if found.weight is not None and found.weight not in parameters:
            continue  # cut since: a layer over tokens, whose sums are a node of their own
        for function, actual in sources(found, assumed, ends):
            if function in made:
                node, dim, expected = made[function]
                actual = actual.movedim(dim, -1)
                if ((actual != expected.to(actual.device)) & (actual != 0)).any():
                    name = graph._param_to_name.get(node.module) or graph._module2name[node.module]
                    yield f"the order of the channels of {name}"


def _channel_dim(node: tp.dependency.Node) -> int | None:
    """Return along which dimension of its output a node makes channels; None if it makes none."""
    if node.type is OPTYPE.PARAMETER:
        return int(node.pruning_dim)
    if node.type in (OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV):
        return 1 - int(node.module.weight.ndim)  # from the end: a batch dimension may be missing
    return -1 if node.type in (OPTYPE.LINEAR, OPTYPE.EMBED, OPTYPE.MHA, OPTYPE.LSTM) else None


def _find(
    graph: tp.DependencyGraph, node: tp.dependency.Node, part: _Part
) -> tuple[str, nn.Parameter]:
    """Return the path and the value of a part of ``node``."""
    if not part.name:
        return graph._param_to_name[node.module], node.module
    path = graph._module2name[node.module]
    return (f"{path}." if path else "") + part.name, node.module.get_parameter(part.name)


def _layout(graph: tp.DependencyGraph, dep: tp.dependency.Dependency) -> list[_Part]:
    """Return the parameters of a module that ``dep`` cuts.

    Raises:
        PruningError: They are of no known layout.
    """
    node = dep.target
    module = node.module
    if node.type in _PASSIVE:
        return []
    if node.type is OPTYPE.PARAMETER:
        return [_Part("", node.pruning_dim % module.ndim)]
    out = graph.is_out_channel_pruning_fn(dep.handler)
    depthwise = isinstance(dep.handler.__self__, DepthwiseConvPruner)
    parts = _parts(module, out, depthwise)
    owned = dict(module.named_parameters())
    present = [p for p in parts or () if attrgetter(p.name)(module) is not None]
    if parts is None or any(p.name not in owned for p in present):
        raise PruningError(
            f"{graph._module2name[module] or 'the model'}: cannot score the "
            f"{'outputs' if out else 'inputs'} of this {type(module).__name__}, whose parameters "
            "torch-pruning cuts in no known or no right way; add it to ignored_layers"
        )
    return present


def _parts(module: nn.Module, out: bool, depthwise: bool) -> list[_Part] | None:
    """Return what a module of this type may own, or None for an unknown type."""
    if depthwise and module.groups != module.in_channels:
        return None  # it is a grouped one that pruning has left with one output per group
    if isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and not depthwise):
        transposed, groups = getattr(module, "transposed", False), getattr(module, "groups", 1)
        if transposed and groups > 1:
            return None  # torch-pruning cuts the wrong dimension
        if out:
            return [_Part("weight", int(transposed)), _Part("bias", 0)]
        return [_Part("weight", int(not transposed), groups)]
    if isinstance(module, nn.Embedding):
        return [_Part("weight", 1)]
    if isinstance(module, nn.LSTM) and not out:  # its hidden units are cut in the wrong places
        ends = ("", "_reverse") if module.bidirectional else ("",)
        return [_Part(f"weight_ih_l0{end}", 1) for end in ends]
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            return None  # torch-pruning leaves the inputs of separate projections behind
        copies = tuple(k * module.embed_dim for k in range(3))
        return [
            _Part("in_proj_weight", 0, offsets=copies),
            _Part("in_proj_weight", 1),
            _Part("in_proj_bias", 0, offsets=copies),
            _Part("bias_k", 2),
            _Part("bias_v", 2),
            _Part("out_proj.weight", 0),
            _Part("out_proj.weight", 1),
            _Part("out_proj.bias", 0),
        ]
    # Normalisations, PReLU, depthwise convolutions and the like: one entry or kernel per channel.
    vectors = [(name, p) for name, p in module.named_parameters() if p.numel() > 1]
    if depthwise or all(p.ndim == 1 for _, p in vectors):
        return [_Part(name, 0) for name, _ in vectors]
    return None
