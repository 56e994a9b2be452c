"""What is pruned in experiments: a trained network, its scores, and its training afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from spamprune import scores
from spamprune.bayes.posterior import Posterior
from spamprune.bayes.spam import SpaM
from spamprune.engine.bench import Bench
from spamprune.engine.fit import Job, fit
from spamprune.engine.methods import ByPrior
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
        return scores.CRITERIA[criterion](scored, self.posterior, data=data, seed=bench.seed)


def finetune_on(
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
