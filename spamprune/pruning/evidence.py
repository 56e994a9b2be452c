"""How far to prune, by the evidence: the sparsity is found, not asked for.

Two statements of the Laplace posterior bound it. The data determine ``γ = Σ (H/T)/(H/T + δ)``
parameters (MacKay 1992), and no fewer weights are kept. Up to there, removing weights changes the
log evidence by

``ΔF = −ΔL/T + ½ Σ [δθ² + ln(P/δ)]``,

summed over the weights that go, L being the summed loss, which is measured on training data: ΔF
from the posterior's quadratic alone is off by far once many weights go together. Of the networks
along an order of removal the one with the largest evidence is taken. Kronecker factors count
through their diagonal, since no weight leaves them by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spamprune.bayes.curvature.batches import pair
from spamprune.bayes.likelihood import CLASSIFICATION, Likelihood
from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.posterior import Posterior
from spamprune.errors import PosteriorError
from spamprune.modules import device_of, evaluation_mode
from spamprune.pruning.masks import Masks

#: Nats by which evidences do not tell networks apart ("not worth more than a bare mention", Kass &
#: Raftery 1995): the smaller one is taken.
TIE = 1.0
#: Networks whose evidence is measured, besides the dense one.
STEPS = 20
#: Training samples that the loss of each is measured on.
EVIDENCE_SAMPLES = 10_000


class Evidence:
    """The evidence of a trained network with parts of it removed.

    Args:
        model: The trained network.
        posterior: Around it, under the prior that it was trained with. A pretrained network had its
            weight decay for a prior: fit the posterior with ``prior=decay * n_data``.
        data: The training data, the same in the same order each time: neither shuffled nor
            augmented.
        likelihood: Of the targets.
        samples: How many of the data the loss is measured on.

    Attributes:
        log_evidence: Of the whole network, in nats.
        effective: γ, how many parameters the data determine; what the curvature leaves out counts
            as determined.
        shares: How far they determine each parameter, 0 to 1, by name.

    Raises:
        PosteriorError: The posterior is of another model, there are no data, or they are others
            each time.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        data: Iterable[tuple[Tensor, Tensor]],
        *,
        likelihood: Likelihood = CLASSIFICATION,
        samples: int = EVIDENCE_SAMPLES,
    ):
        posterior = posterior.on(model)
        self.model, self._posterior = model, posterior
        self._data, self._likelihood, self._samples = data, likelihood, samples
        self.log_evidence = posterior.log_evidence
        self.shares: dict[str, Tensor] = {}
        self._gains: dict[str, Tensor] = {}
        for name, parameter in named_parameters(model).items():
            prior = posterior.prior_precision[name].double()
            h = posterior.curvature.diag.get(name)
            if h is None:
                self.shares[name] = torch.ones_like(prior)
                self._gains[name] = torch.zeros_like(prior)
                continue
            ratio = h.double() / posterior.temperature / prior
            self.shares[name] = ratio / (1 + ratio)
            self._gains[name] = 0.5 * (prior * parameter.double().square() + ratio.log1p())
        self.effective = sum(share.sum().item() for share in self.shares.values())
        if isinstance(data, Iterator):
            raise PosteriorError(
                "the evidence goes through the data again for each network, and this iterator ends "
                "after once: give a loader or a list"
            )
        if not torch.equal(_first(data), _first(data)):
            raise PosteriorError(
                "the evidence compares losses of the same data, and the loader gave other inputs "
                "the second time: give one that neither shuffles nor augments"
            )
        self._dense = self._loss(model)

    def change(self, network: nn.Module, masks: Masks) -> float:
        """Return how much larger the log evidence of a pruned network is, in nats.

        Args:
            network: It, masked or compacted.
            masks: By the whole network's parameters, True where a weight stays.
        """
        gained = sum(self._gains[name][~mask].sum().item() for name, mask in masks.items())
        return gained - (self._loss(network) - self._dense) / self._posterior.temperature

    @torch.no_grad()
    def _loss(self, network: nn.Module) -> float:
        """Return the loss of the whole data set as a sample tells it."""
        loss, seen, device = 0.0, 0, device_of(network)
        with evaluation_mode(network):
            for batch in self._data:
                inputs, targets = pair(batch)
                outputs = network(inputs.to(device))
                losses = self._likelihood.losses(outputs, targets.to(device))
                loss += losses.double().sum().item()
                seen += len(inputs)
                if seen >= self._samples:
                    break
        return loss * self._posterior.curvature.n_data / seen


def _first(data: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    for batch in data:
        return pair(batch)[0]
    raise PosteriorError("the evidence needs data: the loader gave no batches")


@dataclass(frozen=True)
class Choice:
    """How far the evidence says to prune.

    Attributes:
        step: Which of the steps that were offered.
        change: Of the log evidence, in nats.
        notes: When to look twice.
    """

    step: int
    change: float
    notes: tuple[str, ...]


def choose(
    evidence: Evidence, steps: Sequence[int], prune: Callable[[int], tuple[nn.Module, Masks]]
) -> Choice:
    """Return the last step at which the evidence is as good as the largest.

    Args:
        evidence: Of the network.
        steps: From as little pruned as can be to as much as γ allows, ascending.
        prune: Returns the pruned network of a step, and its masks.
    """
    changes = [evidence.change(*prune(step)) for step in steps]
    best = max(j for j, change in enumerate(changes) if change >= max(changes) - TIE)
    notes = []
    if best == 0:
        notes.append("evidence: it favours removing nothing more")
    elif best == len(steps) - 1:
        notes.append(
            f"evidence: still rising where no more weights are left than the data determine "
            f"({evidence.effective:.0f}): so it does under a prior that was not tuned, where only "
            "this count decides"
        )
    return Choice(steps[best], changes[best], tuple(notes))
