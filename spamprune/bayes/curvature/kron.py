"""Kronecker factors of the empirical Fisher and of the Gauss-Newton matrix.

Linear layers and convolutions get ``G ⊗ A`` for the weight and ``G`` for the bias: A is the mean
over samples and positions of the outer products of inputs, G the sum over the data set of those of
the outputs' gradients (Martens and Grosse 2015; Grosse and Martens 2016 for convolutions). Groups
of a grouped convolution have factors of their own. A weight that is used more than once has its
uses taken for further positions.
"""

from __future__ import annotations

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
from spamprune.bayes.curvature.passes import Plan
from spamprune.bayes.curvature.rules import MatrixRule, Shift
from spamprune.bayes.curvature.squares import COLUMNS, at_least_single, slices
from spamprune.bayes.likelihood import CLASSIFICATION, Likelihood
from spamprune.bayes.parameters import named_parameters
from spamprune.errors import PosteriorError

#: Side of the blocks in which the symmetric matrix of the inputs is computed.
_BLOCK = 256
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
        # upper triangles, apart where images of several sizes leave out different inputs
        self._inputs: dict[tuple[str, MatrixRule], Tensor] = {}
        self._whole: dict[str, Tensor] = {}
        self._positions: dict[str, int] = {}
        self._names: set[str] = set()
        self._with_inputs: set[int] = set()
        self._latest: tuple[Tensor, Tensor] | None = None

    def prepare(self, terms: list[Term]) -> None:
        """Tell the parameters that have factors from those that need squares."""
        super().prepare(terms)
        fitting = [self._fits(term) for term in terms]
        names = {name for term in terms for name in term.origins}
        for term, fits in zip(terms, fitting, strict=True):
            names -= set() if fits else term.origins
        self._names = names
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
            and isinstance(term.rule, (MatrixRule, Shift))
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
        elif isinstance(term.rule, MatrixRule):
            outputs = self._add_matrices(name, term, term.rule, gradient)
            self._latest = gradient, outputs
        else:
            if self._latest is None or self._latest[0] is not gradient:
                features = -1 if term.operation == "linear" else 2
                rows = at_least_single(gradient).movedim(features, 0).flatten(1)
                self._latest = gradient, (rows @ rows.mT)[None]
            _add(self._outputs, name, self._latest[1])

    def _add_matrices(self, name: str, term: Term, rule: MatrixRule, gradient: Tensor) -> Tensor:
        """Add a weight's outer products and return those of the outputs' gradients."""
        data = term.data[0]
        # inputs are the same in each backward pass of a batch
        first = id(term) not in self._with_inputs
        self._with_inputs.add(id(term))
        outputs = gradient.new_zeros(())
        width = rule.copies * data[0].numel() * gradient.element_size()
        for part in slices(len(data), width, COLUMNS):
            pair = at_least_single(gradient[part]), at_least_single(data[part])
            rows, columns = rule.matrices(*pair, together=True)
            outputs = outputs + rows @ rows.mT
            if first:
                _add_outer(self._inputs, (name, rule), columns)
                self._positions[name] = self._positions.get(name, 0) + columns.shape[-1]
        _add(self._outputs, name, outputs)
        return outputs

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
        for name, rule in list(self._inputs):
            upper = self._inputs.pop((name, rule))
            _add(self._whole, name, _mirrored(upper, rule))
        names = sorted(self._positions)
        counts = torch.tensor([self._positions[n] for n in names], dtype=torch.float64)
        counts = counts.to(device)
        tensors = [totals[n] for totals in (self._outputs, self._whole) for n in sorted(totals)]
        sum_over_processes([*self.totals.values(), *tensors, counts])
        self._positions = {n: int(c) for n, c in zip(names, counts.tolist(), strict=True)}

    def blocks(self, scale: float) -> dict[str, Kronecker]:
        """Return the factors, the outputs' scaled to the data set, the inputs' a mean."""
        return {
            name: Kronecker(
                outputs * scale,
                self._whole[name] / self._positions[name] if name in self._whole else None,
                tuple(self._parameters[name].shape),
            )
            for name, outputs in self._outputs.items()
        }

    def how(self) -> dict[str, str]:
        """Return, for each parameter, in words, how its curvature was got."""
        words = super().how()
        return words | {name: words[name].replace("exact", "kron") for name in self._outputs}


def _mirrored(upper: Tensor, rule: MatrixRule) -> Tensor:
    """Mirror an upper triangle, and fill in the inputs that are always zero."""
    return rule.restore(rule.restore(upper.triu() + upper.triu(1).mT).mT)


def _add_outer(
    totals: dict[tuple[str, MatrixRule], Tensor], key: tuple[str, MatrixRule], columns: Tensor
) -> None:
    """Add ``columns columnsᵀ``, of large matrices only the blocks at and above the diagonal."""
    groups, features, _ = columns.shape
    if key not in totals:
        totals[key] = columns.new_zeros(groups, features, features)
    for start in range(0, features, _BLOCK):
        rows = slice(start, start + _BLOCK)
        here = totals[key][:, rows, start:]
        here.baddbmm_(columns[:, rows], columns[:, start:].mT)


def _add(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    totals[name] = totals[name].add_(value) if name in totals else value.clone()
