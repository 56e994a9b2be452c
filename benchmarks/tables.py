"""Print a finished run's results as Markdown: ``python benchmarks/tables.py RUN``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from spamprune.report.results import Results, read_results
from spamprune.report.schedules import gradual_steps, online_steps, post_hoc, quality
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

STRUCTURED = [
    "training",
    "criterion",
    "ranking",
    "kB",
    "MACs saved",
    "widths of the first seed",
    "just pruned",
    "fine-tuned",
    "from scratch",
]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print one Markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")
    print()


def show(value: Spread | None, digits: int = 2) -> str:
    """Return mean ± standard error, or a dash."""
    if value is None:
        return "–"
    error = "" if value.error is None else f" ± {value.error:.{digits}f}"
    return f"{value.mean:.{digits}f}{error}"


def print_results(results: Results) -> None:
    """Print the dense networks, the masks at each sparsity, and the pruned networks."""
    cells = trainings(results)
    print(f"## {results.name}: {len(results.cells)} trained networks\n")
    print("Dense networks, test data, mean ± standard error over seeds:\n")
    table(
        ["training", "seeds", "accuracy %", "NLL", "ECE", "Brier", "log evidence", "s / epoch"],
        (
            [
                name,
                str(len(group)),
                show(dense(group, "accuracy")),
                *(show(dense(group, metric), 3) for metric in ("nll", "ece", "brier")),
                show(spread(cell.log_evidence for cell in group), 0),
                show(spread(r.seconds for cell in group for r in cell.history), 1).split(" ±")[0],
            ]
            for name, group in cells.items()
        ),
    )
    for experiment in unstructured_experiments(results):
        series = masked_series(results, experiment, "pruned")
        sparsities = list(next(iter(series.values())))
        for metric, digits in (("accuracy", 1), ("nll", 2), ("ece", 3), ("brier", 3)):
            print(f"Masks without fine-tuning (`prune.{experiment}`), {metric} at sparsity:\n")
            table(
                ["training", "criterion", *(f"{s:.0%}" for s in sparsities)],
                (
                    [*key, *(show(spread_of(points[s], metric), digits) for s in sparsities)]
                    for key, points in series.items()
                ),
            )
    print_online(results)
    print_gradual(results)
    if families(results):
        print("Units removed, accuracy %:\n")
        table(
            STRUCTURED,
            (
                [
                    f.training,
                    f.criterion,
                    f.ranking,
                    f"{f.cost('bytes').mean / 1000:.1f}",
                    f"{f.saving('macs'):.1f}×",
                    "-".join(str(w) for w in f.members[0][1].widths.values()),
                    show(f.accuracy("pruned")),
                    show(f.accuracy("finetuned")),
                    show(f.accuracy("scratch")),
                ]
                for f in families(results)
            ),
        )


def print_online(results: Results) -> None:
    """Print the cuts of masks that grew in training, beside one-shot masks as sparse as they."""
    steps, others = online_steps(results), post_hoc(results)
    if not steps:
        return
    print("Masks that grew in training, accuracy %:\n")
    rows = []
    for training, cuts in steps.items():
        for epoch, seeds in cuts.items():
            sparsity = seeds[0].sparsity
            same = [
                spread_of(found, "accuracy") if (found := points.get(sparsity)) else None
                for points in others.values()
            ]
            measured = [quality(seeds, "pruned"), quality(seeds, "trained"), *same]
            rows.append(
                [training, str(epoch), f"{100 * sparsity:.4g} %", *(show(m) for m in measured)]
            )
    table(["training", "epoch", "sparsity", "just cut", "trained on", *others], rows)


def print_gradual(results: Results) -> None:
    """Print the cuts of units in training."""
    steps = gradual_steps(results)
    if not steps:
        return
    print("Units removed in training, accuracy %:\n")
    rows = []
    for training, cuts in steps.items():
        for epoch, seeds in cuts.items():
            remaining = spread(value for cut in seeds for value in cut.achieved.values()).mean
            kilobytes = spread(cut.size.bytes for cut in seeds).mean / 1000
            widths = "-".join(str(w) for w in seeds[0].widths.values())
            row = [training, str(epoch), f"{100 * remaining:.1f} %", f"{kilobytes:.1f}", widths]
            rows.append([*row, show(quality(seeds, "pruned")), show(quality(seeds, "trained"))])
    head = ["training", "epoch", "remains", "kB", "widths of the first seed"]
    table([*head, "just cut", "trained on"], rows)


if __name__ == "__main__":
    print_results(read_results(Path(sys.argv[1])))
