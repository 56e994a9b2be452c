"""The structured experiments of a recipe: units removed from a trained network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from spamprune import artifact, scores
from spamprune.engine.bench import Bench, create_model
from spamprune.engine.subject import Subject, finetune_on
from spamprune.pruning import compaction, plan
from spamprune.recipe.schema import FineTune, Structured
from spamprune.report.results import Compacted, Quality

#: Inputs on which a compacted network is compared with its masked original.
VERIFY_BATCH = 128


def run(subject: Subject) -> Iterator[Compacted]:
    """Run the recipe's structured experiments; its network is left as it is."""
    bench = subject.bench
    for index, experiment in enumerate(bench.recipe.prune):
        if not isinstance(experiment, Structured):
            continue
        if experiment.trainings is not None and bench.training not in experiment.trainings:
            continue
        for criterion in experiment.criteria:
            values = subject.scores(criterion)
            for wanted in experiment.targets:
                target = plan.Target(**wanted.model_dump())
                name = "prune{}-{}-{}-{}{}".format(
                    index, criterion, experiment.ranking, *target.named()
                )
                yield bench.once(
                    name,
                    Compacted,
                    partial(_compact, subject, experiment, index, criterion, values, target, name),
                )


def _compact(
    subject: Subject,
    experiment: Structured,
    index: int,
    criterion: str,
    values: scores.Scores,
    target: plan.Target,
    name: str,
) -> Compacted:
    bench, model = subject.bench, subject.model
    example = bench.example()
    chosen = plan.plan(model, example, values, target, **experiment.choices())
    small = compaction.apply(model, chosen)
    residual = compaction.verify(model, small, chosen, bench.example(VERIFY_BATCH))
    before = bench.quality(small, bench.data.test)
    after, scratch = None, None
    if experiment.finetune is not None:
        if experiment.scratch is not None:
            anew = experiment.finetune.model_copy(update={"optimiser": experiment.scratch})
            scratch = bench.once(
                f"{name}.scratch", Quality, partial(_from_scratch, bench, chosen, anew, name)
            )
        finetune_on(bench, small, experiment.finetune, f"{name}.finetune")
        after = bench.quality(small, bench.data.test)
    folder = bench.folder / name
    artifact.save(
        small, folder, preprocessing=bench.data.preprocessing, extra={"plan": chosen.summary()}
    )
    size = bench.size(small).model_copy(update={"artifact_bytes": artifact.artifact_bytes(folder)})
    return Compacted(
        experiment=index,
        criterion=criterion,
        ranking=experiment.ranking,
        target=chosen.target,
        achieved=chosen.achieved,
        notes=list(chosen.notes),
        widths=chosen.widths(),
        residual=residual,
        size=size,
        pruned=before,
        finetuned=after,
        scratch=scratch,
        artifact=f"{bench.relative}/{name}",
    )


def _from_scratch(bench: Bench, chosen: compaction.Plan, training: FineTune, name: str) -> Quality:
    """Train the planned architecture from fresh weights and measure it."""
    fresh = create_model(bench.recipe, bench.seed).to(bench.example().device)
    shaped = compaction.apply(fresh, chosen)
    torch.manual_seed(bench.seed)
    for module in shaped.modules():  # a slice of a larger layer has that layer's scale
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    finetune_on(bench, shaped, training, f"{name}.scratch")
    return bench.quality(shaped, bench.data.test)
