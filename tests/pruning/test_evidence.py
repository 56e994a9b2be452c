"""How far the evidence says to prune, against evidences that are known."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader, TensorDataset

import spamprune as sp
from spamprune.bayes.curvature import Curvature
from spamprune.bayes.likelihood import Regression
from spamprune.bayes.posterior import Posterior
from spamprune.errors import PosteriorError, PruningError
from spamprune.pruning.evidence import Evidence, choose
from spamprune.pruning.masks import apply_masks


class Problem:
    """A linear model whose features are orthogonal, so that a diagonal posterior is exact."""

    def __init__(self, n=12, features=6, delta=0.5):
        torch.manual_seed(0)
        basis, _ = torch.linalg.qr(torch.randn(n, features, dtype=torch.float64))
        scales = torch.linspace(0.3, 4.0, features, dtype=torch.float64)
        self.inputs = basis * scales
        truth = torch.randn(features, 1, dtype=torch.float64)
        truth[::2], truth[1::2] = 0, truth[1::2] + 4 * truth[1::2].sign()
        self.targets = self.inputs @ truth + torch.randn(n, 1, dtype=torch.float64)
        self.delta = torch.full((1, features), delta, dtype=torch.float64)
        self.delta[0, 1] = 3.0
        self.model = nn.Linear(features, 1, bias=False).double()
        gram = self.inputs.square().sum(0)
        with torch.no_grad():
            self.model.weight.copy_(self.targets.mT @ self.inputs / (gram + self.delta))
        loss = Regression().losses(self.model(self.inputs), self.targets).sum().item()
        curvature = Curvature({"weight": gram[None]}, loss, n, "ggn", "exact")
        self.posterior = Posterior(
            curvature, {"weight": self.delta}, 1.0, self.evidence(torch.ones(features).bool())
        )

    def evidence(self, kept):
        """Return the log marginal likelihood with some of the features."""
        inputs, delta = self.inputs[:, kept], self.delta[0, kept]
        covariance = inputs @ (1 / delta).diag() @ inputs.mT
        covariance += torch.eye(len(covariance), dtype=torch.float64)
        normal = MultivariateNormal(torch.zeros(len(covariance)).double(), covariance)
        return normal.log_prob(self.targets[:, 0]).item()

    def of(self, **settings):
        data = [(self.inputs[:5], self.targets[:5]), (self.inputs[5:], self.targets[5:])]
        return Evidence(self.model, self.posterior, data, likelihood=Regression(), **settings)

    def masked(self, kept):
        model = nn.Linear(self.inputs.shape[1], 1, bias=False).double()
        model.load_state_dict(self.model.state_dict())
        masks = {"weight": kept[None]}
        apply_masks(model, masks)
        return model, masks


def test_changes_are_those_of_the_marginal_likelihood():
    problem = Problem()
    evidence = problem.of()
    for number in range(1, 64):
        kept = torch.tensor([bool(number >> i & 1) for i in range(6)])
        change = evidence.change(*problem.masked(kept))
        expected = problem.evidence(kept) - evidence.log_evidence
        assert change == pytest.approx(expected, abs=1e-8)


def test_determined_parameters_are_mackays():
    problem = Problem()
    gram = problem.inputs.square().sum(0)
    expected = gram / (gram + problem.delta)
    torch.testing.assert_close(problem.of().shares["weight"], expected)
    assert problem.of().effective == pytest.approx(expected.sum().item())


def test_a_part_of_the_data_stands_for_all():
    problem = Problem(n=10)
    twice = torch.cat([problem.inputs] * 2), torch.cat([problem.targets] * 2)
    problem.inputs, problem.targets = twice
    problem.posterior = Posterior(
        Curvature(problem.posterior.curvature.diag, 1.0, 20, "ggn", "exact"),
        {"weight": problem.delta},
        1.0,
        0.0,
    )
    kept = torch.tensor([True, False, True, False, True, True])
    halves = [(problem.inputs[:10], problem.targets[:10])] * 2
    some = Evidence(
        problem.model, problem.posterior, halves, likelihood=Regression(), samples=7
    ).change(*problem.masked(kept))
    every = Evidence(
        problem.model, problem.posterior, halves, likelihood=Regression(), samples=20
    ).change(*problem.masked(kept))
    assert some == pytest.approx(every, rel=1e-9)


def test_what_the_curvature_leaves_out_counts_as_determined():
    model = nn.Linear(3, 2)
    curvature = Curvature({"weight": torch.zeros(2, 3)}, 1.0, 8, "ef", "exact")
    posterior = Posterior(curvature, {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, 1.0, -1.0)
    data = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    evidence = Evidence(model, posterior, data)
    assert evidence.effective == pytest.approx(2)
    masks = {"weight": torch.ones(2, 3).bool(), "bias": torch.tensor([False, True])}
    assert evidence.change(model, masks) == 0


def test_the_step_of_most_evidence_is_taken_and_the_bound_is_told():
    problem = Problem()
    evidence = problem.of()
    order = problem.model.weight.detach().abs()[0].argsort()

    def prune(step):
        kept = torch.ones(6, dtype=torch.bool)
        kept[order[:step]] = False
        return problem.masked(kept)

    changes = [0.0, *(evidence.change(*prune(step)) for step in range(1, 6))]
    best = max(range(6), key=changes.__getitem__)
    best = max(step for step in range(6) if changes[step] >= changes[best] - 1)
    assert 0 < best < 5
    choice = choose(evidence, range(6), prune)
    assert (choice.step, choice.change, choice.notes) == (best, changes[best], ())
    bounded = choose(evidence, range(best + 1), prune)
    assert bounded.step == best
    assert "still rising" in bounded.notes[0]
    (none,) = choose(evidence, [0, 5], prune).notes
    assert none == "evidence: it favours removing nothing more"


def trained(epochs=60):
    """A network that needs two of twelve hidden units, under a prior of its own."""
    torch.manual_seed(0)
    inputs = torch.randn(400, 5)
    targets = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 2))
    spam = sp.SpaM(model, 400, every=5, update="exact", damping=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    data = [(inputs, targets)]
    for epoch in range(1, epochs + 1):
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            spam.shrink(optimizer)
        spam.update(epoch, data)
    return model, spam.posterior(data), data


@pytest.fixture(scope="module")
def network():
    return trained()


def test_a_plan_by_evidence_keeps_what_is_needed(network):
    model, posterior, data = network
    inputs, targets = data[0]
    evidence = sp.Evidence(model, posterior, data)
    scores = sp.scores.opd(model, posterior)
    plan = sp.plan(model, inputs[:1], scores, sp.Target(evidence=evidence), ranking="global")
    assert plan.target == {"evidence": 1.0}
    assert plan.achieved["evidence"] > -1
    small = sp.apply(model, plan)
    sp.verify(model, small, plan, inputs)
    assert plan.widths()["0"] < 12
    left = sum(p.numel() for p in small.parameters())
    assert left >= evidence.effective
    kept = {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert kept == set(evidence.shares)
    accuracy = [(m(inputs).argmax(1) == targets).float().mean().item() for m in (model, small)]
    assert accuracy[1] > accuracy[0] - 0.01
    # measured anew on the compacted network
    masks = {n: torch.ones_like(s, dtype=torch.bool) for n, s in evidence.shares.items()}
    for cut in plan.cuts:
        masks[cut.tensor].index_fill_(cut.dim, torch.tensor(cut.gone), False)
    assert plan.achieved["evidence"] == pytest.approx(evidence.change(small, masks), abs=1e-2)
    assert sp.Plan.from_json(plan.to_json()) == plan


def masks_of(plan, evidence):
    masks = {n: torch.ones_like(s, dtype=torch.bool) for n, s in evidence.shares.items()}
    for cut in plan.cuts:
        if cut.tensor in masks:
            masks[cut.tensor].index_fill_(cut.dim, torch.tensor(cut.gone), False)
    return masks


def test_what_ratios_remove_in_any_case_counts(network):
    model, posterior, data = network
    evidence = sp.Evidence(model, posterior, data)
    plan = sp.plan(
        model, data[0][0][:1], sp.scores.opd(model, posterior), sp.Target(evidence=evidence),
        ranking="global", ratios={"0": 0.95},
    )  # fmt: skip
    assert plan.widths()["0"] == 1
    change = evidence.change(sp.apply(model, plan), masks_of(plan, evidence))
    assert change < -10  # so that nothing else could be meant
    assert plan.achieved["evidence"] == pytest.approx(change, rel=1e-3)


def test_where_norms_see_zeros_the_small_network_is_judged():
    torch.manual_seed(0)
    inputs = torch.randn(200, 5)
    data = [(inputs, (inputs[:, 0] > 0).long())]
    model = nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 2))
    posterior = sp.fit_posterior(model, data, n_data=200)
    evidence = sp.Evidence(model, posterior, data)
    scores = sp.scores.magnitude(model)
    plan = sp.plan(model, inputs[:1], scores, sp.Target(evidence=evidence), ranking="global")
    assert not plan.comparable
    change = evidence.change(sp.apply(model, plan), masks_of(plan, evidence))
    assert plan.achieved["evidence"] == pytest.approx(change, abs=1e-3)


def test_frozen_parameters_do_not_count_as_left(network):
    model, _, data = network
    frozen = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 5), *model)
    for module in (frozen[0], frozen[2]):
        module.requires_grad_(False)
    fitted = sp.fit_posterior(frozen, data, n_data=400)
    evidence = sp.Evidence(frozen, fitted, data)
    scores = sp.scores.opd(frozen, fitted)
    plan = sp.plan(frozen, data[0][0][:1], scores, sp.Target(evidence=evidence), ranking="global")
    left = sum(mask.sum().item() for mask in masks_of(plan, evidence).values())
    assert left >= evidence.effective


def test_a_loader_that_shuffles_is_refused(network):
    model, posterior, data = network
    shuffled = DataLoader(TensorDataset(*data[0]), batch_size=50, shuffle=True)
    with pytest.raises(PosteriorError, match="neither shuffles nor augments"):
        sp.Evidence(model, posterior, shuffled)
    with pytest.raises(PosteriorError, match="this iterator ends after once: give a loader"):
        sp.Evidence(model, posterior, iter(data))


def test_the_evidence_of_another_network_is_refused(network):
    model, posterior, data = network
    target = sp.Target(evidence=sp.Evidence(model, posterior, data))
    other = copy.deepcopy(model)
    with pytest.raises(PruningError, match="the target's evidence is of another network"):
        sp.plan(other, data[0][0][:1], sp.scores.magnitude(other), target)


def test_faults_are_named(network):
    model, posterior, data = network
    with pytest.raises(PruningError, match=r"give spamprune\.Evidence\(model, posterior, data\)"):
        sp.Target(evidence=True)
    with pytest.raises(PruningError, match=r"a target is one of ratio, .*evidence"):
        sp.Target(ratio=0.5, evidence=sp.Evidence(model, posterior, data))
    with pytest.raises(PosteriorError, match=r"no batches"):
        sp.Evidence(model, posterior, [])
    with pytest.raises(PosteriorError, match="lacks parameter"):
        sp.Evidence(nn.Linear(3, 2), posterior, data)


def test_nothing_is_removed_where_all_is_determined():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    inputs = torch.randn(50, 4)
    targets = model(inputs).argmax(1)
    posterior = sp.fit_posterior(model, [(inputs, targets)], n_data=50, prior=1e-6)
    evidence = sp.Evidence(model, posterior, [(inputs, targets)])
    assert evidence.effective > 0.99 * 15
    assert math.isfinite(evidence.log_evidence)
