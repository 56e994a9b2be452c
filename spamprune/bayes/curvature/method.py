"""One choice of how curvature is computed, and the pass that carries it out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor, nn

from spamprune.bayes.curvature.base import Curvature, Estimator, Labels, Rest, Structure
from spamprune.bayes.curvature.exact import exact
from spamprune.bayes.curvature.kron import kron
from spamprune.bayes.curvature.sketch import sketch
from spamprune.bayes.likelihood import CLASSIFICATION, Likelihood
from spamprune.errors import PosteriorError, nearest

#: What each of these may be; the estimator may be left out too.
_CHOICES = {"labels": Labels, "structure": Structure, "estimator": Estimator, "rest": Rest}


@dataclass(frozen=True)
class CurvatureMethod:
    """How the curvature of the loss is computed.

    Attributes:
        labels: ``"ef"``: empirical Fisher; ``"ggn"``: Gauss-Newton.
        structure: ``"diag"``, or ``"kron"``: Kronecker factors for linear layers and convolutions.
        estimator: ``"sketch"``: one gradient pass, random signs or labels; ``"exact"``: per-sample
            squares; ``"asdl"``: those of the asdl library. By default a sketch; Kronecker factors
            are exact.
        samples: Samples that a pass sees, scaled to the data set; all by default.
        draws: Sign vectors or drawn labels for each sample. By default a sketch takes one, and an
            exact Gauss-Newton goes through all classes.
        group: For a sketch: samples that share a square; whole batches by default.
        rest: What becomes of parameters without Kronecker factors.

    Raises:
        PosteriorError: A choice is unknown, or they do not go together.
    """

    labels: Labels = "ef"
    structure: Structure = "diag"
    estimator: Estimator | None = None
    samples: int | None = None
    draws: int | None = None
    group: int | None = None
    rest: Rest = "diagonal"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value, valid = getattr(self, name), get_args(choices)
            if value not in valid and (name, value) != ("estimator", None):
                raise PosteriorError(f"unknown {name} {value!r}: {nearest(str(value), valid)}")
        for name in ("samples", "draws", "group"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PosteriorError(f"{name}={value}: at least 1, or leave it out")
        if self.structure == "kron" and self.estimator not in (None, "exact"):
            raise PosteriorError(
                f"Kronecker factors come from estimator 'exact', not {self.estimator!r}: leave it "
                "out, or use structure 'diag'"
            )
        if self.group is not None and self.chosen != "sketch":
            raise PosteriorError(f"estimator {self.chosen!r} has no groups: only 'sketch' has")
        if self.rest != "diagonal" and self.structure != "kron":
            raise PosteriorError(f"rest {self.rest!r} is for structure 'kron'")
        if self.draws is not None and self.chosen == "asdl":
            raise PosteriorError("estimator 'asdl' has no draws: use 'sketch' or 'exact'")
        if self.draws is not None and self.chosen == "exact" and self.labels == "ef":
            raise PosteriorError("an exact empirical Fisher has nothing to draw: use labels 'ggn'")

    @property
    def chosen(self) -> Estimator:
        """The estimator, or what it is by default."""
        return self.estimator or ("exact" if self.structure == "kron" else "sketch")


def fit_curvature(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    n_data: int,
    method: CurvatureMethod = CurvatureMethod(),
    likelihood: Likelihood = CLASSIFICATION,
    seed: int = 0,
) -> Curvature:
    """Compute the curvature of the summed loss at the model's parameters.

    Args:
        model: The network; it is left as it was.
        batches: Pairs of inputs and targets.
        n_data: Size of the data set that the curvature is summed over.
        method: How.
        likelihood: Of the targets.
        seed: Of what is drawn.

    Raises:
        PosteriorError: The method cannot be used on this model or these data.
    """
    common: dict[str, Any] = {
        "n_data": n_data,
        "labels": method.labels,
        "samples": method.samples,
    }
    if method.chosen == "asdl":
        from spamprune.bayes.curvature.asdl import asdl_curvature

        if likelihood != CLASSIFICATION:
            raise PosteriorError("asdl knows plain classification only: use estimator 'exact'")
        return asdl_curvature(model, batches, **common)
    common |= {"likelihood": likelihood, "seed": seed}
    if method.structure == "kron":
        return kron(model, batches, draws=method.draws, rest=method.rest, **common)
    if method.chosen == "exact":
        return exact(model, batches, draws=method.draws, **common)
    return sketch(model, batches, draws=method.draws or 1, group=method.group, **common)
