"""Along which gradients a batch is sent back: what makes a curvature Fisher or Gauss-Newton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spamprune.bayes.curvature.base import Labels
from spamprune.bayes.curvature.batches import processes
from spamprune.bayes.likelihood import Likelihood
from spamprune.modules import device_of


def generator_of(model: nn.Module, seed: int) -> torch.Generator:
    """Return a generator on the model's device, seeded differently in each process."""
    rank = dist.get_rank() if processes() > 1 else 0
    # a seed for each process; a CPU's generator takes no notice of the upper half of one
    seeds = torch.randint(2**31, (rank + 1,), generator=torch.Generator().manual_seed(seed))
    return torch.Generator(device=device_of(model)).manual_seed(int(seeds[rank]))


@dataclass(frozen=True)
class Directions:
    """Backward passes whose squared per-sample gradients sum to the curvature's diagonal.

    Attributes:
        labels: ``"ef"``: one, from the loss; ``"ggn"``: one for each column of a root of the loss's
            Hessian in the outputs (Martens 2020, section 9).
        likelihood: Of the targets.
        draws: For ``"ggn"``: this many draws of labels from the model instead of all columns.
        generator: Of the drawn labels, needed with ``draws``.
    """

    labels: Labels
    likelihood: Likelihood
    draws: int | None = None
    generator: torch.Generator | None = None

    def of(
        self, outputs: Tensor, losses: Tensor, targets: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
        """Yield what to differentiate, along which gradient, and whether it is the last time."""
        if self.labels == "ef":
            yield losses.sum(), None, True
        elif self.draws is not None:
            assert self.generator is not None, "draws need a generator"
            for draw in range(self.draws):
                drawn = self.likelihood.drawn_losses(outputs, targets, self.generator)
                yield drawn.sum() / self.draws**0.5, None, draw == self.draws - 1
        else:
            roots = self.likelihood.roots(outputs, targets)
            root = next(roots)
            for following in roots:
                yield outputs, root.to(outputs.dtype), False
                root = following
            yield outputs, root.to(outputs.dtype), True
