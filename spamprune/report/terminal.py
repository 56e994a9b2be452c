"""What a run measured, in a few lines for the terminal; the page shows the rest."""

from __future__ import annotations

from rich import box
from rich.table import Table

from spamprune.report.patterns import patterns
from spamprune.report.results import Results
from spamprune.report.summary import (
    Spread,
    dense,
    families,
    masked_series,
    spread,
    spread_of,
    trainings,
    unstructured_experiments,
)

Rows = dict[tuple[str, str], dict[str, str]]


def tables(results: Results) -> list[Table]:
    """Return a table of the trainings, and one for each pruning experiment."""
    overview = _table("test accuracy in %, ± standard error")
    for heading in ("training", "seeds", "accuracy", "log evidence"):
        overview.add_column(heading)
    for name, cells in trainings(results).items():
        evidence = spread(cell.log_evidence for cell in cells)
        row = (name, str(len(cells)), _show(dense(cells, "accuracy")), f"{evidence.mean:.1f}")
        overview.add_row(*row)
    return [overview, *_unstructured(results), *_patterned(results), *_structured(results)]


def _unstructured(results: Results) -> list[Table]:
    made = []
    for experiment in unstructured_experiments(results):
        rows: Rows = {}
        for stage in ("pruned", "finetuned"):  # the later stage is what remains
            for key, points in masked_series(results, experiment, stage).items():
                for sparsity, qualities in points.items():
                    mean = spread_of(qualities, "accuracy").mean
                    rows.setdefault(key, {})[f"{sparsity:g}"] = f"{mean:.1f}"
        made.append(_experiment(f"prune.{experiment}: mean accuracy at sparsity", rows))
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
        target = " ".join(f"{field} {value:g}" for field, value in family.target.items())
        row = rows.setdefault((family.training, family.criterion), {})
        row[target] = f"{family.final_accuracy().mean:.1f}"
    return [
        _experiment(f"prune.{experiment}: mean accuracy after removing units", rows)
        for experiment, rows in made.items()
    ]


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


def _show(spread: Spread) -> str:
    error = "" if spread.error is None else f" ± {spread.error:.2f}"
    return f"{spread.mean:.2f}{error}"
