"""The Laplace log marginal likelihood with diagonal curvature, and its maximisation in δ.

``log p(D|δ) ≈ −L/T − ½ Σ_p [δ_p θ_p² + log P_p − log δ_p]`` with ``P = H/T + δ`` (paper, eq. 5;
Immer et al. 2021). L and H are summed over the data set, T is the temperature.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spamprune.bayes.curvature import Curvature
from spamprune.bayes.prior import Prior
from spamprune.errors import PosteriorError

#: Bounds on log δ. They only keep float32 from overflowing: at e²³ a weight is zero for every use.
LOG_PRECISION_RANGE = (-23.0, 23.0)


def log_evidence(
    parameters: Mapping[str, Tensor],
    curvature: Curvature,
    precision: Mapping[str, Tensor],
    temperature: float = 1.0,
) -> float:
    """Return the log marginal likelihood of the data set in nats.

    Args:
        parameters: θ by name.
        curvature: L and the diagonal of H at θ.
        precision: δ by name, shaped like θ.
        temperature: T.
    """
    occam = 0.0
    for name, theta in parameters.items():
        delta = precision[name].double()
        posterior = curvature.diag[name].double() / temperature + delta
        terms = delta * theta.detach().double().square() + posterior.log() - delta.log()
        occam += terms.sum().item()
    return -curvature.loss / temperature - 0.5 * occam


def ascend(
    prior: Prior,
    parameters: Mapping[str, Tensor],
    curvature: Curvature,
    *,
    steps: int,
    lr: float = 0.1,
    temperature: float = 1.0,
) -> None:
    """Take Adam steps on log δ towards larger evidence; the prior is changed in place.

    The gradient is analytic: ``∂/∂log δ_p = ½ (1 − δ_p θ_p² − δ_p/P_p)``, summed over tied
    parameters. The optimiser starts afresh at each call, as in the paper's code, and sees the
    gradient per sample (``/N``).
    """
    squares = {name: p.detach().square() for name, p in parameters.items()}
    data = {name: h / temperature for name, h in curvature.diag.items()}
    factors = prior.factors()
    adam = torch.optim.Adam(factors, lr=lr, maximize=True)
    for _ in range(steps):
        gradient = {
            name: 0.5 * (1 - delta * squares[name] - delta / (data[name] + delta))
            for name, delta in prior.precision().items()
        }
        for factor, total in zip(factors, prior.reduce(gradient), strict=True):
            factor.grad = total / curvature.n_data
        adam.step()
        for factor in factors:
            factor.clamp_(*LOG_PRECISION_RANGE)
    for factor in factors:
        factor.grad = None


def maximise(
    prior: Prior,
    parameters: Mapping[str, Tensor],
    curvature: Curvature,
    *,
    damping: float = 0.0,
    temperature: float = 1.0,
) -> None:
    """Set a parameterwise prior to the exact optimum of the evidence, in place.

    ``∂/∂log δ = 0`` is ``θ²δ² + θ²hδ − h = 0`` with ``h = H/T``, whose positive root is
    ``δ = ½ (√(h² + 4h/θ²) − h)``.

    Args:
        prior: A parameterwise prior.
        parameters: θ by name.
        curvature: H at θ.
        damping: Weight of the old log δ in the new one, in [0, 1).
        temperature: T.

    Raises:
        PosteriorError: The prior is tied, so that the optimum is not closed-form.
    """
    if prior.structure != "parameterwise":
        raise PosteriorError(
            f"the exact evidence update needs a parameterwise prior, not a {prior.structure} one: "
            "use update 'adam'"
        )
    for name, (log_delta,) in prior.log_factors.items():
        square = parameters[name].detach().square().clamp(min=1e-20)
        h = (curvature.diag[name] / temperature).clamp(min=1e-20)
        # the root times its conjugate, so that neither cancellation nor overflow spoils it
        optimum = 2 * h / square / (h + h.sqrt() * (h + 4 / square).sqrt())
        log_delta.lerp_(optimum.log().clamp(*LOG_PRECISION_RANGE), 1 - damping)
