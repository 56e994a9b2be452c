"""Diagonal curvature by sketching: one ordinary gradient pass, any architecture.

With independent signs ``s_b = ±1``, ``E[(Σ_b s_b g_b)²] = Σ_b g_b²``: the squared gradient of the
sign-weighted losses of a few samples is an unbiased estimate of their summed squared per-sample
gradients, for every parameter of every layer, whatever the layer is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spamprune.bayes.curvature.base import Curvature, Labels
from spamprune.bayes.curvature.batches import accumulate, doubled, sum_over_processes
from spamprune.bayes.curvature.directions import generator_of
from spamprune.bayes.curvature.passes import streamed
from spamprune.bayes.curvature.squares import zero_total
from spamprune.bayes.likelihood import CLASSIFICATION, Likelihood
from spamprune.bayes.parameters import named_parameters
from spamprune.errors import PosteriorError
from spamprune.modules import device_of

#: Gradients of at most so many elements are kept until the end of a backward pass, and added to the
#: sums together; larger ones go as soon as they are there.
_SMALL = 2**16


def sketch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    n_data: int,
    labels: Labels = "ef",
    likelihood: Likelihood = CLASSIFICATION,
    samples: int | None = None,
    group: int | None = None,
    draws: int = 1,
    seed: int = 0,
) -> Curvature:
    """Estimate the diagonal of the curvature in one gradient pass.

    ``labels="ef"`` gives the empirical Fisher from random signs on the per-sample losses;
    ``labels="ggn"`` draws labels from the model, whose gradients have mean zero, so that the
    squared gradient of their summed loss is the Monte-Carlo Gauss-Newton diagonal (Liu et al.
    2023, *Sophia*, the Gauss-Newton-Bartlett estimator).

    **Variance.** A group of B samples contributes one square, of variance
    ``2 [(Σ_b g_b²)² − Σ_b g_b⁴]`` for ``"ef"`` (a sum with drawn labels adds the fourth cumulants
    of the g_b to ``2 (Σ_b E g_b²)²``). The relative standard error of a parameter's diagonal over
    K groups of equal weight is therefore at most ``√(2/K)`` for ``"ef"``, and about that for
    ``"ggn"``; groups of one sample are the exact empirical Fisher. Two ways to buy less of it:

    - smaller groups, at a pass for each;
    - several draws, at a backward pass for each: D independent ones divide the variance by D. The
      sign vectors of ``"ef"`` are orthogonal: D rows, without replacement, of the Hadamard matrix
      of order M ≥ B (the least power of two) with random signs on its columns. All M rows
      together give Σ_b g_b² exactly, so D of them multiply the variance by
      ``(M − D) / (D (M − 1))``; more than M are not drawn.

    Antithetic signs buy nothing: −s gives the same square as s.

    ``Curvature.error`` estimates the error of this pass from the squares themselves, too high
    where few samples of a small group make up a square. It does not see what is missed by using a
    part of the data only.

    The model runs in evaluation mode, so that samples are independent, and each module's own
    mode is restored. In several processes each passes its own shard of the data and draws its own
    signs; the result is the same in all of them.

    Args:
        model: The network; gradients held by its parameters are left as they are.
        batches: Pairs of inputs and targets.
        n_data: Size of the data set that the curvature is summed over.
        labels: Whose labels the gradients use.
        likelihood: Of the targets.
        samples: Stop once this many samples were seen and scale to ``n_data``; all by default.
        group: Samples that share a square; whole batches by default.
        draws: Sign vectors, or drawn labels, per group.
        seed: Of the signs or the drawn labels.

    Raises:
        PosteriorError: There are no draws, a gradient is not finite, and as for
            :func:`spamprune.bayes.curvature.batches.accumulate`.
    """
    if draws < 1:
        raise PosteriorError(f"draws must be at least 1, not {draws}")
    parameters = named_parameters(model)
    weights = list(parameters.values())
    device = device_of(model)
    generator = generator_of(model, seed)
    sums = [zero_total(p) for p in weights]
    # for each tensor: its variance, summed over some elements, and whether it had a gradient
    variances = torch.zeros(len(weights), dtype=torch.float64, device=device)
    some = [variances.new_zeros(1)] * len(weights)
    used = [0.0] * len(weights)
    share = 1.0

    def add(indices: list[int], gradients: list[Tensor]) -> None:
        torch._foreach_addcmul_([sums[i] for i in indices], gradients, gradients, value=share)
        for i, gradient in zip(indices, gradients, strict=True):
            some[i] = _some(gradient)
            used[i] = 1.0

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal share
        outputs = model(doubled(inputs))[: len(inputs)]
        losses = likelihood.losses(outputs, targets)
        if labels == "ef":
            objectives = _signs(len(losses), draws, generator).to(losses.dtype) @ losses
            spread = _spread(len(losses), len(objectives))
        else:
            objectives = torch.stack(
                [likelihood.drawn_losses(outputs, targets, generator).sum() for _ in range(draws)]
            )
            spread = 2 / 3
        count = len(objectives)
        share = 1 / count
        for draw, objective in enumerate(objectives, start=1):
            with streamed([weights[i] for i in large], lambda i, slope: add([large[i]], [slope])):
                found = torch.autograd.grad(
                    objective, weights, allow_unused=True, retain_graph=draw < count
                )
            if there := [i for i in small if found[i] is not None]:  # foreach takes no empty lists
                add(there, [found[i].to_dense() for i in there])  # an embedding's may be sparse
            norms = torch._foreach_norm(torch._foreach_mul(some, some), 2)
            variances.add_(torch.stack(norms).square(), alpha=spread * share**2)
        return losses.detach().sum()

    large = [i for i, p in enumerate(weights) if p.numel() > _SMALL]
    small = sorted(set(range(len(weights))) - set(large))
    totals = accumulate(model, batches, step, likelihood=likelihood, samples=samples, piece=group)
    uses = torch.tensor(used, device=device)
    sum_over_processes([*sums, variances, uses])
    for name, total in zip(parameters, sums, strict=True):
        if not torch.isfinite(total.sum()):
            raise PosteriorError(
                f"the gradient of {name} overflows or is not a number where the curvature is "
                "taken: use bfloat16 or float32 for it"
            )
    errors = {
        name: _relative_error(total, variance)
        for name, total, variance in zip(parameters, sums, variances.tolist(), strict=True)
    }
    scale = n_data / totals.seen
    return Curvature(
        diag={name: total.mul_(scale) for name, total in zip(parameters, sums, strict=True)},
        loss=totals.loss * scale,
        n_data=n_data,
        labels=labels,
        estimator="sketch",
        how={
            name: "sketch" if n else "sketch: not used by the loss"
            for name, n in zip(parameters, uses.tolist(), strict=True)
        },
        error=errors,
    )


def _signs(size: int, draws: int, generator: torch.Generator) -> Tensor:
    """Return orthogonal sign vectors (D, size), D the least of ``draws`` and the Hadamard order.

    Element (r, c) of the Hadamard matrix is −1 to the number of bits that r and c share.
    """
    device = generator.device
    flips = torch.randint(0, 2, (1, size), generator=generator, device=device)
    if draws > 1:  # a row alone is as random without the matrix
        rows = torch.randperm(_order(size), generator=generator, device=device)[:draws]
        bits = rows[:, None] & torch.arange(size, device=device)
        for shift in (16, 8, 4, 2, 1):  # folds the parity of all bits into the lowest one
            bits ^= bits >> shift
        flips = (flips ^ bits) & 1
    return 1 - 2 * flips


def _order(size: int) -> int:
    """Return the least power of two that is no less than ``size``."""
    return 1 << (size - 1).bit_length()


def _spread(size: int, draws: int) -> float:
    """Return the variance of a mean of ``draws`` orthogonal squares over ``E[square²] / draws``.

    A square q of samples with equal shares has variance ``2 (1 − 1/B) (E q)²``, hence
    ``E q² = (3 − 2/B) (E q)²``; unequal shares have less, so the estimate errs on the safe side.
    """
    others = _order(size) - 1
    return 2 * (size - 1) / (3 * size - 2) * (others + 1 - draws) / max(others, 1)


def _some(tensor: Tensor) -> Tensor:
    """Return some thousands of evenly spaced elements in float64: all would cost a percent."""
    step = tensor.numel() // 4096 | 1  # odd, to miss no row
    return tensor.reshape(-1)[::step].to(torch.float64, copy=True)  # the rest can go


def _relative_error(total: Tensor, variance: float) -> float:
    """Return the root-mean-square error of ``total`` over the root mean square of its target.

    Both are over the elements of :func:`_some`, whose summed variance is given. ``E total²``
    exceeds the target's square by the variance.
    """
    target = _some(total).square().sum().item() - variance
    if target <= 0:  # squares of gradients of a dead layer underflow: all of them is missing
        return 1.0 if variance > 0 else 0.0
    return math.sqrt(variance / target)
