"""The numbers of a comparison as CSV: one with its standard error on each line."""

from __future__ import annotations

import csv
import io

from spamprune.report.cuts import Cut
from spamprune.report.formats import target
from spamprune.report.merge import Measured, Merged, measured
from spamprune.report.plots import METRICS
from spamprune.report.results import Cell, Masked, OnlineCut, Patterned, Quality, Size
from spamprune.report.summary import (
    COST_FIELDS,
    STAGES,
    criterion_of,
    during,
    overshot,
    spread,
    trainings,
)

_COLUMNS = (
    *("dataset", "model", "training", "method", "hessian", "prior", "kind", "experiment"),
    "schedule",
    *("epoch", "stage", "criterion", "ranking", "target", "sparsity_pct"),
    *("metric", "value", "err", "seeds"),
)
_STAGES = (*STAGES, "trained")  # the last one: right before the next cut, or at the end

_EXACT = "exact"  # what tells lines apart whose numbers are written rounded; no column

_Key = dict[str, object]  # columns
_Lines = dict[tuple[tuple[str, object], ...], list[float]]  # columns → a number per seed


def text(merged: Merged) -> str:
    """Return all numbers of comparable runs."""
    buffer = io.StringIO()
    writer = csv.DictWriter(
        buffer, _COLUMNS, restval="", extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for training, cells in trainings(merged.results).items():
        method = merged.methods[training]
        common: _Key = {
            "dataset": merged.results.data.get("name"),
            "model": method.model,
            "training": training,
            "method": method.train.method,
            "hessian": method.hessian,
            "prior": method.prior,
        }
        lines: _Lines = {}
        for cell in cells:
            _note_trained(lines, cell)
            for record in measured(cell):
                if isinstance(record, Masked) and overshot(cell, record):
                    continue  # no line has that sparsity
                _note_pruned(lines, record, merged.origins[record.experiment])
            cuts: list[Cut] = [*cell.online, *cell.gradual]
            for cut in cuts:
                _note_cut(lines, cut)
        for key, values in lines.items():
            result = spread(values)
            error = "" if result.error is None else result.error
            line = {**common, **dict(key), "value": result.mean, "err": error, "seeds": len(values)}
            writer.writerow(line)
    return buffer.getvalue()


def _note_trained(lines: _Lines, cell: Cell) -> None:
    key: _Key = {"kind": "trained" if during([cell]) else "dense"}
    _note_quality(lines, key, cell.dense)
    _note(lines, {**key, "metric": "log_evidence"}, cell.log_evidence)
    _note_size(lines, key, cell.size)
    if cell.inference is not None:
        _note_quality(lines, {**key, "stage": "averaged"}, cell.inference.averaged)
        _note(lines, {**key, "metric": "sparsity_pct"}, 100 * cell.inference.sparsity)


def _note_pruned(lines: _Lines, record: Measured, origin: str) -> None:
    key: _Key = {"kind": record.kind, "experiment": origin, "criterion": record.criterion}
    if not isinstance(record, Patterned):
        key["schedule"] = record.schedule
    if isinstance(record, Masked) and record.chosen is not None:
        key |= {"criterion": criterion_of(record), "target": "evidence"}
        _note(lines, {**key, "metric": "sparsity_pct"}, 100 * record.achieved)
    elif isinstance(record, Masked):
        key |= {"criterion": criterion_of(record), _EXACT: record.requested}
        key["sparsity_pct"] = _percent(record.requested)
    elif isinstance(record, Patterned):
        key["target"] = record.pattern
    else:
        key["criterion"] = criterion_of(record)
        key |= {"ranking": record.ranking, "target": target(record.target)}
        key[_EXACT] = tuple(sorted(record.target.items()))
        _note_size(lines, key, record.size)
    _note_stages(lines, key, record)


def _note_cut(lines: _Lines, cut: Cut) -> None:
    key: _Key = {"epoch": cut.epoch, "criterion": cut.criterion}
    if isinstance(cut, OnlineCut):
        key |= {"kind": "online", "sparsity_pct": _percent(cut.sparsity)}
    else:
        key |= {"kind": "gradual", "ranking": cut.ranking, "target": target(cut.target)}
        _note_size(lines, key, cut.size)
    _note_stages(lines, key, cut)


def _note_stages(lines: _Lines, key: _Key, record: Measured | Cut) -> None:
    for stage in _STAGES:
        quality: Quality | None = getattr(record, stage, None)
        if quality is not None:
            _note_quality(lines, {**key, "stage": stage}, quality)


def _note_quality(lines: _Lines, key: _Key, quality: Quality) -> None:
    for metric in METRICS:
        _note(lines, {**key, "metric": metric}, getattr(quality, metric))


def _note_size(lines: _Lines, key: _Key, size: Size) -> None:
    for field in COST_FIELDS:
        _note(lines, {**key, "metric": field}, getattr(size, field))


def _note(lines: _Lines, key: _Key, value: float) -> None:
    lines.setdefault(tuple(key.items()), []).append(value)


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:.6g}"
