"""The mildest removal of units that meets a target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from spamprune.errors import PruningError
from spamprune.pruning import cost
from spamprune.pruning.assemble import assemble
from spamprune.pruning.axes.axis import Axis
from spamprune.pruning.axes.trace import Trace
from spamprune.pruning.candidates import Candidate, Counts
from spamprune.pruning.compaction import Plan, Ranking, apply
from spamprune.pruning.target import Target

#: A plan that ends further below its budget than this, relatively, says so in its notes.
TOLERANCE = 0.02
SLACK = 1e-9  # 0.29 · 100 is 28.999… in floating point


class Search:
    """The mildest removal, along one order of all units, that meets a target."""

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        traced: Trace,
        candidates: Sequence[Candidate],
        ranking: Ranking,
        target: Target,
    ):
        self.model, self.example, self.traced = model, example, traced
        self.candidates, self.target = candidates, target
        self.order = _order(candidates, ranking)
        self.ranking = ranking
        self.notes: list[str] = []

    def run(self) -> tuple[Counts, float]:
        """Return how many units go from each layer, and what that achieves."""
        key, wanted = self.target.named()
        if key == "ratio":
            counts = self.counts(self._count_for_ratio(wanted))
            achieved = sum(counts.values()) / sum(
                m.group.units for c in self.candidates for m in c.members
            )
            if wanted and not any(counts.values()) and any(c.most for c in self.candidates):
                raise PruningError(
                    f"ratio {wanted} removes no unit: its layers are too narrow for it"
                )
            return counts, achieved
        achieved = self.check_floor()
        low, high = -1, len(self.order)
        while high - low > 1:
            middle = (low + high) // 2
            remaining = self.remaining(self.counts(middle))
            if remaining <= wanted:
                high, achieved = middle, remaining
            else:
                low = middle
        counts = self.counts(high)
        if achieved < wanted * (1 - TOLERANCE):
            self.notes.append(f"{key}: {achieved:.4f} is the nearest step below {wanted}")
        return counts, achieved

    def check_floor(self) -> float:
        """Return what remains with every layer at its minimum; raise unless it fits the budget."""
        key, wanted = self.target.named()
        floor = self.remaining(self.counts(len(self.order)))
        if floor > wanted:
            raise PruningError(
                f"{key}: {wanted} cannot be reached: with every layer at its minimum {floor:.4f} "
                "remains; lower min_units or ask for less"
            )
        return floor

    def counts(self, taken: int) -> Counts:
        """Return how many units go from each layer when the first ``taken`` of the order do."""
        wanted = dict.fromkeys(range(len(self.candidates)), 0)
        for _, i in self.order[:taken]:
            wanted[i] += 1
        counts: Counts = {}
        for i, c in enumerate(self.candidates):
            steps = wanted[i] if c.ratio is None else int(c.ratio * c.steps + SLACK)
            counts |= c.removed(steps)
        return counts

    def _count_for_ratio(self, ratio: float) -> int:
        if self.ranking == "uniform":
            return sum(priority <= ratio + SLACK for priority, _ in self.order)
        free = sum(c.steps for c in self.candidates if c.ratio is None)
        return min(int(ratio * free + SLACK), len(self.order))

    def remaining(self, counts: Counts) -> float:
        """Return the fraction of the cost that remains."""
        key, _ = self.target.named()
        if key != "latency":
            return self._cost(kept(self.candidates, counts)) / self._dense
        wanted = Chosen(
            self.model, self.traced, self.candidates, counts, self.ranking, self.target, 0
        )
        small = apply(self.model, wanted.plan(None))
        # both are timed each time, since machines slow down and recover
        return cost.latency(small, self.example) / cost.latency(self.model, self.example)

    @cached_property
    def _dense(self) -> int:
        return self._cost({})

    @cached_property
    def _weights(self) -> dict[str, int]:
        """What an entry of each tensor counts: one, or its bytes."""
        parameters = dict(self.model.named_parameters())
        if self.target.bytes is None:
            return dict.fromkeys(parameters, 1)
        tensors = {**parameters, **dict(self.model.named_buffers())}
        return {name: t.element_size() for name, t in tensors.items()}

    def _cost(self, left: Mapping[Axis, int]) -> int:
        """Return what the network costs where axes keep what is ``left``."""
        if self.target.macs is not None:
            return self.traced.macs(left)
        return sum(self.traced.numel(name, left) * n for name, n in self._weights.items())


def _order(candidates: Sequence[Candidate], ranking: Ranking) -> list[tuple[float, int]]:
    """Return ``(priority, candidate)`` in the order in which units are removed, worst first.

    The priority is the importance for a global ranking, the fraction of its layer that is gone
    with the unit for a uniform one, the fraction of its kind of group for an isomorphic one.
    """
    entries: list[tuple[float, int]] = []
    for i, c in enumerate(candidates):
        if c.ratio is not None:
            continue
        steps = c.steps
        entries += [
            (value if ranking != "uniform" else (rank + 1) / steps, i)
            for rank, value in enumerate(c.importance.tolist()[: c.most])
        ]
    entries.sort()
    if ranking != "isomorphic":
        return entries
    shapes: dict[tuple[object, ...], list[int]] = {}
    for _, i in entries:
        shapes.setdefault(candidates[i].shape, []).append(i)
    totals: dict[tuple[object, ...], int] = {}
    for c in candidates:
        totals[c.shape] = totals.get(c.shape, 0) + c.steps
    return sorted(
        ((rank + 1) / totals[shape], i)
        for shape, members in shapes.items()
        for rank, i in enumerate(members)
    )


def kept(candidates: Iterable[Candidate], counts: Counts) -> dict[Axis, int]:
    """Return how many positions each axis keeps, for those that lose some."""
    return {
        m.group.axis.root(): m.group.units - counts[m.group.layer]
        for c in candidates
        for m in c.members
        if counts[m.group.layer]
    }


def floors(candidates: Iterable[Candidate], counts: Counts) -> list[str]:
    """Return notes on layers that cannot lose another unit."""
    notes = []
    for c in candidates:
        if c.ratio is not None:
            continue
        if not any(c.removed(c.steps).values()) and len(c.members) > 1:
            steps = ", ".join(f"{m.per_step} of {m.group.layer}" for m in c.members[:3])
            notes.append(f"{c.name}: left whole: units can only go in step, {steps}, at a time")
            continue
        for layer, most in c.removed(c.steps).items():
            units = next(m.group.units for m in c.members if m.group.layer == layer)
            if counts[layer] >= most:
                notes.append(f"{layer}: at its minimum, {units - counts[layer]} of {units} units")
    return notes


@dataclass(frozen=True)
class Chosen:
    """The units that a search chose, from which plans for all or some of the groups are made."""

    model: nn.Module
    traced: Trace
    candidates: Sequence[Candidate]
    counts: Counts
    ranking: Ranking
    target: Target
    achieved: float

    def parts(self) -> list[str]:
        """Return the candidates that lose units."""
        return [
            c.name for c in self.candidates if any(self.counts[m.group.layer] for m in c.members)
        ]

    def plan(self, only: Iterable[str] | None) -> Plan:
        """Return the plan for the candidates in ``only``, None for all."""
        chosen = None if only is None else set(only)
        pruned = {}
        for c in self.candidates:
            for m in c.members:
                wanted = chosen is None or c.name in chosen
                worst = m.importance.argsort(stable=True)[: self.counts[m.group.layer] * wanted]
                pruned[m.group.layer] = tuple(sorted(worst.tolist()))
        groups = [m.group for c in self.candidates for m in c.members]
        key, value = self.target.named()
        return assemble(
            self.model,
            self.traced,
            groups,
            pruned,
            ranking=self.ranking,
            target={key: value},
            achieved={key: self.achieved},
        )
