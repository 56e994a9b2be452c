"""Removing planned units from a network, and checking what is left."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from spamprune.errors import PruningError, nearest
from spamprune.modules import evaluation_mode
from spamprune.pruning.coupling import slices, zero_units

Ranking = Literal["uniform", "global"]


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
        comparable: Whether the compacted network must agree with the masked one. It need not
            where a LayerNorm or GroupNorm spans pruned units: their zeros count there.
    """

    groups: tuple[GroupPlan, ...]
    ranking: Ranking
    target: dict[str, float]
    achieved: dict[str, float]
    notes: tuple[str, ...]
    comparable: bool

    def widths(self) -> dict[str, int]:
        """Return the units that each layer keeps."""
        return {g.layer: g.units - len(g.pruned) for g in self.groups}


def apply(model: nn.Module, plan: Plan, example: Tensor) -> nn.Module:
    """Return a copy of ``model`` without the planned units; its tensors are really smaller.

    Raises:
        PruningError: The plan names a layer that the model lacks, or of another width.
    """
    small = copy.deepcopy(model)
    remove(small, plan.groups, example)
    return small


def masked(model: nn.Module, plan: Plan, example: Tensor) -> nn.Module:
    """Return a copy of ``model`` in full shape with the planned units' parameters at zero."""
    copied = copy.deepcopy(model)
    graph = graph_of(copied, example)
    tensors = {name: p.data for name, p in copied.named_parameters(remove_duplicate=False)}
    for group in plan.groups:
        pieces = list(slices(_whole_group(graph, copied, group)))
        zero_units(pieces, tensors, set(group.pruned))
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
    reference = masked(model, plan, example[:1])
    with evaluation_mode(reference), evaluation_mode(small), torch.no_grad():
        expected, got = reference(example), small(example)
    difference = ((expected - got).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
    if plan.comparable and not difference <= tolerance:
        raise PruningError(
            f"the compacted {type(model).__name__} differs from its masked original by "
            f"{difference:.1e}, more than {tolerance:.0e}"
        )
    return difference


def graph_of(model: nn.Module, example: Tensor) -> tp.DependencyGraph:
    """Trace torch-pruning's dependency graph of ``model`` in evaluation mode."""
    # torch-pruning follows autograd's graph, so gradients must be on
    with evaluation_mode(model), torch.enable_grad():
        return tp.DependencyGraph().build_dependency(model, example_inputs=example, verbose=False)


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


def remove(model: nn.Module, groups: Iterable[GroupPlan], example: Tensor) -> None:
    """Remove the planned units of each group from ``model``, in place."""
    graph = graph_of(model, example)
    for group in groups:
        if group.pruned:
            _whole_group(graph, model, group, list(group.pruned)).prune()
