"""Likelihoods: what a model's outputs say about its targets, in nats.

Curvature needs three things of one: the loss of each sample, its loss under targets drawn from the
model (Monte-Carlo Gauss-Newton) and the Hessian of the loss in the outputs as a sum of outer
products (exact Gauss-Newton).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from spamprune.errors import PosteriorError


class Likelihood(Protocol):
    """A negative log likelihood that is a sum over samples; B is the number of samples."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each sample in nats, summed over its outputs, shape (B,)."""
        ...

    def drawn_losses(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Return the losses (B,) of targets drawn from the model; ``targets`` tell what to ignore.

        Their gradients in the outputs have mean zero and the Hessian of :meth:`losses` as their
        covariance.
        """
        ...

    def roots(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Yield one root for each output of a sample, shaped like ``outputs`` and detached.

        ``Σ_k r_k r_kᵀ`` is each sample's Hessian of :meth:`losses` in its own outputs.
        """
        ...


@dataclass(frozen=True)
class Classification:
    """Softmax cross-entropy with integer targets.

    Outputs are logits (B, C) or (B, C, d₁, …), targets class indices (B,) or (B, d₁, …). Label
    smoothing changes the loss and its gradients but not the Hessian ``diag(p) − ppᵀ``, which is
    the same for every target distribution; drawn targets are therefore not smoothed.

    Attributes:
        label_smoothing: Weight of the uniform distribution in the targets, in [0, 1).
        ignore_index: Positions with this target take no part.

    Raises:
        PosteriorError: The label smoothing is not in [0, 1).
    """

    label_smoothing: float = 0.0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise PosteriorError(
                f"label_smoothing must be at least 0 and less than 1, not {self.label_smoothing}"
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each sample, summed over its positions, shape (B,).

        Raises:
            PosteriorError: The targets are soft, or do not fit the outputs.
        """
        self._check(outputs, targets)
        losses = F.cross_entropy(
            _floats(outputs),
            targets,
            reduction="none",
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
        return _of_samples(losses)

    def drawn_losses(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Return the unsmoothed cross-entropies (B,) of labels drawn from the softmax.

        Raises:
            PosteriorError: As for :meth:`losses`.
        """
        self._check(outputs, targets)
        probabilities = _floats(outputs.detach()).softmax(1).movedim(1, -1)
        rows = probabilities.reshape(-1, outputs.shape[1])
        rows = rows.nan_to_num(nan=1.0)  # the loss tells of these, and in one way for all labels
        drawn = torch.multinomial(rows, 1, generator=generator).view_as(targets)
        losses = F.cross_entropy(_floats(outputs), drawn, reduction="none")
        counted = targets != self.ignore_index
        return _of_samples(losses * counted)

    def roots(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Yield ``√p_c (e_c − p)`` for each position and class c, zero elsewhere.

        Raises:
            PosteriorError: As for :meth:`losses`.
        """
        self._check(outputs, targets)
        p = _floats(outputs.detach()).softmax(1).reshape(*outputs.shape[:2], -1)
        counted = (targets != self.ignore_index).reshape(len(p), -1)  # (B, positions)
        for position in range(p.shape[2]):
            here = p[:, :, position]
            for label in range(p.shape[1]):
                root = -here
                root[:, label] += 1
                weight = here[:, label].sqrt() * counted[:, position]
                spread = torch.zeros_like(p)
                spread[:, :, position] = weight[:, None] * root
                yield spread.view_as(outputs)

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.is_floating_point():
            raise PosteriorError(
                f"classification needs class indices, not soft targets {tuple(targets.shape)} of "
                f"{targets.dtype}: turn mixup and one-hot targets off where the curvature is taken "
                "(label_smoothing is a setting of the likelihood), or use a Regression"
            )
        if outputs.dim() < 2 or targets.shape != outputs.shape[:1] + outputs.shape[2:]:
            raise PosteriorError(
                f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} do not fit: "
                "classification needs logits (B, C, …) and class indices (B, …), the classes in "
                "dimension 1"
            )
        if outputs.shape[1] < 2:
            raise PosteriorError(
                "one class alone has no curvature: give a yes-or-no classifier two outputs"
            )


#: Softmax cross-entropy as it stands, the default everywhere.
CLASSIFICATION: Likelihood = Classification()


@dataclass(frozen=True)
class Regression:
    """Independent Gaussian noise on every output: ``½ r²/σ² + ½ log 2πσ²``.

    Outputs and targets are (B,) or (B, D), or any equal shapes with samples first.

    Attributes:
        noise: σ², the variance of the noise, in squared units of the targets.

    Raises:
        PosteriorError: The noise is not a positive number.
    """

    noise: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.noise < math.inf:
            raise PosteriorError(
                f"the variance of the noise must be a positive number, not {self.noise}"
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log density of each sample's targets, shape (B,).

        Raises:
            PosteriorError: The targets are not shaped like the outputs.
        """
        self._check(outputs, targets)
        residuals = _floats(outputs) - _floats(targets)
        terms = 0.5 * residuals.square() / self.noise + 0.5 * math.log(2 * math.pi * self.noise)
        return _of_samples(terms)

    def drawn_losses(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Return the losses (B,) of the outputs with noise of variance σ² added.

        Raises:
            PosteriorError: As for :meth:`losses`.
        """
        self._check(outputs, targets)
        means = _floats(outputs.detach())
        noise = torch.randn(
            means.shape, generator=generator, dtype=means.dtype, device=means.device
        )
        return self.losses(outputs, means + math.sqrt(self.noise) * noise)

    def roots(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Yield ``e_d/σ`` for each output d of a sample.

        Raises:
            PosteriorError: As for :meth:`losses`.
        """
        self._check(outputs, targets)
        for index in range(outputs[0].numel()):
            root = torch.zeros_like(_floats(outputs.detach())).view(len(outputs), -1)
            root[:, index] = 1 / math.sqrt(self.noise)
            yield root.view_as(outputs)

    def relearned(self, squares: float, n_outputs: int, effective: float) -> Regression:
        """Return this likelihood with the noise that maximises the evidence (MacKay 1992).

        ``σ² = RSS / (N·D − γ)``: the residual variance, with a degree of freedom taken off for
        every parameter that the data determine. The loss and the Gauss-Newton curvature scale
        with 1/σ² and the empirical Fisher with 1/σ⁴, so refit the curvature before the next step.

        Args:
            squares: RSS, the residual sum of squares over the data set.
            n_outputs: N·D, the number of scalars predicted over the data set.
            effective: γ, ``Σ_p (1 − ∂log|P|/∂log δ_p)``; for a diagonal P, ``Σ_p (1 − δ_p/P_p)``.

        Raises:
            PosteriorError: Nothing is left to tell the noise from.
        """
        if not squares > 0 or n_outputs <= effective:
            raise PosteriorError(
                f"the noise cannot be learned from residual squares {squares:.3g} over {n_outputs} "
                f"outputs with {effective:.3g} effective parameters: keep it fixed, or use more "
                "data or a stronger prior"
            )
        return Regression(squares / (n_outputs - effective))

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.shape != targets.shape:
            raise PosteriorError(
                f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} do not fit: "
                "regression needs equal shapes; squeeze or unsqueeze one of them"
            )


def _floats(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32, or float64 where it has that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _of_samples(losses: Tensor) -> Tensor:
    """Sum over all dimensions but the first."""
    return losses.flatten(1).sum(1) if losses.dim() > 1 else losses
