"""The figures of pruning during training: masks that grow, and units that go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from spamprune.report.cuts import (
    C,
    Moment,
    Steps,
    gradual_steps,
    online_steps,
    post_hoc,
    quality,
)
from spamprune.report.plots import (
    COSTS,
    METRICS,
    accuracy_axis,
    entry,
    line,
    log_if_wide,
    round_ticks,
    sparsity_axis,
)
from spamprune.report.results import OnlineCut, Results
from spamprune.report.style import legend, svg, training_colours
from spamprune.report.summary import Family, cost, families, spread_of

_LOOKS: dict[Moment, dict[str, Any]] = {
    "pruned": {"marker": "o", "mfc": "white", "ls": ":", "lw": 0.9},
    "trained": {"marker": "o", "ls": (0, (4, 2))},
}
_POST_HOC = {"marker": "s", "ls": "-"}


@svg
def online_curves(results: Results) -> Figure:
    """Draw quality against sparsity, online beside post hoc (the SpaM paper's figure 1)."""
    steps, others = online_steps(results), post_hoc(results)
    colours = training_colours(results)
    sparsities = {cut.sparsity for cell in results.cells for cut in cell.online}
    sparsities |= {s for points in others.values() for s in points}
    figure = Figure(figsize=(9.6, 6.6), layout="constrained")
    panels = figure.subplots(2, 2)
    moments = list(dict.fromkeys(m for m in _LOOKS if _has(steps, m)))
    for axes, (metric, label) in zip(panels.flat, METRICS.items(), strict=True):
        for name, points in others.items():
            spreads = [spread_of(found, metric) for found in points.values()]
            colour = colours[name.partition(",")[0]]
            line(axes, [1 - s for s in points], spreads, colour, _POST_HOC)
        for name, cuts in steps.items():
            for moment in moments:
                _course(axes, list(cuts.values()), moment, metric, colours[name])
        axes.set_title(label)
        if metric == "nll":
            log_if_wide(axes)
        sparsity_axis(axes, sparsities, 0.11)
    for axes in panels[1]:
        axes.set_xlabel("Sparsity / %")
    names = list(dict.fromkeys([*(name.partition(",")[0] for name in others), *steps]))
    handles = [entry(name, color=colours[name], lw=3, ls="-") for name in names]
    handles += [entry("post hoc", **_POST_HOC)] if others else []
    words = {"pruned": "online, just cut", "trained": "online, trained on"}
    legend(figure, handles + [entry(words[m], **_LOOKS[m]) for m in moments])
    return figure


def _has(steps: Steps[C], moment: Moment) -> bool:
    return any(quality(cuts, moment) for by in steps.values() for cuts in by.values())


def _course(
    axes: Axes, steps: Sequence[Sequence[OnlineCut]], moment: Moment, metric: str, colour: str
) -> None:
    """Draw what one moment of an online training's cuts was like."""
    found = [(cuts[0].sparsity, quality(cuts, moment, metric)) for cuts in steps]
    present = [(sparsity, value) for sparsity, value in found if value is not None]
    spreads = [value for _, value in present]
    line(axes, [1 - sparsity for sparsity, _ in present], spreads, colour, _LOOKS[moment])


@svg
def gradual_curves(results: Results) -> Figure:
    """Draw the way of shrinking networks through accuracy and cost, beside post-hoc pruning."""
    steps, others = gradual_steps(results), families(results)
    colours = training_colours(results)
    figure = Figure(figsize=(9.6, 4.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (field, (_, label, unit)) in zip(panels, COSTS.items(), strict=True):
        for family in others:
            _point(axes, family, field, colours[family.training])
        for name, cuts in steps.items():
            for moment, look in _LOOKS.items():
                found = [(cost(by, field), quality(by, moment)) for by in cuts.values()]
                present = [(x, value) for x, value in found if value is not None]
                spreads = [value for _, value in present]
                line(axes, [x for x, _ in present], spreads, colours[name], look)
        axes.set_xscale("log")
        round_ticks(axes)
        axes.xaxis.set_major_formatter(EngFormatter(unit=unit, sep=" "))
        axes.set_xlabel(label)
    accuracy_axis(panels[0])
    panels[0].set_ylabel("Accuracy / %")
    names = list(dict.fromkeys([*(family.training for family in others), *steps]))
    handles = [entry(name, color=colours[name], lw=3, ls="-") for name in names]
    handles += [entry("just cut", **_LOOKS["pruned"]), entry("trained on", **_LOOKS["trained"])]
    if others:
        handles.append(entry("post hoc, as saved", marker=_POST_HOC["marker"]))
    legend(figure, handles)
    return figure


def _point(axes: Axes, family: Family, field: str, colour: str) -> None:
    """Draw networks that were pruned after training."""
    value = family.final_accuracy()
    axes.errorbar(
        [family.cost(field)],
        [value.mean],
        [value.error or 0.0],
        color=colour,
        marker=_POST_HOC["marker"],
        ls="none",
        capsize=2,
    )
