"""What is pruned in experiments: a trained network, its scores, and its training afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

from safetensors.torch import load_file
from torch import nn

from spamprune import artifact, scores
from spamprune.bayes.posterior import Posterior, load_posterior
from spamprune.bayes.spam import SpaM
from spamprune.copies import copied
from spamprune.engine.bench import Bench
from spamprune.engine.fit import fit
from spamprune.engine.methods import ByPrior, spam_of
from spamprune.engine.objective import Teacher, likelihood_of
from spamprune.files import write_tensors
from spamprune.modules import evaluation_mode
from spamprune.pruning import masks
from spamprune.pruning.evidence import Evidence
from spamprune.pruning.recalibrate import recalibrate
from spamprune.recipe.schema import FineTune
from spamprune.recipe.schema.pruning import Masking, Selective
from spamprune.report.results import Quality
from spamprune.scores import Scores

E = TypeVar("E", bound=Selective)

# what a stage that leads on leaves beside its artifact
_POSTERIOR, _MASKS = "posterior.safetensors", "masks.safetensors"


@dataclass(frozen=True)
class Subject:
    """A trained network, with what pruning needs of it.

    Attributes:
        bench: The cell that it is of.
        model: The network.
        posterior: Around its weights.
        held: False where a weight was pruned for good, by name; None if none was.
        finetune: How it was fine-tuned, if it was.
        dense: The network that training left, if this one was pruned from it.
    """

    bench: Bench
    model: nn.Module
    posterior: Posterior
    held: masks.Masks | None = None
    finetune: FineTune | None = None
    dense: nn.Module | None = None

    def scores(
        self, criterion: str, batches: int | None = None, model: nn.Module | None = None
    ) -> Scores:
        """Score the network, or a masked copy of it.

        Args:
            criterion: By which.
            batches: Of training data to see, if not all.
            model: The copy.
        """
        bench, settings = self.bench, self.finetune or self.bench.config
        loader = bench.data.train.loader(settings.batch_size, seed=bench.seed)
        return scores.CRITERIA[criterion](
            self.model if model is None else model,
            self.posterior,
            data=loader if batches is None else list(islice(loader, batches)),
            likelihood=likelihood_of(settings.loss),
            seed=bench.seed,
        )

    def experiments(self, kind: type[E]) -> Iterator[tuple[int, E]]:
        """Return the recipe's experiments of a kind on this training, with their positions."""
        for index, experiment in enumerate(self.bench.recipe.prune):
            if isinstance(experiment, kind) and experiment.concerns(self.bench.training):
                yield index, experiment

    def held_first(self, scored: Scores) -> Scores:
        """Return scores by which what is pruned already goes before all else."""
        return scored if self.held is None else masks.gone_first(scored, self.held)

    def with_held(self, chosen: masks.Masks) -> masks.Masks:
        """Return masks that hold, besides what they hold, what is pruned already."""
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
        self,
        chosen: masks.Masks,
        experiment: Masking,
        name: str,
        about: dict[str, Any],
        *,
        leads_on: bool = False,
    ) -> tuple[nn.Module, Quality, Quality | None]:
        """Mask, measure, perhaps fine-tune, and save a copy of the network.

        Args:
            chosen: The masks.
            experiment: What becomes of the copy before and after it is measured.
            name: Of the stage and of the artifact's folder.
            about: What the artifact says of itself besides.
            leads_on: Keep for :meth:`after` what it needs.

        Returns:
            The copy, and its quality just pruned and fine-tuned.
        """
        bench = self.bench
        pruned = copied(self.model)
        masks.apply_masks(pruned, chosen)
        before, after = self.just_pruned(pruned, experiment), None
        if experiment.finetune is not None:
            self.tune(pruned, experiment.finetune, name, chosen, leads_on=leads_on)
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

    def tune(
        self,
        pruned: nn.Module,
        finetune: FineTune,
        name: str,
        held_masks: masks.Masks | None = None,
        *,
        leads_on: bool = False,
    ) -> None:
        """Train a pruned copy of the network in place, which may learn from the dense network.

        Args:
            pruned: The copy.
            finetune: How it is trained.
            name: Of its stage, in progress and on disk.
            held_masks: Of weights that stay at zero.
            leads_on: Keep for :meth:`after` its posterior and the masks.
        """
        bench, dense = self.bench, self._dense
        teacher = None if finetune.distil is None else Teacher(dense, finetune.distil)
        with evaluation_mode(dense):
            spam = train_on(bench, pruned, finetune, f"{name}.finetune", held_masks, teacher)
        if leads_on:
            data = bench.data.train.loader(finetune.batch_size)
            spam.posterior(data).save(bench.folder / f"{name}.{_POSTERIOR}")
            if held_masks is not None:
                write_tensors(bench.folder / f"{name}.{_MASKS}", held_masks, {})

    def after(self, name: str, finetune: FineTune) -> Subject:
        """Return what a stage that leads on saved, to be pruned further.

        Args:
            name: The stage's.
            finetune: How its network was fine-tuned.
        """
        folder, device = self.bench.folder, self.bench.accelerator.device
        model = artifact.load(folder / name).to(device)
        saved = folder / f"{name}.{_MASKS}"
        return Subject(
            self.bench,
            model,
            load_posterior(folder / f"{name}.{_POSTERIOR}").on(model),
            load_file(saved, str(device)) if saved.exists() else None,
            finetune,
            self._dense,
        )

    @property
    def _dense(self) -> nn.Module:
        return self.model if self.dense is None else self.dense


def train_on(
    bench: Bench,
    model: nn.Module,
    finetune: FineTune,
    name: str,
    held_masks: masks.Masks | None = None,
    teacher: Teacher | None = None,
) -> SpaM:
    """Train ``model`` in place as fine-tuning does, without distillation unless by ``teacher``.

    Returns:
        Its prior.
    """
    spam = spam_of(finetune, model, len(bench.data.train), bench.seed, held_masks)
    checkpoint = bench.folder / f"{name}.checkpoint.safetensors"
    job = replace(bench.job(finetune, teacher), masks=held_masks, checkpoint=checkpoint)
    fit(model, ByPrior(spam), job, bench.accelerator, lambda record: bench.on_epoch(name, record))
    checkpoint.unlink(missing_ok=True)
    return spam
