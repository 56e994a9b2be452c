"""A comparison as Markdown: the paper's tables, with a row for each way of training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from spamprune.report import bayes, tables
from spamprune.report.cuts import gradual_steps, online_steps
from spamprune.report.formats import DIGITS, count, plus_minus, target
from spamprune.report.merge import Merged
from spamprune.report.patterns import Pattern, patterns
from spamprune.report.plots import METRICS
from spamprune.report.summary import (
    COST_FIELDS,
    STAGES,
    Family,
    Stage,
    beyond,
    cost,
    dense,
    during,
    families,
    masked_series,
    masked_stages,
    spread,
    step_by_step,
    trainings,
    unstructured_experiments,
)
from spamprune.report.table import TIES, Entry, Table, Text, marked

_NOTE = f"Mean ± standard error over seeds, on test data. **Best** of each column; {TIES}"


def text(merged: Merged, figures: Iterable[str]) -> str:
    """Return the tables of comparable runs, and the figures of these file names."""
    parts = [*_head(merged), *_trained(merged), *_after(merged), *_during(merged)]
    return "\n".join([*parts, *(f"![{name.removesuffix('.svg')}]({name})\n" for name in figures)])


def _head(merged: Merged) -> Iterator[str]:
    """Say what is compared, and which versions and hardware are not the same for all runs."""
    yield f"# Comparison on {merged.results.data.get('name')}\n"
    yield f"{_NOTE}\n"
    rows = [
        [Text(f"`{r.folder}`"), Text(r.recipe.name), Text(", ".join(map(str, r.recipe.seeds)))]
        for r in merged.runs
    ]
    yield Table([Text("Run"), Text("Recipe"), Text("Seeds")], rows).markdown()
    environments = [run.results.environment for run in merged.runs]
    for key in dict.fromkeys(key for environment in environments for key in environment):
        values = dict.fromkeys(environment.get(key, "unknown") for environment in environments)
        if len(values) > 1:
            yield f"The runs differ in {key}: {', '.join(values)}.\n"


def _trained(merged: Merged) -> Iterator[str]:
    if any(during([cell]) for cell in merged.results.cells):
        yield "## Trained\n"
        yield "Those that were pruned in training are as they came out.\n"
    else:
        yield "## Unpruned\n"
    yield _trained_table(merged).markdown()
    inference = bayes.inference_table(merged.results)
    if inference.rows:
        yield "## Variational inference\n"
        yield inference.markdown()


def _after(merged: Merged) -> Iterator[str]:
    """Yield what pruning did to networks that were trained."""
    results, origins = merged.results, merged.origins
    for experiment in unstructured_experiments(results):
        for stage in masked_stages(results, experiment):
            yield f"## Unstructured, {STAGES[stage]} (`{origins[experiment]}`)\n"
            if note := step_by_step(results, experiment):
                yield f"{note}\n"
            for metric, label in METRICS.items():
                yield f"{label} at sparsity:\n"
                yield _masked_table(merged, experiment, stage, metric).markdown()
        if note := beyond(results, experiment):
            yield f"{note}\n"
        evidence = bayes.evidence_table(results, experiment)
        if evidence.rows:
            yield f"## Sparsity of most evidence (`{origins[experiment]}`)\n"
            yield evidence.markdown()
    sparse = patterns(results)
    for experiment in dict.fromkeys(pattern.experiment for pattern in sparse):
        yield f"## Semi-structured, accuracy / % (`{origins[experiment]}`)\n"
        yield _patterns_table(merged, [p for p in sparse if p.experiment == experiment]).markdown()
    shown = families(results)
    for experiment in sorted({family.experiment for family in shown}):
        yield f"## Structured, accuracy / % (`{origins[experiment]}`)\n"
        if note := step_by_step(results, experiment):
            yield f"{note}\n"
        yield _compacted_table(merged, [f for f in shown if f.experiment == experiment]).markdown()


def _during(merged: Merged) -> Iterator[str]:
    """Yield what pruning did to networks in training."""
    if online_steps(merged.results):
        yield "## Online: masks that grew in training, accuracy\n"
        yield tables.online_table(merged.results).markdown()
    if gradual_steps(merged.results):
        yield "## Gradual: units that went in training, accuracy\n"
        yield tables.gradual_table(merged.results).markdown()


def _several_models(merged: Merged) -> bool:
    return len({method.model for method in merged.methods.values()}) > 1


def _heads(merged: Merged) -> list[Entry]:
    """Return the heads of the columns that say how a row's networks were trained."""
    model = ["Model"] if _several_models(merged) else []
    return [*map(Text, ("Training", *model, "Hessian", "Prior")), "Seeds"]


def _lead(merged: Merged, training: str, seeds: Iterable[int]) -> list[Entry]:
    """Return what a row has there, given how many seeds its numbers have."""
    method = merged.methods[training]
    model = [method.model] if _several_models(merged) else []
    counts = sorted(set(seeds))
    few_to_many = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return [*map(Text, (training, *model, method.hessian, method.prior)), few_to_many]


def _trained_table(merged: Merged) -> Table:
    groups = trainings(merged.results)
    columns = [marked([dense(cells, m) for cells in groups.values()], m) for m in METRICS]
    rows = [
        [
            *_lead(merged, name, [len(cells)]),
            *column,
            plus_minus(spread(cell.log_evidence for cell in cells), 0),
            *(count(cost(cells, field)) for field in ("params", "macs")),
        ]
        for (name, cells), *column in zip(groups.items(), *columns, strict=True)
    ]
    costs = ("Log evidence / nats", "Parameters", "MACs")
    return Table([*_heads(merged), *METRICS.values(), *costs], rows)


def _masked_table(merged: Merged, experiment: int, stage: Stage, metric: str) -> Table:
    """Return the table of one metric: criteria together, as in the paper, against sparsity."""
    series = masked_series(merged.results, experiment, stage)
    criteria = list(dict.fromkeys(criterion for _, criterion in series))
    keys = sorted(series, key=lambda key: criteria.index(key[1]))
    leads = [
        [Text(criterion), *_lead(merged, training, map(len, series[training, criterion].values()))]
        for training, criterion in keys
    ]
    head = [Text("Criterion"), *_heads(merged)]
    return tables.by_sparsity(head, leads, [series[key] for key in keys], metric)


def _compacted_table(merged: Merged, shown: Sequence[Family]) -> Table:
    """Return the table of a structured experiment; the best of each target's rows is marked."""
    # by exact values: their texts are rounded
    wanted = {tuple(sorted(family.target.items())): family.target for family in shown}
    rows: list[list[Entry]] = []
    for values in wanted.values():
        group = [family for family in shown if family.target == values]
        columns = [marked([f.accuracy(stage) for f in group], "accuracy") for stage in STAGES]
        rows += [
            [
                *map(Text, (target(values), family.criterion, family.ranking)),
                *_lead(merged, family.training, [len(family.members)]),
                *column,
                *(count(family.cost(field)) for field in COST_FIELDS),
                f"{family.saving('macs'):.1f}×",
            ]
            for family, *column in zip(group, *columns, strict=True)
        ]
    head = [*map(Text, ("Target", "Criterion", "Ranking")), *_heads(merged)]
    stages = (label.capitalize() for label in STAGES.values())
    return Table([*head, *stages, "Parameters", "MACs", "Bytes", "Fewer MACs"], rows)


def _patterns_table(merged: Merged, shown: Sequence[Pattern]) -> Table:
    """Return the table of a semi-structured experiment; the best of each pattern is marked."""
    stages: tuple[Stage, ...] = ("pruned", "finetuned")
    rows: list[list[Entry]] = []
    for pattern in dict.fromkeys(p.pattern for p in shown):
        group = [p for p in shown if p.pattern == pattern]
        columns = [marked([p.accuracy(stage) for p in group], "accuracy") for stage in stages]
        rows += [
            [
                *map(Text, (pattern, p.criterion)),
                *_lead(merged, p.training, [len(p.members)]),
                f"{p.zeros().mean:.1f}",
                plus_minus(p.dense_accuracy(), DIGITS["accuracy"]),
                *column,
            ]
            for p, *column in zip(group, *columns, strict=True)
        ]
    head = [*map(Text, ("Pattern", "Criterion")), *_heads(merged)]
    return Table([*head, "Zero weights / %", "As trained", "Just pruned", "Fine-tuned"], rows)
