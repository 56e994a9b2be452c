import inspect

import pytest
import torch

from spamprune import scores
from spamprune.bayes.likelihood import Regression
from spamprune.errors import PosteriorError, PruningError
from spamprune.models.classic import fc_cancer


@pytest.mark.parametrize("name", ["opd", "obd"])
def test_a_posterior_is_asked_for_by_name(name):
    with pytest.raises(PosteriorError, match=f"'{name}' needs a posterior"):
        scores.CRITERIA[name](fc_cancer(), data=[])


@pytest.mark.parametrize("name", ["snip", "grasp", "taylor", "fisher", "synflow"])
def test_data_are_asked_for_by_name(name):
    with pytest.raises(PruningError, match=f"'{name}' needs data"):
        scores.CRITERIA[name](fc_cancer())


@pytest.mark.parametrize("name", ["snip", "grasp", "taylor", "fisher", "synflow"])
def test_a_loader_without_batches_is_refused(name):
    with pytest.raises((PruningError, PosteriorError), match="the loader gave no batches"):
        scores.CRITERIA[name](fc_cancer(), data=[])


def test_what_is_given_arrives(monkeypatch):
    monkeypatch.setattr(scores.CRITERIA, "_items", {})
    seen = {}

    @scores.criterion("spy")
    def spy(model, data, *, likelihood, seed=0):
        seen.update(model=model, data=data, likelihood=likelihood, seed=seed)
        return {}

    model, data, likelihood = fc_cancer(), [1], Regression()
    scores.CRITERIA["spy"](model, None, data=data, likelihood=likelihood, seed=4)
    assert seen == {"model": model, "data": data, "likelihood": likelihood, "seed": 4}
    assert list(inspect.signature(spy).parameters) == ["model", "data", "likelihood", "seed"]


def test_unknown_criteria_suggest_known_ones():
    with pytest.raises(PruningError, match=r"unknown criterion 'magnitud'.*'magnitude'"):
        scores.CRITERIA["magnitud"]


def test_no_criterion_is_registered_twice():
    with pytest.raises(ValueError, match="registered twice"):
        scores.criterion("opd")(scores.magnitude)


def test_a_criterion_cannot_ask_for_what_is_not_there():
    with pytest.raises(TypeError, match="'wish'"):

        @scores.criterion("wishful")
        def wishful(model, wish):
            return {}

    assert "wishful" not in scores.CRITERIA


def test_random_scores_follow_their_seed():
    first, second, again = (scores.random(fc_cancer(), seed=s) for s in (1, 2, 1))
    assert not torch.equal(first["fc1.weight"], second["fc1.weight"])
    assert torch.equal(first["fc1.weight"], again["fc1.weight"])


def test_magnitudes():
    model = fc_cancer()
    for name, p in model.named_parameters():
        torch.testing.assert_close(scores.magnitude(model)[name], p.detach().abs())
