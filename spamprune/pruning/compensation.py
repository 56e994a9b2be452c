"""Compensation: the weights that stay take over what those that go did, as the posterior says.

When inputs g of a layer go, the best remaining weights under the Laplace posterior are not the old
ones but ``θ_r + P_rr⁻¹ P_rg θ_g`` (optimal brain surgeon, Hassibi and Stork 1993, for a block).
With ``P = (G ⊗ A)/T + δ`` that is one linear system per layer,
``G X A_rr/T + δ_r ∘ X = G W_g A_gr/T``, solved by conjugate gradients without forming P.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spamprune.bayes.curvature.blocks import Kronecker
from spamprune.bayes.posterior import Posterior
from spamprune.copies import copied
from spamprune.errors import PosteriorError
from spamprune.pruning.compaction import Plan

#: Relative residual at which a system counts as solved, and steps after which it must be.
TOLERANCE = 1e-6
STEPS = 500


@torch.no_grad()
def compensate(model: nn.Module, plan: Plan, posterior: Posterior) -> nn.Module:
    """Return a copy of ``model``, in full shape, whose weights make up for those the plan removes.

    Layers that lose inputs and have Kronecker factors change; ``apply(compensate(...), plan)`` is
    the compensated small network. It knows no masks: where weights were pruned to zero
    beforehand, those that stay in such a layer may become non-zero.

    Args:
        model: The network that was planned for.
        plan: The plan.
        posterior: Fitted on ``model`` with ``CurvatureMethod(structure="kron")``.

    Raises:
        PosteriorError: The posterior belongs to another model, has no Kronecker factors, or a
            system cannot be solved.
    """
    posterior.check_factors(model, "compensation")
    posterior = posterior.on(model)
    result = copied(model)
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
    shape = (len(factors.outputs), factors.outputs.shape[1], factors.inputs.shape[1])
    result = torch.zeros(shape, dtype=torch.float64, device=weight.device)
    matrices, prior = weight.double().reshape(shape), delta.double().reshape(shape)
    removed = gone.reshape(shape)[:, 0]
    # rows that go are read by nobody: they neither need compensation nor give it
    alive = ~rows.reshape(shape[:2])
    for g in range(shape[0]):
        r, lost, kept = alive[g], removed[g], ~removed[g]
        if not (r.any() and lost.any() and kept.any()):
            continue
        outputs = factors.outputs[g].double()[r][:, r] / temperature
        inputs = factors.inputs[g].double()
        right = outputs @ matrices[g][r][:, lost] @ inputs[lost][:, kept]
        change = _solve(outputs, inputs[kept][:, kept], prior[g][r][:, kept], right, name)
        result[g][r.nonzero(), kept.nonzero()[:, 0]] = change
    return result.reshape(weight.shape).to(weight.dtype)


def _solve(outputs: Tensor, inputs: Tensor, prior: Tensor, right: Tensor, name: str) -> Tensor:
    """Solve ``G X A + δ ∘ X = right`` by conjugate gradients.

    They are preconditioned by the same system with δ averaged in the eigenbasis of the factors
    (Proposition 1), which is that system itself where δ is one number.
    """
    values_g, vectors_g = torch.linalg.eigh(outputs)
    values_a, vectors_a = torch.linalg.eigh(inputs)
    spectrum = vectors_g.square().mT @ prior @ vectors_a.square()
    spectrum += values_g.clamp(min=0)[:, None] * values_a.clamp(min=0)

    def precondition(x: Tensor) -> Tensor:
        return vectors_g @ ((vectors_g.mT @ x @ vectors_a) / spectrum) @ vectors_a.mT

    solution = torch.zeros_like(right)
    residual, scale = right.clone(), right.norm()
    direction = preconditioned = precondition(residual)
    energy = (residual * preconditioned).sum()
    for _ in range(STEPS):
        if residual.norm() <= TOLERANCE * scale:
            return solution
        image = outputs @ direction @ inputs + prior * direction
        step = energy / (direction * image).sum()
        solution = solution + step * direction
        residual = residual - step * image
        preconditioned = precondition(residual)
        new = (residual * preconditioned).sum()
        direction = preconditioned + (new / energy) * direction
        energy = new
    raise PosteriorError(
        f"compensation of {name!r} does not converge: its precision is too near to singular, "
        "which a larger prior precision cures"
    )
