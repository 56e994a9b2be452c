"""Cuts while a network is trained as the report shows them: grouped over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

from spamprune.report.results import Cell, GradualCut, OnlineCut, Quality, Results
from spamprune.report.summary import (
    Spread,
    masked_series,
    spread,
    spread_of,
    step_by_step,
    trained_whole,
    unstructured_experiments,
)

Moment = Literal["pruned", "trained"]
Cut = OnlineCut | GradualCut
C = TypeVar("C", OnlineCut, GradualCut)
Steps = dict[str, dict[int, list[C]]]  # training → epoch → one cut per seed


def online_steps(results: Results) -> Steps[OnlineCut]:
    """Return the cuts of each training whose masks grew."""
    return _grouped((cell, cut) for cell in results.cells for cut in cell.online)


def gradual_steps(results: Results) -> Steps[GradualCut]:
    """Return the cuts of each training that lost units."""
    return _grouped((cell, cut) for cell in results.cells for cut in cell.gradual)


def _grouped(cuts: Iterable[tuple[Cell, C]]) -> Steps[C]:
    steps: Steps[C] = {}
    for cell, cut in cuts:
        steps.setdefault(cell.training, {}).setdefault(cut.epoch, []).append(cut)
    # a seed may need fewer cuts than another
    return {training: dict(sorted(cuts.items())) for training, cuts in steps.items()}


def quality(cuts: Sequence[Cut], moment: Moment, metric: str = "accuracy") -> Spread | None:
    """Return one field of the quality at a moment of a step, or None if it was not measured."""
    measured: list[Quality | None] = [getattr(cut, moment) for cut in cuts]
    present = [found for found in measured if found is not None]
    return spread_of(present, metric) if present else None


def achieved(cuts: Sequence[GradualCut]) -> float:
    """Return which fraction of the dense network's cost remains, on average."""
    return spread(fraction for cut in cuts for fraction in cut.achieved.values()).mean


def post_hoc(results: Results) -> dict[str, dict[float, list[Quality]]]:
    """Return what one-shot masks of the same criteria did to networks that were trained whole.

    Returns:
        Training → sparsity → one measurement per seed.
    """
    criteria = {cut.criterion for cell in results.cells for cut in cell.online}
    whole = trained_whole(results)
    series: dict[str, dict[float, list[Quality]]] = {}
    for experiment in unstructured_experiments(whole):
        if step_by_step(whole, experiment):
            continue
        for (training, criterion), points in masked_series(whole, experiment, "pruned").items():
            if criterion in criteria:
                name = training if len(criteria) == 1 else f"{training}, {criterion}"
                # experiments differ in method: at each sparsity the first of them counts
                series[name] = dict(sorted((points | series.get(name, {})).items()))
    return series
