"""Online pruning: global masks that grow while a network is trained (SpaM paper, figure 1)."""

from __future__ import annotations

import torch
from torch import nn

from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.spam import SpaM
from spamprune.engine.bench import Bench
from spamprune.engine.subject import Subject
from spamprune.pruning import masks
from spamprune.recipe.schema import Online
from spamprune.report.results import OnlineCut, Quality


class Cuts:
    """The cuts of one training, for its loop to call after each epoch and its evidence step.

    Args:
        bench: The training's cell.
        config: When it is cut, and how far.
        model: The network, changed in place.
        spam: Its prior, whose posterior at that moment scores the weights as they are then. It is
            told of the masks.

    Attributes:
        masks: For the loop to hold, changed in place at each cut; None where weights may regrow.
    """

    def __init__(self, bench: Bench, config: Online, model: nn.Module, spam: SpaM):
        self._bench, self._config = bench, config
        self._model, self._spam = model, spam
        self._sparsities = config.sparsities(bench.config.epochs)
        self.masks: masks.Masks | None = None
        if config.hold:
            parameters = named_parameters(model)
            self.masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in parameters.items()}
            spam.masks = self.masks  # its evidence, too, is of the weights that are left

    def after_epoch(self, epoch: int) -> None:
        """Cut where one is due after ``epoch``, and measure what came of the one before."""
        due = epoch in self._sparsities
        before = max((e for e in self._sparsities if e < epoch), default=None)
        ends = due or epoch == self._bench.config.epochs
        if self._config.hold and before is not None and ends:
            self._measured(before, "trained")
        if due:
            self._cut(self._sparsities[epoch])
            self._measured(epoch, "pruned")

    def records(self) -> list[OnlineCut]:
        """Return what the cuts came to, once training is done."""
        last = self._bench.config.epochs
        return [
            OnlineCut(
                epoch=epoch,
                criterion=self._config.criterion,
                held=self._config.hold,
                sparsity=sparsity,
                pruned=self._measured(epoch, "pruned"),
                trained=self._measured(epoch, "trained")
                if self._config.hold and epoch < last
                else None,
            )
            for epoch, sparsity in self._sparsities.items()
        ]

    def _cut(self, sparsity: float) -> None:
        bench = self._bench
        loader = bench.data.train.loader(bench.config.batch_size)
        subject = Subject(bench, self._model, self._spam.posterior(loader))
        scores = subject.scores(self._config.criterion)
        if self.masks is not None:
            scores = masks.gone_first(scores, self.masks)
        chosen = masks.global_masks(scores, sparsity)
        masks.apply_masks(self._model, chosen)
        if self.masks is not None:
            self.masks.update(chosen)

    def _measured(self, epoch: int, stage: str) -> Quality:
        """Return the quality of the network at a stage of a cut: as it is now, if not yet known."""
        bench = self._bench
        name = f"online{epoch}-{stage}"
        return bench.once(name, Quality, lambda: bench.quality(self._model, bench.data.test))
