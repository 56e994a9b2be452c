"""Accuracy against sparsity in panels: trainings of one criterion, and what fine-tuning adds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spamprune.report.plots import METRICS, MOST_LINES, entry, line, sparsity_axis
from spamprune.report.results import Results
from spamprune.report.style import (
    GREY,
    INK,
    criterion_colours,
    criterion_markers,
    legend,
    svg,
    training_colours,
)
from spamprune.report.summary import Stage, dense, masked_series, spread_of, trainings

_COLUMNS = 3
_AS_TRAINED: dict[str, Any] = {"lw": 1, "ls": (0, (4, 3))}
_STAGES: dict[Stage, dict[str, Any]] = {
    "pruned": {"mfc": "white", "ls": ":", "lw": 0.9},
    "finetuned": {"ls": "-"},
}


def figures(results: Results, experiment: int) -> Iterator[tuple[str, str, str]]:
    """Yield the name, drawing and meaning of each figure here that the experiment has data for."""
    series = masked_series(results, experiment, "pruned")
    # with few lines, sparsity_curves has them in one panel
    if len({training for training, _ in series}) > 1 and len(series) > MOST_LINES:
        words = "Test accuracy against sparsity, just pruned: the trainings side by side."
        yield "trainings", training_panels(results, experiment), words
    if masked_series(results, experiment, "finetuned"):
        words = "Test accuracy against sparsity, just pruned (hollow) and after fine-tuning."
        yield "finetuning", finetuning_panels(results, experiment), words


@svg
def training_panels(results: Results, experiment: int) -> Figure:
    """Draw a panel for each criterion and a line for each training (figures 5 and 8 to 10)."""
    series = masked_series(results, experiment, "pruned")
    cells, colours = trainings(results), training_colours(results)
    names = [name for name in cells if any(name == training for training, _ in series)]
    figure, panels = _grid(criterion for _, criterion in series)
    for criterion, axes in panels.items():
        for name in names:
            level = dense(cells[name], "accuracy").mean
            axes.axhline(level, color=colours[name], zorder=1, **_AS_TRAINED)
            points = series.get((name, criterion), {})
            spreads = [spread_of(qualities, "accuracy") for qualities in points.values()]
            line(axes, [1 - s for s in points], spreads, colours[name], {"marker": "o", "ms": 3})
        sparsity_axis(axes, {s for points in series.values() for s in points}, 0.11)
    handles = [entry(name, color=colours[name], lw=3, ls="-") for name in names]
    legend(figure, [*handles, entry("as trained", color=GREY, **_AS_TRAINED)])
    return figure


@svg
def finetuning_panels(results: Results, experiment: int) -> Figure:
    """Draw a panel for each training, each criterion before and after fine-tuning (figure 11)."""
    stages = {stage: masked_series(results, experiment, stage) for stage in _STAGES}
    cells, series = trainings(results), stages["pruned"]
    criteria = list(dict.fromkeys(criterion for _, criterion in series))
    colours, markers = criterion_colours(criteria), criterion_markers(criteria)
    figure, panels = _grid(training for training, _ in series)
    for name, axes in panels.items():
        axes.axhline(dense(cells[name], "accuracy").mean, color=INK, zorder=1, **_AS_TRAINED)
        for stage, look in _STAGES.items():
            for criterion in criteria:
                points = stages[stage].get((name, criterion), {})
                spreads = [spread_of(qualities, "accuracy") for qualities in points.values()]
                style = look | {"marker": markers[criterion]}
                line(axes, [1 - s for s in points], spreads, colours[criterion], style)
        sparsity_axis(axes, {s for points in series.values() for s in points}, 0.11)
    handles = [entry(c, color=colours[c], marker=markers[c], ls="-") for c in criteria]
    handles += [
        entry("just pruned", marker="o", **_STAGES["pruned"]),
        entry("fine-tuned", marker="o", **_STAGES["finetuned"]),
        entry("as trained", color=GREY, **_AS_TRAINED),
    ]
    legend(figure, handles)
    return figure


def _grid(titles: Iterable[str]) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with a panel of accuracy against sparsity for each of ``titles``."""
    names = list(dict.fromkeys(titles))
    rows, columns = math.ceil(len(names) / _COLUMNS), min(len(names), _COLUMNS)
    figure = Figure(figsize=(max(4.0 * columns, 6.0), 0.8 + 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    panels = dict(zip(names, grid.flat, strict=False))
    for i, (name, axes) in enumerate(panels.items()):
        axes.set_title(name)
        if i % columns == 0:
            axes.set_ylabel(METRICS["accuracy"])
        if i + columns >= len(names):
            axes.set_xlabel("Sparsity / %")
    return figure, panels
