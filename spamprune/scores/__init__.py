"""Criteria: functions that give every parameter of a model a score; the lowest goes first.

Every criterion serves every kind of pruning: masks threshold its scores, structured pruning sums
them over coupled units. A new one is one function under the :func:`criterion` decorator.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.posterior import Posterior
from spamprune.errors import PosteriorError, PruningError
from spamprune.registry import Registry

Scores = dict[str, Tensor]


class Criterion(Protocol):
    """Scores every trainable parameter of ``model``, by name, in its shape."""

    def __call__(
        self, model: nn.Module, posterior: Posterior | None = None, *, seed: int = 0
    ) -> Scores:
        """Return the scores; a criterion that needs no posterior or seed ignores them."""
        ...


CRITERIA: Registry[Criterion] = Registry("criterion", PruningError)
criterion = CRITERIA.register


def _needed(model: nn.Module, posterior: Posterior | None, name: str) -> Posterior:
    if posterior is None:
        raise PosteriorError(f"criterion {name!r} needs a posterior: see spamprune.fit_posterior")
    posterior.check(model)
    return posterior


@criterion("opd")
@torch.no_grad()
def opd(model: nn.Module, posterior: Posterior | None = None, *, seed: int = 0) -> Scores:
    """Optimal posterior damage ``P_pp θ_p²`` (SpaM paper, eq. 3)."""
    precision = _needed(model, posterior, "opd").precision()
    return {name: precision[name] * p.square() for name, p in named_parameters(model).items()}


@criterion("obd")
@torch.no_grad()
def obd(model: nn.Module, posterior: Posterior | None = None, *, seed: int = 0) -> Scores:
    """Optimal brain damage ``½ H_pp θ_p²`` (LeCun et al. 1990), H from the posterior.

    It is 0 for parameters that the posterior's curvature excludes.
    """
    diag = _needed(model, posterior, "obd").curvature.diag
    return {
        name: 0.5 * diag[name] * p.square() if name in diag else torch.zeros_like(p)
        for name, p in named_parameters(model).items()
    }


@criterion("magnitude")
@torch.no_grad()
def magnitude(model: nn.Module, posterior: Posterior | None = None, *, seed: int = 0) -> Scores:
    """Absolute value ``|θ_p|`` (Han et al. 2016)."""
    return {name: p.abs() for name, p in named_parameters(model).items()}


@criterion("random")
@torch.no_grad()
def random(model: nn.Module, posterior: Posterior | None = None, *, seed: int = 0) -> Scores:
    """Uniform noise from ``seed``: what every criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator).to(p.device)
        for name, p in named_parameters(model).items()
    }
