import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian

from spamprune import scores
from spamprune.bayes.likelihood import CLASSIFICATION, Classification, Regression
from spamprune.errors import PosteriorError, PruningError
from spamprune.scores.gradients import hessian_product, mean_gradient


class Attention(nn.Module):
    """Fused attention, whose fast kernels have no second derivative."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 4)).permute(2, 0, 3, 1, 4)
        return self.head(F.scaled_dot_product_attention(q, k, v).flatten(1, 2).mean(1))


def _mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _convolutions():
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Dropout(0.5)),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 3)),
    )


CASES = {
    "mlp": (_mlp, (4,)),
    "convolutions": (_convolutions, (1, 4, 4)),
    "attention": (Attention, (5, 4)),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(2)
    make, shape = CASES[request.param]
    model = make().double()
    batches = [(torch.randn(n, *shape).double(), torch.randint(0, 3, (n,))) for n in (5, 1, 3)]
    return model, batches


def _gradients(model, x, y):
    """Return the gradient of the mean loss in evaluation mode, in one plain backward pass."""
    model.eval()
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(parameters.values()))
    model.train()
    return dict(zip(parameters, found, strict=True))


def _all(batches):
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def test_snip_is_weight_times_gradient_of_all_data(case):
    model, batches = case
    reference, found = _gradients(model, *_all(batches)), scores.snip(model, batches)
    for name, p in model.named_parameters():
        expected = (p * reference[name]).abs().detach()
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-14)


def test_snip_of_the_first_batches_is_that_of_less_data(case):
    model, batches = case
    reference, found = _gradients(model, *batches[0]), scores.snip(model, batches[:1])
    for name, p in model.named_parameters():
        expected = (p * reference[name]).abs().detach()
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-14)


def test_taylor_averages_squares_over_batches(case):
    model, batches = case
    per_batch, found = (
        [_gradients(model, *batch) for batch in batches],
        scores.taylor(model, batches),
    )
    for name, p in model.named_parameters():
        expected = torch.stack([(p * g[name]).detach() ** 2 for g in per_batch]).mean(0)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-14)


def test_grasp_is_weight_times_the_change_of_the_gradient_along_itself(case):
    model, batches = case
    data, step = _all(batches), 1e-5
    gradient = _gradients(model, *data)
    found, sides = scores.grasp(model, batches), []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += sign * step * gradient[name]
        sides.append(_gradients(model, *data))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= sign * step * gradient[name]
    for name, p in model.named_parameters():
        product = (sides[0][name] - sides[1][name]) / (2 * step)
        expected = (p * product).abs().detach()
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("frozen", [[], ["0.bias", "2.weight"]])
def test_the_product_is_that_of_the_whole_hessian(frozen):
    torch.manual_seed(3)
    model = _mlp().double()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    x, y = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    likelihood = Classification(label_smoothing=0.1)

    def loss(flat):
        parts = flat.split([p.numel() for p in parameters.values()])
        named = {n: t.view_as(p) for (n, p), t in zip(parameters.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, named, (x,)), y, label_smoothing=0.1)

    at = torch.cat([p.detach().flatten() for p in parameters.values()])
    vector = {n: torch.randn_like(p) for n, p in parameters.items()}
    expected = hessian(loss)(at) @ torch.cat([v.flatten() for v in vector.values()])
    batches = list(zip(x.split(3), y.split(3), strict=True))
    found = hessian_product(model, batches, likelihood, vector)
    assert list(found) == list(parameters)
    flat = torch.cat([t.flatten() for t in found.values()])
    torch.testing.assert_close(flat, expected, rtol=1e-9, atol=1e-12)


def test_linear_regression_is_known_in_closed_form():
    torch.manual_seed(4)
    model = nn.Linear(3, 1, bias=False).double()
    x, y, w = torch.randn(6, 3).double(), torch.randn(6, 1).double(), model.weight.detach()
    g = (x @ w.T - y).T @ x / (6 * 0.5)
    expected = (w * (g @ (x.T @ x) / (6 * 0.5))).abs()
    likelihood = Regression(0.5)
    torch.testing.assert_close(
        scores.snip(model, [(x, y)], likelihood=likelihood)["weight"], (w * g).abs()
    )
    torch.testing.assert_close(
        scores.grasp(model, [(x, y)], likelihood=likelihood)["weight"], expected
    )


def test_a_parameter_that_the_loss_does_not_see_scores_zero():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    model.forward = lambda x: model["used"](x)
    data = [(torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))]
    for name in ("snip", "taylor", "grasp"):
        found = scores.CRITERIA[name](model, data=data)
        assert not found["idle.weight"].any()
        assert found["used.weight"].any()


def test_half_precision_is_summed_in_single():
    model = _mlp().bfloat16()
    data = [(torch.randn(4, 4).bfloat16(), torch.tensor([0, 1, 2, 0]))] * 3
    gradient = mean_gradient(model, data, CLASSIFICATION)
    assert {g.dtype for g in gradient.values()} == {torch.float32}
    assert scores.snip(model, data)["0.weight"].dtype == torch.float32


def test_taylor_of_small_weights_in_half_precision_is_not_zero():
    model = nn.Linear(4, 2, bias=False).half()
    with torch.no_grad():
        model.weight.fill_(1.5e-4)  # its square is 0 in float16
    data = [(torch.randn(8, 4).half(), torch.randint(2, (8,)))]
    gradient = mean_gradient(model, data, CLASSIFICATION)["weight"]
    expected = (model.weight.detach().float() * gradient) ** 2
    torch.testing.assert_close(scores.taylor(model, data)["weight"], expected, atol=0, rtol=1e-5)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


def test_operations_without_second_derivatives_are_refused():
    class Opaque(nn.Sequential):
        def forward(self, x):
            return _Once.apply(super().forward(x))

    model = Opaque(nn.Linear(2, 3))
    data = [(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))]
    scores.snip(model, data)
    with pytest.raises(PruningError, match=r"second derivatives of Opaque .*'snip'"):
        scores.grasp(model, data)


def test_data_that_can_be_read_only_once_are_refused():
    data = iter([(torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))])
    with pytest.raises(PruningError, match="'grasp' goes through the data twice"):
        scores.grasp(_mlp(), data)


def test_losses_that_couple_samples_are_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(PosteriorError, match="track_running_stats"):
        scores.snip(model, [(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))])
