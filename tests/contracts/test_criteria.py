"""What every criterion promises, run over all that are registered."""

import copy

import pytest
import torch
from torch import nn

from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.posterior import fit_posterior
from spamprune.models.classic import lenet
from spamprune.pruning.compaction import apply, verify
from spamprune.pruning.masks import apply_masks, global_masks, sparsity_of
from spamprune.pruning.plan import Target, plan
from spamprune.pruning.semi_structured import is_semi_structured, semi_structured_masks
from spamprune.scores import CRITERIA


class Case:
    """A network with all that a criterion may ask for."""

    def __init__(self, model, shape, classes):
        self.model, self.batches = model, []
        for n in (9, 7):
            targets = torch.randint(0, classes, (n,))
            self.batches.append((torch.randn(n, *shape), targets))
        self.posterior = fit_posterior(model, self.batches, n_data=16)

    def score(self, name):
        return CRITERIA[name](self.model, self.posterior, data=self.batches, seed=3)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = lenet()
    model.conv1.bias.requires_grad_(False)
    return Case(model, (1, 28, 28), 10)


@pytest.fixture
def delicate():
    """A network with modes, buffers and gradients that a careless criterion would change."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    model(torch.randn(4, 2, 3, 3)).sum().backward()
    model[1].eval()
    model[0].weight.grad = None
    return Case(model, (2, 3, 3), 3)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_trainable_parameter_gets_a_finite_score_of_its_shape(trained, name):
    scores, parameters = trained.score(name), named_parameters(trained.model)
    assert list(scores) == list(parameters)  # ties go in this order
    assert [s.shape for s in scores.values()] == [p.shape for p in parameters.values()]
    for n, s in scores.items():
        assert s.isfinite().all()
        assert s.is_floating_point()
        assert not s.requires_grad
        assert s.device == parameters[n].device


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", CRITERIA)
def test_scoring_changes_nothing_and_repeats(delicate, name, grad):
    model = delicate.model
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    with torch.set_grad_enabled(grad):
        first, second = delicate.score(name), delicate.score(name)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is None if gradient is None else torch.equal(p.grad, gradient)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_serves_masks_and_structures(trained, name):
    model, scores = trained.model, trained.score(name)
    assert sparsity_of(global_masks(scores, 0.5)) == pytest.approx(0.5, abs=1e-4)
    fours = copy.deepcopy(model)
    apply_masks(fours, semi_structured_masks(model, scores)[0])
    assert is_semi_structured(fours.conv3.weight)
    assert is_semi_structured(fours.head.weight)
    example = torch.randn(8, 1, 28, 28)
    found = plan(model, example[:1], scores, Target(ratio=0.5), ranking="global")
    verify(model, apply(model, found), found, example)
