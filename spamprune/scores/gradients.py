"""Scores from first and second derivatives of the mean loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spamprune.bayes.curvature.batches import (
    DEFAULT_BUDGET,
    accumulate,
    doubled,
    sum_over_processes,
)
from spamprune.bayes.curvature.squares import at_least_single, zero_total
from spamprune.bayes.likelihood import CLASSIFICATION, Likelihood
from spamprune.bayes.parameters import named_parameters
from spamprune.errors import PruningError
from spamprune.scores.registry import Batches, Scores, criterion


@criterion("snip")
def snip(model: nn.Module, data: Batches, *, likelihood: Likelihood = CLASSIFICATION) -> Scores:
    """Connection sensitivity ``|θ_p g_p|``, g the gradient of the mean loss (Lee et al. 2019)."""
    gradient = mean_gradient(model, data, likelihood)
    with torch.no_grad():
        return {n: (p * gradient[n]).abs() for n, p in named_parameters(model).items()}


@criterion("taylor")
def taylor(model: nn.Module, data: Batches, *, likelihood: Likelihood = CLASSIFICATION) -> Scores:
    """Squared first-order change ``(θ_p g_p)²``, averaged over batches (Molchanov et al. 2019).

    g is the gradient of a batch's mean loss, so that the scores depend on the batch size: noise in
    g counts, which is what is left of it at a minimum. Summed over a unit this is the paper's sum
    of individual contributions.
    """
    totals = {n: zero_total(p) for n, p in named_parameters(model).items()}
    batches = 0
    for batch in data:
        for name, gradient in mean_gradient(model, [batch], likelihood).items():
            totals[name] += gradient.square()
        batches += 1
    if not batches:
        raise PruningError("criterion 'taylor' needs data: the loader gave no batches")
    with torch.no_grad():
        return {
            n: at_least_single(p).square() * totals[n] / batches
            for n, p in named_parameters(model).items()
        }


@criterion("grasp")
def grasp(model: nn.Module, data: Batches, *, likelihood: Likelihood = CLASSIFICATION) -> Scores:
    """Effect on the gradient's norm ``|θ_p (H g)_p|``, H and g of the mean loss (Wang et al. 2020).

    That paper keeps the weights whose removal lowers the gradient's norm the most, from fresh
    weights; by magnitude, as here and in the SpaM paper, those without effect go first.
    """
    if iter(data) is data:
        raise PruningError(
            "criterion 'grasp' goes through the data twice: give a loader or a list, no iterator"
        )
    gradient = mean_gradient(model, data, likelihood)
    product = hessian_product(model, data, likelihood, gradient)
    with torch.no_grad():
        return {n: (p * product[n]).abs() for n, p in named_parameters(model).items()}


def mean_gradient(model: nn.Module, data: Batches, likelihood: Likelihood) -> dict[str, Tensor]:
    """Return the gradient of the loss averaged over the samples, by parameter name."""
    return _mean(
        model,
        data,
        likelihood,
        lambda loss, parameters: torch.autograd.grad(loss, parameters, allow_unused=True),
    )


def hessian_product(
    model: nn.Module, data: Batches, likelihood: Likelihood, vector: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the product of the mean loss's Hessian and a vector, by parameter name.

    Args:
        model: The network; it is left as it was.
        data: Pairs of inputs and targets.
        likelihood: Of the targets.
        vector: A tensor for each trainable parameter, shaped like it.

    Raises:
        PruningError: An operation of the model has no second derivative.
    """
    given = [vector[name] for name in named_parameters(model)]

    def product(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        pairs = zip(found, given, strict=True)
        slope = torch.stack([(g * v).sum() for g, v in pairs if g is not None]).sum()
        try:
            _check_followed(slope)
            return torch.autograd.grad(slope, parameters, allow_unused=True)
        except RuntimeError as error:
            raise PruningError(
                f"second derivatives of {type(model).__name__} cannot be taken: {error}; use a "
                "criterion that needs none, such as 'snip'"
            ) from error

    # fused attention has no second derivative, plain attention has;
    # the graph of the gradient keeps about as much as three more of the first
    with sdpa_kernel(SDPBackend.MATH):
        return _mean(model, data, likelihood, product, DEFAULT_BUDGET // 4)


def _check_followed(value: Tensor) -> None:
    """Raise a RuntimeError if an operation marked ``once_differentiable`` cuts the graph.

    torch leaves an error node there, but never runs it when asked for gradients of parameters: they
    lie behind the cut and would be taken for unused.
    """
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("an operation is marked @once_differentiable")
        nodes += [following for following, _ in node.next_functions]


def _mean(
    model: nn.Module,
    data: Batches,
    likelihood: Likelihood,
    derivative: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor | None]],
    budget: int = DEFAULT_BUDGET,
) -> dict[str, Tensor]:
    """Return the mean over the samples of what ``derivative`` makes of their summed loss."""
    parameters = named_parameters(model)
    totals = {name: zero_total(p) for name, p in parameters.items()}

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = model(doubled(inputs))[: len(inputs)]
        loss = likelihood.losses(outputs, targets).sum()
        found = derivative(loss, list(parameters.values()))
        for total, part in zip(totals.values(), found, strict=True):
            if part is not None:
                total += part.detach()
        return loss.detach()

    seen = accumulate(model, data, step, likelihood=likelihood, budget=budget)
    sum_over_processes(list(totals.values()))
    return {name: total / seen.seen for name, total in totals.items()}
