"""What is pruned in experiments: a trained network, its scores, and its training afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from spamprune import scores
from spamprune.bayes.posterior import Posterior
from spamprune.engine.bench import Bench
from spamprune.engine.fit import fit
from spamprune.engine.methods import ByPrior, spam_of
from spamprune.engine.objective import Teacher, likelihood_of
from spamprune.modules import evaluation_mode
from spamprune.pruning import masks
from spamprune.recipe.schema import FineTune


@dataclass(frozen=True)
class Subject:
    """A trained network, with what pruning needs of it.

    Attributes:
        bench: The cell that it is of.
        model: The network.
        posterior: Around its weights.
    """

    bench: Bench
    model: nn.Module
    posterior: Posterior

    def scores(self, criterion: str, model: nn.Module | None = None) -> scores.Scores:
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
