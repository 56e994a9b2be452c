"""The mildest removal of units that meets a target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from spamprune.errors import PruningError
from spamprune.pruning import cost
from spamprune.pruning.assemble import assemble
from spamprune.pruning.axes.axis import Axis
from spamprune.pruning.axes.trace import Trace
from spamprune.pruning.candidates import Candidate, Counts
from spamprune.pruning.compaction import Plan, Ranking, apply, masked
from spamprune.pruning.evidence import STEPS, Evidence, choose
from spamprune.pruning.masks import Masks
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
        self.ranking = ranking
        self.order = _order(candidates, ranking, self._savings())
        self.notes: list[str] = []

    def run(self) -> tuple[Counts, float]:
        """Return how many units go from each layer, and what that achieves."""
        key, wanted = self.target.named()
        if key == "ratio":
            counts = self.counts(self._count_for_ratio(wanted))
            achieved = sum(counts.values()) / sum(
                m.group.units for c in self.candidates for m in c.members
            )
            self._check_any(counts)
            return counts, achieved
        if self.target.evidence is not None:
            return self._most_evidence(self.target.evidence)
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
        if high > 0 and achieved < wanted * (1 - TOLERANCE) and self.ranking != "uniform":
            counts, achieved = self._give_back(high, wanted)
        if achieved < wanted * (1 - TOLERANCE):
            self.notes.append(f"{key}: {achieved:.4f} is the nearest step below {wanted}")
        return counts, achieved

    def _most_evidence(self, evidence: Evidence) -> tuple[Counts, float]:
        """Return the removal of most evidence along the order, and how much it gains in nats."""

        def prune(taken: int) -> tuple[nn.Module, Masks]:
            plan = self._chosen(self.counts(taken)).plan(None)
            masks = {n: torch.ones_like(s, dtype=torch.bool) for n, s in evidence.shares.items()}
            for cut in plan.cuts:
                if cut.tensor in masks:
                    gone = torch.tensor(cut.gone, device=masks[cut.tensor].device)
                    masks[cut.tensor].index_fill_(cut.dim, gone, False)
            # where norms see the mask's zeros, only the small network has its own loss
            return (masked if plan.comparable else apply)(self.model, plan), masks

        low, high = 0, len(self.order) + 1
        while high - low > 1:  # as long as no fewer weights are left than the data determine
            middle = (low + high) // 2
            left = self._cost(kept(self.candidates, self.counts(middle)))
            low, high = (middle, high) if left >= evidence.effective else (low, middle)
        steps = dict.fromkeys(round(j * low / STEPS) for j in range(STEPS + 1))
        choice = choose(evidence, list(steps), prune)
        self.notes += choice.notes
        return self.counts(choice.step), choice.change

    def _chosen(self, counts: Counts) -> Chosen:
        return Chosen(
            self.model, self.traced, self.candidates, counts, self.ranking, self.target, 0
        )

    def _give_back(self, taken: int, wanted: float) -> tuple[Counts, float]:
        """Return the mildest removal where the last unit taken overshot the budget by far.

        Its layer loses what it must, and of what went before it from the other layers the best
        comes back. So a costly unit does not cost all the cheap ones that were tried in its stead.
        """
        _, layer = self.order[taken - 1]
        least = sum(i == layer for _, i in self.order[:taken])
        low, high = -1, taken
        counts, achieved = self.counts(taken), self.remaining(self.counts(taken))
        while high - low > 1:
            middle = (low + high) // 2
            milder = self.counts(middle, {layer: least})
            remaining = self.remaining(milder)
            if remaining <= wanted:
                high, counts, achieved = middle, milder, remaining
            else:
                low = middle
        return counts, achieved

    def check(self) -> None:
        """Raise unless there are scores by which the target can be met; those at hand are any."""
        if self.target.ratio is not None:
            taken = self._count_for_ratio(self.target.ratio)
            # which layers lose them, unless all do, is for the scores to say
            most = 0 if self.ranking == "uniform" else taken
            self._check_any(self.counts(taken, dict.fromkeys(range(len(self.candidates)), most)))
        elif self.target.evidence is None:
            self.check_floor()

    def _check_any(self, counts: Counts) -> None:
        """Raise if a ratio above zero removes nothing."""
        if self.target.ratio and not any(counts.values()):
            raise PruningError(
                f"ratio {self.target.ratio} removes no unit: {self._ways_out('ask for more')}"
            )

    def _ways_out(self, another: str) -> str:
        """Return what could be changed: settings by which units stay, or for ``another`` target."""
        ways = {
            "change ratios": any(c.ratio is not None for c in self.candidates),
            "lower min_units": any(c.most < c.steps - 1 for c in self.candidates),
            "lower round_to": any(c.round_to > 1 for c in self.candidates),
            another: any(c.ratio is None for c in self.candidates),
        }
        return " or ".join(way for way, helps in ways.items() if helps)

    def check_floor(self) -> float:
        """Return what remains with every layer at its minimum; raise unless it fits the budget."""
        key, wanted = self.target.named()
        floor = self.remaining(self.counts(len(self.order)))
        if floor > wanted:
            raise PruningError(
                f"{key}: {wanted} cannot be reached: with every layer at its minimum {floor:.4f} "
                f"remains; {self._ways_out('ask for less')}"
            )
        return floor

    def counts(self, taken: int, least: Mapping[int, int] | None = None) -> Counts:
        """Return how many units go from each layer when the first ``taken`` of the order do.

        Args:
            taken: How many steps of the order.
            least: Candidate → how many steps it takes at least.
        """
        wanted = dict.fromkeys(range(len(self.candidates)), 0)
        for _, i in self.order[:taken]:
            wanted[i] += 1
        for i, steps in (least or {}).items():
            wanted[i] = max(wanted[i], steps)
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
        small = apply(self.model, self._chosen(counts).plan(None))
        # both are timed each time, since machines slow down and recover
        return cost.latency(small, self.example) / cost.latency(self.model, self.example)

    def _savings(self) -> list[float]:
        """Return what the first step of each candidate saves of the dense network's cost."""
        if self.ranking != "per_cost" or self.target.ratio is not None:
            return [1.0] * len(self.candidates)  # the cost of a unit is one unit
        savings: list[float] = []
        for c in self.candidates:
            step = {m.group.layer: m.per_step for m in c.members}
            saved = self._dense - self._cost(kept([c], step))
            savings.append(saved)
        return savings

    @cached_property
    def _dense(self) -> int:
        return self._cost({})

    @cached_property
    def _weights(self) -> dict[str, int]:
        """What an entry of each tensor counts: one, or its bytes."""
        parameters = dict(self.model.named_parameters())
        if self.target.evidence is not None:  # frozen ones are not the posterior's to count
            return dict.fromkeys(self.target.evidence.shares, 1)
        if self.target.bytes is None:
            return dict.fromkeys(parameters, 1)
        tensors = {**parameters, **dict(self.model.named_buffers())}
        return {name: t.element_size() for name, t in tensors.items()}

    def _cost(self, left: Mapping[Axis, int]) -> int:
        """Return what the network costs where axes keep what is ``left``."""
        if self.target.macs is not None or self.target.latency is not None:
            return self.traced.macs(left)
        return sum(self.traced.numel(name, left) * n for name, n in self._weights.items())


def _order(
    candidates: Sequence[Candidate], ranking: Ranking, savings: Sequence[float]
) -> list[tuple[float, int]]:
    """Return ``(priority, candidate)`` in the order in which units are removed, worst first.

    The priority is the importance for a global ranking, divided by what the unit saves for one per
    cost (what saves nothing goes last), the fraction of its layer that is gone with the unit for a
    uniform one, the fraction of its kind of group for an isomorphic one.
    """
    entries: list[tuple[float, int]] = []
    for i, c in enumerate(candidates):
        if c.ratio is not None:
            continue
        steps = c.steps
        entries += [
            ((rank + 1) / steps if ranking == "uniform" else _ratio(value, savings[i]), i)
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
        if c.ratio is None:
            totals[c.shape] = totals.get(c.shape, 0) + c.steps
    return sorted(
        ((rank + 1) / totals[shape], i)
        for shape, members in shapes.items()
        for rank, i in enumerate(members)
    )


def _ratio(value: float, saved: float) -> float:
    return value / saved if saved else math.inf


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
