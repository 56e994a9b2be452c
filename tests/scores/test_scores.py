import pytest
import torch

from spamprune import scores
from spamprune.bayes.posterior import fit_posterior
from spamprune.errors import PosteriorError, PruningError
from spamprune.models.classic import fc_cancer


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = fc_cancer()
    batches = [(torch.randn(12, 30), torch.randint(0, 2, (12,)))]
    return model, fit_posterior(model, batches, n_data=24, prior=0.5, temperature=2.0)


def test_the_formulas(trained):
    model, posterior = trained
    for name, p in model.named_parameters():
        h, square = posterior.curvature.diag[name], p.detach() ** 2
        torch.testing.assert_close(scores.opd(model, posterior)[name], (h / 2 + 0.5) * square)
        torch.testing.assert_close(scores.obd(model, posterior)[name], 0.5 * h * square)
        torch.testing.assert_close(scores.magnitude(model)[name], p.detach().abs())


def test_random_scores_follow_their_seed(trained):
    model, _ = trained
    first, second = scores.random(model, seed=1), scores.random(model, seed=2)
    assert not torch.equal(first["fc1.weight"], second["fc1.weight"])


@pytest.mark.parametrize("name", ["opd", "obd"])
def test_a_posterior_is_asked_for_by_name(trained, name):
    with pytest.raises(PosteriorError, match=f"'{name}' needs a posterior"):
        scores.CRITERIA[name](trained[0])


def test_unknown_criteria_suggest_known_ones():
    with pytest.raises(PruningError, match=r"unknown criterion 'magnitud'.*'magnitude'"):
        scores.CRITERIA["magnitud"]


def test_no_criterion_is_registered_twice():
    with pytest.raises(ValueError, match="registered twice"):
        scores.criterion("opd")(scores.magnitude)
