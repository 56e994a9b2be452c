"""Structured pruning in three steps: plan which units go, apply the plan, verify the result."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from spamprune.errors import PruningError, nearest
from spamprune.modules import evaluation_mode
from spamprune.pruning import cost
from spamprune.pruning.coupling import slices, zero_units
from spamprune.pruning.importance import ScoreImportance

Ranking = Literal["uniform", "global"]

#: A budget counts as met when what remains is at most this much below it, relatively.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Target:
    """How small the network should become; exactly one field is given.

    Attributes:
        ratio: Fraction of units removed, in [0, 1).
        macs: Fraction of multiply-accumulates that may remain, in (0, 1).
        params: Fraction of parameters that may remain, in (0, 1).
    """

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        """Refuse none or several fields, and values out of range."""
        given = {k: v for k, v in asdict(self).items() if v is not None}
        if len(given) != 1:
            raise PruningError(f"a target is one of ratio, macs, params, not {given or 'nothing'}")
        ((key, value),) = given.items()
        if not (0 <= value < 1) or (key != "ratio" and value == 0):
            raise PruningError(f"target {key}={value} is out of range: a fraction below 1")

    def named(self) -> tuple[str, float]:
        """Return the field that is given, and its value."""
        ((key, value),) = ((k, v) for k, v in asdict(self).items() if v is not None)
        return key, value


@dataclass(frozen=True)
class GroupPlan:
    """The units of one group of coupled layers.

    Attributes:
        layer: The layer whose outputs are the units.
        units: How many there are.
        pruned: Which of them go, in increasing order.
    """

    layer: str
    units: int
    pruned: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Which units go, and what that reaches.

    Attributes:
        groups: One entry for each group of coupled layers.
        ranking: How units were compared.
        target: What was asked for, such as ``{"macs": 0.1}``.
        achieved: The same key: what the plan reaches.
        notes: Groups left whole or stopped at their minimum, each with the reason.
    """

    groups: tuple[GroupPlan, ...]
    ranking: Ranking
    target: dict[str, float]
    achieved: dict[str, float]
    notes: tuple[str, ...]

    def widths(self) -> dict[str, int]:
        """Return the units that each layer keeps."""
        return {g.layer: g.units - len(g.pruned) for g in self.groups}

    def to_json(self) -> str:
        """Return the plan as JSON that a person can read."""
        return json.dumps(asdict(self), indent=1)


def plan(
    model: nn.Module,
    example: Tensor,
    scores: Mapping[str, Tensor],
    target: Target,
    *,
    ranking: Ranking = "uniform",
    min_units: int = 1,
    ignored: Iterable[str] = ("head",),
) -> Plan:
    """Choose the units to remove.

    ``uniform`` removes ``int(ratio · n)`` of the n units of each layer (the paper's); ``global``
    lets all units compete by importance. A budget is met by the mildest pruning that fits it.

    Args:
        model: The trained network; it is left as it is.
        example: An input batch ``(1, ...)``.
        scores: A score for every parameter, by name.
        target: How small.
        ranking: How units are compared.
        min_units: Units that each layer keeps at least.
        ignored: Names of layers whose outputs stay, such as the classifier.

    Raises:
        PruningError: There is nothing to prune, or the budget cannot be reached.
    """
    graph = _graph(model, example)
    importance = ScoreImportance(scores)
    layers: list[tuple[str, Tensor]] = []
    notes: list[str] = []
    for group in graph.get_all_groups(
        ignored_layers=_modules(model, ignored),
        root_module_types=[nn.modules.conv._ConvNd, nn.Linear],
    ):
        name = graph._module2name[group.items[0].dep.target.module]
        try:
            value = importance(group)
        except PruningError as error:
            notes.append(f"{name}: left whole: {error}")
            continue
        if value is None:
            notes.append(f"{name}: left whole: nothing in its group is trainable")
        else:
            layers.append((name, value))
    if not layers:
        why = "; ".join(notes) or "it has no layers with units"
        raise PruningError(f"nothing of {type(model).__name__} can be pruned: {why}")
    layers.sort(key=lambda pair: list(graph._module2name.values()).index(pair[0]))
    order = _order(layers, ranking, min_units)
    key, wanted = target.named()
    if key == "ratio":
        count = _count_for_ratio(layers, order, ranking, wanted)
        achieved = count / sum(len(v) for _, v in layers)
    else:
        count, achieved = _count_for_budget(model, example, layers, order, key, wanted)
    groups = _chosen(layers, order[:count])
    for g in groups:
        if g.pruned and g.units - len(g.pruned) <= min_units:
            notes.append(f"{g.layer}: at its minimum, {min_units} of {g.units} units")
    return Plan(groups, ranking, {key: wanted}, {key: achieved}, tuple(notes))


def apply(model: nn.Module, plan: Plan, example: Tensor) -> nn.Module:
    """Return a copy of ``model`` without the planned units; its tensors are really smaller.

    Raises:
        PruningError: The plan names a layer that the model lacks, or of another width.
    """
    small = copy.deepcopy(model)
    _remove(small, plan.groups, example)
    return small


def masked(model: nn.Module, plan: Plan, example: Tensor) -> nn.Module:
    """Return a copy of ``model`` in full shape with the planned units' parameters at zero."""
    copied = copy.deepcopy(model)
    graph = _graph(copied, example)
    tensors = {name: p.data for name, p in copied.named_parameters(remove_duplicate=False)}
    for group in plan.groups:
        pieces = list(slices(_whole_group(graph, copied, group)))
        zero_units(pieces, tensors, set(group.pruned))
    return copied


def verify(
    model: nn.Module, small: nn.Module, plan: Plan, example: Tensor, tolerance: float = 1e-4
) -> float:
    """Compare a compacted network with the masked original, which must agree with it.

    Args:
        model: The network that was planned for, unchanged since.
        small: What :func:`apply` made of it, not trained since.
        plan: The plan.
        example: Inputs to compare on, ``(B, ...)``; a batch of real data is best.
        tolerance: Largest difference allowed, relative to the largest output.

    Returns:
        The largest difference between their outputs, relative to the largest output.

    Raises:
        PruningError: They differ by more than ``tolerance``.
    """
    reference = masked(model, plan, example[:1])
    with evaluation_mode(reference), evaluation_mode(small), torch.no_grad():
        expected, got = reference(example), small(example)
    difference = ((expected - got).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
    if not difference <= tolerance:
        raise PruningError(
            f"the compacted {type(model).__name__} differs from its masked original by "
            f"{difference:.1e}, more than {tolerance:.0e}"
        )
    return difference


def _graph(model: nn.Module, example: Tensor) -> tp.DependencyGraph:
    # torch-pruning follows autograd's graph, so gradients must be on
    with evaluation_mode(model), torch.enable_grad():
        return tp.DependencyGraph().build_dependency(model, example_inputs=example, verbose=False)


def _modules(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise PruningError(f"no layer {name!r} to ignore: {nearest(name, modules)}")
    return [modules[name] for name in names]


def _order(
    layers: list[tuple[str, Tensor]], ranking: Ranking, min_units: int
) -> list[tuple[float, int, int]]:
    """Return ``(priority, layer, unit)`` in the order in which units would be removed.

    The best ``min_units`` of each layer are never in it. The priority is the importance for a
    global ranking, and the fraction of its layer that is gone with the unit for a uniform one.
    """
    entries = []
    for i, (_, importance) in enumerate(layers):
        ranked = importance.argsort(stable=True).tolist()
        for rank, unit in enumerate(ranked[: max(len(ranked) - min_units, 0)]):
            fraction = (rank + 1) / len(ranked)
            entries.append((importance[unit].item() if ranking == "global" else fraction, i, unit))
    return sorted(entries)


def _count_for_ratio(
    layers: list[tuple[str, Tensor]],
    order: list[tuple[float, int, int]],
    ranking: Ranking,
    ratio: float,
) -> int:
    slack = 1e-9  # 0.29 · 100 is 28.999… in floating point
    if ranking == "uniform":
        return sum(fraction <= ratio + slack for fraction, _, _ in order)
    return min(int(ratio * sum(len(v) for _, v in layers) + slack), len(order))


def _count_for_budget(
    model: nn.Module,
    example: Tensor,
    layers: list[tuple[str, Tensor]],
    order: list[tuple[float, int, int]],
    key: str,
    wanted: float,
) -> tuple[int, float]:
    """Return how many units must go to fit the budget, and the fraction that then remains."""
    measure = (lambda m: cost.macs(m, example)) if key == "macs" else cost.params
    dense = measure(model)

    def remaining(count: int) -> float:
        small = copy.deepcopy(model)
        _remove(small, _chosen(layers, order[:count]), example)
        return measure(small) / dense

    low, high = 0, len(order)  # remaining(high) is the smallest network that there is
    smallest = remaining(high)
    if smallest > wanted * (1 + TOLERANCE):
        raise PruningError(
            f"{key}: {wanted} cannot be reached: with every layer at its minimum "
            f"{smallest:.4f} remains; lower min_units or ask for less"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if remaining(middle) <= wanted:
            high = middle
        else:
            low = middle
    return high, remaining(high)


def _chosen(
    layers: list[tuple[str, Tensor]], removed: list[tuple[float, int, int]]
) -> tuple[GroupPlan, ...]:
    return tuple(
        GroupPlan(name, len(value), tuple(sorted(unit for _, j, unit in removed if j == i)))
        for i, (name, value) in enumerate(layers)
    )


def _whole_group(
    graph: tp.DependencyGraph, model: nn.Module, group: GroupPlan, only: list[int] | None = None
) -> tp.dependency.Group:
    """Return torch-pruning's group for all units of a layer, or for some."""
    modules = dict(model.named_modules())
    if group.layer not in modules:
        raise PruningError(f"the plan's layer {group.layer!r}: {nearest(group.layer, modules)}")
    module = modules[group.layer]
    pruner = graph.get_pruner_of_module(module)
    if pruner.get_out_channels(module) != group.units:
        raise PruningError(
            f"the plan expects {group.units} units in {group.layer!r}, the model has "
            f"{pruner.get_out_channels(module)}: plan again after each change"
        )
    units = list(range(group.units)) if only is None else only
    return graph.get_pruning_group(module, pruner.prune_out_channels, units)


def _remove(model: nn.Module, groups: Iterable[GroupPlan], example: Tensor) -> None:
    graph = _graph(model, example)
    for group in groups:
        if group.pruned:
            _whole_group(graph, model, group, list(group.pruned)).prune()
