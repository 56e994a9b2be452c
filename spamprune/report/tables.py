"""The tables of a report, as HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

from spamprune.report.patterns import Pattern, batches
from spamprune.report.plots import METRICS
from spamprune.report.results import Cell, Quality, Results
from spamprune.report.schedules import gradual_steps, online_steps, post_hoc, quality
from spamprune.report.summary import (
    Family,
    Spread,
    Stage,
    dense,
    families,
    masked_series,
    spread,
    spread_of,
    trainings,
)

_DIGITS = {"accuracy": 2, "nll": 3, "ece": 3, "brier": 3}
_ABSENT = "–"


@dataclass(frozen=True)
class _Text:
    """A table's cell that is read, not compared; ``long`` ones may wrap."""

    text: str
    long: bool = False


@dataclass(frozen=True)
class _Best:
    """The best number of its column."""

    text: str


_Cell = str | _Text | _Best


def _table(head: Sequence[_Cell], rows: Sequence[Sequence[_Cell]]) -> str:
    """Return a table that scrolls on its own where it is wider than the page."""

    def draw(tag: str, cell: _Cell) -> str:
        if isinstance(cell, str):
            return f"<{tag}>{escape(cell)}</{tag}>"
        name = "best" if isinstance(cell, _Best) else "text long" if cell.long else "text"
        return f'<{tag} class="{name}">{escape(cell.text)}</{tag}>'

    top = "".join(draw("th", cell) for cell in head).replace(" / ", " /&nbsp;")  # with its unit
    body = "".join(f"<tr>{''.join(draw('td', cell) for cell in row)}</tr>\n" for row in rows)
    return (
        '<div class="scroll" tabindex="0"><table>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def number(value: float, digits: int) -> str:
    """Return ``value`` with ``digits`` decimals and grouped thousands; NaN and ∞ by their names."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    return f"{value:,.{digits}f}".replace("-", "−")


def plus_minus(value: Spread | None, digits: int) -> str:
    """Return "mean ± standard error", the mean alone for one seed, a dash for nothing."""
    if value is None:
        return _ABSENT
    error = "" if value.error is None else f" ± {value.error:.{digits}f}"
    return number(value.mean, digits) + error


def count(value: float) -> str:
    """Return a count with grouped thousands."""
    return number(value, 0)


def milliseconds(seconds: Sequence[float]) -> str:
    """Return the median of latencies in seconds, in milliseconds."""
    if not seconds:
        return _ABSENT
    value = 1000 * median(seconds)
    return count(value) if value >= 100 else f"{value:#.3g}"


def target(values: dict[str, float]) -> str:
    """Return a target such as "10 % MACs"."""
    if "evidence" in values:
        return "most evidence"
    names = {"macs": "% of MACs", "params": "% of params", "ratio": "% of units removed"}
    return ", ".join(f"{100 * v:.3g} {names.get(k, k)}" for k, v in values.items())


def _batches(results: Results) -> list[int]:
    """Return the batch sizes at which latency was measured."""
    return sorted({batch for cell in results.cells for batch in cell.size.latency})


def dense_table(results: Results) -> str:
    """Return the table of the unpruned networks: quality, evidence and cost of each training."""
    batches = _batches(results)
    head: list[_Cell] = [
        _Text("Training"),
        "Seeds",
        *METRICS.values(),
        "Log evidence / nats",
        "Training / s",
        "Parameters",
        "MACs",
        "Bytes",
        *(f"Latency, batch {batch} / ms" for batch in batches),
    ]
    rows: list[list[_Cell]] = []
    for name, cells in trainings(results).items():
        size = cells[0].size
        rows.append(
            [
                _Text(name),
                str(len(cells)),
                *(plus_minus(dense(cells, metric), _DIGITS[metric]) for metric in METRICS),
                plus_minus(spread(cell.log_evidence for cell in cells), 0),
                plus_minus(spread(cell.train_seconds for cell in cells), 0),
                count(size.params),
                count(size.macs),
                count(size.bytes),
                *(milliseconds(_latencies(cells, batch)) for batch in batches),
            ]
        )
    return _table(head, rows)


def _latencies(cells: Sequence[Cell], batch: int) -> list[float]:
    return [cell.size.latency[batch] for cell in cells if batch in cell.size.latency]


def masked_table(results: Results, experiment: int, stage: Stage, metric: str) -> str:
    """Return the table of one metric: training and criterion against sparsity, best in bold."""
    series = masked_series(results, experiment, stage)
    sparsities = sorted({s for points in series.values() for s in points})
    spreads = {
        key: {s: spread_of(qualities, metric) for s, qualities in points.items()}
        for key, points in series.items()
    }
    best = {}
    for s in sparsities:
        column = [points[s].mean for points in spreads.values() if s in points]
        finite = [mean for mean in column if math.isfinite(mean)]
        if finite:
            best[s] = max(finite) if metric == "accuracy" else min(finite)
    rows: list[list[_Cell]] = []
    for (training, criterion), points in spreads.items():
        row: list[_Cell] = [_Text(training), _Text(criterion)]
        for s in sparsities:
            text = plus_minus(points.get(s), _DIGITS[metric])
            row.append(_Best(text) if s in points and points[s].mean == best.get(s) else text)
        rows.append(row)
    return _table(
        [_Text("Training"), _Text("Criterion"), *(f"{100 * s:.4g} %" for s in sparsities)], rows
    )


def compacted_table(results: Results, experiment: int) -> str:
    """Return the table of one structured experiment: means over seeds, a row per target."""
    shown = [family for family in families(results) if family.experiment == experiment]
    batches = _batches(results)
    head: list[_Cell] = [
        _Text("Training"),
        _Text("Criterion"),
        _Text("Ranking"),
        _Text("Target → achieved"),
        "Just pruned / %",
        "Fine-tuned / %",
        "From scratch / %",
        "Parameters",
        "MACs",
        "Bytes",
        "Artifact bytes",
        *(f"Latency, batch {batch} / ms" for batch in batches),
    ]
    stages: tuple[Stage, ...] = ("pruned", "finetuned", "scratch")
    rows: list[list[_Cell]] = [
        [
            _Text(family.training),
            _Text(family.criterion),
            _Text(family.ranking),
            _Text(f"{target(family.target)} → {_achieved(family)}"),
            *(plus_minus(family.accuracy(stage), 2) for stage in stages),
            *(count(family.cost(field).mean) for field in ("params", "macs", "bytes")),
            _artifact_bytes(family),
            *(
                milliseconds([p.size.latency[b] for _, p in family.members if b in p.size.latency])
                for b in batches
            ),
        ]
        for family in shown
    ]
    return _table(head, rows)


def _achieved(family: Family) -> str:
    """Return what was reached of the target, on average."""
    means = {k: spread(p.achieved[k] for _, p in family.members).mean for k in family.target}
    if "evidence" in means:
        return f"{means['evidence']:+.3g} nats"
    return ", ".join(f"{100 * mean:.3g} %" for mean in means.values())


def _artifact_bytes(family: Family) -> str:
    sizes = [p.size.artifact_bytes for _, p in family.members if p.size.artifact_bytes is not None]
    return count(spread(sizes).mean) if sizes else _ABSENT


def networks_table(results: Results, experiment: int) -> str:
    """Return the table of every pruned network of one structured experiment."""
    head: list[_Cell] = [
        _Text("Training"),
        "Seed",
        _Text("Criterion"),
        _Text("Ranking"),
        _Text("Target"),
        "Residual",
        _Text("Units kept"),
        _Text("Notes"),
        _Text("Artifact"),
    ]
    rows: list[list[_Cell]] = [
        [
            _Text(cell.training),
            str(cell.seed),
            _Text(family.criterion),
            _Text(family.ranking),
            _Text(target(family.target)),
            f"{pruned.residual:.1e}",
            _Text(", ".join(f"{k} {v}" for k, v in pruned.widths.items()), long=True),
            _Text("; ".join(pruned.notes) or _ABSENT, long=True),
            _Text(pruned.artifact),
        ]
        for family in families(results)
        if family.experiment == experiment
        for cell, pruned in family.members
    ]
    return _table(head, rows)


def patterns_table(shown: Sequence[Pattern]) -> str:
    """Return the table of a semi-structured experiment: means over seeds."""
    timed = batches(shown)
    head: list[_Cell] = [
        _Text("Training"),
        _Text("Criterion"),
        _Text("Pattern"),
        "Zero weights / %",
        "Unpruned / %",
        "Just pruned / %",
        "Fine-tuned / %",
        *(f"Speed-up on the GPU, batch {batch}" for batch in timed),
        _Text("Notes"),
    ]
    rows: list[list[_Cell]] = [
        [
            _Text(pattern.training),
            _Text(pattern.criterion),
            _Text(pattern.pattern),
            number(pattern.zeros().mean, 1),
            plus_minus(pattern.dense_accuracy(), 2),
            plus_minus(pattern.accuracy("pruned"), 2),
            plus_minus(pattern.accuracy("finetuned"), 2),
            *(plus_minus(pattern.speedup(batch), 2) for batch in timed),
            _Text("; ".join(pattern.notes()) or _ABSENT, long=True),
        ]
        for pattern in shown
    ]
    return _table(head, rows)


def online_table(results: Results) -> str:
    """Return the table of masks that grew in training, beside those of networks trained whole."""
    others = post_hoc(results)
    head: list[_Cell] = [
        _Text("Training"),
        _Text("Pruned weights"),
        "Epoch",
        "Sparsity / %",
        "Just cut / %",
        "Trained on / %",
        *(f"Post hoc, {name} / %" for name in others),
    ]
    rows: list[list[_Cell]] = [
        [
            _Text(training),
            _Text("stay zero" if cuts[0].held else "grow again"),
            str(epoch),
            f"{100 * cuts[0].sparsity:.4g}",
            plus_minus(quality(cuts, "pruned"), 2),
            plus_minus(quality(cuts, "trained"), 2),
            *(plus_minus(_at(points, cuts[0].sparsity), 2) for points in others.values()),
        ]
        for training, steps in online_steps(results).items()
        for epoch, cuts in steps.items()
    ]
    return _table(head, rows)


def _at(points: dict[float, list[Quality]], sparsity: float) -> Spread | None:
    """Return the accuracy that was measured at a sparsity, if it was."""
    near = [found for s, found in points.items() if math.isclose(s, sparsity, abs_tol=1e-9)]
    return spread_of(near[0], "accuracy") if near else None


def gradual_table(results: Results) -> str:
    """Return the table of units that went in training."""
    head: list[_Cell] = [
        _Text("Training"),
        _Text("Ranking"),
        "Epoch",
        _Text("Target → achieved"),
        "Just cut / %",
        "Trained on / %",
        "Parameters",
        "MACs",
        "Bytes",
        _Text("Units kept, first seed", long=True),
    ]
    rows: list[list[_Cell]] = []
    for training, steps in gradual_steps(results).items():
        for epoch, cuts in steps.items():
            achieved = spread(value for cut in cuts for value in cut.achieved.values()).mean
            sizes = [
                count(spread(getattr(cut.size, field) for cut in cuts).mean)
                for field in ("params", "macs", "bytes")
            ]
            widths = ", ".join(f"{layer} {n}" for layer, n in cuts[0].widths.items())
            rows.append(
                [
                    _Text(training),
                    _Text(cuts[0].ranking),
                    str(epoch),
                    _Text(f"{target(cuts[0].target)} → {100 * achieved:.3g} %"),
                    plus_minus(quality(cuts, "pruned"), 2),
                    plus_minus(quality(cuts, "trained"), 2),
                    *sizes,
                    _Text(widths, long=True),
                ]
            )
    return _table(head, rows)


def facts_table(facts: dict[str, str]) -> str:
    """Return a table of names and values."""
    return _table(
        [_Text("What"), _Text("Value")],
        [[_Text(name), _Text(value, long=True)] for name, value in facts.items()],
    )
