"""Diagonal curvature by sketching: one ordinary gradient pass, any architecture.

With independent signs ``s_b = ±1``, ``E[(Σ_b s_b g_b)²] = Σ_b g_b²``: the squared gradient of the
sign-weighted loss of a batch is an unbiased estimate of the batch's summed squared per-sample
gradients, for every parameter of every layer, with no hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spamprune.bayes.curvature.base import Curvature
from spamprune.bayes.parameters import named_parameters
from spamprune.errors import PosteriorError
from spamprune.modules import device_of, evaluation_mode

Labels = Literal["ef", "ggn"]
Losses = Callable[[Tensor, Tensor], Tensor]


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each sample, in nats; shapes ``(B, C)``, ``(B,)`` → ``(B,)``."""
    return F.cross_entropy(outputs, targets, reduction="none")


def sketch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    n_data: int,
    labels: Labels = "ef",
    samples: int | None = None,
    seed: int = 0,
    losses: Losses = cross_entropies,
) -> Curvature:
    """Estimate the diagonal of the curvature in one gradient pass.

    ``labels="ef"`` gives the empirical Fisher from random signs on the per-sample losses;
    ``labels="ggn"`` draws labels from the model, whose gradients have mean zero, so that the
    squared batch gradient is the Monte-Carlo Gauss-Newton diagonal (Liu et al. 2023, *Sophia*,
    the Gauss-Newton-Bartlett estimator).

    Each batch of size B contributes one square with relative standard deviation
    ``√(2(1 − Σ_b g_b⁴ / (Σ_b g_b²)²)) ≤ √2``; over K batches of equal weight the relative standard
    error of a parameter's diagonal is therefore at most ``√(2/K)``.

    The model runs in evaluation mode, so that samples are independent, and each module's own
    mode is restored.

    Args:
        model: The network; gradients held by its parameters are left as they are.
        batches: Pairs of inputs and integer class labels ``(B,)``.
        n_data: Size of the data set that the curvature is summed over.
        labels: Whose labels the gradients use.
        samples: Stop once this many samples were seen and scale to ``n_data``; all by default.
        seed: Of the signs or the drawn labels.
        losses: Per-sample losses ``(outputs, targets) -> (B,)``.

    Raises:
        PosteriorError: There are no batches, or the loss is not finite.
    """
    parameters = named_parameters(model)
    device = device_of(model)
    generator = torch.Generator(device=device).manual_seed(seed)
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in parameters.values()]
    total_loss, seen = torch.zeros((), device=device, dtype=torch.float64), 0
    with evaluation_mode(model), torch.enable_grad():
        for inputs, targets in batches:
            inputs, targets = inputs.to(device), targets.to(device)
            outputs = model(inputs)
            true_losses = losses(outputs, targets)
            total_loss += true_losses.detach().sum()
            if labels == "ggn":
                probabilities = outputs.detach().float().softmax(-1)
                drawn = torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
                objective = losses(outputs, drawn).sum()
            else:
                coins = torch.randint(0, 2, true_losses.shape, generator=generator, device=device)
                objective = (true_losses * (2 * coins - 1)).sum()
            gradients = torch.autograd.grad(objective, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient)
            seen += len(targets)
            if samples is not None and seen >= samples:
                break
    if seen == 0:
        raise PosteriorError("curvature needs data: the loader gave no batches")
    if not torch.isfinite(total_loss):
        raise PosteriorError(f"the loss is {total_loss.item()} where the curvature is taken")
    scale = n_data / seen
    return Curvature(
        diag={name: t.mul_(scale) for name, t in zip(parameters, totals, strict=True)},
        loss=total_loss.item() * scale,
        n_data=n_data,
        labels=labels,
        estimator="sketch",
    )
