"""Choosing which units to remove so that a network becomes as small as asked."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
import torch_pruning as tp
from torch import Tensor, nn

from spamprune.errors import PruningError, nearest
from spamprune.models.classifier import classifier_name
from spamprune.pruning import cost
from spamprune.pruning.compaction import GroupPlan, Plan, Ranking, graph_of, remove
from spamprune.pruning.importance import ScoreImportance

#: A plan that ends further below its budget than this, relatively, says so in its notes.
TOLERANCE = 0.02
#: Layers that normalise over their units: masking a unit changes what the others become.
_JOINT = (nn.LayerNorm, nn.GroupNorm)


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


def plan(
    model: nn.Module,
    example: Tensor,
    scores: Mapping[str, Tensor],
    target: Target,
    *,
    ranking: Ranking = "uniform",
    min_units: int = 1,
    ignored: Iterable[str] | None = None,
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
        ignored: Names of layers whose outputs stay; by default the classifier.

    Raises:
        PruningError: There is nothing to prune, the ratio is too small to remove a unit, or the
            budget cannot be reached.
    """
    graph = graph_of(model, example)
    layers, joint, notes = _layers(graph, model, ScoreImportance(scores), ignored)
    order = _order(layers, ranking, min_units)
    key, wanted = target.named()
    if key == "ratio":
        count = _count_for_ratio(layers, order, ranking, wanted)
        achieved = count / sum(len(v) for _, v in layers)
        if wanted and not count and order:
            raise PruningError(f"ratio {wanted} removes no unit: its layers are too narrow for it")
    else:
        count, achieved = _count_for_budget(model, example, layers, order, key, wanted)
        if achieved < wanted * (1 - TOLERANCE):
            notes.append(f"{key}: {achieved:.4f} is the nearest step below {wanted}")
    groups = _chosen(layers, order[:count])
    for g in groups:
        if g.units - len(g.pruned) <= min_units:
            kept = g.units - len(g.pruned)
            notes.append(f"{g.layer}: at its minimum, {kept} of {g.units} units")
    comparable = not any(g.pruned and g.layer in joint for g in groups)
    return Plan(groups, ranking, {key: wanted}, {key: achieved}, tuple(notes), comparable)


def check_reachable(
    model: nn.Module,
    example: Tensor,
    targets: Iterable[Target],
    *,
    min_units: int = 1,
    ignored: Iterable[str] | None = None,
) -> None:
    """Raise a :class:`PruningError` for a target that no scores could reach on ``model``.

    Weights do not matter, so that an untrained network tells what a trained one will.
    """
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    graph = graph_of(model, example)
    layers, _, _ = _layers(graph, model, ScoreImportance(ones), ignored)
    order = _order(layers, "uniform", min_units)
    for target in targets:
        key, wanted = target.named()
        if key != "ratio":
            _check_floor(model, example, layers, order, key, wanted)


def _layers(
    graph: tp.DependencyGraph,
    model: nn.Module,
    importance: ScoreImportance,
    ignored: Iterable[str] | None,
) -> tuple[list[tuple[str, Tensor]], set[str], list[str]]:
    """Return the prunable layers with their units' importance, in the model's order.

    Also the names of those whose units are normalised jointly, and notes on what is left whole.
    """
    names = graph._module2name
    layers: list[tuple[str, Tensor]] = []
    joint: set[str] = set()
    notes: list[str] = []
    for group in graph.get_all_groups(
        ignored_layers=_modules(model, [classifier_name(model)] if ignored is None else ignored),
        root_module_types=[nn.modules.conv._ConvNd, nn.Linear],
    ):
        name = names[group.items[0].dep.target.module]
        try:
            value = importance(group)
        except PruningError as error:
            notes.append(f"{name}: left whole: {error}")
            continue
        if value is None:
            notes.append(f"{name}: left whole: nothing in its group is trainable")
            continue
        layers.append((name, value))
        if any(isinstance(item.dep.target.module, _JOINT) for item in group.items):
            joint.add(name)
    if not layers:
        why = "; ".join(notes) or "it has no layers with units"
        raise PruningError(f"nothing of {type(model).__name__} can be pruned: {why}")
    order = {name: i for i, name in enumerate(names.values())}
    return sorted(layers, key=lambda pair: order[pair[0]]), joint, notes


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
    dense = _measure(model, example, key)

    def remaining(count: int) -> float:
        return _cost_without(model, example, layers, order[:count], key) / dense

    _check_floor(model, example, layers, order, key, wanted)
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        if remaining(middle) <= wanted:
            high = middle
        else:
            low = middle
    return high, remaining(high)


def _check_floor(
    model: nn.Module,
    example: Tensor,
    layers: list[tuple[str, Tensor]],
    order: list[tuple[float, int, int]],
    key: str,
    wanted: float,
) -> None:
    """Raise unless the network with every layer at its minimum fits the budget."""
    floor = _cost_without(model, example, layers, order, key) / _measure(model, example, key)
    if floor > wanted:
        raise PruningError(
            f"{key}: {wanted} cannot be reached: with every layer at its minimum {floor:.4f} "
            "remains; lower min_units or ask for less"
        )


def _cost_without(
    model: nn.Module,
    example: Tensor,
    layers: list[tuple[str, Tensor]],
    removed: list[tuple[float, int, int]],
    key: str,
) -> int:
    """Return what a copy of ``model`` costs once the ``removed`` units are gone."""
    small = copy.deepcopy(model)
    remove(small, _chosen(layers, removed), example)
    return _measure(small, example, key)


def _measure(model: nn.Module, example: Tensor, key: str) -> int:
    return cost.macs(model, example) if key == "macs" else cost.params(model)


def _chosen(
    layers: list[tuple[str, Tensor]], removed: list[tuple[float, int, int]]
) -> tuple[GroupPlan, ...]:
    return tuple(
        GroupPlan(name, len(value), tuple(sorted(unit for _, j, unit in removed if j == i)))
        for i, (name, value) in enumerate(layers)
    )
