"""What a run measured, in a few lines for the terminal; the page shows the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from rich import box
from rich.table import Table

from spamprune.report.cuts import Cut, Moment, achieved, quality
from spamprune.report.formats import plus_minus, target
from spamprune.report.patterns import patterns
from spamprune.report.results import Results
from spamprune.report.summary import (
    Stage,
    by_evidence,
    dense,
    families,
    masked_series,
    spread,
    spread_of,
    step_by_step,
    trainings,
    unstructured_experiments,
)

Rows = dict[tuple[str, str], dict[str, str]]


def tables(results: Results) -> list[Table]:
    """Return a table of the trainings, one of each kind of cut in them, one of each experiment."""
    overview = _table("test accuracy in %, ± standard error")
    for heading in ("training", "seeds", "accuracy", "log evidence"):
        overview.add_column(heading)
    for name, cells in trainings(results).items():
        evidence = spread(cell.log_evidence for cell in cells)
        accuracy = plus_minus(dense(cells, "accuracy"), 2)
        overview.add_row(name, str(len(cells)), accuracy, f"{evidence.mean:.1f}")
    after = [*_unstructured(results), *_patterned(results), *_structured(results)]
    return [overview, *_online(results), *_gradual(results), *after]


def _online(results: Results) -> list[Table]:
    table = _last_cuts("masks that grew in training", "sparsity / %")
    for name, cells in trainings(results).items():
        last = [cell.online[-1] for cell in cells if cell.online]
        if last:
            table.add_row(name, f"{100 * last[0].sparsity:.4g}", *_moments(last))
    return [table] if table.rows else []


def _gradual(results: Results) -> list[Table]:
    table = _last_cuts("units that went in training", "target → achieved")
    for name, cells in trainings(results).items():
        last = [cell.gradual[-1] for cell in cells if cell.gradual]
        if last:
            left = f"{target(last[0].target)} → {100 * achieved(last):.3g} %"
            table.add_row(name, left, *_moments(last))
    return [table] if table.rows else []


def _last_cuts(title: str, measure: str) -> Table:
    table = _table(f"{title}: mean accuracy at the last cut")
    for heading in ("training", measure, "just cut", "trained on"):
        table.add_column(heading)
    return table


def _moments(cuts: Sequence[Cut]) -> list[str]:
    return [plus_minus(quality(cuts, moment), 2) for moment in get_args(Moment)]


def _unstructured(results: Results) -> list[Table]:
    made = []
    for experiment in unstructured_experiments(results):
        rows: Rows = {}
        stages: tuple[Stage, ...] = ("pruned", "finetuned")
        for stage in stages:  # the later stage is what remains
            series = masked_series(results, experiment, stage)
            # by sparsity, as a row may lack the first ones
            for sparsity in sorted({s for points in series.values() for s in points}):
                for key in (key for key, points in series.items() if sparsity in points):
                    mean = spread_of(series[key][sparsity], "accuracy").mean
                    rows.setdefault(key, {})[f"{sparsity:g}"] = f"{mean:.1f}"
            for key, (sparsity, qualities) in by_evidence(results, experiment, stage).items():
                mean = spread_of(qualities, "accuracy").mean
                rows.setdefault(key, {})["most evidence"] = f"{mean:.1f} @ {100 * sparsity:.1f} %"
        if rows:
            title = f"{_title(results, experiment)}: mean accuracy at sparsity"
            made.append(_experiment(title, rows))
    return made


def _patterned(results: Results) -> list[Table]:
    made: dict[int, Rows] = {}
    for pattern in patterns(results):
        row = made.setdefault(pattern.experiment, {}).setdefault(
            (pattern.training, pattern.criterion), {}
        )
        last = pattern.accuracy("finetuned") or pattern.accuracy("pruned")
        if last is not None:
            row[pattern.pattern] = f"{last.mean:.1f}"
    return [
        _experiment(f"prune.{experiment}: mean accuracy by pattern", rows)
        for experiment, rows in made.items()
    ]


def _structured(results: Results) -> list[Table]:
    made: dict[int, Rows] = {}
    for family in families(results):
        rows = made.setdefault(family.experiment, {})
        row = rows.setdefault((family.training, family.criterion), {})
        row[target(family.target)] = f"{family.final_accuracy().mean:.1f}"
    return [
        _experiment(f"{_title(results, experiment)}: mean accuracy after removing units", rows)
        for experiment, rows in made.items()
    ]


def _title(results: Results, experiment: int) -> str:
    return f"prune.{experiment}" + ", iterative" * bool(step_by_step(results, experiment))


def _experiment(title: str, rows: Rows) -> Table:
    """Return a table with one row for each training and criterion."""
    sizes = list(dict.fromkeys(size for row in rows.values() for size in row))
    table = _table(title)
    for heading in ("training", "criterion"):
        table.add_column(heading)
    for size in sizes:
        table.add_column(size, justify="right")
    for names, row in rows.items():
        table.add_row(*names, *(row.get(size, "-") for size in sizes))
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
