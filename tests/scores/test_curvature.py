import pytest
import torch

from spamprune import scores
from spamprune.bayes.likelihood import Regression
from spamprune.bayes.posterior import fit_posterior
from spamprune.bayes.reduction import Reduction
from spamprune.errors import PosteriorError
from spamprune.models.classic import fc_cancer
from tests.bayes.reference import squared


@pytest.fixture
def model():
    torch.manual_seed(0)
    return fc_cancer().double()


@pytest.fixture
def batches():
    sizes = (7, 5)
    return [(torch.randn(n, 30).double(), torch.randint(0, 2, (n,))) for n in sizes]


def test_opd_and_obd_are_their_formulas(model, batches):
    posterior = fit_posterior(model, batches, n_data=24, prior=0.5, temperature=2.0)
    for name, p in model.named_parameters():
        h, square = posterior.curvature.diag[name], p.detach() ** 2
        torch.testing.assert_close(scores.opd(model, posterior)[name], (h / 2 + 0.5) * square)
        torch.testing.assert_close(scores.obd(model, posterior)[name], 0.5 * h * square)


@pytest.mark.parametrize("name", ["opd", "obd"])
def test_a_posterior_of_another_model_is_refused(model, batches, name):
    posterior = fit_posterior(model, batches, n_data=12)
    with pytest.raises(PosteriorError, match=r"'fc1\.weight'"):
        getattr(scores, name)(fc_cancer(widths=(30, 20)), posterior)


def test_fisher_is_half_the_mean_square_of_what_each_sample_would_lose(model, batches):
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    reference = squared(model, inputs, targets)
    found = scores.fisher(model, batches)
    for name, p in model.named_parameters():
        expected = 0.5 * p.detach() ** 2 * reference[name] / 12
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=0)


def test_fisher_knows_other_likelihoods():
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 1, bias=False).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    residual = (model(x) - y).detach() / 0.5
    expected = 0.5 * model.weight.detach() ** 2 * (residual * x).square().mean(0)
    found = scores.fisher(model, [(x, y)], likelihood=Regression(0.5))
    torch.testing.assert_close(found["weight"], expected)


def test_small_weights_of_a_half_precision_model_keep_their_scores():
    model = torch.nn.Linear(8, 2, bias=False).half()
    with torch.no_grad():
        model.weight.fill_(1.5e-4)  # its square is 0 in float16
    data = [(torch.randn(16, 8).half(), torch.randint(2, (16,)))]
    posterior = fit_posterior(model, data, n_data=10**6, prior=1e6)
    weight = model.weight.detach().float()
    h = posterior.curvature.diag["weight"]
    for name, given, expected in [
        ("opd", posterior, (h + 1e6) * weight**2),
        ("obd", posterior, 0.5 * h * weight**2),
        ("fisher", data, 0.5 * h / 10**6 * weight**2),
    ]:
        found = getattr(scores, name)(model, given)["weight"]
        assert found.all()
        torch.testing.assert_close(found, expected)


def test_bmr_of_a_half_precision_model_is_not_rounded_to_its_range():
    model = torch.nn.Linear(8, 2, bias=False).half()
    data = [(torch.randn(16, 8).half(), torch.randint(2, (16,)))]
    posterior = fit_posterior(model, data, n_data=10**9)
    found = scores.bmr(model, posterior)["weight"]
    expected = -Reduction(model, posterior).evidence()["weight"]
    torch.testing.assert_close(found, expected.float())
