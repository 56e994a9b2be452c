"""Compensation: the weights that stay take over what those that go did, as the posterior says.

When inputs g of a layer go, the best remaining weights under the Laplace posterior are not the old
ones but ``θ_r + P_rr⁻¹ P_rg θ_g`` (optimal brain surgeon, Hassibi and Stork 1993, for a block).
With ``P = (G ⊗ A)/T + δ`` that is one linear system per layer,
``G X A_rr/T + δ_r ∘ X = G W_g A_gr/T``, solved by conjugate gradients without forming P.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from spamprune.bayes.curvature.blocks import Kronecker
from spamprune.bayes.posterior import Posterior
from spamprune.errors import PosteriorError
from spamprune.pruning.compaction import Plan

#: Relative residual at which a system counts as solved, and steps after which it must be.
TOLERANCE = 1e-6
STEPS = 500


@torch.no_grad()
def compensate(model: nn.Module, plan: Plan, posterior: Posterior) -> nn.Module:
    """Return a copy of ``model``, in full shape, whose weights make up for those the plan removes.

    Layers that lose inputs and have Kronecker factors change; ``apply(compensate(...), plan)`` is
    the compensated small network.

    Args:
        model: The network that was planned for.
        plan: The plan.
        posterior: Fitted on ``model`` with ``CurvatureMethod(structure="kron")``.

    Raises:
        PosteriorError: The posterior belongs to another model, has no Kronecker factors, or a
            system cannot be solved.
    """
    posterior.check(model)
    if not posterior.curvature.kron:
        raise PosteriorError(
            "compensation needs Kronecker factors: fit the posterior with "
            "CurvatureMethod(structure='kron')"
        )
    result = copy.deepcopy(model)
    weights = dict(result.named_parameters())
    for name, factors in posterior.curvature.kron.items():
        weight = weights[name]
        gone = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        rows = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        for cut in plan.cuts:
            if cut.tensor == name and cut.dim == 0:
                rows[list(cut.gone)] = True
            elif cut.tensor == name:
                gone.index_fill_(cut.dim, torch.tensor(cut.gone, device=weight.device), True)
        if gone.any():
            delta = posterior.prior_precision[name].expand_as(weight)
            change = _change(weight, gone, rows, factors, delta, posterior.temperature, name)
            weight.add_(change)
    return result


def _change(
    weight: Tensor,
    gone: Tensor,
    rows: Tensor,
    factors: Kronecker,
    delta: Tensor,
    temperature: float,
    name: str,
) -> Tensor:
    """Return what is added to a weight: zero for inputs that go and for outputs that go."""
    assert factors.inputs is not None  # only a bias lacks them, and a bias has no inputs
    outputs = factors.outputs.double() / temperature
    inputs = factors.inputs.double()
    shape = (len(outputs), outputs.shape[1], inputs.shape[1])
    removed = gone.reshape(shape)
    # rows that go are read by nobody: they neither need compensation nor give it
    alive = ~rows.reshape(shape[:2])[:, :, None] & ~removed
    lost = weight.double().reshape(shape) * (removed & ~rows.reshape(shape[:2])[:, :, None])
    prior = delta.double().reshape(shape)

    def product(x: Tensor) -> Tensor:
        return (outputs @ x @ inputs + prior * x) * alive

    diagonal = outputs.diagonal(dim1=1, dim2=2)[:, :, None]
    diagonal = diagonal * inputs.diagonal(dim1=1, dim2=2)[:, None, :] + prior
    change = _solve(product, (outputs @ lost @ inputs) * alive, diagonal, name)
    return change.reshape(weight.shape).to(weight.dtype)


def _solve(
    product: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor, name: str
) -> Tensor:
    """Solve a positive definite system by conjugate gradients, preconditioned by its diagonal."""
    solution = torch.zeros_like(right)
    residual = right.clone()
    scale = right.norm()
    if scale == 0:
        return solution
    direction = preconditioned = residual / diagonal
    energy = (residual * preconditioned).sum()
    for _ in range(STEPS):
        image = product(direction)
        step = energy / (direction * image).sum()
        solution = solution + step * direction
        residual = residual - step * image
        if residual.norm() <= TOLERANCE * scale:
            return solution
        preconditioned = residual / diagonal
        new = (residual * preconditioned).sum()
        direction = preconditioned + (new / energy) * direction
        energy = new
    raise PosteriorError(
        f"compensation of {name!r} does not converge: its precision is too near to singular, "
        "which a larger prior precision cures"
    )
