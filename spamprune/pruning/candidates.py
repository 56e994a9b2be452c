"""Groups that can lose units, alone or in step with others, and what that would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from spamprune.bayes.parameters import named_parameters
from spamprune.errors import PruningError, nearest
from spamprune.pruning.axes.axis import Axis
from spamprune.pruning.axes.trace import Trace
from spamprune.pruning.units import Group, Scores, importance

#: Layer → how many of its units go.
Counts = dict[str, int]


@dataclass(frozen=True)
class Member:
    """A group, the importance of its units, and how many of them go in each step."""

    group: Group
    importance: Tensor
    per_step: int = 1


@dataclass(frozen=True)
class Candidate:
    """Groups that lose units in step; nearly always one, unit by unit.

    Attributes:
        members: The groups.
        importance: Of each step, in the order in which they are taken.
        most: How many steps may be taken.
        round_to: Channels that remain are a multiple of this.
        ratio: The fraction that the user set, if any.
    """

    members: tuple[Member, ...]
    importance: Tensor
    most: int
    round_to: int
    ratio: float | None

    @property
    def name(self) -> str:
        """The first layer."""
        return self.members[0].group.layer

    @property
    def steps(self) -> int:
        """How many steps would take everything."""
        return len(self.importance)

    @property
    def shape(self) -> tuple[object, ...]:
        """Equal for candidates that hold the same kinds of layers."""
        return tuple(m.group.shape for m in self.members)

    def removed(self, wanted: int) -> dict[str, int]:
        """Return how many units go from each layer after ``wanted`` steps, or fewer by rounding."""
        steps = min(wanted, self.most)
        while steps > 0 and any(
            (m.group.units - steps * m.per_step) * m.group.positions % self.round_to
            for m in self.members
        ):
            steps -= 1
        return {m.group.layer: steps * m.per_step for m in self.members}


def find(
    model: nn.Module,
    traced: Trace,
    found: Sequence[Group],
    scores: Scores,
    min_units: int,
    round_to: int,
    ratios: Mapping[str, float],
) -> tuple[list[Candidate], list[str]]:
    """Return the groups that can lose units, and notes on the others."""
    for pattern, ratio in ratios.items():
        if not 0 <= ratio < 1:
            raise PruningError(f"ratio {ratio} of {pattern!r} is out of range: a fraction below 1")
        if not any(fnmatchcase(g.layer, pattern) for g in found):
            hint = nearest(pattern, [g.layer for g in found])
            raise PruningError(f"no layer to prune is called {pattern!r}: {hint}")
    result, notes = [], []
    trainable = named_parameters(model)
    for bundle in _bundles(traced, found):
        present = {g.axis.root(): g for g in bundle[1]}
        names = ", ".join(g.layer for g in bundle[1][:3])
        if len(present) < len(bundle[0]):
            notes.append(
                f"{names}: left whole: code wants their number to follow that of units of another "
                "kind, which are ignored or not among the kinds to prune"
            )
            continue
        values = [importance(trainable, g, scores) for g in bundle[1]]
        if any(value is None for value in values):
            notes.append(f"{names}: left whole: nothing in its group is trainable")
            continue
        members = tuple(
            Member(g, value, bundle[0][g.axis.root()])
            for g, value in zip(bundle[1], values, strict=True)
            if value is not None
        )
        matching = (r for p, r in ratios.items() for g in bundle[1] if fnmatchcase(g.layer, p))
        result.append(
            Candidate(
                members,
                _step_importance(members),
                max(min((m.group.units - min_units) // m.per_step for m in members), 0),
                round_to,
                next(matching, None),
            )
        )
    return result, notes


def _bundles(traced: Trace, found: Sequence[Group]) -> list[tuple[Mapping[Axis, int], list[Group]]]:
    """Return the groups that lose units in step, with the units that each axis loses."""
    result: list[tuple[Mapping[Axis, int], list[Group]]] = []
    seen: set[int] = set()
    for group in found:
        axis = group.axis.root()
        bundle = next((b for b in traced.bundles if axis in b), {axis: 1})
        if id(bundle) in seen:
            continue
        seen.add(id(bundle))
        result.append((bundle, [g for g in found if g.axis.root() in bundle]))
    return result


def _step_importance(members: Sequence[Member]) -> Tensor:
    """Return the importance that each step takes, if every group loses its worst units first."""
    steps = min(m.group.units // m.per_step for m in members)
    ranked = [
        m.importance.sort().values[: steps * m.per_step].reshape(steps, m.per_step).sum(1)
        for m in members
    ]
    return torch.stack(ranked).sum(0)
