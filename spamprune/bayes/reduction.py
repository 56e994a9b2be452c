"""Bayesian model reduction: how much evidence a network gains when parameters are removed.

A posterior q under a prior p tells the evidence under any narrower prior without a second fit
(Friston & Penny 2011). Where the prior of some parameters narrows to a spike at zero, the gain is
``ΔF = ln q(0)/p(0)``, in nats (arXiv 2309.12095). For a Gaussian q with mean θ, covariance Σ and
prior precisions δ, a group g of parameters gains

``ΔF_g = −½ ln|Σ_gg| − ½ Σ ln δ_g − ½ θ_gᵀ Σ_gg⁻¹ θ_g``.

Positive means that the evidence favours removal. Where Σ is diagonal this is the sum of
``½ ln(P/δ) − ½ Pθ²`` over the group.

Where the evidence tuned δ for each parameter by itself, ``δθ² = 1 − δ/P`` and hence ``ΔF ≤ 0``:
nothing would ever go. Such a prior is exchanged for a *slab*, one precision δ₀ for a whole layer:
the data fix ``b = Pθ``, so that ``P' = P − δ + δ₀`` and ``θ' = P'⁻¹ b``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from spamprune.bayes.evidence import LOG_PRECISION_RANGE
from spamprune.bayes.gaussians import DiagonalGaussian, Gaussian, KroneckerGaussian
from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.posterior import Posterior
from spamprune.errors import PosteriorError, nearest

#: The prior of what stays: for each layer the precision of most evidence, one given precision, or
#: the posterior's own prior as it is.
Slab = float | Literal["layerwise", "own"]

#: Steps towards the best slab of a layer; each multiplies its distance by less than one.
_STEPS = 100


def layer_of(name: str) -> str:
    """Return the layer of a parameter; weight and bias share one."""
    return name.removesuffix("weight").removesuffix("bias").removesuffix(".")


def layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of parameters by layer, in order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(layer_of(name), []).append(name)
    return found


def pruned_of(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the fraction of each layer's weights that masks, False where one goes, remove."""
    found = {}
    for layer, names in layers(masks).items():
        total = sum(masks[name].numel() for name in names)
        found[layer] = 1 - sum(int(masks[name].sum()) for name in names) / total
    return found


class Reduction:
    """The evidence for removing parameters of a network, singly or in groups.

    Args:
        model: The network at the posterior's mean, that is trained to a minimum under the
            posterior's own prior. A pretrained one had its weight decay for a prior: fit its
            posterior with ``prior=decay * n_data``.
        posterior: Diagonal or Kronecker. What its curvature leaves out is never favoured for
            removal.
        slab: The prior of what stays.

    Attributes:
        log_evidence: Log marginal likelihood under the slab, in nats, before anything is removed.
            Where the posterior is diagonal it grows by the sum of ΔF over what is removed.

    Raises:
        PosteriorError: The posterior is of another model, or the slab is not a precision.
    """

    def __init__(self, model: nn.Module, posterior: Posterior, slab: Slab = "layerwise"):
        named = slab in ("layerwise", "own")
        if not named and not (isinstance(slab, int | float) and 0 < slab < math.inf):
            raise PosteriorError(
                f"a slab is 'layerwise', 'own' or a positive precision, not {slab!r}"
            )
        posterior = posterior.on(model)
        parameters = named_parameters(model)
        self.log_evidence = posterior.log_evidence
        self._gaussians: dict[str, Gaussian] = {}
        for names in layers(parameters).values():
            found = {name: _gaussian(posterior, name, parameters[name]) for name in names}
            self._gaussians |= found
            # what the curvature leaves out tells nothing of a slab, and takes no part in evidence
            known = {name: g for name, g in found.items() if name in posterior.curvature.diag}
            if known and slab != "own":
                delta = _best_slab(known.values()) if slab == "layerwise" else slab
                before = sum(g.log_normaliser() for g in known.values())
                known = {name: g.under(delta) for name, g in known.items()}
                self.log_evidence += sum(g.log_normaliser() for g in known.values()) - before
                self._gaussians |= known

    def evidence(self) -> dict[str, Tensor]:
        """Return ΔF in nats for the removal of each parameter by itself, float64, in its shape."""
        return {name: g.each() for name, g in self._gaussians.items()}

    def group_evidence(self, name: str, dim: int, members: Tensor) -> Tensor:
        """Return ΔF in nats for the removal of groups of rows or columns of one tensor.

        Tensors do not interact in a posterior, so what removing a unit gains is the sum over the
        tensors that it reaches into.

        Args:
            name: Of the parameter.
            dim: The dimension that is cut; under Kronecker factors 0 (outputs) or 1 (inputs).
            members: Positions along ``dim`` of each group, shape (groups, positions).

        Returns:
            Float64, shape (groups,).

        Raises:
            PosteriorError: There is no such parameter, dimension or position.
        """
        gaussian = self._gaussians.get(name)
        if gaussian is None:
            raise PosteriorError(f"no parameter {name!r}: {nearest(name, self._gaussians)}")
        dims = gaussian.mean.dim()
        if not 0 <= dim < (min(dims, 2) if isinstance(gaussian, KroneckerGaussian) else dims):
            raise PosteriorError(
                f"groups of {name!r}, shape {tuple(gaussian.mean.shape)}, cannot be cut along "
                f"dimension {dim}"
            )
        size = gaussian.mean.shape[dim]
        if not ((members >= 0) & (members < size)).all():
            raise PosteriorError(
                f"groups of {name!r} have members {members.min()} to {members.max()}: dimension "
                f"{dim} has positions 0 to {size - 1}"
            )
        return gaussian.groups(dim, members.to(gaussian.mean.device))


def log_odds(delta_f: Tensor, iterations: int = 4) -> Tensor:
    """Return ζ, the log odds that an exchangeable parameter is active, learned from all of them.

    Each is active with unknown probability π, uniform a priori. Variational inference alternates
    ``ρ = σ(ζ − ΔF)``, the probability that a parameter is active, and
    ``ζ = E[ln π − ln(1 − π)] = ψ(1 + Σρ) − ψ(1 + Σ(1 − ρ))``, from even odds. Each step takes ζ
    further in the same direction. It pays to remove a parameter where ``ΔF > ζ``.

    Args:
        delta_f: ΔF in nats of each of them, of any shape; ∞ for what is gone already.
        iterations: How often; the paper's code takes four.

    Returns:
        A float64 scalar.
    """
    delta_f = delta_f.double()
    zeta = delta_f.new_zeros(())
    for _ in range(iterations):
        active = torch.sigmoid(zeta - delta_f).sum()
        zeta = torch.digamma(1 + active) - torch.digamma(1 + delta_f.numel() - active)
    return zeta


def surplus(
    delta_f: Mapping[str, Tensor],
    *,
    whole: Collection[str] = (),
    pruned: Mapping[str, Tensor] | None = None,
    iterations: int = 4,
) -> dict[str, Tensor]:
    """Return ``ΔF − ζ`` under odds that each layer learns: it pays to remove what is positive.

    Args:
        delta_f: ΔF in nats by name.
        whole: Layers that stay as they are, such as the last; the paper's method keeps it.
        pruned: Masks of an earlier round, True where a parameter stayed: the others stay gone, and
            count as such in the odds.
        iterations: See :func:`log_odds`; 0 for even odds.

    Returns:
        Float64 by name; ∞ for what is gone, −∞ for what stays in any case.

    Raises:
        PosteriorError: There is no such layer, or ΔF is not a number.
    """
    by_layer = layers(delta_f)
    for layer in whole:
        if layer not in by_layer:
            raise PosteriorError(f"no layer {layer!r} to leave whole: {nearest(layer, by_layer)}")
    found: dict[str, Tensor] = {}
    for layer, names in by_layer.items():
        gains = {name: delta_f[name].double() for name in names}
        if pruned is not None:
            gains = {n: gain.masked_fill(~pruned[n], math.inf) for n, gain in gains.items()}
        for name, gain in gains.items():
            if gain.isnan().any():
                raise PosteriorError(f"ΔF of {name!r} is not a number: is the posterior finite?")
        if layer in whole:
            found |= {n: gain.masked_fill(gain < math.inf, -math.inf) for n, gain in gains.items()}
        else:
            zeta = log_odds(torch.cat([gain.flatten() for gain in gains.values()]), iterations)
            found |= {name: gain - zeta for name, gain in gains.items()}
    return {name: found[name] for name in delta_f}


def furthest(
    order: Mapping[str, Tensor],
    proposed: Mapping[str, Tensor],
    allowed: Callable[[dict[str, Tensor]], bool],
    *,
    steps: int = 6,
) -> dict[str, Tensor]:
    """Return masks that remove as much of what is proposed, in a given order, as is allowed.

    ΔF is of one parameter beside the others: many small effects that point the same way add up to
    more than their sum. So the evidence of the reduced network is worth measuring.

    Args:
        order: By name; what is larger goes first, and ∞ is what is gone already.
        proposed: Masks, False where a parameter may go, by name.
        allowed: Told masks, True where a parameter stays, returns whether they may be.
        steps: Of the bisection, each with a call of ``allowed``; first comes one for all at once.

    Returns:
        Masks, True where a parameter stays; what is gone already stays gone.
    """
    places = {n: place.masked_fill(proposed[n], -math.inf) for n, place in order.items()}
    flat = torch.cat([place.flatten() for place in places.values()])
    queue = flat[flat.isfinite()].sort(descending=True).values

    def masks(taken: int) -> dict[str, Tensor]:
        least = queue[taken - 1].item() if taken else math.inf
        return {name: place < least for name, place in places.items()}

    low, high = 0, len(queue)
    if not high or allowed(masks(high)):
        return masks(high)
    for _ in range(steps):
        middle = (low + high) // 2
        if middle == low:
            break
        low, high = (middle, high) if allowed(masks(middle)) else (low, middle)
    return masks(low)


def _gaussian(posterior: Posterior, name: str, parameter: Tensor) -> Gaussian:
    mean, prior = parameter.detach().double(), posterior.prior_precision[name].double()
    block = posterior.curvature.kron.get(name)
    if block is not None:
        return KroneckerGaussian.of(block, mean, prior, posterior.temperature)
    diag = posterior.curvature.diag.get(name)
    h = torch.zeros_like(mean) if diag is None else diag.double() / posterior.temperature
    return DiagonalGaussian(mean, prior, h)


def _best_slab(gaussians: Collection[Gaussian]) -> float:
    """Return the precision of most evidence for a layer, by MacKay's fixed point."""
    bounds = [math.exp(log) for log in LOG_PRECISION_RANGE]
    delta = 1.0
    for _ in range(_STEPS):
        determined, square = map(sum, zip(*(g.moments(delta) for g in gaussians), strict=True))
        delta = min(max(determined / max(square, 1e-300), bounds[0]), bounds[1])
    return delta
