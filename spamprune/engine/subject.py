"""What is pruned in experiments: a trained network, its scores, and its training afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from torch import nn

from spamprune import artifact, scores
from spamprune.bayes.posterior import Posterior
from spamprune.engine.bench import Bench
from spamprune.engine.fit import fit
from spamprune.engine.methods import ByPrior, spam_of
from spamprune.engine.objective import Teacher, likelihood_of
from spamprune.modules import evaluation_mode
from spamprune.pruning import masks
from spamprune.pruning.evidence import Evidence
from spamprune.pruning.recalibrate import recalibrate
from spamprune.recipe.schema import FineTune
from spamprune.recipe.schema.pruning import Masking, Selective
from spamprune.report.results import Quality
from spamprune.scores import Scores

E = TypeVar("E", bound=Selective)


@dataclass(frozen=True)
class Subject:
    """A trained network, with what pruning needs of it.

    Attributes:
        bench: The cell that it is of.
        model: The network.
        posterior: Around its weights.
        held: False where its training pruned a weight for good, by name; None if it pruned none.
    """

    bench: Bench
    model: nn.Module
    posterior: Posterior
    held: masks.Masks | None = None

    def scores(self, criterion: str, model: nn.Module | None = None) -> Scores:
        """Score the trained network, or a masked copy of it."""
        bench = self.bench
        batch_size = bench.config.batch_size
        data = bench.data.train.loader(batch_size, seed=bench.seed)
        scored = self.model if model is None else model
        return scores.CRITERIA[criterion](
            scored,
            self.posterior,
            data=data,
            likelihood=likelihood_of(bench.config.loss),
            seed=bench.seed,
        )

    def experiments(self, kind: type[E]) -> Iterator[tuple[int, E]]:
        """Return the recipe's experiments of a kind on this training, with their positions."""
        for index, experiment in enumerate(self.bench.recipe.prune):
            if isinstance(experiment, kind) and experiment.concerns(self.bench.training):
                yield index, experiment

    def held_first(self, scored: Scores) -> Scores:
        """Return scores by which what training pruned goes before all else."""
        return scored if self.held is None else masks.gone_first(scored, self.held)

    def with_held(self, chosen: masks.Masks) -> masks.Masks:
        """Return masks that hold, besides what they hold, what training pruned."""
        held = self.held
        return chosen if held is None else held | {n: m & held[n] for n, m in chosen.items()}

    @cached_property
    def evidence(self) -> Evidence:
        """The evidence of the network with parts of it removed."""
        bench = self.bench
        return Evidence(
            self.model,
            self.posterior,
            bench.data.train.loader(bench.recipe.evaluate.batch_size, seed=bench.seed),
            likelihood=likelihood_of(bench.config.loss),
        )

    def masked(
        self, chosen: masks.Masks, experiment: Masking, name: str, about: dict[str, Any]
    ) -> tuple[nn.Module, Quality, Quality | None]:
        """Mask, measure, perhaps fine-tune, and save a copy of the network.

        Args:
            chosen: The masks.
            experiment: What becomes of the copy before and after it is measured.
            name: Of the stage and of the artifact's folder.
            about: What the artifact says of itself besides.

        Returns:
            The copy, and its quality just pruned and fine-tuned.
        """
        bench = self.bench
        pruned = copy.deepcopy(self.model)
        masks.apply_masks(pruned, chosen)
        before, after = self.just_pruned(pruned, experiment), None
        if experiment.finetune is not None:
            self.finetune(pruned, experiment.finetune, f"{name}.finetune", chosen)
            after = bench.quality(pruned, bench.data.test)
        preprocessing = bench.data.preprocessing
        artifact.save(pruned, bench.folder / name, preprocessing=preprocessing, extra=about)
        return pruned, before, after

    def just_pruned(self, pruned: nn.Module, experiment: Selective) -> Quality:
        """Measure a pruned copy of the network, with its BatchNorms' statistics anew if asked."""
        bench = self.bench
        if experiment.recalibrate:
            recalibrate(pruned, bench.data.train.loader(bench.config.batch_size, seed=bench.seed))
        return bench.quality(pruned, bench.data.test)

    def finetune(
        self,
        pruned: nn.Module,
        finetune: FineTune,
        name: str,
        held_masks: masks.Masks | None = None,
    ) -> None:
        """Train a pruned copy of the network in place, which may learn from the network itself.

        Args:
            pruned: The copy.
            finetune: How it is trained.
            name: Of this stage, in progress and on disk.
            held_masks: Of weights that stay at zero.
        """
        teacher = None if finetune.distil is None else Teacher(self.model, finetune.distil)
        with evaluation_mode(self.model):
            train_on(self.bench, pruned, finetune, name, held_masks, teacher)


def train_on(
    bench: Bench,
    model: nn.Module,
    finetune: FineTune,
    name: str,
    held_masks: masks.Masks | None = None,
    teacher: Teacher | None = None,
) -> None:
    """Train ``model`` in place as fine-tuning does, without distillation unless by ``teacher``."""
    spam = spam_of(finetune, model, len(bench.data.train), bench.seed, held_masks)
    checkpoint = bench.folder / f"{name}.checkpoint.safetensors"
    job = replace(bench.job(finetune, teacher), masks=held_masks, checkpoint=checkpoint)
    fit(model, ByPrior(spam), job, bench.accelerator, lambda record: bench.on_epoch(name, record))
    checkpoint.unlink(missing_ok=True)
