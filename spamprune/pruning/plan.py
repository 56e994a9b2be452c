"""Choosing which units to remove so that a network becomes as small as asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import get_args

from torch import Tensor, nn

from spamprune.copies import copied
from spamprune.errors import PruningError
from spamprune.pruning import trial
from spamprune.pruning.axes.trace import Trace, trace
from spamprune.pruning.candidates import Candidate, find
from spamprune.pruning.compaction import Plan, Ranking, apply
from spamprune.pruning.search import Chosen, Search, floors
from spamprune.pruning.target import Target
from spamprune.pruning.units import DEFAULT_KINDS, KINDS, Kind, Scores, groups

__all__ = ["Target", "check_reachable", "plan"]


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
    layers (Fang et al. 2024), ``per_cost`` all by importance over what the layer's first unit saves
    of the budget's cost (of the MACs for a latency): the greedy answer to a knapsack. A budget is
    met by the mildest pruning that fits it. The pruned
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
        PruningError: An argument is not legal, the network cannot be followed or copied, there is
            nothing to prune, the ratio is too small to remove a unit, or the budget cannot be
            reached.
        PosteriorError: The scores do not fit the network.
    """
    _check(ranking, kinds, min_units, round_to, ignored)
    if not isinstance(target, Target):
        raise PruningError(f"target {target!r} is no Target: give for example Target(ratio=0.5)")
    if target.evidence is not None and target.evidence.model is not model:
        raise PruningError(
            "the target's evidence is of another network: make it of the one to be pruned, with "
            "spamprune.Evidence(model, posterior, data)"
        )
    traced = trace(model, example)
    copied(model)  # pruned ones are, and those that cannot be are to say so once
    found, notes = groups(model, traced, kinds=kinds, ignored=ignored)
    candidates, more = find(model, traced, found, scores, min_units, round_to, ratios or {})
    notes += more
    if target.latency is not None or target.evidence is not None:
        # the search itself runs pruned networks
        candidates, more = _that_run(model, example, traced, candidates)
        notes += more
    while True:
        _check_any(model, candidates, notes)
        search = Search(model, example, traced, candidates, ranking, target)
        counts, achieved = search.run()
        wanted = Chosen(model, traced, candidates, counts, ranking, target, achieved)
        whole, candidates, more = _tried(wanted, example)
        if not more:
            return replace(whole, notes=(*notes, *search.notes, *floors(candidates, counts)))
        notes += more


def _check(
    ranking: str, kinds: Sequence[str], min_units: int, round_to: int, ignored: Iterable[str]
) -> None:
    for name, names in {"kinds": kinds, "ignored": ignored}.items():
        if isinstance(names, str):  # which would be taken letter by letter
            raise PruningError(f"{name} is one string, {names!r}: give a list, [{names!r}]")
    given = [(ranking, get_args(Ranking), "ranking"), *((kind, KINDS, "kind") for kind in kinds)]
    for value, known, what in given:
        if value not in known:
            raise PruningError(f"no {what} {value!r}: one of {', '.join(known)}")
    for name, number in {"min_units": min_units, "round_to": round_to}.items():
        if number < 1:
            raise PruningError(f"{name} is {number}, and must be at least 1")


def _that_run(
    model: nn.Module, example: Tensor, traced: Trace, candidates: list[Candidate]
) -> tuple[list[Candidate], list[str]]:
    """Leave out candidates without half of whose units the network fails; return notes on them."""
    notes: list[str] = []
    while True:
        search = Search(model, example, traced, candidates, "uniform", Target(ratio=0.5))
        counts = search.counts(len(search.order) // 2)
        half = Chosen(model, traced, candidates, counts, "uniform", search.target, 0)
        _, candidates, more = _tried(half, example)
        if not more:
            return candidates, notes
        notes += more


def _tried(wanted: Chosen, example: Tensor) -> tuple[Plan, list[Candidate], list[str]]:
    """Return a plan, the candidates without which the network runs, and notes on the others."""
    whole, parts = wanted.plan(None), wanted.parts()
    prune = partial(_prune, wanted, whole, parts)
    broken = trial.broken(example, wanted.traced, parts, prune)
    notes = [
        f"{m.group.layer}: left whole: {broken[c.name]}"
        for c in wanted.candidates
        for m in c.members
        if c.name in broken
    ]
    return whole, [c for c in wanted.candidates if c.name not in broken], notes


def _check_any(model: nn.Module, candidates: Sequence[Candidate], notes: Sequence[str]) -> None:
    if not candidates:
        why = "; ".join(notes) or "it has no layers with units"
        raise PruningError(f"nothing of {type(model).__name__} can be pruned: {why}")


def _prune(wanted: Chosen, whole: Plan, parts: Sequence[str], chosen: Sequence[str]) -> nn.Module:
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
    _check(ranking, kinds, min_units, round_to, ignored)
    traced = trace(model, example)
    copied(model)  # pruned ones are, and those that cannot be are to say so once
    found, notes = groups(model, traced, kinds=kinds, ignored=ignored)
    anything = {name: p.detach().abs() for name, p in model.named_parameters()}
    candidates, more = find(model, traced, found, anything, min_units, round_to, ratios or {})
    _check_any(model, candidates, [*notes, *more])
    for target in targets:
        tried = candidates
        if target.latency is not None:  # which runs pruned networks
            tried, more = _that_run(model, example, traced, candidates)
            _check_any(model, tried, more)
        Search(model, example, traced, tried, ranking, target).check()
