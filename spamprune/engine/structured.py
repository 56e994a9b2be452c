"""The structured experiments of a recipe: units removed from a trained network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from spamprune import artifact
from spamprune.engine.bench import Bench, create_model
from spamprune.engine.subject import Subject, train_on
from spamprune.pruning import compaction, plan
from spamprune.pruning.block import BlockOPD
from spamprune.pruning.compensation import compensate
from spamprune.pruning.units import Scores
from spamprune.recipe.schema import BLOCK_OPD, FineTune, Structured, Target
from spamprune.report.results import Compacted, Quality

#: Inputs on which a compacted network is compared with its masked original.
VERIFY_BATCH = 128


def run(subject: Subject) -> Iterator[Compacted]:
    """Run the recipe's structured experiments; its network is left as it is."""
    bench = subject.bench
    for index, experiment in subject.experiments(Structured):
        for criterion in experiment.criteria:
            values = _scores(subject, criterion)
            for wanted in experiment.targets:
                target = _target(subject, wanted)
                name = "prune{}-{}-{}-{}{}".format(
                    index, criterion, experiment.ranking, *target.named()
                )
                yield bench.once(
                    name,
                    Compacted,
                    partial(_compact, subject, experiment, index, criterion, values, target, name),
                )


def _target(subject: Subject, wanted: Target) -> plan.Target:
    if wanted.evidence is not None:
        return plan.Target(evidence=subject.evidence)
    return plan.Target(**wanted.model_dump())


def _scores(subject: Subject, criterion: str) -> Scores:
    """Return what units are ranked by."""
    if criterion == BLOCK_OPD:
        return BlockOPD(subject.model, subject.posterior)
    return subject.scores(criterion)


def _compact(
    subject: Subject,
    experiment: Structured,
    index: int,
    criterion: str,
    values: Scores,
    target: plan.Target,
    name: str,
) -> Compacted:
    bench, model = subject.bench, subject.model
    example = bench.example()
    chosen = plan.plan(model, example, values, target, **experiment.choices())
    full = compensate(model, chosen, subject.posterior) if experiment.compensate else model
    small = compaction.apply(full, chosen)
    residual = compaction.verify(full, small, chosen, bench.example(VERIFY_BATCH))
    before = subject.just_pruned(small, experiment)
    after, scratch = None, None
    if experiment.finetune is not None:
        if experiment.scratch is not None:
            epochs = experiment.scratch_epochs(bench.config)
            # a fresh network has no statistics to freeze
            anew = experiment.finetune.model_copy(
                update={"optimiser": experiment.scratch, "epochs": epochs, "norms": "train"}
            )
            scratch = bench.once(
                f"{name}.scratch", Quality, partial(_from_scratch, bench, chosen, anew, name)
            )
        held = subject.held and {
            n: compaction.cut_tensor(chosen, n, mask) for n, mask in subject.held.items()
        }
        subject.finetune(small, experiment.finetune, f"{name}.finetune", held)
        after = bench.quality(small, bench.data.test)
    folder = bench.folder / name
    artifact.save(
        small, folder, preprocessing=bench.data.preprocessing, extra={"plan": chosen.summary()}
    )
    size = bench.size(small).model_copy(update={"artifact_bytes": artifact.artifact_bytes(folder)})
    return Compacted(
        experiment=index,
        criterion=criterion,
        compensated=experiment.compensate,
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
    reinitialise(shaped, fresh)
    train_on(bench, shaped, training, f"{name}.scratch")
    return bench.quality(shaped, bench.data.test)


@torch.no_grad()
def reinitialise(small: nn.Module, fresh: nn.Module) -> None:
    """Draw the weights of a network that was cut from a fresh one as for its own sizes.

    A slice of a larger layer has that layer's scale, so layers draw anew as torch does. What the
    architecture sets to one number stays: residual branches that start at zero, gains. Parameters
    that are no layer's own, such as positions, stay slices.
    """
    for module in small.modules():
        attention = isinstance(module, nn.MultiheadAttention)
        reset = getattr(module, "_reset_parameters" if attention else "reset_parameters", None)
        if callable(reset):
            reset()
    parameters = dict(small.named_parameters())
    for name, whole in fresh.named_parameters():
        first = whole.flatten()[0]
        if whole.numel() > 1 and bool((whole == first).all()):
            parameters[name].fill_(first)
