"""The figures of a report: quality against sparsity and cost, and the course of training.

Each function returns the text of an SVG. One visual language holds throughout: colour is the
training, marker and dash the criterion, hollow means just pruned. Where one panel would get more
than eight lines, or there is one training only, colour is the criterion instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullLocator,
    ScalarFormatter,
)

from spamprune.report.results import Cell, EpochRecord, Results
from spamprune.report.style import (
    GREY,
    INK,
    band,
    criterion_colours,
    criterion_dashes,
    criterion_markers,
    legend,
    svg,
    training_colours,
)
from spamprune.report.summary import (
    Family,
    Spread,
    Stage,
    best_family,
    by_evidence,
    dense,
    families,
    masked_series,
    spread,
    spread_of,
    trained_whole,
    trainings,
)

METRICS = {"accuracy": "Accuracy / %", "nll": "NLL / nats", "ece": "ECE", "brier": "Brier score"}
MOST_LINES = 8  # that share one panel
COSTS = {  # field → what there are fewer of, label, unit
    "macs": ("MACs", "MACs of one sample", ""),
    "bytes": ("bytes", "Bytes of the parameters", "B"),
}
_RANKINGS: dict[str, Any] = {
    "uniform": "-",
    "global": (0, (4, 2)),
    "per_cost": (0, (6, 1, 1, 1)),
    "isomorphic": (0, (1, 1)),
}
_CURVES = {
    "loss": "Training loss / nats",
    "validation_accuracy": "Validation accuracy / %",
    "log_evidence": "Log evidence / nats",
}


@svg
def sparsity_curves(results: Results, experiment: int, stage: Stage) -> Figure:
    """Draw quality against sparsity for one unstructured experiment that has ``stage``."""
    series = masked_series(results, experiment, stage)
    cells = trainings(results)
    names = [name for name in cells if any(name == training for training, _ in series)]
    criteria = list(dict.fromkeys(criterion for _, criterion in series))
    shared = len(names) > 1 and len(series) <= MOST_LINES
    rows = [names] if shared else [[name] for name in names]
    if len(rows) == 1:
        figure = Figure(figsize=(9.6, 6.6), layout="constrained")
        grid = figure.subplots(2, 2, squeeze=False).reshape(1, 4)
    else:
        figure = Figure(figsize=(12.0, 0.8 + 2.5 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), 4, squeeze=False, sharey="col")
    if shared:
        colours = training_colours(results)
        dashes, dense_colours = criterion_dashes(criteria), colours
    else:
        colours = criterion_colours(criteria)
        dashes, dense_colours = dict.fromkeys(criteria, "-"), dict.fromkeys(names, INK)
    markers = criterion_markers(criteria)
    sparsities = {s for points in series.values() for s in points}
    found = by_evidence(results, experiment, stage)
    sparsities |= {sparsity for sparsity, _ in found.values()}
    for row, panels in zip(rows, grid, strict=True):
        for axes, (metric, label) in zip(panels, METRICS.items(), strict=True):
            for name in row:
                level = dense(cells[name], metric).mean
                axes.axhline(level, color=dense_colours[name], lw=1, ls=(0, (4, 3)), zorder=1)
            for (training, criterion), points in series.items():
                if training in row:
                    colour = colours[training if shared else criterion]
                    spreads = [spread_of(qualities, metric) for qualities in points.values()]
                    look = {"ls": dashes[criterion], "marker": markers[criterion]}
                    line(axes, [1 - s for s in points], spreads, colour, look)
            for (training, criterion), (sparsity, qualities) in found.items():
                if training in row:
                    colour = colours[training if shared else criterion]
                    level = spread_of(qualities, metric).mean
                    look = {"ms": 14, "mfc": colour, "mec": "white", "zorder": 5}
                    axes.plot([1 - sparsity], [level], "*", **look)
            title = label if len(rows) == 1 else f"{row[0]}: {label}"
            axes.set_title(title, fontsize=11 if len(rows) == 1 else 9.5)
            if metric == "nll":
                log_if_wide(axes)
    for axes in grid.flat:
        sparsity_axis(axes, sparsities, 0.055 if len(rows) == 1 else 0.11)
    for axes in grid[-1] if len(rows) > 1 else grid[0, 2:]:
        axes.set_xlabel("Sparsity / %")
    handles = [entry(name, color=colours[name], lw=3, ls="-") for name in names if shared]
    if len(criteria) > 1 or not shared:
        for criterion in criteria:
            look = {"ls": dashes[criterion], "marker": markers[criterion]}
            handles.append(entry(criterion, color=INK if shared else colours[criterion], **look))
    if found:
        handles.append(entry("most evidence", marker="*", ms=10))
    handles.append(entry("as trained", color=GREY, lw=1, ls=(0, (4, 3))))
    legend(figure, handles)
    return figure


def line(
    axes: Axes, x: Sequence[float], spreads: Sequence[Spread], colour: str, look: dict[str, Any]
) -> None:
    """Draw means, and a band of ± one standard error where there are several seeds."""
    mean = [s.mean for s in spreads]
    band(axes, list(x), mean, [s.error or 0.0 for s in spreads], colour)
    axes.plot(x, mean, color=colour, **look)


def log_if_wide(axes: Axes) -> None:
    """Use a logarithmic y axis where the lines span more than a factor of 20."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    drawn = drawn[np.isfinite(drawn)]
    if drawn.size and drawn.min() > 0 and drawn.max() > 20 * drawn.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_minor_locator(NullLocator())


def sparsity_axis(axes: Axes, measured: Iterable[float], apart: float) -> None:
    """Show sparsity on an axis that is logarithmic in what remains, with ticks at the data."""
    sparsities = sorted(measured, reverse=True)
    place = [-math.log(1 - s) for s in sparsities]
    span = place[0] - place[-1]
    ticks: list[int] = []
    for i in range(len(sparsities)):
        if not ticks or place[ticks[-1]] - place[i] >= apart * span:
            ticks.append(i)
    margin = math.exp(0.04 * span or 0.1)
    axes.set_xlim((1 - sparsities[-1]) * margin, (1 - sparsities[0]) / margin)
    axes.set_xscale("log")
    labels = [f"{100 * sparsities[i]:.4g}" for i in ticks]
    axes.set_xticks([1 - sparsities[i] for i in ticks], labels)
    axes.xaxis.set_minor_locator(NullLocator())


@svg
def cost_accuracy(results: Results, experiment: int) -> Figure:
    """Draw accuracy against MACs and bytes for one structured experiment."""
    shown = [family for family in families(results) if family.experiment == experiment]
    cells = {
        name: group
        for name, group in trainings(results).items()
        if any(family.training == name for family in shown)
    }
    criteria = list(dict.fromkeys(family.criterion for family in shown))
    by_training = len(cells) > 1
    colours = training_colours(results) if by_training else criterion_colours(criteria)
    markers = criterion_markers(criteria)
    whole = families(trained_whole(results))
    best = best_family([family for family in whole if family.experiment == experiment])
    figure = Figure(figsize=(9.6, 4.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (field, (noun, label, unit)) in zip(panels, COSTS.items(), strict=True):
        paths: dict[tuple[str, str, str], list[Family]] = {}
        for family in sorted(shown, key=lambda family: family.cost(field)):
            key = (family.training, family.criterion, family.ranking)
            paths.setdefault(key, []).append(family)
        for (name, criterion, ranking), path in paths.items():
            colour = colours[name if by_training else criterion]
            _path(axes, path, field, colour, markers[criterion], _RANKINGS[ranking])
        for name, group in cells.items():
            cost = spread(getattr(cell.size, field) for cell in group).mean
            level = dense(group, "accuracy").mean
            colour = colours[name] if by_training else INK
            axes.axhline(level, color=colour, lw=1, ls=(0, (4, 3)), zorder=1)
            axes.plot([cost], [level], "*", ms=14, mfc=colour, mec="white", zorder=5)
        axes.set_xscale("log")
        round_ticks(axes)
        axes.xaxis.set_major_formatter(EngFormatter(unit=unit, sep=" "))
        axes.set_xlabel(label)
        if best is not None:
            text = f"{best.saving(field):.1f}× fewer {noun}"
            _callout(axes, best.cost(field), best.final_accuracy().mean, text)
    accuracy_axis(panels[0])
    panels[0].set_ylabel("Accuracy / %")
    coloured = list(cells) if by_training else criteria
    handles = [entry(name, color=colours[name], lw=3, ls="-") for name in coloured]
    if by_training and len(criteria) > 1:
        handles += [entry(criterion, marker=markers[criterion]) for criterion in criteria]
    rankings = dict.fromkeys(family.ranking for family in shown)
    if len(rankings) > 1:
        handles += [entry(f"{ranking} ranking", ls=_RANKINGS[ranking]) for ranking in rankings]
    marker = markers[criteria[0]]
    if any(family.accuracy("finetuned") for family in shown):
        handles.append(entry("fine-tuned", marker=marker))
    handles.append(entry("just pruned", marker=marker, mfc="white"))
    if any(family.accuracy("scratch") for family in shown):
        handles.append(entry("trained from scratch", marker="x", mew=1.6))
    handles.append(entry("as trained", marker="*", ms=10))
    legend(figure, handles)
    return figure


def _path(
    axes: Axes, path: Sequence[Family], field: str, colour: str, marker: str, line: Any
) -> None:
    """Draw one way of pruning to several sizes, at each stage that was measured."""
    looks: dict[Stage, dict[str, Any]] = {
        "pruned": {"marker": marker, "mfc": "white", "ls": ":", "lw": 0.9},
        "scratch": {"marker": "x", "ls": "none", "mew": 1.6},
        "finetuned": {"marker": marker, "ls": line},
    }
    for stage, look in looks.items():
        measured = [(family.cost(field), family.accuracy(stage)) for family in path]
        points = [(cost, accuracy) for cost, accuracy in measured if accuracy is not None]
        axes.errorbar(
            [cost for cost, _ in points],
            [accuracy.mean for _, accuracy in points],
            [accuracy.error or 0.0 for _, accuracy in points],
            color=colour,
            capsize=2,
            elinewidth=1,
            **look,
        )


def entry(label: str, **look: Any) -> Line2D:
    """Return an entry of a legend."""
    return Line2D([], [], label=label, **{"color": INK, "ls": "none", **look})


def round_ticks(axes: Axes) -> None:
    """Label 1, 2 and 5 of each decade."""
    low, high = axes.get_xlim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())


def accuracy_axis(axes: Axes) -> None:
    """Stretch the top of an accuracy axis: it is logarithmic in the error plus half a point."""
    low, high = axes.get_ylim()
    axes.set_yscale(
        "function",
        functions=(
            lambda a: -np.log(np.maximum(100.5 - np.asarray(a), 1e-3)),
            lambda t: 100.5 - np.exp(-np.asarray(t)),
        ),
    )
    axes.set_ylim(max(low, 0.0), min(high + 0.35 * (100 - high), 100.2))
    ticks = [0, 20, 40, 60, 70, 80, 85, 90, 93, 95, 96, 97, 98, 99, 99.5, 100]
    low, high = axes.get_ylim()
    place = {tick: -math.log(100.5 - tick) for tick in (low, high, *ticks)}
    kept: list[float] = []
    for tick in reversed(ticks):
        apart = not kept or place[kept[-1]] - place[tick] >= 0.06 * (place[high] - place[low])
        if low <= tick <= high and apart:
            kept.append(tick)
    axes.set_yticks(kept, [f"{tick:g}" for tick in kept])


def _callout(axes: Axes, x: float, y: float, text: str) -> None:
    """Point at the best network and say how much smaller it is, towards the axes' middle."""
    low, high = axes.get_xlim()
    axes.annotate(
        text,
        (x, y),
        (0, 30),
        textcoords="offset points",
        ha="left" if x * x < low * high else "right",  # the axis is logarithmic
        fontweight="bold",
        arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.8, "shrinkB": 4},
    )


@svg
def training_curves(results: Results) -> Figure:
    """Draw loss, validation accuracy and log evidence against epochs, where they were measured."""
    curves = {
        label: {name: _course(cells, field) for name, cells in trainings(results).items()}
        for field, label in _CURVES.items()
    }
    curves = {label: lines for label, lines in curves.items() if any(lines.values())}
    colours = training_colours(results)
    figure = Figure(figsize=(3.5 * max(len(curves), 2), 3.4), layout="constrained")
    panels = figure.subplots(1, max(len(curves), 1), squeeze=False)[0]
    for axes, (label, lines) in zip(panels, curves.items(), strict=False):
        for name, course in lines.items():
            if course:
                # a measurement made now and then is a point, one made each epoch a line
                look = {"marker": "o", "ms": 3} if len(course) < 25 else {}
                line(axes, list(course), list(course.values()), colours[name], look)
        axes.set_title(label)
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        if label == _CURVES["log_evidence"]:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    legend(figure, [entry(n, color=c, lw=3, ls="-") for n, c in colours.items()])
    return figure


def _course(cells: Sequence[Cell], field: str) -> dict[int, Spread]:
    """Return the spread over seeds of one field of the epochs, where it was measured."""
    values: dict[int, list[float]] = {}
    records: list[EpochRecord] = [record for cell in cells for record in cell.history]
    for record in records:
        value = getattr(record, field)
        if value is not None:
            values.setdefault(record.epoch, []).append(value)
    return {epoch: spread(values[epoch]) for epoch in sorted(values)}
