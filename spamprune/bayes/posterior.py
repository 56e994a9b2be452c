"""The Laplace posterior: a Gaussian at the trained parameters with precision ``P = H/T + δ``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spamprune.bayes.curvature import Curvature, CurvatureMethod, fit_curvature
from spamprune.bayes.curvature.blocks import Kronecker
from spamprune.bayes.evidence import log_evidence
from spamprune.bayes.likelihood import CLASSIFICATION, Likelihood
from spamprune.bayes.parameters import check_positive, check_shapes, named_parameters
from spamprune.bayes.prior import Prior
from spamprune.errors import PosteriorError
from spamprune.files import write_tensors

_FORMAT = "spamprune-posterior-2"

#: What a file's metadata tells of the curvature, besides its tensors.
_ABOUT = ("loss", "n_data", "labels", "estimator", "how", "error")


@dataclass(frozen=True)
class Posterior:
    """A Laplace posterior, keyed by parameter name, with diagonal or Kronecker curvature.

    Attributes:
        curvature: H, summed over the data set, and how it was estimated; parameters that it lacks
            have the precision of the prior alone.
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
            name: self.curvature.block(name).precision(delta, self.temperature)
            if name in self.curvature.diag
            else delta
            for name, delta in self.prior_precision.items()
        }

    def coverage(self) -> dict[str, str]:
        """Return in words, for every parameter, how its curvature was got."""
        curvature = self.curvature
        return {
            name: curvature.how.get(name, curvature.estimator)
            if name in curvature.diag
            else "excluded: prior precision only"
            for name in self.prior_precision
        }

    def check(self, model: nn.Module) -> None:
        """Raise a :class:`PosteriorError` unless this posterior fits ``model``'s parameters."""
        check_shapes(named_parameters(model), self.prior_precision, "the posterior")

    def on(self, model: nn.Module) -> Posterior:
        """Return this posterior where the parameters of ``model`` are; files are read on the CPU.

        Raises:
            PosteriorError: It does not fit ``model``'s parameters.
        """
        self.check(model)
        devices = {name: p.device for name, p in named_parameters(model).items()}
        if all(delta.device == devices[name] for name, delta in self.prior_precision.items()):
            return self
        curvature = replace(
            self.curvature,
            diag={name: h.to(devices[name]) for name, h in self.curvature.diag.items()},
            kron={name: block.to(devices[name]) for name, block in self.curvature.kron.items()},
        )
        prior = {name: delta.to(devices[name]) for name, delta in self.prior_precision.items()}
        return replace(self, curvature=curvature, prior_precision=prior)

    def check_factors(self, model: nn.Module, purpose: str) -> None:
        """Raise a :class:`PosteriorError` unless it fits ``model`` and has Kronecker factors.

        Args:
            model: The network.
            purpose: What needs them, for the message.
        """
        self.check(model)
        if not self.curvature.kron:
            raise PosteriorError(
                f"{purpose} needs Kronecker factors: fit the posterior with "
                "CurvatureMethod(structure='kron')"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the posterior to one safetensors file, atomically."""
        curvature = self.curvature
        tensors = {f"curvature/{n}": h for n, h in curvature.diag.items()}
        tensors |= {f"prior/{n}": d for n, d in self.prior_precision.items()}
        for name, block in curvature.kron.items():
            tensors[f"kron_outputs/{name}"] = block.outputs
            if block.inputs is not None:
                tensors[f"kron_inputs/{name}"] = block.inputs
        about = {"temperature": self.temperature, "log_evidence": self.log_evidence}
        about |= {key: getattr(curvature, key) for key in _ABOUT}
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
        for kind in ("curvature", "prior", "kron_outputs", "kron_inputs")
    }
    try:
        about = json.loads(metadata["posterior"])
        temperature, evidence = about.pop("temperature"), about.pop("log_evidence")
        diag, inputs = part["curvature"], part["kron_inputs"]
        kron = {
            name: Kronecker(outputs, inputs.get(name), tuple(diag[name].shape))
            for name, outputs in part["kron_outputs"].items()
        }
        curvature = Curvature(diag, **about, kron=kron)
        return Posterior(curvature, part["prior"], temperature, evidence)
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
    curvature: CurvatureMethod = CurvatureMethod(),  # noqa: B008 - frozen
    likelihood: Likelihood = CLASSIFICATION,
    temperature: float = 1.0,
    seed: int = 0,
) -> Posterior:
    """Fit a Laplace posterior to any trained network, by default in one gradient pass.

    Args:
        model: The trained network; it is left as it was.
        loader: Batches of inputs and targets.
        n_data: Size of the training set; by default ``len(loader.dataset)``.
        prior: A :class:`~spamprune.bayes.prior.Prior`, or the precision of a scalar one.
        curvature: How H is computed: diagonal or Kronecker-factored, sketched or exact.
        likelihood: Of the targets; by default integer class labels.
        temperature: T.
        seed: Of what the curvature draws.

    Raises:
        PosteriorError: ``n_data`` is not given and the loader has no ``dataset`` with a length, a
            number is not positive, the prior is of another model, or the curvature cannot be
            computed this way.
    """
    if n_data is None:
        dataset = getattr(loader, "dataset", None)
        if not hasattr(dataset, "__len__"):
            raise PosteriorError(
                "this loader has no .dataset with a length: give n_data, the number of samples"
            )
        n_data = len(dataset)  # type: ignore[arg-type]
    check_positive(n_data=n_data, temperature=temperature)
    if isinstance(prior, str):
        raise PosteriorError(
            f"prior {prior!r} has no precision: give spamprune.Prior(model, {prior!r})"
        )
    if not isinstance(prior, Prior):
        prior = Prior(model, "scalar", prior)
    check_shapes(named_parameters(model), prior.precision(), "the prior")
    found = fit_curvature(
        model, loader, n_data=n_data, method=curvature, likelihood=likelihood, seed=seed
    )
    return posterior_from(model, found, prior, temperature)
