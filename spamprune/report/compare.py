"""Tables and figures of several runs in the paper's form, as Markdown, CSV and SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from spamprune.files import write_text
from spamprune.report import compare_csv, compare_markdown, panels, plots, schedules
from spamprune.report.cuts import gradual_steps, online_steps
from spamprune.report.merge import merge
from spamprune.report.results import Results
from spamprune.report.summary import families, masked_stages, unstructured_experiments


def compare(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the tables and figures of finished runs on the same data.

    Args:
        runs: Their folders; one is enough.
        out: Folder for ``comparison.md``, ``comparison.csv`` (one number with its standard error
            per line) and the figures.

    Returns:
        The path of ``comparison.md``.

    Raises:
        OutputError: A run is not finished, or the runs cannot be compared.
        RecipeError: A run's recipe is not one of this version of spamprune.
    """
    merged, out = merge(runs), Path(out)
    figures = dict(_figures(merged.results))
    for name, drawing in figures.items():
        write_text(out / name, drawing)
    write_text(out / "comparison.csv", compare_csv.text(merged))
    path = out / "comparison.md"
    write_text(path, compare_markdown.text(merged, list(figures)))
    return path


def _figures(results: Results) -> Iterator[tuple[str, str]]:
    """Yield the file name and drawing of each figure that there are data for."""
    if any(cell.history for cell in results.cells):
        yield "training.svg", plots.training_curves(results)
    for experiment in unstructured_experiments(results):
        for stage in masked_stages(results, experiment):
            name = f"sparsity-{experiment}-{stage}.svg"
            yield name, plots.sparsity_curves(results, experiment, stage)
        for name, drawing, _ in panels.figures(results, experiment):
            yield f"{name}-{experiment}.svg", drawing
    for experiment in sorted({family.experiment for family in families(results)}):
        yield f"cost-{experiment}.svg", plots.cost_accuracy(results, experiment)
    if online_steps(results):
        yield "online.svg", schedules.online_curves(results)
    if gradual_steps(results):
        yield "gradual.svg", schedules.gradual_curves(results)
