"""Kronecker factors of the empirical Fisher and of the Gauss-Newton matrix.

Linear layers and convolutions get ``G ⊗ A`` for the weight and ``G`` for the bias: A is the mean
over samples and positions of the outer products of inputs, G the sum over the data set of those of
the outputs' gradients (Martens and Grosse 2015; Grosse and Martens 2016 for convolutions). Groups
of a grouped convolution have factors of their own. A weight that is used more than once has its
uses taken for further positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spamprune.bayes.curvature.base import Curvature, Labels, Rest
from spamprune.bayes.curvature.batches import (
    DEFAULT_BUDGET,
    processes,
    sum_over_processes,
)
from spamprune.bayes.curvature.blocks import Kronecker
from spamprune.bayes.curvature.directions import Directions, generator_of
from spamprune.bayes.curvature.exact import Squares, summed
from spamprune.bayes.curvature.operations import Term
from spamprune.bayes.curvature.outer import (
    Inputs,
    add_products,
    inputs_of,
    mirror,
    pieces,
    whole,
)
from spamprune.bayes.curvature.passes import Plan
from spamprune.bayes.curvature.rules import Convolution, Linear, Shift
from spamprune.bayes.curvature.squares import zero_total
from spamprune.bayes.likelihood import CLASSIFICATION, Likelihood
from spamprune.bayes.parameters import named_parameters
from spamprune.errors import PosteriorError

_OPERATIONS = frozenset({"linear", "conv1d", "conv2d", "conv3d"})


def kron(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    n_data: int,
    labels: Labels = "ef",
    likelihood: Likelihood = CLASSIFICATION,
    samples: int | None = None,
    draws: int | None = None,
    rest: Rest = "diagonal",
    seed: int = 0,
    budget: int = DEFAULT_BUDGET,
) -> Curvature:
    """Compute Kronecker factors for linear layers and convolutions, exact diagonals for the rest.

    Args:
        model: The network; it is left as it was.
        batches: Pairs of inputs and targets.
        n_data: Size of the data set that the curvature is summed over.
        labels: Whose labels the gradients use.
        likelihood: Of the targets.
        samples: Stop once this many samples were seen and scale to ``n_data``; all by default.
        draws: For ``"ggn"``: draws of labels from the model, instead of all classes; unbiased.
        rest: Parameters that have no factors get an exact diagonal, or are left out of the
            posterior: they keep their prior precision.
        seed: Of the draws.
        budget: Bytes that a piece of a batch may keep for its backward pass.

    Raises:
        PosteriorError: As for :func:`spamprune.bayes.curvature.exact.exact`.
    """
    parameters = named_parameters(model)
    directions = Directions(labels, likelihood, draws, generator_of(model, seed))
    build = partial(Factors, parameters, rest=rest)
    factors, seen = summed(model, batches, parameters, build, directions, samples, budget)
    factors.sum_over_processes()
    scale = n_data / seen.seen
    blocks = factors.blocks(scale)
    diag = {name: total.mul_(scale) for name, total in factors.totals.items()}
    diag |= {name: block.diag for name, block in blocks.items()}
    if rest == "diagonal":  # a layer that is computed may have no way to the loss
        diag = {name: zero_total(p) for name, p in parameters.items()} | diag
    return Curvature(
        diag={name: diag[name] for name in parameters if name in diag},
        loss=seen.loss * scale,
        n_data=n_data,
        labels=labels,
        estimator="exact",
        kron=blocks,
        how={name: words for name, words in factors.how().items() if name in diag},
    )


class Factors(Squares):
    """Sums of outer products where a parameter has Kronecker factors, of squares elsewhere."""

    def __init__(self, parameters: Mapping[str, Tensor], plan: Plan, rest: Rest):
        super().__init__(parameters, plan)
        self._rest = rest
        self._outputs: dict[str, Tensor] = {}
        # apart where images of several sizes leave out different inputs
        self._inputs: dict[tuple[str, Linear | Convolution, torch.Size], Inputs] = {}
        self._whole: dict[str, Tensor] = {}
        self._positions: dict[str, int] = {}
        self._names: set[str] = set()
        self._uses: Counter[str] = Counter()
        self._with_inputs: set[int] = set()
        self._latest: tuple[Tensor, str] | None = None
        # a bias beside the weight that has the same factor of the outputs
        self._same: dict[str, str] = {}

    def prepare(self, terms: list[Term]) -> None:
        """Tell the parameters that have factors from those that need squares."""
        super().prepare(terms)
        fitting = [self._fits(term) for term in terms]
        names = {name for term in terms for name in term.origins}
        for term, fits in zip(terms, fitting, strict=True):
            names -= set() if fits else term.origins
        self._names = names
        self._uses.update(name for term in terms for name in term.origins)
        self.totals = {
            name: total
            for name, total in self.totals.items()
            if name not in names and self._rest == "diagonal"
        }

    def _fits(self, term: Term) -> bool:
        (name, *_) = term.origins
        return (
            term.operation in _OPERATIONS
            and term.target is self._parameters[name]
            and isinstance(term.rule, (Linear, Convolution, Shift))
        )

    def add_batch(self, *args: Any) -> Tensor:
        """Add a batch and return its summed loss."""
        self._with_inputs.clear()
        return super().add_batch(*args)

    def receive(self, term: Term, gradient: Tensor) -> None:
        """Add outer products or squares."""
        (name, *_) = term.origins
        if name not in self._names:
            if self._rest == "diagonal":
                super().receive(term, gradient)
            return
        rule, groups = term.rule, 1
        if isinstance(rule, (Linear, Convolution)):
            groups = getattr(rule, "groups", 1)
            self._add_inputs(name, rule, term, gradient)
        elif self._latest is not None and self._latest[0] is gradient:
            weight = self._latest[1]
            if self._uses[name] == self._uses[weight] == 1:
                self._same[name] = weight
                return
        self._latest = gradient, name
        axis = -1 if term.operation == "linear" else 2
        for piece in pieces(gradient, 1):
            rows = piece.movedim(axis, 0).reshape(groups, gradient.shape[axis] // groups, -1)
            self._outputs[name] = add_products(self._outputs.get(name), rows)

    def _add_inputs(
        self, name: str, rule: Linear | Convolution, term: Term, gradient: Tensor
    ) -> None:
        """Add a weight's inputs, which are the same in each backward pass of a batch."""
        if id(term) in self._with_inputs:
            return
        self._with_inputs.add(id(term))
        (data,) = term.data
        key = name, rule, data.shape[2:] if isinstance(rule, Convolution) else torch.Size()
        if key not in self._inputs:
            self._inputs[key] = inputs_of(rule, data)
        self._inputs[key].add(data)
        positions = gradient.numel() // len(term.target)
        self._positions[name] = self._positions.get(name, 0) + positions

    def sum_over_processes(self) -> None:
        """Add what the other processes saw.

        Raises:
            PosteriorError: Not all of them found the same parameters to have factors.
        """
        device = next(iter(self._parameters.values())).device
        found = torch.tensor([float(n in self._outputs) for n in self._parameters], device=device)
        sum_over_processes([found])
        if not ((found == 0) | (found == processes())).all():
            raise PosteriorError(
                "the processes do not agree on which parameters have Kronecker factors: each needs "
                "data of its own, of the same kind"
            )
        for key in list(self._inputs):
            name, rule, _ = key
            found = whole(rule, self._inputs.pop(key).total())
            self._whole[name] = self._whole[name].add_(found) if name in self._whole else found
        names = sorted(self._positions)
        counts = torch.tensor([self._positions[n] for n in names], dtype=torch.float64)
        counts = counts.to(device)
        tensors = [totals[n] for totals in (self._outputs, self._whole) for n in sorted(totals)]
        sum_over_processes([*self.totals.values(), *tensors, counts])
        self._positions = {n: int(c) for n, c in zip(names, counts.tolist(), strict=True)}

    def blocks(self, scale: float) -> dict[str, Kronecker]:
        """Return the factors, the outputs' scaled to the data set, the inputs' a mean."""
        for outputs in self._outputs.values():
            mirror(outputs).mul_(scale)
        for name, inputs in self._whole.items():
            inputs.div_(self._positions[name])
        factors = self._outputs | {b: self._outputs[w].clone() for b, w in self._same.items()}
        return {
            name: Kronecker(outputs, self._whole.get(name), tuple(self._parameters[name].shape))
            for name, outputs in factors.items()
        }

    def how(self) -> dict[str, str]:
        """Return, for each parameter, in words, how its curvature was got."""
        words = super().how()
        found = [*self._outputs, *self._same]
        return words | {name: words[name].replace("exact", "kron") for name in found}
