"""What every criterion promises, run over all that are registered."""

import copy

import pytest
import torch

from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.posterior import fit_posterior
from spamprune.models.classic import lenet
from spamprune.pruning.compaction import apply, verify
from spamprune.pruning.masks import global_masks, sparsity_of
from spamprune.pruning.plan import Target, plan
from spamprune.scores import CRITERIA


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = lenet()
    model.conv1.bias.requires_grad_(False)
    batches = [(torch.randn(16, 1, 28, 28), torch.randint(0, 10, (16,)))]
    return model, fit_posterior(model, batches, n_data=16)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_trainable_parameter_gets_a_finite_score_of_its_shape(trained, name):
    model, posterior = trained
    scores = CRITERIA[name](model, posterior, seed=3)
    assert {n: s.shape for n, s in scores.items()} == {
        n: p.shape for n, p in named_parameters(model).items()
    }
    assert all(s.isfinite().all() and not s.requires_grad for s in scores.values())


@pytest.mark.parametrize("name", CRITERIA)
def test_scoring_changes_nothing_and_repeats(trained, name):
    model, posterior = trained
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = CRITERIA[name](model, posterior, seed=3)
    second = CRITERIA[name](model, posterior, seed=3)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_serves_masks_and_structures(trained, name):
    model, posterior = trained
    scores = CRITERIA[name](model, posterior, seed=3)
    assert sparsity_of(global_masks(scores, 0.5)) == pytest.approx(0.5, abs=1e-4)
    example = torch.randn(8, 1, 28, 28)
    found = plan(model, example[:1], scores, Target(ratio=0.5), ranking="global")
    verify(model, apply(model, found, example[:1]), found, example)
