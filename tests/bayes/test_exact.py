import pytest

from spamprune.bayes.curvature.exact import exact
from tests.bayes import reference
from tests.bayes.cases import CASES, case


def assert_equal(found, expected):
    """Every element to 1e-8 of itself; below rounding of a tensor's largest, equal to that."""
    assert set(found) == set(expected)
    for name, truth in expected.items():
        error = (found[name] - truth).abs()
        allowed = 1e-8 * truth + 1e-14 * truth.max() + 1e-26
        assert (error <= allowed).all(), f"{name}: {(error / allowed).max():.3g}"


@pytest.mark.parametrize("labels", ["ef", "ggn"])
@pytest.mark.parametrize("name", CASES)
def test_squares_equal_those_of_single_samples(name, labels):
    model, inputs, targets = case(name)
    batches = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    found = exact(model, batches, n_data=6, labels=labels)
    assert_equal(found.diag, reference.one_at_a_time(model, inputs, targets, labels))
