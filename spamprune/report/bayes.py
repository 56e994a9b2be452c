"""What inference and evidence found, as tables: variational trainings, and sparsities chosen."""

from __future__ import annotations

from spamprune.report.formats import ABSENT, DIGITS, count, number, plus_minus
from spamprune.report.plots import METRICS
from spamprune.report.results import ByEvidence, Cell, Masked, Results
from spamprune.report.summary import spread, spread_of, trainings
from spamprune.report.table import Entry, Table, Text

NOTE = (
    "Mean over seeds ± standard error. Averaged: probabilities averaged over draws of the weights. "
    "Quantile ECE: 20 bins of equal counts, as in the code of the BMR paper (arXiv 2309.12095). A "
    "reduction goes as far as it proposes, unless that would lower the measured evidence."
)


def inference_table(results: Results) -> Table:
    """Return the table of variational trainings: quality at the means and averaged, and pruned."""
    head: list[Entry] = [
        Text("Training"),
        "Seeds",
        Text("Prediction"),
        *METRICS.values(),
        "Quantile ECE",
        "Weights at zero / %",
        "Seconds per epoch",
    ]
    rows: list[list[Entry]] = []
    for name, cells in trainings(results).items():
        found = [cell.inference for cell in cells if cell.inference is not None]
        if not found:
            continue
        sparsity = spread(100 * inference.sparsity for inference in found)
        seconds = spread(record.seconds for cell in cells for record in cell.history).mean
        for words, qualities in (
            ("posterior means", [cell.dense for cell in cells]),
            (f"averaged, {found[0].draws} draws", [inference.averaged for inference in found]),
        ):
            quantile = [q.quantile_ece for q in qualities if q.quantile_ece is not None]
            rows.append(
                [
                    Text(name),
                    str(len(cells)),
                    Text(words),
                    *(plus_minus(spread_of(qualities, m), DIGITS[m]) for m in METRICS),
                    plus_minus(spread(quantile) if quantile else None, 3),
                    plus_minus(sparsity, 1),
                    number(seconds, 1),
                ]
            )
    return Table(head, rows)


def reductions_table(results: Results) -> Table:
    """Return the table of model reductions: how far each went, and the evidence before and after.

    A reduction that was held back is one whose proposal would have lowered the evidence.
    """
    head: list[Entry] = [
        Text("Training"),
        "Seed",
        "Epoch",
        "Proposed / %",
        "Pruned / %",
        "Log evidence before / nats",
        "after",
        Text("Pruned by layer / %"),
    ]
    rows: list[list[Entry]] = [
        [
            Text(cell.training),
            str(cell.seed),
            str(record.epoch),
            number(100 * reduced.proposed, 1),
            number(100 * reduced.sparsity, 1),
            count(reduced.before),
            count(reduced.after),
            Text(_by_layer(reduced.pruned), long=True),
        ]
        for cell in results.cells
        for record in cell.history
        if (reduced := record.reduced) is not None
    ]
    return Table(head, rows)


def chosen(results: Results, experiment: int) -> list[tuple[Cell, Masked, ByEvidence]]:
    """Return the masks of one unstructured experiment whose sparsity the evidence chose."""
    return [
        (cell, masked, masked.chosen)
        for cell in results.cells
        for masked in cell.masked
        if masked.experiment == experiment and masked.chosen is not None
    ]


def evidence_table(results: Results, experiment: int) -> Table:
    """Return the table of the sparsities that the evidence chose in one experiment."""
    found = chosen(results, experiment)
    tuned = any(masked.finetuned is not None for _, masked, _ in found)
    head: list[Entry] = [
        Text("Training"),
        "Seed",
        Text("Criterion"),
        "Sparsity / %",
        "Just pruned / %",
        *(["Fine-tuned / %"] if tuned else []),
        "As trained / %",
        "Determined weights",
        "Log evidence before / nats",
        "after",
        Text("Pruned by layer / %"),
        Text("Notes"),
    ]
    rows: list[list[Entry]] = [
        [
            Text(cell.training),
            str(cell.seed),
            Text(masked.criterion),
            number(100 * masked.achieved, 1),
            number(masked.pruned.accuracy, 2),
            *([number(masked.finetuned.accuracy, 2)] if masked.finetuned is not None else []),
            number(cell.dense.accuracy, 2),
            count(evidence.effective),
            count(evidence.before),
            count(evidence.after),
            Text(_by_layer(evidence.pruned), long=True),
            Text("; ".join(evidence.notes) or ABSENT, long=True),
        ]
        for cell, masked, evidence in found
    ]
    return Table(head, rows)


def _by_layer(pruned: dict[str, float]) -> str:
    return ", ".join(f"{layer or 'network'} {100 * share:.0f}" for layer, share in pruned.items())
