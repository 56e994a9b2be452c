import gc
import weakref

import pytest
import torch

from spamprune.bayes.curvature.exact import exact
from spamprune.errors import PosteriorError
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


def test_only_the_unusual_goes_through_the_loop():
    slow = {
        name
        for name in CASES
        for model, inputs, targets in [case(name)]
        for how in exact(model, [(inputs, targets)], n_data=6).how.values()
        if "one sample at a time" in how
    }
    assert slow == {"attention with extra keys", "token put in place", "lstm"}


@pytest.mark.parametrize("labels", ["ef", "ggn"])
def test_nothing_of_a_batch_is_kept_alive(labels):
    """Hooks that refer to the graph they hang on would keep all activations for ever."""
    model, inputs, targets = case("inplace activation")
    given = weakref.ref(inputs)
    batches = [(inputs, targets)]
    del inputs
    exact(model, batches, n_data=6, labels=labels)
    batches.clear()
    gc.collect()
    assert given() is None


def test_parameters_and_modes_are_left_as_they_were():
    model, inputs, targets = case("tokens of a batch norm")
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    exact(model, [(inputs, targets)], n_data=6)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_of_one_are_right_where_batch_norm_is_not():
    """At batch size one torch's BatchNorm takes wrong gradients from tokens of its output."""
    model, inputs, targets = case("tokens of a batch norm")
    found = exact(model, list(zip(inputs.split(1), targets.split(1), strict=True)), n_data=6)
    assert_equal(found.diag, reference.one_at_a_time(model, inputs, targets))


def test_drawn_labels_average_to_all_classes():
    model, inputs, targets = case("linear on tokens")
    truth = reference.one_at_a_time(model, inputs, targets, "ggn")["body.weight"]
    found = torch.stack(
        [
            exact(model, [(inputs, targets)], n_data=6, labels="ggn", draws=2, seed=s).diag[
                "body.weight"
            ]
            for s in range(200)
        ]
    )
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - truth).abs() <= 4.5 * error).all()


def test_frozen_parameters_are_skipped():
    model, inputs, targets = case("inplace activation")
    model.body[0].weight.requires_grad_(False)
    found = exact(model, [(inputs, targets)], n_data=6)
    assert "body.0.weight" not in found.diag
    assert_equal(found.diag, reference.one_at_a_time(model, inputs, targets))


def test_half_precision_is_summed_in_float32():
    model, inputs, targets = case("inplace activation")
    truth = reference.one_at_a_time(model, inputs, targets)
    model = model.to(torch.bfloat16)
    found = exact(model, [(inputs.bfloat16(), targets)], n_data=6)
    for name, diag in found.diag.items():
        assert diag.dtype == torch.float32
        assert (diag - truth[name]).abs().max() < 0.1 * truth[name].max()


def test_samples_scale_to_the_data_set():
    model, inputs, targets = case("linear")
    part = exact(model, [(inputs[:4], targets[:4])], n_data=4)
    scaled = exact(model, [(inputs, targets)], n_data=12, samples=4)
    assert scaled.loss == pytest.approx(3 * part.loss)
    torch.testing.assert_close(scaled.diag["body.weight"], 3 * part.diag["body.weight"])


class Moody(torch.nn.Module):
    """Takes another path when its input is large."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.first(x) + self.second(x) if x.abs().max() > 5 else self.first(x)


def test_a_path_that_depends_on_the_data_is_refused():
    torch.manual_seed(0)
    quiet, loud = torch.zeros(6, 4), torch.full((6, 4), 9.0)
    targets = torch.arange(6) % 3
    with pytest.raises(PosteriorError, match="estimator 'sketch'"):
        exact(Moody(), [(loud, targets), (quiet, targets)], n_data=12)
