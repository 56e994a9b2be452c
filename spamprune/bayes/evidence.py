"""The Laplace log marginal likelihood and its maximisation in the prior precisions δ.

``log p(D|δ) ≈ −L/T − ½ [Σ_p δ_p θ_p² + log |P| − Σ_p log δ_p]`` with ``P = H/T + δ`` (paper, eq. 5;
Immer et al. 2021). L and H are summed over the data set, T is the temperature. The sums run over
the parameters that the curvature covers; the others take no part and keep their prior.

Every update rests on the analytic gradient ``∂/∂log δ_p = ½ (γ_p − δ_p θ_p²)``, where
``γ_p = 1 − ∂log|P|/∂log δ_p`` tells how far the data determine the parameter (MacKay 1992), summed
over tied parameters. Sets of factors that share no parameter do not interact, so each is taken
through all its steps before the next: what it needs stays in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spamprune.bayes.curvature import Curvature
from spamprune.bayes.curvature.blocks import Block, Index, Kronecker
from spamprune.bayes.prior import Prior
from spamprune.errors import PosteriorError

#: Bounds on log δ. They only keep float32 from overflowing: at e²³ a weight is zero for every use.
LOG_PRECISION_RANGE = (-23.0, 23.0)

#: Elements worked on at once: some ten such float32 tensors fit a processor's last cache.
_PART = 2**17


def log_evidence(
    parameters: Mapping[str, Tensor],
    curvature: Curvature,
    precision: Mapping[str, Tensor],
    temperature: float = 1.0,
) -> float:
    """Return the log marginal likelihood of the data set in nats.

    Args:
        parameters: θ by name.
        curvature: L and H at θ.
        precision: δ by name, shaped like θ.
        temperature: T.
    """
    occam = 0.0
    for name in curvature.diag:
        delta = precision[name].double()
        terms = delta * parameters[name].detach().double().square() - delta.log()
        occam += (terms.sum() + curvature.block(name).log_det(delta, temperature)).item()
    return -curvature.loss / temperature - 0.5 * occam


@torch.no_grad()
def effective_parameters(
    curvature: Curvature, precision: Mapping[str, Tensor], temperature: float = 1.0
) -> float:
    """Return ``Σ_p γ_p``, how many parameters the data determine (MacKay 1992)."""
    gammas = [
        (1 - curvature.block(name).log_det_gradient(precision[name], temperature)).double().sum()
        for name in curvature.diag
    ]
    return torch.stack(gammas).sum().item()


@torch.no_grad()
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

    The optimiser starts afresh at each call, as in the paper's code, and sees the gradient per
    sample (``/N``).
    """

    def twice_gradient(part: _Part, delta: Tensor) -> Tensor:
        return part.determined(delta, temperature).addcmul_(delta, part.squares, value=-1)

    for tie in _ties(prior, parameters, curvature):
        adam = torch.optim.Adam(tie.factors, lr=lr, maximize=True, fused=True)
        for _ in range(steps):
            for factor, gradient in zip(tie.factors, tie.totals(twice_gradient), strict=True):
                factor.grad = (gradient * (0.5 / curvature.n_data)).to(factor.dtype)
            adam.step()
            for factor in tie.factors:
                factor.clamp_(*LOG_PRECISION_RANGE)


@torch.no_grad()
def mackay(
    prior: Prior,
    parameters: Mapping[str, Tensor],
    curvature: Curvature,
    *,
    steps: int,
    temperature: float = 1.0,
) -> None:
    """Take fixed-point steps on δ towards larger evidence, in place; none lowers it.

    Sums run over tied parameters; the two factors of a unitwise prior take turns. The evidence is
    concave in the log factors, and each step maximises a bound that touches it:

    - MacKay's ``δ ← Σγ / Σθ²`` at half its length in log δ, from the tangent of
      ``log |P| − log |δ|`` in 1/δ. Whole steps swing about the optimum, with a slope close to −1
      where the prior dominates; half steps approach it from one side and halve the distance at
      least.
    - Where Kronecker factors meet unequal δ that bound fails, as Proposition 1 lets γ be negative.
      There the tangent of ``log |P|`` in δ serves (MacKay 1992, Tipping 2001: the EM update),
      ``δ ← n / Σ(θ² + (1 − γ)/δ)`` for n tied parameters; it is slow towards δ far above H.

    Args:
        prior: A prior of any structure; a parameterwise one has a closed form, :func:`maximise`.
        parameters: θ by name.
        curvature: H at θ.
        steps: Of each log factor.
        temperature: T.
    """

    def determined(part: _Part, delta: Tensor) -> Tensor:
        return part.determined(delta, temperature)

    def penalty(part: _Part, delta: Tensor) -> Tensor:
        return delta * part.squares

    for tie in _ties(prior, parameters, curvature):
        factored = any(isinstance(part.block, Kronecker) for part in tie.parts)
        unequal = any(factor.numel() > 1 for factor in tie.factors)
        for _ in range(steps):
            for i, factor in enumerate(tie.factors):
                gamma, cost = tie.totals(determined)[i], tie.totals(penalty)[i]
                count = tie.size / factor.numel()
                if factored and unequal:
                    step = -torch.log1p((cost - gamma) / count)
                else:
                    # what float32 cannot tell from zero: neither then pulls without end
                    floor = torch.finfo(torch.float32).eps * count
                    step = (gamma.clamp(min=floor) / cost.clamp(min=floor)).log() / 2
                factor.add_(step).clamp_(*LOG_PRECISION_RANGE)


@torch.no_grad()
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
        curvature: H at θ, diagonal.
        damping: Weight of the old log δ in the new one, in [0, 1).
        temperature: T.

    Raises:
        PosteriorError: The prior is tied or the curvature Kronecker-factored, so that the optimum
            is not closed-form.
    """
    if prior.structure != "parameterwise":
        raise PosteriorError(
            f"the exact evidence update needs a parameterwise prior, not a {prior.structure} one: "
            "use update 'adam' or 'mackay'"
        )
    if curvature.kron:
        raise PosteriorError(
            "the exact evidence update needs diagonal curvature, which these parameters lack: "
            f"{', '.join(curvature.kron)}; use update 'adam'"
        )
    for tie in _ties(prior, parameters, curvature):
        (log_delta,), (part,) = tie.factors, tie.parts
        square = part.squares.clamp(min=1e-20)
        h = part.block.precision(torch.zeros_like(log_delta), temperature).clamp(min=1e-20)
        # the root times its conjugate, so that neither cancellation nor overflow spoils it
        optimum = (2 * h / square / (h + h.sqrt() * (h + 4 / square).sqrt())).log()
        log_delta.lerp_(optimum.clamp(*LOG_PRECISION_RANGE).to(log_delta.dtype), 1 - damping)


@dataclass(frozen=True)
class _Part:
    """Some rows of one parameter tensor.

    Attributes:
        block: Their curvature.
        squares: θ², summed over what shares one δ.
        indices: For each factor of the tie the part of it that governs these rows.
    """

    block: Block
    squares: Tensor
    indices: list[Index]

    def determined(self, delta: Tensor, temperature: float) -> Tensor:
        """Return γ, summed over what shares one δ, for δ and in its shape."""
        gamma = 1 - self.block.log_det_gradient(delta, temperature)
        return gamma.sum_to_size(delta.shape)


@dataclass(frozen=True)
class _Tie:
    """Free log factors, as views of the prior's, and the ``size`` parameters that they govern."""

    factors: list[Tensor]
    parts: list[_Part]
    size: int

    def totals(self, term: Callable[[_Part, Tensor], Tensor]) -> list[Tensor]:
        """Return ``term(part, δ)``, shaped like δ, summed into the shape of each factor."""
        sums: list[list[Tensor]] = [[] for _ in self.factors]
        for part in self.parts:
            log_delta = [f[i] for f, i in zip(self.factors, part.indices, strict=True)]
            value = term(part, sum(log_delta[1:], log_delta[0]).exp())
            for found, governs in zip(sums, log_delta, strict=True):
                found.append(value.sum_to_size(governs.shape))
        return [_join(found, i) for found, i in zip(sums, self.parts[0].indices, strict=True)]


def _join(found: list[Tensor], index: Index) -> Tensor:
    """Return a factor's total from its parts': of the whole factor each, or of successive rows."""
    if len(found) == 1:
        return found[0]
    return torch.stack(found).sum(0) if index is ... else torch.cat(found)


def _ties(prior: Prior, parameters: Mapping[str, Tensor], curvature: Curvature) -> Iterator[_Tie]:
    """Yield the sets of factors that do not interact, of what the curvature covers."""
    for shared, names in prior.ties():
        factors = [factor.detach() for factor in shared]
        tensors = [
            (curvature.block(name), parameters[name].detach())
            for name in names
            if name in curvature.diag
        ]
        if [f.shape for f in factors] == [theta.shape for _, theta in tensors]:
            # nothing is tied
            ((block, theta),) = tensors
            for rows, part in block.parts(_PART):
                yield _tie([factors[0][rows]], [(part, theta[rows])])
        elif tensors:
            yield _tie(factors, tensors)


def _tie(factors: list[Tensor], tensors: list[tuple[Block, Tensor]]) -> _Tie:
    """Cut what ``factors`` govern into parts."""
    parts = []
    for block, theta in tensors:
        for rows, part in block.parts(_PART):
            indices = [rows if f.shape[:1] == theta.shape[:1] else ... for f in factors]
            shape = torch.broadcast_shapes(
                *(f[i].shape for f, i in zip(factors, indices, strict=True))
            )
            squares = theta[rows].to(factors[0].dtype).square().sum_to_size(shape)
            parts.append(_Part(part, squares, indices))
    return _Tie(factors, parts, sum(theta.numel() for _, theta in tensors))
