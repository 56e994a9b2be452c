"""What every curvature estimator returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Curvature:
    """Curvature of the summed loss at the current parameters.

    Attributes:
        diag: For each parameter the diagonal, summed over the data set, shaped like it.
        loss: The loss summed over the data set, in nats.
        n_data: Number of samples that both sums stand for.
        labels: ``"ef"`` (empirical Fisher) or ``"ggn"`` (Gauss-Newton).
        estimator: How it was computed.
    """

    diag: dict[str, Tensor]
    loss: float
    n_data: int
    labels: str
    estimator: str
