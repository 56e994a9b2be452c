"""Exact diagonals of the empirical Fisher and of the Gauss-Newton matrix, for any architecture.

Every operation in which a parameter meets data is followed (:mod:`.trace`) and the squares of its
per-sample gradients are summed by a rule (:mod:`.rules`). Parameters that are used more than once
have their per-sample gradients added up before they are squared; parameters behind a tensor made
of parameters (weight standardisation, tables of position biases) get theirs through it; what no
rule covers is computed one sample at a time. All of it is compared with single samples' gradients
on a few samples of the data before the pass begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from spamprune.bayes.curvature.base import Curvature, Labels
from spamprune.bayes.curvature.batches import (
    DEFAULT_BUDGET,
    Totals,
    accumulate,
    doubled,
    sum_over_processes,
)
from spamprune.bayes.curvature.directions import Directions, generator_of
from spamprune.bayes.curvature.operations import Term
from spamprune.bayes.curvature.passes import Pass, Plan, streamed
from spamprune.bayes.curvature.probe import few, jittered, probe
from spamprune.bayes.curvature.squares import at_least_single, slices, sum_of_squares, zero_total
from spamprune.bayes.likelihood import CLASSIFICATION, Likelihood
from spamprune.bayes.parameters import named_parameters

#: Bytes of per-sample gradients of parameters that are used more than once.
_SHARED = 2**26
#: Samples whose gradients are checked one by one.
_CHECKED = 2

SomeSquares = TypeVar("SomeSquares", bound="Squares")


def exact(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    n_data: int,
    labels: Labels = "ef",
    likelihood: Likelihood = CLASSIFICATION,
    samples: int | None = None,
    draws: int | None = None,
    seed: int = 0,
    budget: int = DEFAULT_BUDGET,
) -> Curvature:
    """Compute the diagonal of the curvature from exact per-sample squares.

    ``labels="ef"`` sums the squared gradients of every sample's loss; ``labels="ggn"`` the squared
    gradients along every column of a root of the loss's Hessian in the outputs, one backward pass
    for each class (Martens 2020, section 9), or those of the losses of drawn labels.

    Args:
        model: The network; it is left as it was.
        batches: Pairs of inputs and targets.
        n_data: Size of the data set that the curvature is summed over.
        labels: Whose labels the gradients use.
        likelihood: Of the targets.
        samples: Stop once this many samples were seen and scale to ``n_data``; all by default.
        draws: For ``"ggn"``: draws of labels from the model, instead of all classes; unbiased.
        seed: Of the draws.
        budget: Bytes that a piece of a batch may keep for its backward pass.

    Raises:
        PosteriorError: There are no batches, samples are not independent, the loss is not finite,
            or the model's operations depend on the data.
    """
    parameters = named_parameters(model)
    directions = Directions(labels, likelihood, draws, generator_of(model, seed))
    sums, seen = summed(
        model, batches, parameters, partial(Squares, parameters), directions, samples, budget
    )
    sum_over_processes(list(sums.totals.values()))
    scale = n_data / seen.seen
    return Curvature(
        diag={name: total.mul_(scale) for name, total in sums.totals.items()},
        loss=seen.loss * scale,
        n_data=n_data,
        labels=labels,
        estimator="exact",
        how=sums.how(),
    )


def summed(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    parameters: Mapping[str, Tensor],
    build: Callable[[Plan], SomeSquares],
    directions: Directions,
    samples: int | None,
    budget: int,
) -> tuple[SomeSquares, Totals]:
    """Return this process's sums over the data, built from a checked plan, and what was seen."""
    sums: SomeSquares | None = None
    likelihood = directions.likelihood

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal sums
        if sums is None:
            sums = build(checked_plan(model, inputs, targets, parameters, likelihood))
        return sums.add_batch(model, inputs, targets, directions)

    seen = accumulate(model, batches, step, likelihood=likelihood, samples=samples, budget=budget)
    return sums or build(Plan()), seen  # a process without data has sums of nothing


@dataclass
class _Shared:
    """Parameters whose per-sample gradients need several terms, or go through another tensor."""

    names: tuple[str, ...]
    expected: int
    arrived: list[tuple[Term, Tensor]] = field(default_factory=list)


class Squares:
    """Sums of squared per-sample gradients, for every parameter.

    Attributes:
        totals: By name, shaped like the parameter, in float32 at least.
    """

    def __init__(self, parameters: Mapping[str, Tensor], plan: Plan):
        self._parameters, self._plan = parameters, plan
        self.totals = {name: zero_total(p) for name, p in parameters.items()}
        self._prepared = False
        self._shared: dict[str, _Shared] = {}
        self._operations: dict[str, set[str]] = {name: set() for name in parameters}

    def add_batch(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        directions: Directions,
    ) -> Tensor:
        """Add a batch and return its summed loss."""
        forward = self.forward(model, inputs)
        try:
            losses = directions.likelihood.losses(forward.outputs, targets)
            for objective, gradient, last in directions.of(forward.outputs, losses, targets):
                forward.backward(objective, gradient, last=last)
                self.finish()
        finally:
            forward.close()
        self._add_loops(model, inputs, targets, directions)
        return losses.detach().sum()

    def forward(self, model: nn.Module, inputs: Tensor) -> Pass:
        """Return the forward pass of a batch, whose backward passes add to the totals."""
        given = model, inputs, self._parameters, self._plan, self.receive
        if self._prepared:
            return Pass(*given)
        terms: list[Term] = []
        forward = Pass(*given, terms.append)
        self.prepare(terms)
        self._prepared = True
        terms.clear()  # they hold the activations
        return forward

    def prepare(self, terms: list[Term]) -> None:
        """Group parameters that share terms; those with one direct term need no group."""
        groups: list[set[str]] = []
        for term in terms:
            for name in term.origins:
                self._operations[name].add(term.operation)
            touching = [g for g in groups if g & term.origins]
            groups = [g for g in groups if not g & term.origins]
            groups.append(set(term.origins).union(*touching))
        for group in groups:
            mine = [term for term in terms if term.origins & group]
            (name, *_) = group
            if len(mine) > 1 or mine[0].target is not self._parameters[name]:
                component = _Shared(tuple(sorted(group)), len(mine))
                self._shared |= dict.fromkeys(group, component)

    def receive(self, term: Term, gradient: Tensor) -> None:
        """Add what the gradient at a term's operation says of its parameters."""
        (name, *_) = term.origins
        if name not in self._shared:
            total = self.totals[name]
            found = sum_of_squares(term.rule, gradient, term.data, total.numel())
            total.add_(found.view_as(total))
            return
        component = self._shared[name]
        component.arrived.append((term, gradient))
        if len(component.arrived) == component.expected:
            self._add_shared(component)

    def finish(self) -> None:
        """Add what waits for terms that a backward pass did not reach: their gradients are zero."""
        for component in self._shared.values():
            if component.arrived:
                self._add_shared(component)

    def _add_shared(self, component: _Shared) -> None:
        arrived, component.arrived = component.arrived, []
        parameters = {name: self._parameters[name] for name in component.names}
        sizes = [p.numel() for p in parameters.values()]
        sizes += [term.target.numel() for term, _ in arrived]
        sizes += [x[0].numel() for term, gradient in arrived for x in (gradient, *term.data)]
        for part in slices(len(arrived[0][1]), 8 * sum(sizes), _SHARED):
            sums: dict[str, Tensor] = {}
            for term, gradient in arrived:
                data = [at_least_single(x[part]) for x in term.data]
                found = term.rule.per_sample(at_least_single(gradient[part]), *data)
                found = found.view(-1, *term.target.shape)
                for name, rows in _through(term, found, parameters):
                    sums[name] = sums[name] + rows if name in sums else rows
            for name, rows in sums.items():
                self.totals[name] += rows.square().sum(0)

    def _add_loops(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, directions: Directions
    ) -> None:
        names = sorted(self._plan.loops & self.totals.keys())
        if not names:
            return
        parameters = [self._parameters[name] for name in names]
        totals = [self.totals[name] for name in names]
        add_single_squares(model, inputs, targets, parameters, directions, totals)

    def how(self) -> dict[str, str]:
        """Return, for each parameter, in words, how its squares were got."""
        words = {}
        for name, operations in self._operations.items():
            if name in self._plan.loops:
                words[name] = "exact: one sample at a time"
            elif operations:
                words[name] = "exact: " + ", ".join(sorted(operations))
            else:
                words[name] = "exact: not used by the loss"
        return words


def _through(
    term: Term, rows: Tensor, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Take per-sample gradients of a term's target to the parameters that it is made of."""
    names = sorted(term.origins)
    if len(names) == 1 and term.target is parameters[names[0]]:
        yield names[0], rows
        return
    found = torch.autograd.grad(
        term.target,
        [parameters[name] for name in names],
        rows.to(term.target.dtype),
        retain_graph=True,
        is_grads_batched=True,
        allow_unused=True,
    )
    for name, gradient in zip(names, found, strict=True):
        if gradient is not None:
            yield name, at_least_single(gradient)


def add_single_squares(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    parameters: Sequence[Tensor],
    directions: Directions,
    totals: Sequence[Tensor],
    sign: float = 1,
) -> set[int]:
    """Add squared gradients of one sample (and root) at a time: slow, and right for anything.

    Args:
        model: In evaluation mode.
        inputs: A batch.
        targets: Of the batch.
        parameters: Whose squares are asked for.
        directions: Along which gradients are taken.
        totals: Of each parameter, added to.
        sign: −1 takes the squares off instead.

    Returns:
        Indices of the parameters that have gradients, be they zero.
    """
    reached: set[int] = set()

    def consume(index: int, gradient: Tensor) -> None:
        reached.add(index)
        gradient = at_least_single(gradient)
        totals[index].addcmul_(gradient, gradient, value=sign)

    with streamed(parameters, consume):
        for x, y in zip(inputs.split(1), targets.split(1), strict=True):
            outputs = model(doubled(x))[:1]
            losses = directions.likelihood.losses(outputs, y)
            for objective, gradient, last in directions.of(outputs, losses, y):
                torch.autograd.grad(
                    objective, parameters, gradient, retain_graph=not last, allow_unused=True
                )
    return reached


def checked_plan(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    parameters: Mapping[str, Tensor],
    likelihood: Likelihood,
) -> Plan:
    """Return a plan whose every parameter was compared with single samples' gradients.

    The parameters are jittered meanwhile, so that zeros at initialisation hide nothing; one whose
    squares differ by more than rounding is left to the loop over single samples.
    """
    x, y = few(inputs, targets)
    first = x[:_CHECKED], y[:_CHECKED]
    fisher = Directions("ef", likelihood)
    with jittered(parameters):
        plan = probe(model, x, parameters)
        sums = Squares(parameters, plan)
        forward = sums.forward(model, x)
        losses = likelihood.losses(forward.outputs, y)
        forward.backward(losses[:_CHECKED].sum(), last=True)
        forward.close()
        sums.finish()
        scales = {name: total.max() for name, total in sums.totals.items() if total.numel()}
        leaves, totals = list(parameters.values()), list(sums.totals.values())
        reached = add_single_squares(model, *first, leaves, fisher, totals, sign=-1)
    largest = max(scales.values())
    # what an operation that was not seen uses may tell nothing of these samples, and much of others
    followed = {name for use in plan.uses for names in use.origins for name in names}
    names = list(parameters)
    loops = set(plan.loops) | ({names[index] for index in reached} - followed)
    for name, scale in scales.items():
        eps = torch.finfo(parameters[name].dtype).eps
        rounding = min(0.2, 30 * eps**0.5) * scale + (100 * eps) ** 2 * largest
        if not sums.totals[name].abs().max() <= rounding:
            loops.add(name)
    return plan.without(frozenset(loops))
