import pytest
import torch
from torch import nn

import spamprune as sp
from spamprune.bayes.prior import Prior
from spamprune.errors import PosteriorError
from spamprune.pruning.axes.trace import trace
from spamprune.pruning.block import BlockOPD
from spamprune.pruning.units import KINDS, groups, importance


class Small(nn.Module):
    """Convolutions with and without groups, normalisation, a flattened linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, groups=2, stride=2)
        self.fc1 = nn.Linear(8 * 4, 5)
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x)).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    model = Small().double().eval()
    loader = [(torch.randn(8, 2, 6, 6).double(), torch.randint(0, 3, (8,))) for _ in range(2)]
    prior = Prior(model, "parameterwise", 1.0)
    with torch.no_grad():
        for factor in prior.factors():
            factor.normal_()
    method = sp.CurvatureMethod(structure="kron")
    posterior = sp.fit_posterior(
        model, loader, n_data=16, prior=prior, curvature=method, temperature=0.7
    )
    return model, posterior


def brute_force(model, posterior, pieces, unit):
    """θ_gᵀ P_gg θ_g from the whole precision matrix of each tensor."""
    total = 0.0
    parameters = dict(model.named_parameters())
    for piece in pieces:
        if piece.name not in parameters:
            continue
        theta = parameters[piece.name].detach()
        mask = torch.zeros_like(theta)
        mask.index_fill_(piece.dim, piece.index[piece.unit == unit], 1)
        theta = (theta * mask).flatten()
        delta = posterior.prior_precision[piece.name].flatten()
        if piece.name in posterior.curvature.kron:
            factors = posterior.curvature.kron[piece.name]
            inputs = factors.inputs
            if inputs is None:
                inputs = torch.ones(len(factors.outputs), 1, 1).double()
            h = torch.block_diag(
                *(
                    torch.kron(g.contiguous(), a.contiguous())
                    for g, a in zip(factors.outputs, inputs, strict=True)
                )
            )
        else:
            h = posterior.curvature.diag[piece.name].flatten().diag()
        total += theta @ (h / posterior.temperature + delta.diag()) @ theta
    return total


def test_damage_of_a_unit_is_that_of_its_block(fitted):
    model, posterior = fitted
    assert {"conv1.weight", "conv2.weight", "fc1.weight"} <= posterior.curvature.kron.keys()
    scores = BlockOPD(model, posterior)
    found, _ = groups(model, trace(model, torch.randn(1, 2, 6, 6).double()), kinds=KINDS)
    assert {g.layer for g in found} > {"fc1", "conv1:groups", "conv1:group_dims"}
    trainable = dict(model.named_parameters())
    for group in found:
        expected = [
            brute_force(model, posterior, group.pieces, unit) for unit in range(group.units)
        ]
        got = importance(trainable, group, scores)
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_blocks_differ_from_the_sum_of_their_diagonals_and_drive_a_plan(fitted):
    model, posterior = fitted
    example = torch.randn(1, 2, 6, 6).double()
    scores = BlockOPD(model, posterior)
    plan = sp.plan(model, example, scores, sp.Target(ratio=0.5), ranking="global", kinds=["hidden"])
    assert sp.verify(model, sp.apply(model, plan), plan, example) < 1e-10
    (group,) = groups(model, trace(model, example), kinds=["hidden"])[0]
    trainable = dict(model.named_parameters())
    diagonal = importance(trainable, group, sp.scores.opd(model, posterior))
    assert not torch.allclose(importance(trainable, group, scores), diagonal, rtol=0.01)


def test_a_diagonal_posterior_is_refused(fitted):
    model, _ = fitted
    loader = [(torch.randn(8, 2, 6, 6).double(), torch.randint(0, 3, (8,)))]
    posterior = sp.fit_posterior(model, loader, n_data=8)
    with pytest.raises(PosteriorError, match="needs Kronecker factors"):
        BlockOPD(model, posterior)


def test_small_weights_in_half_precision_are_not_lost():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    example = torch.randn(1, 4)
    loader = [(torch.randn(8, 4), torch.randint(2, (8,)))]
    method = sp.CurvatureMethod(structure="kron")
    posterior = sp.fit_posterior(model, loader, n_data=8, prior=1e6, curvature=method)
    for p in model.parameters():
        nn.init.constant_(p, 1.5e-4)  # its square is 0 in float16
    (group,) = groups(model, trace(model, example), kinds=["hidden"])[0]
    trainable = dict(model.named_parameters())
    single = importance(trainable, group, BlockOPD(model, posterior))
    half = importance(trainable, group, BlockOPD(model.half(), posterior))
    torch.testing.assert_close(half, single, rtol=1e-2, atol=0)
