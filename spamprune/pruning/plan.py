"""Choosing which units to remove so that a network becomes as small as asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from spamprune.bayes.parameters import named_parameters
from spamprune.errors import PruningError, nearest
from spamprune.pruning import cost, trial
from spamprune.pruning.assemble import assemble
from spamprune.pruning.axes.axis import Axis
from spamprune.pruning.axes.trace import Trace, trace
from spamprune.pruning.compaction import Plan, Ranking, apply
from spamprune.pruning.units import DEFAULT_KINDS, Group, Kind, Scores, groups, importance

#: A plan that ends further below its budget than this, relatively, says so in its notes.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Target:
    """How small the network should become; exactly one field is given.

    Attributes:
        ratio: Fraction of units removed, in [0, 1).
        macs: Fraction of multiply-accumulates that may remain, in (0, 1).
        params: Fraction of parameters that may remain, in (0, 1).
        bytes: Fraction of the parameters' and buffers' bytes that may remain, in (0, 1).
        latency: Fraction of the time of a forward pass of the example that may remain, in (0, 1),
            measured where the model is.
    """

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        """Refuse none or several fields, and values out of range."""
        given = {k: v for k, v in asdict(self).items() if v is not None}
        if len(given) != 1:
            valid = ", ".join(asdict(self))
            raise PruningError(f"a target is one of {valid}, not {given or 'nothing'}")
        ((key, value),) = given.items()
        if not (0 <= value < 1) or (key != "ratio" and value == 0):
            raise PruningError(f"target {key}={value} is out of range: a fraction below 1")

    def named(self) -> tuple[str, float]:
        """Return the field that is given, and its value."""
        ((key, value),) = ((k, v) for k, v in asdict(self).items() if v is not None)
        return key, value


@dataclass(frozen=True)
class _Member:
    """A group, the importance of its units, and how many of them go in each step."""

    group: Group
    importance: Tensor
    per_step: int = 1


@dataclass(frozen=True)
class _Candidate:
    """Groups that lose units in step; nearly always one, unit by unit.

    Attributes:
        members: The groups.
        importance: Of each step, in the order in which they are taken.
        most: How many steps may be taken.
        round_to: Channels that remain are a multiple of this.
        ratio: The fraction that the user set, if any.
    """

    members: tuple[_Member, ...]
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


def plan(
    model: nn.Module,
    example: Tensor,
    scores: Scores,
    target: Target,
    *,
    ranking: Ranking = "uniform",
    kinds: Sequence[Kind] = DEFAULT_KINDS,
    ratios: Mapping[str, float] | None = None,
    min_units: int = 1,
    round_to: int = 1,
    ignored: Iterable[str] = (),
) -> Plan:
    """Choose the units to remove.

    ``uniform`` removes ``int(ratio · n)`` of the n units of each layer (the paper's); ``global``
    lets all units compete by importance, ``isomorphic`` those of groups that hold the same kinds of
    layers (Fang et al. 2024). A budget is met by the mildest pruning that fits it. The pruned
    network is tried on ``example``: a group without whose units it fails is left whole, and the
    plan's notes say so. Whether the numbers are right is for :func:`verify` to say.

    Args:
        model: The trained network; it is left as it is.
        example: An input batch, ``(1, ...)`` for costs of one sample.
        scores: A score for every trainable parameter, by name, or :class:`BlockOPD`.
        target: How small.
        ranking: How units are compared.
        kinds: Which kinds of units may go.
        ratios: Fractions of units that go from layers of these names or patterns, whatever the
            target asks of the others; the first that matches counts.
        min_units: Units that each layer keeps at least.
        round_to: Channels that remain in each layer are a multiple of this.
        ignored: Names of layers, or patterns, whose outputs stay. Outputs of the network always do.

    Raises:
        PruningError: The network cannot be followed, there is nothing to prune, the ratio is too
            small to remove a unit, or the budget cannot be reached.
        PosteriorError: The scores do not fit the network.
    """
    traced = trace(model, example)
    found, notes = groups(model, traced, kinds=kinds, ignored=ignored)
    candidates, more = _candidates(model, traced, found, scores, min_units, round_to, ratios or {})
    notes += more
    while True:
        if not candidates:
            why = "; ".join(notes) or "it has no layers with units"
            raise PruningError(f"nothing of {type(model).__name__} can be pruned: {why}")
        search = _Search(model, example, traced, candidates, ranking, target)
        counts, achieved = search.run()
        wanted = _Wanted(model, traced, candidates, counts, ranking, target, achieved)
        whole, parts = wanted.plan(None), wanted.parts()
        prune = partial(_prune, wanted, whole, parts)
        broken = trial.broken(example, traced.outputs, parts, prune)
        if not broken:
            floors = _floors(candidates, counts)
            return replace(whole, notes=(*notes, *search.notes, *floors))
        notes += [
            f"{m.group.layer}: left whole: {broken[c.name]}"
            for c in candidates
            for m in c.members
            if c.name in broken
        ]
        candidates = [c for c in candidates if c.name not in broken]


def _prune(wanted: _Wanted, whole: Plan, parts: Sequence[str], chosen: Sequence[str]) -> nn.Module:
    """Return the network without the units of some parts."""
    return apply(wanted.model, whole if chosen == parts else wanted.plan(chosen))


def check_reachable(
    model: nn.Module,
    example: Tensor,
    targets: Iterable[Target],
    *,
    ranking: Ranking = "uniform",
    kinds: Sequence[Kind] = DEFAULT_KINDS,
    ratios: Mapping[str, float] | None = None,
    min_units: int = 1,
    round_to: int = 1,
    ignored: Iterable[str] = (),
) -> None:
    """Check on an untrained network that plans for all ``targets`` exist.

    Args:
        model: A network of the architecture to be pruned.
        example: An input batch ``(1, ...)``.
        targets: How small.
        ranking: See :func:`plan`.
        kinds: See :func:`plan`.
        ratios: See :func:`plan`.
        min_units: See :func:`plan`.
        round_to: See :func:`plan`.
        ignored: See :func:`plan`.

    Raises:
        PruningError: As :func:`plan` would.
    """
    traced = trace(model, example)
    found, notes = groups(model, traced, kinds=kinds, ignored=ignored)
    anything = {name: p.detach().abs() for name, p in model.named_parameters()}
    candidates, _ = _candidates(model, traced, found, anything, min_units, round_to, ratios or {})
    if not candidates:
        why = "; ".join(notes) or "it has no layers with units"
        raise PruningError(f"nothing of {type(model).__name__} can be pruned: {why}")
    for target in targets:
        if target.ratio is None:
            _Search(model, example, traced, candidates, ranking, target).check_floor()


def _candidates(
    model: nn.Module,
    traced: Trace,
    found: Sequence[Group],
    scores: Scores,
    min_units: int,
    round_to: int,
    ratios: Mapping[str, float],
) -> tuple[list[_Candidate], list[str]]:
    """Return the groups that can lose units, and notes on the others."""
    for pattern, ratio in ratios.items():
        if not 0 <= ratio < 1:
            raise PruningError(f"ratio {ratio} of {pattern!r} is out of range: a fraction below 1")
        if not any(fnmatchcase(g.layer, pattern) for g in found):
            hint = nearest(pattern, [g.layer for g in found])
            raise PruningError(f"no layer to prune is called {pattern!r}: {hint}")
    candidates, notes = [], []
    trainable = named_parameters(model)
    for bundle in _bundles(traced, found):
        present = {g.axis.root(): g for g in bundle[1]}
        names = ", ".join(g.layer for g in bundle[1][:3])
        if len(present) < len(bundle[0]):
            notes.append(f"{names}: left whole: its number must follow another that stays")
            continue
        values = [importance(trainable, g, scores) for g in bundle[1]]
        if any(value is None for value in values):
            notes.append(f"{names}: left whole: nothing in its group is trainable")
            continue
        members = tuple(
            _Member(g, value, bundle[0][g.axis.root()])
            for g, value in zip(bundle[1], values, strict=True)
            if value is not None
        )
        matching = (r for p, r in ratios.items() for g in bundle[1] if fnmatchcase(g.layer, p))
        candidates.append(
            _Candidate(
                members,
                _step_importance(members),
                max(min((m.group.units - min_units) // m.per_step for m in members), 0),
                round_to,
                next(matching, None),
            )
        )
    return candidates, notes


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


def _step_importance(members: Sequence[_Member]) -> Tensor:
    """Return the importance that each step takes, if every group loses its worst units first."""
    steps = min(m.group.units // m.per_step for m in members)
    ranked = [
        m.importance.sort().values[: steps * m.per_step].reshape(steps, m.per_step).sum(1)
        for m in members
    ]
    return torch.stack(ranked).sum(0)


Counts = dict[str, int]


class _Search:
    """The mildest removal, along one order of all units, that meets a target."""

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        traced: Trace,
        candidates: Sequence[_Candidate],
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
        self.check_floor()
        low, high = -1, len(self.order)
        while high - low > 1:
            middle = (low + high) // 2
            if self.remaining(self.counts(middle)) <= wanted:
                high = middle
            else:
                low = middle
        counts = self.counts(high)
        achieved = self.remaining(counts)
        if achieved < wanted * (1 - TOLERANCE):
            self.notes.append(f"{key}: {achieved:.4f} is the nearest step below {wanted}")
        return counts, achieved

    def check_floor(self) -> None:
        """Raise unless the network with every layer at its minimum fits the budget."""
        key, wanted = self.target.named()
        floor = self.remaining(self.counts(len(self.order)))
        if floor > wanted:
            raise PruningError(
                f"{key}: {wanted} cannot be reached: with every layer at its minimum {floor:.4f} "
                "remains; lower min_units or ask for less"
            )

    def counts(self, taken: int) -> Counts:
        """Return how many units go from each layer when the first ``taken`` of the order do."""
        wanted = dict.fromkeys(range(len(self.candidates)), 0)
        for _, i in self.order[:taken]:
            wanted[i] += 1
        counts: Counts = {}
        for i, c in enumerate(self.candidates):
            steps = wanted[i] if c.ratio is None else int(c.ratio * c.steps + _SLACK)
            counts |= c.removed(steps)
        return counts

    def _count_for_ratio(self, ratio: float) -> int:
        if self.ranking == "uniform":
            return sum(priority <= ratio + _SLACK for priority, _ in self.order)
        free = sum(c.steps for c in self.candidates if c.ratio is None)
        return min(int(ratio * free + _SLACK), len(self.order))

    def remaining(self, counts: Counts) -> float:
        """Return the fraction of the cost that remains."""
        key, _ = self.target.named()
        kept = _kept(self.candidates, counts)
        if key == "macs":
            return self.traced.macs(kept) / self.traced.macs({})
        if key in ("params", "bytes"):
            return self._size(key, kept) / self._size(key, {})
        wanted = _Wanted(
            self.model, self.traced, self.candidates, counts, self.ranking, self.target, 0
        )
        small = apply(self.model, wanted.plan(None))
        return cost.latency(small, self.example) / self._dense_latency()

    def _size(self, key: str, kept: Mapping[Axis, int]) -> int:
        tensors = dict(self.model.named_parameters())
        if key == "bytes":
            tensors |= dict(self.model.named_buffers())  # type: ignore[arg-type]
        return sum(
            self.traced.numel(name, kept) * (t.element_size() if key == "bytes" else 1)
            for name, t in tensors.items()
        )

    def _dense_latency(self) -> float:
        if not hasattr(self, "_latency"):
            self._latency = cost.latency(self.model, self.example)
        return self._latency


_SLACK = 1e-9  # 0.29 · 100 is 28.999… in floating point


def _order(candidates: Sequence[_Candidate], ranking: Ranking) -> list[tuple[float, int]]:
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


def _kept(candidates: Iterable[_Candidate], counts: Counts) -> dict[Axis, int]:
    return {
        m.group.axis.root(): m.group.units - counts[m.group.layer]
        for c in candidates
        for m in c.members
        if counts[m.group.layer]
    }


def _floors(candidates: Iterable[_Candidate], counts: Counts) -> list[str]:
    """Return notes on layers that cannot lose another unit."""
    notes = []
    for c in candidates:
        if c.ratio is not None:
            continue
        for layer, most in c.removed(c.steps).items():
            units = next(m.group.units for m in c.members if m.group.layer == layer)
            if counts[layer] >= most:
                notes.append(f"{layer}: at its minimum, {units - counts[layer]} of {units} units")
    return notes


@dataclass(frozen=True)
class _Wanted:
    """The units that a search chose, from which plans for all or some of the groups are made."""

    model: nn.Module
    traced: Trace
    candidates: Sequence[_Candidate]
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
        return replace(
            assemble(self.model, self.traced, groups, pruned),
            ranking=self.ranking,
            target={key: value},
            achieved={key: self.achieved},
        )
