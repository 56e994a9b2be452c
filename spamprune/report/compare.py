"""Tables and figures of several runs in the paper's form, as Markdown, CSV and SVG."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from spamprune.files import write_text
from spamprune.report import panels, plots, schedules
from spamprune.report.merge import Measured, Merged, measured, merge
from spamprune.report.patterns import Pattern, patterns
from spamprune.report.plots import METRICS
from spamprune.report.results import Masked, Patterned, Quality
from spamprune.report.summary import (
    Family,
    Spread,
    Stage,
    criterion_of,
    families,
    masked_series,
    spread,
    spread_of,
    trainings,
    unstructured_experiments,
)
from spamprune.report.tables import count, plus_minus, target

_STAGES: dict[Stage, str] = {
    "pruned": "just pruned",
    "finetuned": "fine-tuned",
    "scratch": "from scratch",
}
_COSTS = ("params", "macs", "bytes")
_COLUMNS = (
    *("dataset", "model", "training", "method", "hessian", "prior"),
    *("kind", "experiment", "stage", "criterion", "ranking", "target", "sparsity_pct"),
    *("metric", "value", "err", "seeds"),
)
_NOTE = (
    "Mean ± standard error over seeds, on test data. **Best** of each column; † within one "
    "standard error of the difference from it, so not told apart by these seeds. A single seed "
    "has no error."
)


def compare(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the tables and figures of finished runs on the same data.

    Args:
        runs: Their folders.
        out: Folder for ``comparison.md``, ``comparison.csv`` (one number with its standard error
            per line) and the figures.

    Returns:
        The path of ``comparison.md``.

    Raises:
        OutputError: A run is not finished, or the runs cannot be compared.
        RecipeError: A run's recipe is not one of this version of spamprune.
    """
    merged, out = merge(runs), Path(out)
    figures = dict(_figures(merged))
    for name, drawing in figures.items():
        write_text(out / name, drawing)
    write_text(out / "comparison.csv", _csv(merged))
    path = out / "comparison.md"
    write_text(path, "\n".join(_markdown(merged, list(figures))))
    return path


def _stages(merged: Merged, experiment: int) -> list[Stage]:
    """Return the stages that an unstructured experiment was measured at."""
    return [stage for stage in _STAGES if stage != "scratch" and _series(merged, experiment, stage)]


def _series(
    merged: Merged, experiment: int, stage: Stage
) -> dict[tuple[str, str], dict[float, list[Quality]]]:
    """Return (criterion, training) → sparsity → a measurement per seed, criteria together."""
    series = masked_series(merged.results, experiment, stage)
    criteria = dict.fromkeys(criterion for _, criterion in series)
    return {
        (criterion, training): points
        for criterion in criteria
        for (training, other), points in series.items()
        if other == criterion
    }


def _figures(merged: Merged) -> Iterator[tuple[str, str]]:
    if any(cell.history for cell in merged.results.cells):
        yield "training.svg", plots.training_curves(merged.results)
    for experiment in unstructured_experiments(merged.results):
        for stage in _stages(merged, experiment):
            name = f"sparsity-{experiment}-{stage}.svg"
            yield name, plots.sparsity_curves(merged.results, experiment, stage)
        for name, drawing, _ in panels.figures(merged.results, experiment):
            yield f"{name}-{experiment}.svg", drawing
    for experiment in sorted({family.experiment for family in families(merged.results)}):
        yield f"cost-{experiment}.svg", plots.cost_accuracy(merged.results, experiment)
    if schedules.online_steps(merged.results):
        yield "online.svg", schedules.online_curves(merged.results)
    if schedules.gradual_steps(merged.results):
        yield "gradual.svg", schedules.gradual_curves(merged.results)


# ---- Markdown -----------------------------------------------------------------------------------


def _markdown(merged: Merged, figures: Sequence[str]) -> Iterator[str]:
    data = merged.results.data
    yield f"# Comparison on {data.get('name')}\n"
    yield f"{_NOTE}\n"
    rows = [
        [f"`{run.folder}`", run.recipe.name, ", ".join(map(str, run.recipe.seeds))]
        for run in merged.runs
    ]
    yield _table(["Run", "Recipe", "Seeds"], rows)
    for difference in _environments(merged):
        yield f"The runs differ in {difference}.\n"
    yield "## Unpruned\n"
    yield _dense_table(merged)
    for experiment in unstructured_experiments(merged.results):
        for stage in _stages(merged, experiment):
            origin = merged.origins[experiment]
            yield f"## Unstructured, {_STAGES[stage]} (`{origin}`)\n"
            for metric, label in METRICS.items():
                yield f"{label} at sparsity:\n"
                yield _masked_table(merged, experiment, stage, metric)
    sparse = patterns(merged.results)
    for experiment in dict.fromkeys(pattern.experiment for pattern in sparse):
        yield f"## Semi-structured, accuracy / % (`{merged.origins[experiment]}`)\n"
        yield _patterns_table(merged, [p for p in sparse if p.experiment == experiment])
    shown = families(merged.results)
    for experiment in sorted({family.experiment for family in shown}):
        yield f"## Structured, accuracy / % (`{merged.origins[experiment]}`)\n"
        yield _compacted_table(merged, [f for f in shown if f.experiment == experiment])
    for name in figures:
        yield f"![{name.removesuffix('.svg')}]({name})\n"


def _environments(merged: Merged) -> Iterator[str]:
    """Say which versions and hardware are not the same for all runs."""
    environments = [run.results.environment for run in merged.runs]
    for key in dict.fromkeys(key for environment in environments for key in environment):
        values = dict.fromkeys(environment.get(key, "unknown") for environment in environments)
        if len(values) > 1:
            yield f"{key}: {', '.join(values)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |\n" for line in lines)


def _heads(merged: Merged) -> list[str]:
    """Return the heads of the columns that say how a row's networks were trained."""
    several = len({method.model for method in merged.methods.values()}) > 1
    return ["Training", *(["Model"] if several else []), "Hessian", "Prior"]


def _cells(merged: Merged, training: str) -> list[str]:
    method = merged.methods[training]
    values = {
        "Training": training,
        "Model": method.model,
        "Hessian": _hessian(merged, training),
        "Prior": _prior(merged, training),
    }
    return [values[head] for head in _heads(merged)]


def _hessian(merged: Merged, training: str) -> str:
    if merged.methods[training].train.method == "variational":
        return "Mean field"
    return {"diag": "Diag", "kron": "KFAC"}[merged.methods[training].train.curvature.structure]


def _prior(merged: Merged, training: str) -> str:
    train = merged.methods[training].train
    settings = train.inference()
    if settings is not None:
        return settings.prior
    return "MAP" if train.method == "map" else train.prior.structure


def _dense_table(merged: Merged) -> str:
    groups = trainings(merged.results)
    columns = [
        _marked(
            [spread(getattr(c.dense, metric) for c in cells) for cells in groups.values()], metric
        )
        for metric in METRICS
    ]
    rows = [
        [
            *_cells(merged, name),
            str(len(cells)),
            *column,
            plus_minus(spread(cell.log_evidence for cell in cells), 0),
            count(cells[0].size.params),
            count(cells[0].size.macs),
        ]
        for (name, cells), *column in zip(groups.items(), *columns, strict=True)
    ]
    head = [
        *_heads(merged),
        "Seeds",
        *METRICS.values(),
        "Log evidence / nats",
        "Parameters",
        "MACs",
    ]
    return _table(head, rows)


def _masked_table(merged: Merged, experiment: int, stage: Stage, metric: str) -> str:
    series = _series(merged, experiment, stage)
    sparsities = sorted({s for points in series.values() for s in points})
    columns = [
        _marked(
            [spread_of(points[s], metric) if s in points else None for points in series.values()],
            metric,
        )
        for s in sparsities
    ]
    rows = [
        [criterion, *_cells(merged, training), _seeds(points.values()), *column]
        for ((criterion, training), points), *column in zip(series.items(), *columns, strict=True)
    ]
    head = ["Criterion", *_heads(merged), "Seeds", *(f"{100 * s:.4g} %" for s in sparsities)]
    return _table(head, rows)


def _seeds(groups: Iterable[Sequence[object]]) -> str:
    """Return how many seeds the entries of a row have."""
    counts = sorted({len(group) for group in groups})
    return "–".join(map(str, {counts[0]: None, counts[-1]: None}))


def _compacted_table(merged: Merged, shown: Sequence[Family]) -> str:
    """Return the table of a structured experiment; the best of each target's rows is bold."""
    wanted = {target(family.target): family.target for family in shown}
    rows = []
    for name, values in wanted.items():
        group = [family for family in shown if family.target == values]
        columns = [_marked([f.accuracy(stage) for f in group], "accuracy") for stage in _STAGES]
        rows += [
            [
                name,
                family.criterion,
                family.ranking,
                *_cells(merged, family.training),
                str(len(family.members)),
                *column,
                *(count(family.cost(field).mean) for field in _COSTS),
                f"{family.saving('macs'):.1f}×",
            ]
            for family, *column in zip(group, *columns, strict=True)
        ]
    head = ["Target", "Criterion", "Ranking", *_heads(merged), "Seeds"]
    stages = (label.capitalize() for label in _STAGES.values())
    return _table([*head, *stages, "Parameters", "MACs", "Bytes", "Fewer MACs"], rows)


def _patterns_table(merged: Merged, shown: Sequence[Pattern]) -> str:
    """Return the table of a semi-structured experiment; the best of each pattern is bold."""
    rows = []
    for pattern in dict.fromkeys(p.pattern for p in shown):
        group = [p for p in shown if p.pattern == pattern]
        stages: tuple[Stage, ...] = ("pruned", "finetuned")
        columns = [_marked([p.accuracy(stage) for p in group], "accuracy") for stage in stages]
        rows += [
            [
                *(pattern, p.criterion, *_cells(merged, p.training), str(len(p.members))),
                *(f"{p.zeros().mean:.1f}", plus_minus(p.dense_accuracy(), 2), *column),
            ]
            for p, *column in zip(group, *columns, strict=True)
        ]
    head = ["Pattern", "Criterion", *_heads(merged), "Seeds", "Zero weights / %", "Unpruned"]
    return _table([*head, "Just pruned", "Fine-tuned"], rows)


def _marked(column: Sequence[Spread | None], metric: str) -> list[str]:
    """Return a column as text: the best bold, and a dagger at what it is not told apart from."""
    sign = 1 if metric == "accuracy" else -1
    finite = [value for value in column if value is not None and math.isfinite(value.mean)]
    best = max(finite, key=lambda value: sign * value.mean, default=None)
    texts = []
    for value in column:
        text = plus_minus(value, 2 if metric == "accuracy" else 3)
        if value is not None and best is not None:
            if value.mean == best.mean:
                text = f"**{text}**"
            elif value.error is not None and best.error is not None:
                told_apart = abs(best.mean - value.mean) > math.hypot(best.error, value.error)
                text += "" if told_apart else " †"
        texts.append(text)
    return texts


# ---- CSV ----------------------------------------------------------------------------------------


_Lines = dict[tuple[tuple[str, object], ...], list[float]]  # columns → a number per seed


def _csv(merged: Merged) -> str:
    """Return all numbers, one with its standard error on each line."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for training, cells in trainings(merged.results).items():
        method = merged.methods[training]
        common: dict[str, object] = {
            "dataset": merged.results.data.get("name"),
            "model": method.model,
            "training": training,
            "method": method.train.method,
            "hessian": _hessian(merged, training),
            "prior": _prior(merged, training),
        }
        lines: _Lines = {}
        for cell in cells:
            _note(lines, {"kind": "dense"}, cell.dense)
            for field in _COSTS:
                _add(lines, {"kind": "dense", "metric": field}, getattr(cell.size, field))
            for record in measured(cell):
                _note_pruned(lines, record, merged.origins[record.experiment])
        for key, values in lines.items():
            result = spread(values)
            error = "" if result.error is None else result.error
            line = {**common, **dict(key), "value": result.mean, "err": error, "seeds": len(values)}
            writer.writerow(line)
    return buffer.getvalue()


def _add(lines: _Lines, key: dict[str, object], value: float) -> None:
    lines.setdefault(tuple(key.items()), []).append(value)


def _note(lines: _Lines, key: dict[str, object], quality: Quality) -> None:
    for metric in METRICS:
        _add(lines, {**key, "metric": metric}, getattr(quality, metric))


def _note_pruned(lines: _Lines, record: Measured, origin: str) -> None:
    key: dict[str, object] = {
        "kind": record.kind,
        "experiment": origin,
        "criterion": record.criterion,
    }
    if isinstance(record, Masked) and record.chosen is not None:
        key["target"] = "evidence"
        _add(lines, {**key, "metric": "sparsity"}, record.achieved)
    elif isinstance(record, Masked):
        key["sparsity_pct"] = f"{100 * record.requested:.6g}"
    elif isinstance(record, Patterned):
        key["target"] = record.pattern
    else:
        key["criterion"] = criterion_of(record)
        key |= {"ranking": record.ranking, "target": target(record.target)}
        for field in _COSTS:
            _add(lines, {**key, "metric": field}, getattr(record.size, field))
    for stage in _STAGES:
        quality: Quality | None = getattr(record, stage, None)
        if quality is not None:
            _note(lines, {**key, "stage": stage}, quality)
