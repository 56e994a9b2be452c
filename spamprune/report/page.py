"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spamprune.bayes.posterior import load_posterior
from spamprune.errors import OutputError
from spamprune.files import write_text
from spamprune.report import bayes, panels, tables
from spamprune.report.cuts import gradual_steps, online_steps
from spamprune.report.patterns import note, patterns
from spamprune.report.plots import METRICS, cost_accuracy, sparsity_curves, training_curves
from spamprune.report.results import Results, read_results
from spamprune.report.schedules import gradual_curves, online_curves
from spamprune.report.style import training_colours
from spamprune.report.summary import (
    STAGES,
    TOLERANCE,
    best_family,
    best_sparsity,
    beyond,
    by_evidence,
    dense,
    during,
    families,
    masked_stages,
    spread,
    step_by_step,
    trained_whole,
    trainings,
    unstructured_experiments,
)
from spamprune.report.table import TIES
from spamprune.report.weights import filter_banks, precision_histograms, varied

_BAND = "Means over seeds; bands and bars are ± one standard error."

_Section = tuple[str, list["_Figure"], str]  # title, figures, what follows them


@dataclass(frozen=True)
class _Figure:
    """A figure with the name of its file and its caption."""

    name: str
    svg: str
    caption: str

    def html(self) -> str:
        """Return the figure for use inside a page."""
        text = self.svg[self.svg.index("<svg") :]
        # ids are unique within a figure only; the page sets the size
        text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{self.name}-", text)
        text = re.sub(r'^<svg ([^>]*?) ?(?:width|height)="[^"]*"', r"<svg \1", text)
        text = re.sub(r'^<svg ([^>]*?) ?(?:width|height)="[^"]*"', r"<svg \1", text)
        text = text.replace("<svg ", f'<svg role="img" aria-label="{escape(self.caption)}" ', 1)
        caption = f"<figcaption>{escape(self.caption)}</figcaption>"
        plate = f'<div class="plate" tabindex="0">{text}</div>'
        return f'<figure id="{self.name}">{plate}{caption}</figure>\n'


def write(folder: Path) -> Path:
    """Write ``report.html``, and each figure under ``figures/``, from a run's ``results.json``.

    Posteriors (``<cell>/posterior.safetensors``), ``figures/filter_banks.safetensors`` and
    ``recipe.yaml`` are shown where they exist.

    Args:
        folder: The folder of a run.

    Returns:
        The path of the page.

    Raises:
        OutputError: ``results.json`` or the filter banks are missing or damaged, or the page
            cannot be written.
        PosteriorError: A posterior is damaged.
    """
    results = read_results(folder)
    if not results.cells:
        raise OutputError(f"{folder} has results of no training: let the run finish one first")
    sections = [
        _training(results),
        *(_unstructured(results, e) for e in unstructured_experiments(results)),
        *(
            _semi_structured(results, e)
            for e in dict.fromkeys(p.experiment for p in patterns(results))
        ),
        *(_structured(results, e) for e in dict.fromkeys(f.experiment for f in families(results))),
        _inference(results),
        _online(results),
        _gradual(results),
        _parameters(folder, results),
    ]
    body = [_head(results)]
    for title, figures, content in sections:
        if figures or content:
            for figure in figures:
                write_text(folder / "figures" / f"{figure.name}.svg", figure.svg)
            body += [f"<h2>{escape(title)}</h2>\n", *(f.html() for f in figures), content]
    body.append(_appendix(folder, results))
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    path = folder / "report.html"
    write_text(
        path,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # an empty icon keeps browsers from asking for one
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(results.name)} · spamprune</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}</main>\n</body>\n</html>\n",
    )
    return path


def _head(results: Results) -> str:
    """Return the title, the summary in one paragraph, and the headline cards."""
    cells = trainings(results)
    seeds = max(len(group) for group in cells.values())
    seconds = results.train_seconds
    took = f"{seconds / 60:.3g} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"
    sentences = [
        f"{len(cells)} training{'s' * (len(cells) > 1)} ({', '.join(cells)}) with "
        f"{seeds} seed{'s' * (seeds > 1)} each on {results.data.get('name', 'the data')}, in "
        f"{took} of training."
    ]
    whole = trained_whole(results)
    best_name = max(trainings(whole) or cells, key=lambda name: dense(cells[name], "accuracy").mean)
    accuracy = dense(cells[best_name], "accuracy")
    label = "accuracy unpruned" if whole.cells else "accuracy"
    cards = [(f"{accuracy.mean:.1f} %", label, best_name)]
    sparsest = best_sparsity(whole)
    if sparsest is not None:
        how = "after fine-tuning" if sparsest.finetuned else "without fine-tuning"
        sentences.append(
            f"Unstructured: {100 * sparsest.sparsity:.4g} % of the weights of {sparsest.training} "
            f"go by {sparsest.criterion} {how} at {sparsest.accuracy.mean:.1f} % accuracy "
            f"(unpruned {sparsest.dense_accuracy.mean:.1f} %)."
        )
        what = f"{sparsest.training}, {sparsest.criterion}, {how}"
        cards.append((f"{100 * sparsest.sparsity:.4g} %", "weights set to zero", what))
    elif any(masked_stages(whole, e) for e in unstructured_experiments(whole)):
        sentences.append(f"No mask stays within {TOLERANCE:g} point of the unpruned network.")
    smallest = best_family(families(whole))
    if smallest is not None:
        ratios = {field: f"{smallest.saving(field):.1f}×" for field in ("bytes", "macs")}
        final, before = smallest.final_accuracy().mean, smallest.dense_accuracy().mean
        what = f"{smallest.training}, {smallest.criterion}, {smallest.ranking}"
        sentences.append(
            f"Structured: {ratios['bytes']} fewer bytes and {ratios['macs']} fewer MACs at "
            f"{final:.1f} % (unpruned {before:.1f} %; {what})."
        )
        cards.append((ratios["bytes"], "fewer bytes", f"{what}: {final:.1f} %"))
        cards.append((ratios["macs"], "fewer MACs", f"{what}: {final:.1f} %"))
    elif families(whole):
        sentences.append(
            f"No smaller network stays within {TOLERANCE:g} point of the unpruned one."
        )
    note = ""
    if sparsest is not None or smallest is not None:
        note = (
            '<p class="soft">Headlines are the smallest networks pruned after training that lose '
            f"at most {TOLERANCE:g} point of mean test accuracy. They were picked by that "
            "accuracy, so they flatter a little: the tables show all.</p>\n"
        )
    drawn = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span>'
        f'<div class="soft">{escape(detail)}</div></div>\n'
        for value, label, detail in cards
    )
    return (
        f'<h1>{escape(results.name)}</h1>\n<p class="soft">{escape(results.description)}</p>\n'
        f"<p>{escape(' '.join(sentences))}</p>\n"
        f'<div class="cards">\n{drawn}</div>\n{note}'
    )


def _training(results: Results) -> _Section:
    caption = f"The course of training. {_BAND}"
    figures = []
    if any(cell.history for cell in results.cells):
        figures.append(_Figure("training", training_curves(results), caption))
    threads = results.cells[0].size.threads
    note = (
        f'<p class="soft">Test data, mean ± standard error over seeds. Latency is the median of '
        f"a forward pass with {threads} CPU thread{'s' * (threads > 1)}. MACs count convolutions, "
        "linear and recurrent layers and matrix products of one sample; bytes are those of the "
        "parameters in memory.</p>\n"
    )
    if any(during([cell]) for cell in results.cells):
        title = "Trained networks"
        note += '<p class="soft">Those that were pruned in training are as they came out.</p>\n'
    else:
        title = "Unpruned networks"
    return title, figures, tables.dense_table(results).html() + note


def _unstructured(results: Results, experiment: int) -> _Section:
    figures, content = [], []
    steps = step_by_step(results, experiment)
    for stage in masked_stages(results, experiment):
        words = STAGES[stage]
        chosen = by_evidence(results, experiment, stage)
        stars = ", stars the sparsity of most evidence" if chosen else ""
        caption = (
            f"Quality on the test data against sparsity, {words}. {_BAND} The sparsity axis is "
            "logarithmic in the weights that remain; dashed lines without markers are as trained"
            f"{stars}. {steps}"
        ).strip()
        svg = sparsity_curves(results, experiment, stage)
        figures.append(_Figure(f"unstructured-{experiment}-{stage}", svg, caption))
        for metric, label in METRICS.items():
            table = tables.masked_table(results, experiment, stage, metric).html()
            title = f"{label} by sparsity, {words}"
            if metric == "accuracy":
                content.append(f"<h3>{escape(title)}</h3>\n{table}")
            else:
                content.append(f"<details><summary>{escape(title)}</summary>\n{table}</details>\n")
    if content:
        notes = f"The best of each column is marked; {TIES} {beyond(results, experiment)}"
        content.append(f'<p class="soft">{escape(notes)}</p>\n')
    evidence = bayes.evidence_table(results, experiment)
    if evidence.rows:
        content.append(f"<h3>Sparsity of most evidence</h3>\n{evidence.html()}")
    for name, svg, words in panels.figures(results, experiment):
        figures.append(_Figure(f"{name}-{experiment}", svg, f"{words} {_BAND} {steps}".strip()))
    return f"Unstructured pruning (prune.{experiment})", figures, "".join(content)


def _semi_structured(results: Results, experiment: int) -> _Section:
    shown = [pattern for pattern in patterns(results) if pattern.experiment == experiment]
    content = tables.patterns_table(shown).html() + f'<p class="soft">{escape(note(shown))}</p>\n'
    return f"Semi-structured pruning (prune.{experiment})", [], content


def _structured(results: Results, experiment: int) -> _Section:
    caption = (
        f"Test accuracy against cost of the networks with their units removed. {_BAND} The "
        "accuracy axis is stretched towards 100 %; both cost axes are logarithmic. "
        f"{step_by_step(results, experiment)}"
    ).strip()
    figure = _Figure(f"structured-{experiment}", cost_accuracy(results, experiment), caption)
    content = (
        tables.compacted_table(results, experiment).html()
        + "<details><summary>Every pruned network: units kept, residual, notes, artifact</summary>"
        + '\n<p class="soft">Residual is the largest relative difference between the outputs of '
        "the compacted and the masked network.</p>\n"
        + tables.networks_table(results, experiment).html()
        + "</details>\n"
    )
    return f"Structured pruning (prune.{experiment})", [figure], content


def _inference(results: Results) -> _Section:
    inference, reductions = bayes.inference_table(results), bayes.reductions_table(results)
    if not inference.rows:
        return "", [], ""
    content = inference.html()
    if reductions.rows:
        content += f"<h3>Bayesian model reduction</h3>\n{reductions.html()}"
    return "Variational inference", [], content + f'<p class="soft">{escape(bayes.NOTE)}</p>\n'


def _online(results: Results) -> _Section:
    if not online_steps(results):
        return "", [], ""
    caption = (
        "Quality on the test data against sparsity. Online: masks grow while the network is "
        "trained, and quality is measured right after each cut; where pruned weights stay zero "
        "also right before the next one. Post hoc: one-shot masks of networks that were trained "
        f"whole. {_BAND}"
    )
    figures = [_Figure("online", online_curves(results), caption)]
    return "Online pruning", figures, tables.online_table(results).html()


def _gradual(results: Results) -> _Section:
    if not gradual_steps(results):
        return "", [], ""
    caption = (
        "Test accuracy against cost of networks that lose units while they are trained: right "
        f"after each cut, and right before the next one or at the end. {_BAND}"
    )
    figures = [_Figure("gradual", gradual_curves(results), caption)]
    return "Gradual pruning", figures, tables.gradual_table(results).html()


def _parameters(folder: Path, results: Results) -> _Section:
    figures = []
    precisions = {}
    for name, cells in trainings(results).items():
        path = folder / cells[0].folder / "posterior.safetensors"
        if path.exists():
            precisions[name] = load_posterior(path).prior_precision
    precisions = varied(precisions)
    if precisions:
        caption = (
            "Prior precisions δ that the evidence chose, by parameter tensor (its size in "
            "brackets; the largest 24), for the first seed. A large δ says: not needed. Priors "
            "that are constant within every tensor are not shown."
        )
        drawn = precision_histograms(precisions, training_colours(results))
        figures.append(_Figure("precisions", drawn, caption))
    banks = _read_banks(folder / "figures" / "filter_banks.safetensors")
    if banks:
        caption = (
            "Weights as matrices, one row for each output unit, before and after pruning, to one "
            "scale in each row. Colours saturate at the 99th percentile."
        )
        figures.append(_Figure("filter_banks", filter_banks(banks), caption))
    return "Parameters", figures, ""


def _read_banks(path: Path) -> list[tuple[str, dict[str, Tensor | None]]]:
    """Return the layers in the file, if there is one, each with its weights by state."""
    if not path.exists():
        return []
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot read {path}: {error}: remove it or run again") from error
    banks: dict[str, dict[str, Tensor | None]] = {}
    for key, tensor in tensors.items():
        state, _, layer = key.partition("/")
        banks.setdefault(layer, {})[state] = tensor
    return list(banks.items())


def _appendix(folder: Path, results: Results) -> str:
    """Return how to use the artifacts, and what is needed to repeat the run."""
    parts = []
    shown = families(results)
    if shown:
        best = best_family(families(trained_whole(results))) or shown[-1]
        code = (
            "import spamprune as sp\n\n"
            f"model = sp.load({best.members[0][1].artifact!r})  # a torch.nn.Module, in this "
            "run's folder\nmodel.eval()\n"
        )
        parts.append(f"<h2>Use a pruned network</h2>\n<pre>{escape(code)}</pre>\n")
    facts = {f"data: {key}": str(value) for key, value in results.data.items()}
    seconds = spread(cell.train_seconds for cell in results.cells).mean
    facts |= {"training": f"{seconds:.0f} seconds for each network"}
    table = tables.facts_table(results.environment | facts)
    parts.append(f"<h2>Data and environment</h2>\n{table.html()}")
    recipe = folder / "recipe.yaml"
    if recipe.exists():
        text = escape(recipe.read_text(encoding="utf-8"))
        parts.append(f"<details><summary>The recipe</summary>\n<pre>{text}</pre></details>\n")
    return "".join(parts)
