"""The Laplace posterior: a Gaussian at the trained parameters with precision ``P = H/T + δ``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spamprune.bayes.curvature import Curvature, sketch
from spamprune.bayes.curvature.sketch import Labels
from spamprune.bayes.evidence import log_evidence
from spamprune.bayes.parameters import check_shapes, named_parameters
from spamprune.bayes.prior import Prior
from spamprune.errors import PosteriorError
from spamprune.files import write_tensors

_FORMAT = "spamprune-posterior-1"


@dataclass(frozen=True)
class Posterior:
    """A diagonal Laplace posterior, keyed by parameter name.

    Attributes:
        curvature: H, summed over the data set, and how it was estimated.
        prior_precision: δ for every parameter, shaped like it.
        temperature: T.
        log_evidence: Log marginal likelihood of the data set, in nats, at the fitted parameters.
    """

    curvature: Curvature
    prior_precision: dict[str, Tensor]
    temperature: float
    log_evidence: float

    def precision(self) -> dict[str, Tensor]:
        """Return the diagonal of P for every parameter, shaped like it."""
        return {
            name: h / self.temperature + self.prior_precision[name]
            for name, h in self.curvature.diag.items()
        }

    def check(self, model: nn.Module) -> None:
        """Raise a :class:`PosteriorError` unless this posterior fits ``model``'s parameters."""
        check_shapes(model, self.curvature.diag, "the posterior")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the posterior to one safetensors file, atomically."""
        tensors = {f"curvature/{n}": h for n, h in self.curvature.diag.items()}
        tensors |= {f"prior/{n}": d for n, d in self.prior_precision.items()}
        about = {
            "temperature": self.temperature,
            "log_evidence": self.log_evidence,
            "loss": self.curvature.loss,
            "n_data": self.curvature.n_data,
            "labels": self.curvature.labels,
            "estimator": self.curvature.estimator,
        }
        write_tensors(path, tensors, {"format": _FORMAT, "posterior": json.dumps(about)})


def load_posterior(path: str | os.PathLike[str]) -> Posterior:
    """Read a posterior written by :meth:`Posterior.save`.

    Raises:
        PosteriorError: The file is missing, damaged or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PosteriorError(
            f"cannot read a posterior from {os.fspath(path)}: {error}; fit it again"
        ) from error
    if metadata.get("format") != _FORMAT:
        raise PosteriorError(f"{os.fspath(path)} is no posterior of this version of spamprune")
    part = {
        kind: {k.split("/", 1)[1]: t for k, t in tensors.items() if k.startswith(kind + "/")}
        for kind in ("curvature", "prior")
    }
    try:
        about = json.loads(metadata["posterior"])
        temperature, evidence = about.pop("temperature"), about.pop("log_evidence")
        return Posterior(
            Curvature(part["curvature"], **about), part["prior"], temperature, evidence
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PosteriorError(f"{os.fspath(path)} is damaged: fit the posterior again") from error


def posterior_from(
    model: nn.Module, curvature: Curvature, prior: Prior, temperature: float = 1.0
) -> Posterior:
    """Combine curvature and prior into the posterior at the model's current parameters."""
    delta = prior.precision()
    evidence = log_evidence(named_parameters(model), curvature, delta, temperature)
    return Posterior(
        curvature, {n: d.detach().clone() for n, d in delta.items()}, temperature, evidence
    )


def fit_posterior(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    n_data: int | None = None,
    prior: Prior | float = 1.0,
    labels: Labels = "ef",
    temperature: float = 1.0,
    samples: int | None = None,
    seed: int = 0,
) -> Posterior:
    """Fit a diagonal Laplace posterior to any trained classifier in one gradient pass.

    Args:
        model: The trained network; it is left as it was.
        loader: Batches of inputs and integer class labels.
        n_data: Size of the training set; by default ``len(loader.dataset)``.
        prior: A prior, or the precision of a scalar one.
        labels: ``"ef"`` or ``"ggn"``, see :func:`spamprune.bayes.curvature.sketch`.
        temperature: T.
        samples: Use this many samples only, scaled up to ``n_data``.
        seed: Of the sketch.

    Raises:
        PosteriorError: ``n_data`` is not given and the loader has no ``dataset``.
    """
    if n_data is None:
        dataset = getattr(loader, "dataset", None)
        if dataset is None:
            raise PosteriorError("this loader has no .dataset: give n_data, the number of samples")
        n_data = len(dataset)
    if not isinstance(prior, Prior):
        prior = Prior(model, "scalar", prior)
    curvature = sketch(model, loader, n_data=n_data, labels=labels, samples=samples, seed=seed)
    return posterior_from(model, curvature, prior, temperature)
