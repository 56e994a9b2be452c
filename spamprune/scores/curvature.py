"""Scores from a quadratic model of the loss: curvature times squared weight."""

from __future__ import annotations

import torch
from torch import nn

from spamprune.bayes.curvature import exact
from spamprune.bayes.curvature.squares import at_least_single
from spamprune.bayes.likelihood import CLASSIFICATION, Likelihood
from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.posterior import Posterior
from spamprune.bayes.reduction import Reduction
from spamprune.scores.registry import Batches, Scores, criterion


@criterion("opd")
@torch.no_grad()
def opd(model: nn.Module, posterior: Posterior) -> Scores:
    """Optimal posterior damage ``P_pp θ_p²`` (SpaM paper, eq. 3)."""
    posterior = posterior.on(model)
    precision = posterior.precision()
    return {
        name: precision[name] * at_least_single(p).square()
        for name, p in named_parameters(model).items()
    }


@criterion("obd")
@torch.no_grad()
def obd(model: nn.Module, posterior: Posterior) -> Scores:
    """Optimal brain damage ``½ H_pp θ_p²`` (LeCun et al. 1990), H from the posterior.

    It is 0 for parameters that the posterior's curvature excludes.
    """
    posterior = posterior.on(model)
    diag = posterior.curvature.diag
    return {
        name: 0.5 * diag[name] * at_least_single(p).square()
        if name in diag
        else torch.zeros_like(p)
        for name, p in named_parameters(model).items()
    }


@criterion("bmr")
def bmr(model: nn.Module, posterior: Posterior) -> Scores:
    """Bayesian model reduction: minus the gain ``ΔF`` in log evidence if the parameter went.

    Scores are signed: the evidence favours removal where they are negative. A prior that was tuned
    for each parameter is exchanged for a layer's slab first (see :class:`Reduction`). For a
    diagonal posterior the sum over a unit is exactly minus the gain of removing the unit.
    """
    gains = Reduction(model, posterior).evidence()
    return {
        name: -gains[name].to(torch.promote_types(p.dtype, torch.float32))
        for name, p in named_parameters(model).items()
    }


@criterion("fisher")
@torch.no_grad()
def fisher(model: nn.Module, data: Batches, *, likelihood: Likelihood = CLASSIFICATION) -> Scores:
    """Fisher pruning ``½ θ_p² · mean_n g_np²``, g_n a sample's gradient (Theis et al. 2018).

    It is OBD with the exact empirical Fisher, whatever curvature a posterior has.
    """
    mean = exact(model, data, n_data=1, likelihood=likelihood).diag  # a sum over one sample
    return {
        name: 0.5 * mean[name] * at_least_single(p).square()
        for name, p in named_parameters(model).items()
    }
