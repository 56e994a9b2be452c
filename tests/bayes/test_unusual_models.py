"""Models and batches that once broke the curvature engine, or might."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spamprune.bayes.curvature import exact, kron, sketch
from spamprune.errors import PosteriorError
from tests.bayes import reference
from tests.bayes.cases import Function, Headed, randomise
from tests.bayes.test_exact import assert_equal

LOOP = "exact: one sample at a time"


def model_of(function, features, **shapes):
    return randomise(Headed(Function(function, **shapes), features).double()).eval()


def data(n, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def check(model, *batches, estimator=exact):
    """Compare with single samples' gradients; return in words how they were got."""
    found = estimator(model, batches, n_data=sum(len(y) for _, y in batches))
    truths = [reference.one_at_a_time(model, x, y) for x, y in batches]
    assert_equal(found.diag, {name: sum(t[name] for t in truths) for name in truths[0]})
    return found.how


def test_a_use_that_only_some_batches_take_is_not_lost():
    def one_or_both(m, x):
        first, second = torch.tanh(x @ m.w), torch.tanh(2 * x @ m.w)
        return (first if x.shape[1] > 4 else first + second).mean(1)

    batches = data(3, 4, 4), data(3, 5, 4), data(3, 4, 4, seed=2)
    how = check(model_of(one_or_both, 4, w=(4, 4)), *batches)
    assert how["body.w"] == "exact: matmul"


def _missing_values(m, x):
    rows = x @ m.w
    rows[x[:, 0] > 10] = m.missing
    return torch.tanh(rows) * m.u


class _Gated(torch.autograd.Function):
    """Sees none of the samples whose first entry is at most 10."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        return x + weight * (x[:, :1] > 10)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient, (gradient * (x[:, :1] > 10)).sum(0)


def _some_samples_only(m, x):
    return torch.tanh(_Gated.apply(x, m.missing) @ m.w) * m.u


@pytest.mark.parametrize("function", [_missing_values, _some_samples_only])
def test_what_only_later_samples_use_is_not_taken_for_nothing(function):
    inputs, targets = data(12, 4)
    inputs[8:, 0] = 20.0
    model = model_of(function, 4, w=(4, 4), missing=(4,), u=(4,))
    how = check(model, (inputs, targets))
    assert how["body.missing"] == LOOP
    assert exact(model, [(inputs, targets)], n_data=12).diag["body.missing"].any()


def test_a_table_whose_padding_is_counted_from_the_end():
    def looked_up(m, x):
        return torch.tanh(F.embedding(x, m.table, padding_idx=-1)).mean(1)

    inputs = torch.arange(36).view(12, 3) % 5
    inputs[4:, 1:] = 5
    batch = inputs, torch.arange(12) % 3
    model = model_of(looked_up, 4, table=(6, 4))
    check(model, batch)
    assert not exact(model, [batch], n_data=12).diag["body.table"][-1].any()


class _Routed(nn.Module):
    """Sends each sample to one of two heads."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x):
        outputs, first = x.new_zeros(len(x), 3), x[:, 0] > 0
        for head, taken in zip(self.heads, (first, ~first), strict=True):
            outputs[taken] = head(x[taken])
        return outputs


def test_batches_of_which_an_operation_sees_other_samples_each_are_refused():
    inputs, targets = data(20, 4)
    inputs[:8, 0] = inputs[:8, 0].abs()
    with pytest.raises(PosteriorError, match="depends on the data; use estimator 'sketch'"):
        exact(_Routed().double(), [(inputs, targets)], n_data=20)


def test_the_same_operation_on_another_parameter_is_refused():
    model = model_of(lambda m, x: x * (m.a if x.shape[1] > 4 else m.b), 20, a=(4,), b=(4,))
    model.head = model.head[:4]
    model.forward = lambda x: torch.tanh(model.body(x)).mean(1) @ model.head
    with pytest.raises(PosteriorError, match=r"'mul' with body.a as operation 0"):
        exact(model, [data(3, 4, 4), data(3, 5, 4)], n_data=6)


@pytest.mark.parametrize("size", [2, 4, 5, 7])
def test_an_axis_as_long_as_the_batch_is_not_taken_for_it(size):
    """Only a batch as large as the probe's may be mistaken, and then goes through the loop."""

    def repeated(m, x):
        return torch.tanh(m.u.expand(size, 4) * x) @ m.w

    batch = data(size, size, 4)
    how = check(model_of(repeated, 4 * size, u=(1, 4), w=(4, 4)), batch)
    assert how["body.u"] == (LOOP if size == 5 else "exact: mul")


@pytest.mark.parametrize("size", [2, 3, 6])
def test_positions_made_of_constants_alone(size):
    """As XCiT's: a grid is repeated along one axis, projected, then repeated for each sample."""

    def positions(m, x):
        grid = torch.arange(1.0, 4, dtype=x.dtype).view(1, 1, 1, 3).repeat(1, 2, 3, 1)
        return x + F.conv2d(grid, m.w).repeat(len(x), 1, 1, 1)

    how = check(model_of(positions, 36, w=(4, 2, 1, 1)), data(size, 4, 3, 3))
    assert how["body.w"] == "exact: repeat"


def _product_inside(m, x):
    with torch.no_grad():
        gate = torch.tanh(x @ m.w)
    return gate * m.s + x @ m.w


def _query_of_batch_size(m, x):
    query = m.q * torch.ones(len(x), 1, 1, dtype=x.dtype)
    return F.scaled_dot_product_attention(query, x @ m.k, x)


def _samples_as_channels(m, x):
    weight = m.w.repeat(len(x), 1, 1, 1)
    folded = x.reshape(1, -1, *x.shape[2:])
    return F.conv2d(folded, weight, groups=4 * len(x), padding=1).view(x.shape)


def _native_batch_norm(m, x):
    mean, variance = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    return torch.batch_norm(x, m.g, m.b, mean, variance, False, 0.1, 1e-5, False)


def _force(m, x):
    x = x.clone().requires_grad_()
    energy = torch.tanh(x @ m.w).sum()
    return torch.autograd.grad(energy, x, create_graph=True)[0]


class _Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return 3 * w

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


def _custom_function(m, x):
    return x * _Triple.apply(m.w) + m.w


@pytest.mark.parametrize(
    ("function", "shapes", "sample", "features", "slow"),
    [
        (_product_inside, {"w": (4, 4), "s": (4,)}, (4,), 4, set()),
        (_query_of_batch_size, {"q": (3, 4), "k": (4, 4)}, (5, 4), 12, {"q"}),
        (_samples_as_channels, {"w": (4, 1, 3, 3)}, (4, 5, 6), 120, {"w"}),
        (_native_batch_norm, {"g": (4,), "b": (4,)}, (4,), 4, {"g", "b"}),
        (_force, {"w": (4, 4)}, (4,), 4, {"w"}),
        (_custom_function, {"w": (4,)}, (4,), 4, {"w"}),
    ],
)
def test_what_no_rule_fits_is_right_all_the_same(function, shapes, sample, features, slow):
    model = model_of(function, features, **shapes)
    how = check(model, data(4, *sample), data(2, *sample, seed=2))
    assert {name.removeprefix("body.") for name, words in how.items() if words == LOOP} == slow


class Words(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(7, 4, sparse=sparse)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.table(tokens).mean(1))


@pytest.mark.parametrize("estimator", [exact, kron, sketch])
def test_sparse_gradients_are_those_of_a_dense_table(estimator):
    sparse, dense = (randomise(Words(kind).double()) for kind in (True, False))
    batch = torch.arange(30).view(6, 5) % 7, torch.arange(6) % 3
    found, truth = (estimator(model, [batch], n_data=6).diag for model in (sparse, dense))
    for name in truth:
        torch.testing.assert_close(found[name], truth[name])


def test_a_parameter_without_elements():
    model, batch = model_of(lambda m, x: x * m.s + m.none.sum(), 4, s=(4,), none=(4, 0)), data(6, 4)
    found = exact(model, [batch], n_data=6).diag
    assert found.pop("body.none").shape == (4, 0)
    truth = reference.one_at_a_time(model, *batch)
    assert_equal(found, {"body.s": truth["body.s"]})


def test_inputs_that_want_a_gradient_get_none():
    model, (inputs, targets) = model_of(lambda m, x: x @ m.w, 4, w=(4, 4)), data(6, 4)
    inputs.requires_grad_()
    assert check(model, (inputs, targets)) == {"body.w": "exact: matmul"}
    assert inputs.grad is None


@pytest.mark.parametrize("estimator", [exact, kron, sketch])
def test_a_graph_that_waits_for_its_backward_pass_is_not_spoilt(estimator):
    model, (inputs, targets) = (
        model_of(lambda m, x: torch.tanh(x @ m.w) @ m.w, 4, w=(4, 4)),
        data(6, 4),
    )
    (truth,) = torch.autograd.grad(F.cross_entropy(model(inputs), targets), model.body.w)
    loss = F.cross_entropy(model(inputs), targets)
    estimator(model, [(inputs, targets)], n_data=6)
    loss.backward()
    assert torch.equal(model.body.w.grad, truth)


def network(outputs=lambda x: x):
    body = nn.Linear(4, 3).double()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, x):
            return outputs(self.body(x))

    return Network()


@pytest.mark.parametrize("estimator", [exact, kron, sketch])
@pytest.mark.parametrize("outputs", [lambda x: (x, x), lambda x: {"logits": x}, lambda x: [x]])
def test_a_model_that_returns_no_tensor_is_refused(outputs, estimator):
    with pytest.raises(PosteriorError, match="wrap the model"):
        estimator(network(outputs), [data(6, 4)], n_data=6)


@pytest.mark.parametrize("estimator", [exact, kron, sketch])
@pytest.mark.parametrize(
    "batch",
    [
        {"image": torch.zeros(2, 4), "label": torch.zeros(2)},
        (torch.zeros(2, 4), torch.zeros(2), torch.zeros(2)),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), torch.zeros(2)),
        torch.zeros(2, 4),
    ],
)
def test_a_batch_that_is_no_pair_is_refused(batch, estimator):
    with pytest.raises(PosteriorError, match="must be a pair of tensors"):
        estimator(network(), [batch], n_data=2)


@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("estimator", [exact, kron, sketch])
def test_random_numbers_are_refused_at_any_batch_size(estimator, size):
    torch.manual_seed(0)  # four features may by chance be dropped alike
    inputs, targets = data(6, 4)
    batches = list(zip(inputs.split(size), targets.split(size), strict=True))
    with pytest.raises(PosteriorError, match="draws random numbers"):
        estimator(network(lambda x: F.dropout(x, 0.5, True)), batches, n_data=6)


@pytest.mark.parametrize("estimator", [exact, kron, sketch])
def test_complex_parameters_are_refused(estimator):
    model = network()
    model.register_parameter("phase", nn.Parameter(torch.ones(3, dtype=torch.complex128)))
    with pytest.raises(PosteriorError, match="phase is complex"):
        estimator(model, [data(6, 4)], n_data=6)


@pytest.mark.parametrize("estimator", [exact, kron, sketch])
def test_inference_mode_is_refused(estimator):
    with torch.inference_mode(), pytest.raises(PosteriorError, match="outside torch"):
        estimator(network(), [data(6, 4)], n_data=6)


def test_a_last_batch_of_one_weighs_no_more_in_the_factors():
    model, (inputs, targets) = network(), data(6, 4)
    parts = list(zip(inputs.split([5, 1]), targets.split([5, 1]), strict=True))
    found = kron(model, parts, n_data=6).kron["body.weight"]
    truth = kron(model, [(inputs, targets)], n_data=6).kron["body.weight"]
    torch.testing.assert_close(found.inputs, truth.inputs)
    torch.testing.assert_close(found.outputs, truth.outputs)
    torch.testing.assert_close(truth.inputs[0], inputs.mT @ inputs / 6)


def test_factors_of_images_of_several_sizes():
    """On one pixel a kernel's margin meets only padding, and is left out until the end."""
    model = randomise(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    )
    batches = [data(4, 2, 3, 4), data(4, 2, 1, 1, seed=2)]
    found = kron(model, batches, n_data=8).kron["0.weight"].inputs[0]
    columns = torch.cat(
        [F.unfold(x, 3, padding=1).transpose(0, 1).flatten(1) for x, _ in batches], 1
    )
    torch.testing.assert_close(found, columns @ columns.mT / columns.shape[1])


def test_excluded_parameters_may_be_those_that_no_rule_covers():
    def stacked(m, x):
        return F.linear(x, m.w) + torch.stack([m.p] * len(x))

    model = model_of(stacked, 4, w=(4, 4), p=(4,))
    assert set(kron(model, [data(6, 4)], n_data=6, rest="exclude").diag) == {"body.w"}
    assert kron(model, [data(6, 4)], n_data=6).how["body.p"] == LOOP
