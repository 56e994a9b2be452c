"""Removing planned units from a network, and checking what is left."""

from __future__ import annotations

import copy
import json
from dataclasses import field
from typing import Any, Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spamprune.errors import PruningError, nearest
from spamprune.modules import evaluation_mode
from spamprune.pruning.units import Kind

Ranking = Literal["uniform", "global", "isomorphic"]
Number = int | float
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
        cuts: What goes from each tensor.
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
        whole: dict[str, Any] = json.loads(self.to_json())
        return {k: v for k, v in whole.items() if k not in ("cuts", "attributes", "scalings")}

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
        PruningError: The plan was made for another model, or for this one in another shape.
    """
    small = copy.deepcopy(model)
    _scale(small, plan)
    _cut(small, plan)
    _set_attributes(small, plan)
    return small


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` in full shape with the planned units' parameters at zero."""
    copied = copy.deepcopy(model)
    parameters = dict(copied.named_parameters())
    with torch.no_grad():
        for cut in plan.cuts:
            _check(copied, cut)
            if cut.tensor in parameters:
                tensor = parameters[cut.tensor]
                tensor.index_fill_(cut.dim, torch.tensor(cut.gone, device=tensor.device), 0)
    return copied


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
        tolerance: Largest difference allowed, relative to the largest output.

    Returns:
        The largest difference between their outputs, relative to the largest output.

    Raises:
        PruningError: They are comparable and differ by more than ``tolerance``.
    """
    apart = difference(masked(model, plan), small, example)
    if plan.comparable and not apart <= tolerance:
        raise PruningError(
            f"the compacted {type(model).__name__} differs from its masked original by "
            f"{apart:.1e}, more than {tolerance:.0e}"
        )
    return apart


def difference(reference: nn.Module, small: nn.Module, example: Tensor) -> float:
    """Return the largest difference of two networks' outputs, relative to the first's largest."""
    with evaluation_mode(reference), evaluation_mode(small), torch.no_grad():
        expected, got = _tensors(reference(example)), _tensors(small(example))
    largest = max(t.abs().max().item() for t in expected)
    worst = max((a - b).abs().max().item() for a, b in zip(expected, got, strict=True))
    return worst / max(largest, 1e-12)


def _tensors(output: object) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return for each tensor, by its first name, every module and key that holds it."""
    names: dict[int, str] = {}
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                name = names.setdefault(id(tensor), f"{path}.{key}" if path else key)
                found.setdefault(name, []).append((module, key))
    return found


def _check(model: nn.Module, cut: Cut) -> Tensor:
    """Return the tensor that is cut, once it is known to have the expected size."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if cut.tensor not in tensors:
        raise PruningError(f"the plan's tensor {cut.tensor!r}: {nearest(cut.tensor, tensors)}")
    tensor = tensors[cut.tensor]
    found = tensor.shape[cut.dim] if cut.dim < tensor.dim() else None
    if found != cut.size:
        raise PruningError(
            f"the plan expects {cut.size} positions in dimension {cut.dim} of {cut.tensor!r}, "
            f"the model has {found}: plan again after each change"
        )
    return tensor


@torch.no_grad()
def _scale(model: nn.Module, plan: Plan) -> None:
    parameters = dict(model.named_parameters())
    for scaling in plan.scalings:
        if scaling.tensor not in parameters:
            hint = nearest(scaling.tensor, parameters)
            raise PruningError(f"the plan's tensor {scaling.tensor!r}: {hint}")
        tensor = parameters[scaling.tensor]
        rows = torch.tensor(scaling.rows, device=tensor.device)
        tensor.index_copy_(scaling.dim, rows, tensor.index_select(scaling.dim, rows) * scaling.factor)


def _cut(model: nn.Module, plan: Plan) -> None:
    places = _places(model)
    smaller: dict[str, Tensor] = {}
    for cut in plan.cuts:
        tensor = _check(model, cut)
        keep = torch.ones(cut.size, dtype=torch.bool)
        keep[list(cut.gone)] = False
        smaller[cut.tensor] = (
            smaller.get(cut.tensor, tensor)
            .detach()
            .index_select(cut.dim, keep.nonzero()[:, 0].to(tensor.device))
        )
    for name, tensor in smaller.items():
        module, key = places[name][0]
        old = getattr(module, key)
        # clone: a selection of a channels-last tensor may keep another layout
        new = tensor.clone(memory_format=torch.preserve_format)
        value = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        for module, key in places[name]:
            setattr(module, key, value)
    touched = {id(module) for name in smaller for module, _ in places[name]}
    for module in model.modules():
        if id(module) in touched:
            _describe(module)
        cache = getattr(module, "attention_bias_cache", None)
        if isinstance(cache, dict):
            cache.clear()


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
    elif isinstance(module, nn.RNNBase):
        module.input_size = module.weight_ih_l0.shape[1]
        module.hidden_size = module.weight_hh_l0.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _set_attributes(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules())
    for path, attributes in plan.attributes.items():
        if path not in modules:
            raise PruningError(f"the plan's module {path!r}: {nearest(path, modules)}")
        for name, value in attributes.items():
            old = getattr(modules[path], name, None)
            if old is None:
                raise PruningError(f"the plan sets {path}.{name}, which the model lacks")
            setattr(modules[path], name, tuple(value) if isinstance(old, tuple) else value)  # type: ignore[arg-type]
    for module in modules.values():  # its groups may just have changed
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
            _describe(module)
