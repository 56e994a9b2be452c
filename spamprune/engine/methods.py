"""Ways of training: what happens besides gradient steps on the mean loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from spamprune.bayes.curvature import CurvatureMethod
from spamprune.bayes.spam import SpaM
from spamprune.engine.objective import likelihood_of
from spamprune.recipe.schema import Training
from spamprune.report.results import Reduced


@dataclass(frozen=True)
class Tuned:
    """What an epoch's update of the prior came to.

    Attributes:
        log_evidence: In nats, after it.
        log_precision: Mean log δ of each parameter tensor, in the model's order.
        reduced: What Bayesian model reduction pruned, if it did.
    """

    log_evidence: float
    log_precision: list[float]
    reduced: Reduced | None = None


class Method(Protocol):
    """A way of training, as the loop sees it."""

    def penalty(self) -> Tensor | float:
        """Return what is added to the mean loss of a batch."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Do what follows every step of the optimiser."""

    def after_epoch(self, epoch: int, loader: Iterable[tuple[Tensor, Tensor]]) -> Tuned | None:
        """Do what follows epoch ``epoch``, counted from 1; ``loader`` is without augmentation."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what training changes and the trained module does not hold."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""


@dataclass(frozen=True)
class ByPrior:
    """SpaM, or MAP where ``spam`` never updates its prior.

    The prior acts through :meth:`SpaM.shrink`, which is stable however large its precision.
    """

    spam: SpaM

    def penalty(self) -> float:
        """Return nothing: the prior acts after the step."""
        return 0.0

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Shrink the weights."""
        self.spam.shrink(optimizer)

    def after_epoch(self, epoch: int, loader: Iterable[tuple[Tensor, Tensor]]) -> Tuned | None:
        """Take an evidence step, when one is due."""
        step = self.spam.update(epoch, loader)
        return Tuned(step.after, self.spam.mean_log_precision()) if step else None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the prior."""
        return self.spam.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the prior."""
        self.spam.load_state_dict(state)


def spam_of(
    settings: Training,
    model: nn.Module,
    samples: int,
    seed: int,
    masks: Mapping[str, Tensor] | None = None,
) -> SpaM:
    """Return the prior of a network that is trained, or trained further, as settings say.

    Args:
        settings: A recipe's.
        model: The network.
        samples: Of its training data.
        seed: Of what the curvature draws.
        masks: Of weights that are pruned.
    """
    evidence, tuned = settings.evidence, settings.method == "spam"
    return SpaM(
        model,
        samples,
        prior=settings.prior.structure,
        curvature=CurvatureMethod(**settings.curvature.model_dump()),
        likelihood=likelihood_of(settings.loss),
        precision=settings.prior.precision,
        temperature=settings.temperature,
        burn_in=evidence.burn_in if tuned else None,
        every=evidence.every,
        last=evidence.last,
        update=evidence.update if tuned else "adam",
        steps=evidence.steps,
        lr=evidence.lr,
        damping=evidence.damping,
        seed=seed,
        masks=masks,
    )
