"""What the figures and tables show: results grouped by what was done, spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from spamprune.report.results import Cell, Compacted, GradualCut, Masked, Quality, Results

Stage = Literal["pruned", "finetuned", "scratch"]
STAGES: dict[Stage, str] = {  # in words, in the order of time
    "pruned": "just pruned",
    "finetuned": "fine-tuned",
    "scratch": "from scratch",
}
COST_FIELDS = ("params", "macs", "bytes")  # fields of a size
MaskedSeries = dict[tuple[str, str], dict[float, list[Quality]]]

TOLERANCE = 1.0  # points of accuracy that a headline may lose


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and its standard error where there are at least two."""

    mean: float
    error: float | None


def spread(values: Iterable[float]) -> Spread:
    """Return the mean of ``values`` (at least one) and its standard error."""
    values = list(values)
    mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
    if len(values) < 2 or math.isnan(mean):
        return Spread(mean, None)
    return Spread(mean, statistics.stdev(values) / math.sqrt(len(values)))


def spread_of(qualities: Sequence[Quality], metric: str) -> Spread:
    """Return the spread of one field of several measurements."""
    return spread(getattr(quality, metric) for quality in qualities)


def trainings(results: Results) -> dict[str, list[Cell]]:
    """Return the cells of each training, in the order of the results."""
    groups: dict[str, list[Cell]] = {}
    for cell in results.cells:
        groups.setdefault(cell.training, []).append(cell)
    return groups


def during(cells: Sequence[Cell]) -> bool:
    """Return whether networks were pruned while they were trained."""
    return any(cell.online or cell.gradual or cell.artifact for cell in cells)


def trained_whole(results: Results) -> Results:
    """Return the results of those trainings that pruned nothing."""
    cells = [c for group in trainings(results).values() if not during(group) for c in group]
    return results.model_copy(update={"cells": cells})


def dense(cells: Sequence[Cell], metric: str) -> Spread:
    """Return the spread of one field of the trained networks' quality."""
    return spread_of([cell.dense for cell in cells], metric)


def cost(sized: Iterable[Cell | Compacted | GradualCut], field: str) -> float:
    """Return a field of the size on average: what is cut in training differs between seeds."""
    return spread(getattr(one.size, field) for one in sized).mean


def unstructured_experiments(results: Results) -> list[int]:
    """Return the positions in the recipe of the unstructured experiments that have results."""
    return sorted({m.experiment for cell in results.cells for m in cell.masked})


def overshot(cell: Cell, masked: Masked) -> bool:
    """Return whether training had pruned more than the sparsity asked for, beyond rounding."""
    return (masked.achieved - masked.requested) * cell.size.params > 1


def beyond(results: Results, experiment: int) -> str:
    """Return what a dash stands for in an experiment's tables by sparsity, if training left any."""
    left_out = any(
        masked.experiment == experiment and overshot(cell, masked)
        for cell in results.cells
        for masked in cell.masked
    )
    return "–: training had already pruned more than that." if left_out else ""


def step_by_step(results: Results, experiment: int) -> str:
    """Return what is to be said of an iterative experiment's networks; nothing of others."""
    records: list[Masked | Compacted] = []
    for cell in results.cells:
        records += [*cell.masked, *cell.compacted]
    if not any(r.experiment == experiment and r.schedule == "iterative" for r in records):
        return ""
    return "Iterative: each network was pruned from the fine-tuned one before it."


def masked_series(results: Results, experiment: int, stage: Stage) -> MaskedSeries:
    """Return what masks did: (training, criterion) → sparsity → one measurement per seed.

    A sparsity that training had gone beyond is left out: no network has it.
    """
    series: MaskedSeries = {}
    for cell in results.cells:
        for masked in cell.masked:
            quality: Quality | None = getattr(masked, stage)
            asked = masked.chosen is None  # else a sparsity of its own for each seed
            here = masked.experiment == experiment and asked and not overshot(cell, masked)
            if here and quality is not None:
                points = series.setdefault((cell.training, criterion_of(masked)), {})
                points.setdefault(masked.requested, []).append(quality)
    return {key: dict(sorted(points.items())) for key, points in series.items()}


def masked_stages(results: Results, experiment: int) -> list[Stage]:
    """Return the stages at which an experiment's masks of given sparsities were measured."""
    stages: tuple[Stage, ...] = ("pruned", "finetuned")
    return [stage for stage in stages if masked_series(results, experiment, stage)]


def by_evidence(
    results: Results, experiment: int, stage: Stage
) -> dict[tuple[str, str], tuple[float, list[Quality]]]:
    """Return, by training and criterion, the mean sparsity that the evidence chose, and quality."""
    found: dict[tuple[str, str], list[tuple[float, Quality]]] = {}
    for cell in results.cells:
        for masked in cell.masked:
            quality: Quality | None = getattr(masked, stage)
            chosen = masked.chosen is not None and masked.experiment == experiment
            if chosen and quality is not None:
                point = (masked.achieved, quality)
                found.setdefault((cell.training, criterion_of(masked)), []).append(point)
    return {
        key: (spread(sparsity for sparsity, _ in points).mean, [q for _, q in points])
        for key, points in found.items()
    }


@dataclass(frozen=True)
class Family:
    """The networks that one structured pruning made, one per seed.

    Attributes:
        experiment: Its position in the recipe's ``prune``.
        members: Each pruned network with the cell that it came from.
    """

    experiment: int
    training: str
    criterion: str  # as ``criterion_of`` words it
    ranking: str
    target: dict[str, float]
    members: list[tuple[Cell, Compacted]]

    def accuracy(self, stage: Stage) -> Spread | None:
        """Return the accuracy at ``stage`` in percent, or None if it was not measured."""
        measured: list[Quality | None] = [getattr(pruned, stage) for _, pruned in self.members]
        present = [quality for quality in measured if quality is not None]
        return spread_of(present, "accuracy") if present else None

    def final_accuracy(self) -> Spread:
        """Return the accuracy of the networks as they were saved, in percent."""
        return spread((pruned.finetuned or pruned.pruned).accuracy for _, pruned in self.members)

    def dense_accuracy(self) -> Spread:
        """Return the accuracy of the networks that these came from, in percent."""
        return dense([cell for cell, _ in self.members], "accuracy")

    def cost(self, field: str) -> float:
        """Return a field of the size, on average."""
        return cost([pruned for _, pruned in self.members], field)

    def saving(self, field: str) -> float:
        """Return how many times smaller the average of a field of the size became."""
        return cost([cell for cell, _ in self.members], field) / self.cost(field)


def criterion_of(record: Masked | Compacted) -> str:
    """Return what weights or units were ranked by, with a word on rounds and on compensation."""
    if isinstance(record, Compacted):
        return f"{record.criterion}, compensated" if record.compensated else record.criterion
    return f"{record.criterion}, {record.rounds} rounds" if record.rounds > 1 else record.criterion


def families(results: Results) -> list[Family]:
    """Return every structured pruning, in the order of the results."""
    groups: dict[tuple[object, ...], Family] = {}
    for cell in results.cells:
        for p in cell.compacted:
            target = tuple(sorted(p.target.items()))
            criterion = criterion_of(p)
            key = (p.experiment, cell.training, criterion, p.ranking, target)
            new = Family(p.experiment, cell.training, criterion, p.ranking, p.target, [])
            groups.setdefault(key, new).members.append((cell, p))
    return sorted(groups.values(), key=lambda family: family.experiment)


def best_family(candidates: Sequence[Family]) -> Family | None:
    """Return the family with the fewest bytes that loses at most :data:`TOLERANCE` points."""
    good = [
        family
        for family in candidates
        if family.final_accuracy().mean >= family.dense_accuracy().mean - TOLERANCE
    ]
    return min(good, key=lambda family: family.cost("bytes"), default=None)


@dataclass(frozen=True)
class SparsityRecord:
    """The largest sparsity that loses at most :data:`TOLERANCE` points."""

    training: str
    criterion: str
    sparsity: float
    accuracy: Spread
    dense_accuracy: Spread
    finetuned: bool


def best_sparsity(results: Results) -> SparsityRecord | None:
    """Return the sparsest masked networks that lose at most :data:`TOLERANCE` points."""
    by_training = {name: dense(cells, "accuracy") for name, cells in trainings(results).items()}
    good = [
        SparsityRecord(
            training, criterion, sparsity, accuracy, by_training[training], stage == "finetuned"
        )
        for experiment in unstructured_experiments(results)
        for stage in masked_stages(results, experiment)
        if stage == "finetuned" or not step_by_step(results, experiment)
        for (training, criterion), points in masked_series(results, experiment, stage).items()
        for sparsity, qualities in points.items()
        for accuracy in [spread_of(qualities, "accuracy")]
        if sparsity > 0 and accuracy.mean >= by_training[training].mean - TOLERANCE
    ]
    return max(good, key=lambda record: (record.sparsity, record.accuracy.mean), default=None)
