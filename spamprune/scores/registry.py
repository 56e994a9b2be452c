"""What a criterion is, and the list of them all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from spamprune.bayes.likelihood import CLASSIFICATION, Likelihood
from spamprune.bayes.posterior import Posterior
from spamprune.errors import PosteriorError, PruningError
from spamprune.registry import Registry

Scores = dict[str, Tensor]
#: Pairs of inputs and targets, such as a loader; it may be gone through more than once.
Batches = Iterable[tuple[Tensor, Tensor]]


class Criterion(Protocol):
    """Scores every trainable parameter of ``model``, by name, in its shape."""

    def __call__(
        self,
        model: nn.Module,
        posterior: Posterior | None = None,
        *,
        data: Batches | None = None,
        likelihood: Likelihood = CLASSIFICATION,
        seed: int = 0,
    ) -> Scores:
        """Return the scores; what a criterion has no use for is ignored.

        Args:
            model: The network; it is left as it was.
            posterior: Of the network.
            data: Training data; for a few batches of a loader, ``list(islice(loader, n))``.
            likelihood: Of the targets.
            seed: Of what is drawn.

        Raises:
            PosteriorError: The criterion needs a posterior, or that of this network.
            PruningError: The criterion needs data.
        """
        ...


CRITERIA: Registry[Criterion] = Registry("criterion", PruningError)

#: What the decorator passes on, besides the model.
_OFFERED = ("posterior", "data", "likelihood", "seed")

F = TypeVar("F", bound=Callable[..., Scores])


def criterion(name: str) -> Callable[[F], F]:
    """Return a decorator that files a function as the criterion ``name``.

    The function takes the model and, under these names, what it uses of ``posterior``, ``data``,
    ``likelihood`` and ``seed``. Those without a default it needs: the filed criterion asks for
    them.

    Raises:
        TypeError: The function takes something else.
        ValueError: The name is taken.
    """

    def decorator(score: F) -> F:
        _, *takes = inspect.signature(score).parameters.values()
        for parameter in takes:
            if parameter.name not in _OFFERED:
                raise TypeError(f"{name!r} takes {parameter.name!r}: criteria get {_OFFERED}")

        def filed(
            model: nn.Module,
            posterior: Posterior | None = None,
            *,
            data: Batches | None = None,
            likelihood: Likelihood = CLASSIFICATION,
            seed: int = 0,
        ) -> Scores:
            offered = posterior, data, likelihood, seed
            given: dict[str, Any] = dict(zip(_OFFERED, offered, strict=True))
            for parameter in takes:
                if parameter.default is parameter.empty and given[parameter.name] is None:
                    raise _missing(name, parameter.name)
            return score(model, **{p.name: given[p.name] for p in takes})

        CRITERIA.register(name)(filed)
        return score

    return decorator


def _missing(name: str, what: str) -> PosteriorError | PruningError:
    if what == "posterior":
        return PosteriorError(f"criterion {name!r} needs a posterior: see spamprune.fit_posterior")
    return PruningError(
        f"criterion {name!r} needs data: give data, a loader of pairs of inputs and targets"
    )
