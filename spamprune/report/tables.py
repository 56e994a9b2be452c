"""What the tables of the page show; comparisons share those of cuts in training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from spamprune.report.cuts import (
    achieved,
    gradual_steps,
    online_steps,
    post_hoc,
    quality,
)
from spamprune.report.formats import (
    ABSENT,
    DIGITS,
    count,
    milliseconds,
    number,
    plus_minus,
    target,
)
from spamprune.report.patterns import Pattern, batches
from spamprune.report.plots import METRICS
from spamprune.report.results import Cell, Quality, Results
from spamprune.report.summary import (
    COST_FIELDS,
    STAGES,
    Family,
    Spread,
    Stage,
    cost,
    dense,
    families,
    masked_series,
    spread,
    spread_of,
    trainings,
)
from spamprune.report.table import Entry, Table, Text, marked


def _batches(results: Results) -> list[int]:
    """Return the batch sizes at which latency was measured."""
    return sorted({batch for cell in results.cells for batch in cell.size.latency})


def dense_table(results: Results) -> Table:
    """Return the table of the trained networks: quality, evidence and cost of each training."""
    batches = _batches(results)
    head: list[Entry] = [
        Text("Training"),
        "Seeds",
        *METRICS.values(),
        "Log evidence / nats",
        "Training / s",
        "Parameters",
        "MACs",
        "Bytes",
        *(f"Latency, batch {batch} / ms" for batch in batches),
    ]
    rows: list[list[Entry]] = []
    for name, cells in trainings(results).items():
        rows.append(
            [
                Text(name),
                str(len(cells)),
                *(plus_minus(dense(cells, metric), DIGITS[metric]) for metric in METRICS),
                plus_minus(spread(cell.log_evidence for cell in cells), 0),
                plus_minus(spread(cell.train_seconds for cell in cells), 0),
                *(count(cost(cells, field)) for field in COST_FIELDS),
                *(milliseconds(_latencies(cells, batch)) for batch in batches),
            ]
        )
    return Table(head, rows)


def _latencies(cells: Sequence[Cell], batch: int) -> list[float]:
    return [cell.size.latency[batch] for cell in cells if batch in cell.size.latency]


def masked_table(results: Results, experiment: int, stage: Stage, metric: str) -> Table:
    """Return the table of one metric: training and criterion against sparsity."""
    series = masked_series(results, experiment, stage)
    leads = [[Text(training), Text(criterion)] for training, criterion in series]
    return by_sparsity([Text("Training"), Text("Criterion")], leads, series.values(), metric)


def by_sparsity(
    head: Sequence[Entry],
    leads: Iterable[Sequence[Entry]],
    courses: Iterable[dict[float, list[Quality]]],
    metric: str,
) -> Table:
    """Return a table with a column for each sparsity, the best of each marked.

    Args:
        head: Heads of the columns before those.
        leads: What each row has there.
        courses: Sparsity → a measurement per seed, of each row.
        metric: The field of the measurements to show.
    """
    courses = list(courses)
    sparsities = sorted({s for points in courses for s in points})
    columns = [
        marked([spread_of(p[s], metric) if s in p else None for p in courses], metric)
        for s in sparsities
    ]
    rows = [[*lead, *row] for lead, *row in zip(leads, *columns, strict=True)]
    return Table([*head, *(f"{100 * s:.6g} %" for s in sparsities)], rows)


def compacted_table(results: Results, experiment: int) -> Table:
    """Return the table of one structured experiment: means over seeds, a row per target."""
    shown = [family for family in families(results) if family.experiment == experiment]
    batches = _batches(results)
    head: list[Entry] = [
        Text("Training"),
        Text("Criterion"),
        Text("Ranking"),
        Text("Target → achieved"),
        *(f"{label.capitalize()} / %" for label in STAGES.values()),
        "Parameters",
        "MACs",
        "Bytes",
        "Artifact bytes",
        *(f"Latency, batch {batch} / ms" for batch in batches),
    ]
    rows: list[list[Entry]] = [
        [
            Text(family.training),
            Text(family.criterion),
            Text(family.ranking),
            Text(f"{target(family.target)} → {_achieved(family)}"),
            *(plus_minus(family.accuracy(stage), 2) for stage in STAGES),
            *(count(family.cost(field)) for field in COST_FIELDS),
            _artifact_bytes(family),
            *(
                milliseconds([p.size.latency[b] for _, p in family.members if b in p.size.latency])
                for b in batches
            ),
        ]
        for family in shown
    ]
    return Table(head, rows)


def _achieved(family: Family) -> str:
    """Return what was reached of the target, on average."""
    means = {k: spread(p.achieved[k] for _, p in family.members).mean for k in family.target}
    if "evidence" in means:
        return f"{means['evidence']:+.3g} nats"
    return ", ".join(f"{100 * mean:.3g} %" for mean in means.values())


def _artifact_bytes(family: Family) -> str:
    sizes = [p.size.artifact_bytes for _, p in family.members if p.size.artifact_bytes is not None]
    return count(spread(sizes).mean) if sizes else ABSENT


def networks_table(results: Results, experiment: int) -> Table:
    """Return the table of every pruned network of one structured experiment."""
    head: list[Entry] = [
        Text("Training"),
        "Seed",
        Text("Criterion"),
        Text("Ranking"),
        Text("Target"),
        "Residual",
        Text("Units kept"),
        Text("Notes"),
        Text("Artifact"),
    ]
    rows: list[list[Entry]] = [
        [
            Text(cell.training),
            str(cell.seed),
            Text(family.criterion),
            Text(family.ranking),
            Text(target(family.target)),
            f"{pruned.residual:.1e}",
            Text(_units(pruned.widths), long=True),
            Text("; ".join(pruned.notes) or ABSENT, long=True),
            Text(pruned.artifact),
        ]
        for family in families(results)
        if family.experiment == experiment
        for cell, pruned in family.members
    ]
    return Table(head, rows)


def patterns_table(shown: Sequence[Pattern]) -> Table:
    """Return the table of a semi-structured experiment: means over seeds."""
    timed = batches(shown)
    head: list[Entry] = [
        Text("Training"),
        Text("Criterion"),
        Text("Pattern"),
        "Zero weights / %",
        "As trained / %",
        "Just pruned / %",
        "Fine-tuned / %",
        *(f"Speed-up on the GPU, batch {batch}" for batch in timed),
        Text("Notes"),
    ]
    rows: list[list[Entry]] = [
        [
            Text(pattern.training),
            Text(pattern.criterion),
            Text(pattern.pattern),
            number(pattern.zeros().mean, 1),
            plus_minus(pattern.dense_accuracy(), 2),
            plus_minus(pattern.accuracy("pruned"), 2),
            plus_minus(pattern.accuracy("finetuned"), 2),
            *(plus_minus(pattern.speedup(batch), 2) for batch in timed),
            Text("; ".join(pattern.notes()) or ABSENT, long=True),
        ]
        for pattern in shown
    ]
    return Table(head, rows)


def online_table(results: Results) -> Table:
    """Return the table of masks that grew in training, beside those of networks trained whole."""
    others = post_hoc(results)
    head: list[Entry] = [
        Text("Training"),
        Text("Criterion"),
        Text("Pruned weights"),
        "Epoch",
        "Seeds",
        "Sparsity / %",
        "Just cut / %",
        "Trained on / %",
        *(f"Post hoc, {name} / %" for name in others),
    ]
    rows: list[list[Entry]] = [
        [
            Text(training),
            Text(cuts[0].criterion),
            Text("stay zero" if cuts[0].held else "grow again"),
            str(epoch),
            str(len(cuts)),
            f"{100 * cuts[0].sparsity:.4g}",
            plus_minus(quality(cuts, "pruned"), 2),
            plus_minus(quality(cuts, "trained"), 2),
            *(plus_minus(_at(points, cuts[0].sparsity), 2) for points in others.values()),
        ]
        for training, steps in online_steps(results).items()
        for epoch, cuts in steps.items()
    ]
    return Table(head, rows)


def _at(points: dict[float, list[Quality]], sparsity: float) -> Spread | None:
    """Return the accuracy that was measured at a sparsity, if it was."""
    near = [found for s, found in points.items() if math.isclose(s, sparsity, abs_tol=1e-9)]
    return spread_of(near[0], "accuracy") if near else None


def gradual_table(results: Results) -> Table:
    """Return the table of units that went in training."""
    head: list[Entry] = [
        Text("Training"),
        Text("Criterion"),
        Text("Ranking"),
        "Epoch",
        "Seeds",
        Text("Target → achieved"),
        "Just cut / %",
        "Trained on / %",
        "Parameters",
        "MACs",
        "Bytes",
        Text("Units kept, first seed", long=True),
    ]
    rows: list[list[Entry]] = [
        [
            Text(training),
            Text(cuts[0].criterion),
            Text(cuts[0].ranking),
            str(epoch),
            str(len(cuts)),
            Text(f"{target(cuts[0].target)} → {100 * achieved(cuts):.3g} %"),
            plus_minus(quality(cuts, "pruned"), 2),
            plus_minus(quality(cuts, "trained"), 2),
            *(count(cost(cuts, field)) for field in COST_FIELDS),
            Text(_units(cuts[0].widths), long=True),
        ]
        for training, steps in gradual_steps(results).items()
        for epoch, cuts in steps.items()
    ]
    return Table(head, rows)


def _units(widths: dict[str, int]) -> str:
    return ", ".join(f"{layer} {n}" for layer, n in widths.items())


def facts_table(facts: dict[str, str]) -> Table:
    """Return a table of names and values."""
    return Table(
        [Text("What"), Text("Value")],
        [[Text(name), Text(value, long=True)] for name, value in facts.items()],
    )
