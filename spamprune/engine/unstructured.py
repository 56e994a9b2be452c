"""The unstructured experiments of a recipe: masks on a trained network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

from spamprune import artifact, scores
from spamprune.engine.subject import Subject, finetune_on
from spamprune.pruning import cost, masks
from spamprune.recipe.schema import Unstructured
from spamprune.report.results import Masked


def run(subject: Subject) -> Iterator[Masked]:
    """Run the recipe's unstructured experiments; its network is left as it is."""
    bench = subject.bench
    for index, experiment in enumerate(bench.recipe.prune):
        if not isinstance(experiment, Unstructured):
            continue
        for criterion in experiment.criteria:
            values = subject.scores(criterion)
            for sparsity in experiment.sparsities:
                name = f"prune{index}-{criterion}-{sparsity}"
                yield bench.once(
                    name,
                    Masked,
                    partial(_mask, subject, experiment, index, criterion, values, sparsity, name),
                )


def _mask(
    subject: Subject,
    experiment: Unstructured,
    index: int,
    criterion: str,
    values: scores.Scores,
    sparsity: float,
    name: str,
) -> Masked:
    bench = subject.bench
    chosen = _choose(subject, experiment, criterion, values, sparsity)
    pruned = copy.deepcopy(subject.model)
    masks.apply_masks(pruned, chosen)
    before, after = bench.quality(pruned, bench.data.test), None
    if experiment.finetune is not None:
        finetune_on(bench, pruned, experiment.finetune, f"{name}.finetune", chosen)
        after = bench.quality(pruned, bench.data.test)
    folder = bench.folder / name
    artifact.save(
        pruned,
        folder,
        preprocessing=bench.data.preprocessing,
        extra={"sparsity": sparsity, "criterion": criterion},
    )
    return Masked(
        experiment=index,
        criterion=criterion,
        requested=sparsity,
        achieved=masks.sparsity_of(chosen),
        nonzero=cost.nonzero(pruned),
        pruned=before,
        finetuned=after,
        artifact=f"{bench.relative}/{name}",
    )


def _choose(
    subject: Subject,
    experiment: Unstructured,
    criterion: str,
    values: scores.Scores,
    sparsity: float,
) -> masks.Masks:
    """Return masks of the sparsity, at once or in rounds."""

    def comparable(scored: scores.Scores) -> scores.Scores:
        return masks.lamp(scored) if experiment.threshold == "lamp" else scored

    if experiment.rounds == 1:
        return masks.global_masks(comparable(values), sparsity)
    return masks.iterative_masks(
        subject.model,
        lambda model: comparable(subject.scores(criterion, model)),
        sparsity,
        rounds=experiment.rounds,
    )
