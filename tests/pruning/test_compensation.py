import pytest
import torch

import spamprune as sp
from spamprune.errors import PosteriorError
from spamprune.pruning.block import BlockOPD
from spamprune.pruning.compensation import compensate
from tests.pruning.test_block import fitted  # noqa: F401  a fixture


def planned(model, posterior, ratio=0.5):
    example = torch.randn(1, 2, 6, 6).double()
    scores = BlockOPD(model, posterior)
    return sp.plan(
        model, example, scores, sp.Target(ratio=ratio), kinds=["hidden", "groups", "group_dims"]
    )


def test_what_stays_solves_the_posterior_s_linear_system(fitted):  # noqa: F811
    model, posterior = fitted
    plan = planned(model, posterior)
    changed = dict(compensate(model, plan, posterior).named_parameters())
    for name, before in model.named_parameters():
        after = changed[name].detach()
        cuts = [c for c in plan.cuts if c.tensor == name]
        if name not in posterior.curvature.kron or not any(c.dim > 0 for c in cuts):
            assert torch.equal(after, before)
            continue
        factors = posterior.curvature.kron[name]
        h = torch.block_diag(
            *(
                torch.kron(g.contiguous(), a.contiguous())
                for g, a in zip(factors.outputs, factors.inputs, strict=True)
            )
        )
        precision = h / posterior.temperature + posterior.prior_precision[name].flatten().diag()
        lost = torch.zeros_like(before, dtype=torch.bool)
        rows = torch.zeros_like(lost)
        for cut in cuts:
            (rows if cut.dim == 0 else lost).index_fill_(cut.dim, torch.tensor(cut.gone), True)
        g = (lost & ~rows).flatten()
        r = (~lost & ~rows).flatten()
        theta = before.detach().flatten()
        expected = theta.clone()
        expected[r] += torch.linalg.solve(precision[r][:, r], precision[r][:, g] @ theta[g])
        torch.testing.assert_close(after.flatten(), expected, rtol=1e-4, atol=1e-6)


def test_damage_with_compensation_is_never_larger(fitted):  # noqa: F811
    model, posterior = fitted
    plan = planned(model, posterior)
    name = "fc2.weight"
    factors = posterior.curvature.kron[name]
    h = torch.kron(factors.outputs[0].contiguous(), factors.inputs[0].contiguous())
    precision = h / posterior.temperature + posterior.prior_precision[name].flatten().diag()
    (cut,) = [c for c in plan.cuts if c.tensor == name]

    def damage(network):
        moved = dict(network.named_parameters())[name].detach().clone()
        moved[:, list(cut.gone)] = 0
        apart = (moved - model.fc2.weight.detach()).flatten()
        return apart @ precision @ apart

    assert damage(compensate(model, plan, posterior)) < damage(model)


def test_the_compensated_network_is_compacted_and_verified(fitted):  # noqa: F811
    model, posterior = fitted
    plan = planned(model, posterior)
    full = compensate(model, plan, posterior)
    small = sp.apply(full, plan)
    assert sp.verify(full, small, plan, torch.randn(4, 2, 6, 6).double()) < 1e-10


def test_a_diagonal_posterior_is_refused(fitted):  # noqa: F811
    model, posterior = fitted
    plan = planned(model, posterior)
    loader = [(torch.randn(8, 2, 6, 6).double(), torch.randint(0, 3, (8,)))]
    with pytest.raises(PosteriorError, match="needs Kronecker factors"):
        compensate(model, plan, sp.fit_posterior(model, loader, n_data=8))
