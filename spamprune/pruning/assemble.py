"""From chosen units to a plan: what goes from each tensor, and which attributes follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spamprune.pruning.axes.axis import Axis, count
from spamprune.pruning.axes.trace import Trace
from spamprune.pruning.compaction import Cut, GroupPlan, Number, Plan, Ranking, Scaling
from spamprune.pruning.units import Group

Attributes = dict[str, dict[str, Any]]


def assemble(
    model: nn.Module,
    traced: Trace,
    groups: Sequence[Group],
    pruned: Mapping[str, tuple[int, ...]],
    *,
    ranking: Ranking,
    target: dict[str, float],
    achieved: dict[str, float],
) -> Plan:
    """Return the plan that removes the units ``pruned`` of each layer.

    Args:
        model: The network.
        traced: Its trace.
        groups: All groups that the plan is to list.
        pruned: For each of their layers, the units that go.
        ranking: How they were compared.
        target: What was asked for.
        achieved: What the plan reaches.
    """
    kept = {g.axis.root(): g.units - len(pruned[g.layer]) for g in groups if pruned[g.layer]}
    attributes = _attributes(model, traced, kept)
    scalings = _scalings(traced, kept, attributes)
    return Plan(
        groups=tuple(GroupPlan(g.layer, g.kind, g.units, pruned[g.layer]) for g in groups),
        ranking=ranking,
        target=target,
        achieved=achieved,
        notes=(),
        comparable=not any(pruned[g.layer] and g.joint for g in groups),
        cuts=_cuts(model, groups, pruned),
        attributes=attributes,
        scalings=scalings,
    )


def _cuts(
    model: nn.Module, groups: Sequence[Group], pruned: Mapping[str, tuple[int, ...]]
) -> tuple[Cut, ...]:
    sizes = {
        name: tuple(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    gone: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        if not pruned[group.layer]:
            continue
        chosen = torch.zeros(group.units, dtype=torch.bool)
        chosen[list(pruned[group.layer])] = True
        for piece in group.pieces:
            key = (piece.name, piece.dim)
            if key not in gone:
                gone[key] = torch.zeros(sizes[piece.name][piece.dim], dtype=torch.bool)
            gone[key][piece.index[chosen[piece.unit]]] = True
    # one tensor after the other: of those cut in two dimensions, only one is held half done
    return tuple(
        Cut(name, dim, size, tuple(gone[name, dim].nonzero()[:, 0].tolist()))
        for name, shape in sizes.items()
        for dim, size in enumerate(shape)
        if (name, dim) in gone
    )


def _attributes(model: nn.Module, traced: Trace, kept: dict[Axis, int]) -> Attributes:
    """Return the attributes that must change."""
    modules = dict(model.named_modules())
    found: Attributes = {}
    for attribute, value in traced.attributes(kept).items():
        old = getattr(modules[attribute.path], attribute.name)
        if attribute.item is None:
            if old != value:
                found.setdefault(attribute.path, {})[attribute.name] = value
        elif old[attribute.item] != value:
            own = found.setdefault(attribute.path, {})
            items: list[Number] = own.setdefault(attribute.name, list(old))
            items[attribute.item] = value
    return found


def _scalings(traced: Trace, kept: dict[Axis, int], attributes: Attributes) -> tuple[Scaling, ...]:
    """Return what keeps the logits of attention; note the scales that modules must store."""
    rows: dict[tuple[str, int], tuple[set[int], float]] = {}
    for fold in traced.folds:
        before, after = fold.depth.size, count(fold.depth, kept)
        if after == before:
            continue
        if fold.scale is not None:
            attributes.setdefault(fold.scale, {})["scale"] = after**-0.5
        for name, dim, positions in fold.rows:
            known, _ = rows.setdefault((name, dim), (set(), math.sqrt(after / before)))
            known.update(positions.tolist())
    return tuple(
        Scaling(name, dim, tuple(sorted(known)), factor)
        for (name, dim), (known, factor) in rows.items()
    )
