import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spamprune.bayes.curvature.batches import accumulate, examine, sum_over_processes
from spamprune.bayes.likelihood import CLASSIFICATION, Classification, Regression
from spamprune.errors import PosteriorError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)).double()


def data(n):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (n,), generator=generator)


def batches(inputs, targets, size):
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def recorded(model, pieces):
    """Return a step that notes the inputs it was given."""

    def step(inputs, targets):
        pieces.append(inputs)
        return CLASSIFICATION.losses(model(inputs), targets).detach().sum()

    return step


@settings(deadline=None)
@given(
    n=st.integers(1, 20),
    size=st.integers(1, 8),
    samples=st.none() | st.integers(1, 25),
    piece=st.none() | st.integers(1, 9),
)
def test_every_sample_is_seen_once_in_order_and_no_more_than_asked(n, size, samples, piece):
    model, (inputs, targets), pieces = network(), data(n), []
    totals = accumulate(
        model,
        batches(inputs, targets, size),
        recorded(model, pieces),
        likelihood=CLASSIFICATION,
        samples=samples,
        piece=piece,
    )
    expected = n if samples is None else min(n, samples)
    assert totals.seen == expected
    torch.testing.assert_close(torch.cat(pieces), inputs[:expected], rtol=0, atol=0)
    assert all(1 <= len(p) <= min(size, piece or size) for p in pieces)
    with torch.no_grad():
        loss = F.cross_entropy(
            model.eval()(inputs[:expected]), targets[:expected], reduction="sum"
        ).item()
    assert totals.loss == pytest.approx(loss)


def test_no_batch_is_fetched_beyond_the_last_sample():
    model, (inputs, targets) = network(), data(8)

    def loader():
        yield inputs, targets
        raise AssertionError("fetched a batch that nobody needs")

    step = recorded(model, [])
    assert accumulate(model, loader(), step, likelihood=CLASSIFICATION, samples=8).seen == 8


def test_bytes_kept_are_those_of_the_activations():
    # ReLU keeps its output (5 doubles), the next Linear the same one; log_softmax its output (3);
    # the loss one scalar; what the first Linear keeps is the batch, a view of much more
    model, (inputs, targets) = network().eval(), data(100)
    found = examine(model, CLASSIFICATION, inputs[10:20], targets[10:20])
    assert 8 * (5 + 3) <= found <= 8 * (5 + 3) + 8


def test_a_budget_splits_batches():
    model, (inputs, targets), pieces = network(), data(20), []
    each = examine(model.eval(), CLASSIFICATION, inputs, targets)
    step = recorded(model, pieces)
    accumulate(model, [(inputs, targets)], step, likelihood=CLASSIFICATION, budget=6 * each)
    assert [len(p) for p in pieces] == [6, 6, 6, 2]
    pieces.clear()
    accumulate(model, [(inputs, targets)], step, likelihood=CLASSIFICATION, budget=1)
    assert [len(p) for p in pieces] == [1] * 20


def test_it_runs_in_evaluation_mode_with_gradients_and_restores_both():
    model, (inputs, targets) = network(), data(4)
    model[0].eval()

    def step(x, y):
        assert torch.is_grad_enabled()
        assert not any(m.training for m in model.modules())
        return CLASSIFICATION.losses(model(x), y).detach().sum()

    with torch.no_grad():
        accumulate(model, [(inputs, targets)], step, likelihood=CLASSIFICATION)
        assert not torch.is_grad_enabled()
    assert [m.training for m in (model, model[0], model[2])] == [True, False, True]


class Centred(nn.Module):
    """Takes the batch mean off, as a careless normalisation would."""

    def forward(self, x):
        return x - x.mean(0)


class Contrastive(Classification):
    """Tells each sample from the others of its batch."""

    def losses(self, outputs, targets):
        scores = outputs @ outputs.mT
        return F.cross_entropy(scores, torch.arange(len(outputs)), reduction="none")


def coupled(layer):
    model = network()
    return nn.Sequential(model[0], layer.double(), model[3])


@pytest.mark.parametrize(
    ("model", "likelihood", "message"),
    [
        (coupled(nn.BatchNorm1d(5, track_running_stats=False)), CLASSIFICATION, "'1'.*BatchNorm1d"),
        (coupled(Centred()), CLASSIFICATION, "depends on the other samples"),
        (network(), Contrastive(), "contrastive"),
    ],
)
@pytest.mark.parametrize("n", [2, 3, 8])
def test_samples_that_depend_on_each_other_are_refused(model, likelihood, message, n):
    step = recorded(model, [])
    with pytest.raises(PosteriorError, match=message):
        accumulate(model, [data(n)], step, likelihood=likelihood)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d(5), nn.LayerNorm(5), nn.GroupNorm(1, 5)])
def test_normalisation_of_each_sample_passes(layer, dtype):
    model = coupled(layer).to(dtype)
    inputs, targets = data(8)
    totals = accumulate(
        model, [(inputs.to(dtype), targets)], recorded(model, []), likelihood=CLASSIFICATION
    )
    assert totals.seen == 8


def test_instance_normalisation_is_not_blamed():
    model = nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2), nn.Flatten(), Centred(), nn.Linear(6, 3)
    ).double()
    with pytest.raises(PosteriorError) as error:
        accumulate(model, [data(4)], recorded(model, []), likelihood=CLASSIFICATION)
    assert "InstanceNorm" not in str(error.value)


def test_a_loss_that_is_not_one_for_each_sample_is_refused():
    class Mean(Classification):
        def losses(self, outputs, targets):
            return super().losses(outputs, targets).mean()

    model = network()
    with pytest.raises(PosteriorError, match="one for each"):
        accumulate(model, [data(4)], recorded(model, []), likelihood=Mean())


def test_regression_targets_pass():
    model, (inputs, _) = network(), data(9)
    targets = torch.ones(9, 3, dtype=torch.float64)
    likelihood = Regression(0.5)

    def step(x, y):
        return likelihood.losses(model(x), y).detach().sum()

    totals = accumulate(model, batches(inputs, targets, 4), step, likelihood=likelihood)
    with torch.no_grad():
        squares = (model.eval()(inputs) - targets).square().sum().item()
    assert totals.loss == pytest.approx(squares + 27 / 2 * math.log(math.pi))


def test_what_cannot_be_done_is_refused():
    model, (inputs, targets) = network(), data(4)
    step = recorded(model, [])
    with pytest.raises(PosteriorError, match="no batches"):
        accumulate(model, [], step, likelihood=CLASSIFICATION)
    with pytest.raises(PosteriorError, match="loss is nan"):
        accumulate(model, [(inputs * math.nan, targets)], step, likelihood=CLASSIFICATION)
    for arguments in ({"samples": 0}, {"piece": 0}):
        with pytest.raises(PosteriorError, match="at least 1, not 0"):
            accumulate(model, [(inputs, targets)], step, likelihood=CLASSIFICATION, **arguments)
    with pytest.raises(PosteriorError, match="no trainable parameters"):
        accumulate(
            model.requires_grad_(False), [(inputs, targets)], step, likelihood=CLASSIFICATION
        )


def test_one_process_alone_sums_nothing():
    tensor = torch.ones(3)
    sum_over_processes([tensor])
    assert tensor.tolist() == [1, 1, 1]
