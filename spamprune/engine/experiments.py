"""The pruning experiments of a recipe, on one trained network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from spamprune import artifact, scores
from spamprune.bayes.posterior import Posterior
from spamprune.bayes.spam import SpaM
from spamprune.engine.bench import Bench, create_model
from spamprune.engine.fit import Job, fit
from spamprune.engine.methods import ByPrior
from spamprune.pruning import compaction, cost, masks, plan
from spamprune.recipe.schema import FineTune, Structured, Unstructured
from spamprune.report.results import Compacted, Masked, Quality

#: Inputs on which a compacted network is compared with its masked original.
VERIFY_BATCH = 128


@dataclass(frozen=True)
class _Trained:
    """A trained network with what pruning needs of it."""

    bench: Bench
    model: nn.Module
    posterior: Posterior

    def scores(self, criterion: str, model: nn.Module | None = None) -> scores.Scores:
        """Score the trained network, or a masked copy of it."""
        bench = self.bench
        batch_size = bench.config.batch_size
        data = bench.data.train.loader(batch_size, seed=bench.seed)
        scored = self.model if model is None else model
        return scores.CRITERIA[criterion](scored, self.posterior, data=data, seed=bench.seed)


def run_unstructured(bench: Bench, model: nn.Module, posterior: Posterior) -> Iterator[Masked]:
    """Run the recipe's unstructured experiments; ``model`` is left as it is."""
    trained = _Trained(bench, model, posterior)
    for index, experiment in enumerate(bench.recipe.prune):
        if not isinstance(experiment, Unstructured):
            continue
        for criterion in experiment.criteria:
            values = trained.scores(criterion)
            for sparsity in experiment.sparsities:
                name = f"prune{index}-{criterion}-{sparsity}"
                yield bench.once(
                    name,
                    Masked,
                    partial(_mask, trained, experiment, index, criterion, values, sparsity, name),
                )


def run_structured(bench: Bench, model: nn.Module, posterior: Posterior) -> Iterator[Compacted]:
    """Run the recipe's structured experiments; ``model`` is left as it is."""
    trained = _Trained(bench, model, posterior)
    for index, experiment in enumerate(bench.recipe.prune):
        if not isinstance(experiment, Structured):
            continue
        if experiment.trainings is not None and bench.training not in experiment.trainings:
            continue
        for criterion in experiment.criteria:
            values = trained.scores(criterion)
            for wanted in experiment.targets:
                target = plan.Target(**wanted.model_dump())
                name = "prune{}-{}-{}-{}{}".format(
                    index, criterion, experiment.ranking, *target.named()
                )
                yield bench.once(
                    name,
                    Compacted,
                    partial(_compact, trained, experiment, index, criterion, values, target, name),
                )


def _mask(
    trained: _Trained,
    experiment: Unstructured,
    index: int,
    criterion: str,
    values: scores.Scores,
    sparsity: float,
    name: str,
) -> Masked:
    bench = trained.bench
    chosen = _choose(trained, experiment, criterion, values, sparsity)
    pruned = copy.deepcopy(trained.model)
    masks.apply_masks(pruned, chosen)
    before, after = bench.quality(pruned, bench.data.test), None
    if experiment.finetune is not None:
        _train_on(bench, pruned, experiment.finetune, f"{name}.finetune", chosen)
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
    trained: _Trained,
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
        trained.model,
        lambda model: comparable(trained.scores(criterion, model)),
        sparsity,
        rounds=experiment.rounds,
    )


def _compact(
    trained: _Trained,
    experiment: Structured,
    index: int,
    criterion: str,
    values: scores.Scores,
    target: plan.Target,
    name: str,
) -> Compacted:
    bench, model = trained.bench, trained.model
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
        _train_on(bench, small, experiment.finetune, f"{name}.finetune")
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
    _train_on(bench, shaped, training, f"{name}.scratch")
    return bench.quality(shaped, bench.data.test)


def _train_on(
    bench: Bench,
    model: nn.Module,
    finetune: FineTune,
    name: str,
    held_masks: masks.Masks | None = None,
) -> None:
    """Train ``model`` in place under a fixed prior; pruned weights stay pruned."""
    train = bench.data.train
    spam = SpaM(model, len(train), prior="scalar", precision=finetune.precision, burn_in=None)
    checkpoint = bench.folder / f"{name}.checkpoint.safetensors"
    job = Job(
        train=train,
        epochs=finetune.epochs,
        batch_size=finetune.batch_size,
        optimiser=finetune.optimiser,
        seed=bench.seed,
        augment=bench.recipe.data.augment,
        masks=held_masks,
        checkpoint=checkpoint,
    )
    fit(model, ByPrior(spam), job, bench.accelerator, lambda record: bench.on_epoch(name, record))
    checkpoint.unlink(missing_ok=True)
