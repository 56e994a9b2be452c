"""What every curvature estimator returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from spamprune.bayes.curvature.blocks import Block, Diagonal, Kronecker

#: Whose labels the gradients use: the data's (empirical Fisher) or the model's (Gauss-Newton).
Labels = Literal["ef", "ggn"]
#: Form of the curvature of a weight matrix.
Structure = Literal["diag", "kron"]
#: How it is computed: random signs in one gradient pass, exactly, or by the asdl library.
Estimator = Literal["sketch", "exact", "asdl"]
#: What becomes of parameters without Kronecker factors: norms, scales, positions, lookup tables.
Rest = Literal["diagonal", "exclude"]


@dataclass(frozen=True)
class Curvature:
    """Curvature of the summed loss at the current parameters.

    Attributes:
        diag: For each covered parameter the diagonal, summed over the data set, shaped like it.
        loss: The loss summed over the data set, in nats.
        n_data: Number of samples that both sums stand for.
        labels: ``"ef"`` (empirical Fisher) or ``"ggn"`` (Gauss-Newton).
        estimator: How it was computed.
        kron: Kronecker factors of the parameters that have them; the others are diagonal.
        how: For each covered parameter, in words, how its curvature was got.
        error: For each parameter tensor the estimated root-mean-square error of its diagonal,
            relative to the root mean square of that diagonal; empty where the estimator is exact.
    """

    diag: dict[str, Tensor]
    loss: float
    n_data: int
    labels: str
    estimator: str
    kron: dict[str, Kronecker] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)

    def block(self, name: str) -> Block:
        """Return the curvature of one parameter tensor: Kronecker where it has factors."""
        return self.kron[name] if name in self.kron else Diagonal(self.diag[name])
