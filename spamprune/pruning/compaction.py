"""Removing planned units from a network, and checking what is left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field
from functools import cache
from typing import Any, Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spamprune.copies import copied
from spamprune.errors import PruningError, nearest
from spamprune.modules import check_python, evaluation_mode, full_precision
from spamprune.pruning.slices import owner
from spamprune.pruning.units import Kind

Ranking = Literal["uniform", "global", "per_cost", "isomorphic"]
Number = int | float
#: An output this far below the network's largest one may be what rounding left of greater numbers.
FLOOR = 1e-3
_DATA = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_DATA)
class GroupPlan:
    """The units of one group of coupled layers.

    Attributes:
        layer: The layer whose outputs the units are.
        kind: What they are.
        units: How many there are.
        pruned: Which of them go, in increasing order.
    """

    layer: str
    kind: Kind
    units: int
    pruned: tuple[int, ...]


@dataclass(frozen=True, config=_DATA)
class Cut:
    """Positions that go from one dimension of a tensor.

    Attributes:
        tensor: A parameter or buffer.
        dim: The dimension.
        size: Its size before.
        gone: The positions.
    """

    tensor: str
    dim: int
    size: int
    gone: tuple[int, ...]


@dataclass(frozen=True, config=_DATA)
class Scaling:
    """Rows of queries that are multiplied, since attention divides by the root of its depth.

    Attributes:
        tensor: A parameter.
        dim: The dimension.
        rows: Positions in the original tensor.
        factor: What to multiply by.
    """

    tensor: str
    dim: int
    rows: tuple[int, ...]
    factor: float


@dataclass(frozen=True, config=_DATA)
class Plan:
    """Which units go, all that follows from it, and what it reaches: plain data.

    Attributes:
        groups: One entry for each group of coupled layers.
        ranking: How units were compared.
        target: What was asked for, such as ``{"macs": 0.1}``.
        achieved: The same key: what the plan reaches.
        notes: Groups left whole or stopped at their minimum, each with the reason.
        comparable: Whether the compacted network must agree with the masked one. It need not
            where normalisation spans pruned units: their zeros count there.
        cuts: What goes from each tensor, one tensor after the other.
        attributes: Module → attribute → value, such as a number of heads.
        scalings: Factors that keep attention logits what they were.
    """

    groups: tuple[GroupPlan, ...]
    ranking: Ranking
    target: dict[str, float]
    achieved: dict[str, float]
    notes: tuple[str, ...]
    comparable: bool
    cuts: tuple[Cut, ...] = ()
    attributes: dict[str, dict[str, Number | list[Number]]] = field(default_factory=dict)
    scalings: tuple[Scaling, ...] = ()

    def widths(self) -> dict[str, int]:
        """Return the units that each layer keeps."""
        return {g.layer: g.units - len(g.pruned) for g in self.groups}

    def summary(self) -> dict[str, Any]:
        """Return what was chosen and reached as plain data, without what goes from each tensor."""
        derived = {"cuts", "attributes", "scalings"}
        summary: dict[str, Any] = _ADAPTER.dump_python(self, mode="json", exclude=derived)
        return summary

    def to_json(self) -> str:
        """Return the plan as JSON; :meth:`from_json` reads it."""
        return _ADAPTER.dump_json(self, indent=1).decode()

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            PruningError: It is no plan.
        """
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the start"
            raise PruningError(f"this is no plan: {first['msg']} at {where}") from error


_ADAPTER = TypeAdapter(Plan)


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` without the planned units; its tensors are really smaller.

    Raises:
        PruningError: The plan was made for another model, or for this one in another shape, or the
            model cannot be copied, for example since it computes through a function that would go
            on using the original's weights.
    """
    small = _copy(model, _smaller(model, plan))
    _set_attributes(small, plan)
    changed = {owner(cut.tensor)[0] for cut in plan.cuts} | plan.attributes.keys()
    with evaluation_mode(small):  # in training some parametrisations change when a weight is read
        for path, module in small.named_modules():
            if path in changed:
                _describe(module)
            cache = getattr(module, "attention_bias_cache", None)
            if isinstance(cache, dict):
                cache.clear()
    return small


def cut_tensor(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    """Return what a plan leaves of a tensor that goes along with a parameter, such as its prior.

    Args:
        plan: The plan.
        name: The parameter.
        tensor: Shaped like it, save that it may have one entry for all positions of a dimension.

    Raises:
        PruningError: The tensor is shaped otherwise.
    """
    for cut in plan.cuts:
        if cut.tensor != name or tensor.shape[cut.dim] == 1:
            continue
        if tensor.shape[cut.dim] != cut.size:
            raise PruningError(
                f"the plan expects {cut.size} positions in dimension {cut.dim} of what goes along "
                f"with {name!r}, not {tensor.shape[cut.dim]}"
            )
        tensor = tensor.index_select(cut.dim, _kept(cut.size, cut.gone).to(tensor.device))
    return tensor


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` in full shape with the planned units' parameters at zero."""
    tensors = _tensors(model)
    zeroed: dict[str, Tensor] = {}
    for cut in plan.cuts:
        tensor = _checked(tensors, cut)
        if isinstance(tensor, nn.Parameter):
            value = zeroed.setdefault(cut.tensor, tensor.detach().clone())
            value.index_fill_(cut.dim, torch.tensor(cut.gone, device=tensor.device), 0)
    return _copy(model, zeroed)


def verify(
    model: nn.Module, small: nn.Module, plan: Plan, example: Tensor, tolerance: float = 1e-4
) -> float:
    """Compare a compacted network with the masked original.

    They must agree unless the plan says that they are not ``comparable``.

    Args:
        model: The network that was planned for, unchanged since.
        small: What :func:`apply` made of it, not trained since.
        plan: The plan.
        example: Inputs to compare on, ``(B, ...)``; a batch of real data is best.
        tolerance: Largest difference allowed, relative as in :func:`difference`.

    Returns:
        The largest difference between their outputs; see :func:`difference`.

    Raises:
        PruningError: They are comparable and differ by more than ``tolerance``.
    """
    reference = masked(model, plan)
    with full_precision():
        apart = difference(outputs_of(reference, example), outputs_of(small, example))
    if plan.comparable and not apart <= tolerance:
        raise PruningError(
            f"the compacted {type(model).__name__} differs from its masked original by "
            f"{apart:.1e}, more than {tolerance:.0e}"
        )
    return apart


def difference(expected: object, found: object) -> float:
    """Return the largest difference of two networks' outputs.

    Each tensor's is relative to the largest entry of the first network's, or to ``FLOOR`` of the
    largest entry of all its tensors where that is more. It is NaN where either gives NaN.

    Raises:
        PruningError: There is nothing to compare.
    """
    first, second = _floats(expected), _floats(found)
    if not first:
        raise PruningError("the outputs hold no floating-point numbers that could be compared")
    largest = [_largest(t.where(t.isfinite(), 0)) for t in first]
    floor = max(FLOOR * max(largest), 1e-12)
    relative = [
        _largest((a - b).where(a != b, 0)) / max(scale, floor)  # ∞ equals ∞
        for a, b, scale in zip(first, second, largest, strict=True)
    ]
    return next((d for d in relative if math.isnan(d)), max(relative))  # which max would lose


def outputs_of(model: nn.Module, example: Tensor) -> object:
    """Return what ``model`` gives for ``example`` in evaluation mode."""
    with evaluation_mode(model), torch.no_grad():
        return model(example)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _floats(output: object) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _copy(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a deep copy of ``model`` with some of its tensors replaced, wherever they are used."""
    check_python(model, PruningError)  # copies of others would keep all units
    replaced: dict[int, object] = {}
    for name, old in _tensors(model).items():
        if name in tensors:
            new = tensors[name]
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, old.requires_grad)
            replaced[id(old)] = new
    return copied(model, replaced)


def _checked(tensors: Mapping[str, Tensor], change: Cut | Scaling) -> Tensor:
    """Return the tensor that is changed, once it is known to have what the plan changes."""
    if change.tensor not in tensors:
        hint = nearest(change.tensor, tensors)
        raise PruningError(f"the plan's tensor {change.tensor!r}: {hint}")
    tensor = tensors[change.tensor]
    found = tensor.shape[change.dim] if 0 <= change.dim < tensor.dim() else None
    place = f"dimension {change.dim} of {change.tensor!r}"
    if isinstance(change, Cut):
        if found != change.size:
            raise PruningError(
                f"the plan expects {change.size} positions in {place}, the model has {found}: "
                "plan again after each change"
            )
        if len(set(change.gone)) == found:
            raise PruningError(f"the plan leaves nothing of {place}")
    positions = change.gone if isinstance(change, Cut) else change.rows
    if found is None or (positions and not 0 <= min(positions) <= max(positions) < found):
        raise PruningError(f"the plan names positions that {place} lacks")
    return tensor


@torch.no_grad()
def _smaller(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Return every tensor that changes, scaled and cut."""
    tensors = _tensors(model)
    kept = cache(_kept)  # most tensors lose the same positions as others
    result: dict[str, Tensor] = {}
    for scaling in plan.scalings:
        checked = _checked(tensors, scaling)
        tensor = result.setdefault(scaling.tensor, checked.detach().clone())
        rows = torch.tensor(scaling.rows, device=tensor.device)
        scaled = tensor.index_select(scaling.dim, rows) * scaling.factor
        tensor.index_copy_(scaling.dim, rows, scaled)
    for cut in plan.cuts:
        tensor = _checked(tensors, cut)
        positions = kept(cut.size, cut.gone).to(tensor.device)
        before = result.get(cut.tensor, tensor.detach())
        result[cut.tensor] = before.index_select(cut.dim, positions)
    return result


def _kept(size: int, gone: tuple[int, ...]) -> Tensor:
    """Return the positions that stay."""
    keep = torch.ones(size, dtype=torch.bool)
    keep[list(gone)] = False
    return keep.nonzero()[:, 0]


def _describe(module: nn.Module) -> None:
    """Make the sizes that torch's own layers keep for display those of their tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        first, second = module.weight.shape[:2]
        sides = (first, second * module.groups)
        if module.transposed:
            sides = (second * module.groups, first)
        module.out_channels, module.in_channels = sides
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        if module.running_mean is not None:
            module.num_features = len(module.running_mean)
    elif isinstance(module, nn.GroupNorm) and isinstance(weight, Tensor):
        module.num_channels = len(weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.MultiheadAttention):
        if module._qkv_same_embed_dim:
            module.embed_dim = module.kdim = module.vdim = _size(module, "in_proj_weight", 1)
        else:
            module.embed_dim = _size(module, "q_proj_weight", 1)
            module.kdim = _size(module, "k_proj_weight", 1)
            module.vdim = _size(module, "v_proj_weight", 1)
        module.head_dim = module.embed_dim // module.num_heads
    elif isinstance(module, nn.RNNBase):
        module.input_size = _size(module, "weight_ih_l0", 1)
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        module.hidden_size = _size(module, "weight_hh_l0", 0) // gates
        if module.proj_size:
            module.proj_size = _size(module, "weight_hr_l0", 0)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _size(module: nn.Module, name: str, dim: int) -> int:
    return int(dict(module.named_parameters(recurse=False))[name].shape[dim])


def _set_attributes(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules())
    for path, attributes in plan.attributes.items():
        if path not in modules:
            raise PruningError(f"the plan's module {path!r}: {nearest(path, modules)}")
        for name, value in attributes.items():
            old = vars(modules[path]).get(name)
            if type(old) not in (int, float, list, tuple):
                raise PruningError(f"the plan sets {path}.{name}, which is no size of the model")
            setattr(modules[path], name, tuple(value) if isinstance(old, tuple) else value)  # type: ignore[arg-type]
