from importlib import import_module

import pytest
import torch
from torch import nn

import spamprune as sp
from spamprune import scores
from spamprune.bayes.curvature import CurvatureMethod
from spamprune.bayes.posterior import fit_posterior
from spamprune.errors import PosteriorError, PruningError
from spamprune.modules import call_with, differentiable, evaluation_mode, full_precision


class Twice(nn.Module):
    """One layer in two places, with a norm."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.second(self.first(x)))


def test_a_module_in_two_places_gets_its_own_parameters_back():
    model = Twice().eval()
    own = dict(model.named_parameters())
    others = {name: 2 * p.detach() for name, p in own.items()}
    inputs = torch.randn(4, 3)
    got = call_with(model, others, inputs)
    reference = Twice().eval()
    reference.load_state_dict(others, strict=False)
    torch.testing.assert_close(got, reference(inputs))
    assert all(p is own[name] for name, p in model.named_parameters())
    assert model.first.weight is own["first.weight"]


def test_given_buffers_are_used_and_the_model_s_own_stay():
    model = Twice().eval()
    mean = model.norm.running_mean
    given = {"norm.running_mean": torch.full((3,), 5.0)}
    inputs = torch.randn(4, 3)
    plain = model(inputs)
    assert not torch.allclose(call_with(model, given, inputs), plain)
    assert model.norm.running_mean is mean
    torch.testing.assert_close(model(inputs), plain)


class Merging(nn.Linear):
    """Merges an update of its weight in evaluation mode, as layers of adapters do."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_modes_are_restored_by_the_modules_own_method():
    model = nn.Sequential(Merging(3, 3), nn.Sequential(Merging(3, 3)))
    model[1].eval()
    with evaluation_mode(model):
        assert all(layer.merged for layer in (model[0], model[1][0]))
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
    assert [model[0].merged, model[1][0].merged] == [False, True]


class Recurrent(nn.Module):
    """Notes whether it was called with cuDNN allowed."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)
        self.seen = []

    def forward(self, x):
        self.seen.append(torch.backends.cudnn.enabled)
        return self.head(self.rnn(x)[0][:, -1])


def test_recurrent_layers_do_without_cudnn_where_gradients_are_taken():
    """It has no backward pass for them in evaluation mode."""
    model = Recurrent()
    data = [(torch.randn(8, 5, 4), torch.randint(2, (8,)))]
    fit_posterior(model, data, n_data=8)
    scores.snip(model, data)
    scores.synflow(model, data)
    assert model.seen
    assert not any(model.seen)
    assert torch.backends.cudnn.enabled
    with torch.no_grad(), differentiable(nn.Linear(2, 2)):
        assert torch.is_grad_enabled()
        assert torch.backends.cudnn.enabled


@pytest.fixture(params=["scripted", "traced", "a part"])
def script(request):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    if request.param == "traced":
        return torch.jit.trace(model, torch.randn(2, 4))
    if request.param == "scripted":
        return torch.jit.script(model)
    model[0] = torch.jit.script(model[0])
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused_where_code_is_followed(script):
    python = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    data, half = [(torch.randn(8, 4), torch.randint(3, (8,)))], sp.Target(ratio=0.5)
    plan = sp.plan(python, torch.randn(1, 4), scores.magnitude(python), half)
    asdl = sp.CurvatureMethod(estimator="asdl")
    for error, use in (
        (PruningError, lambda: sp.plan(script, torch.randn(1, 4), scores.magnitude(script), half)),
        (PruningError, lambda: sp.apply(script, plan)),
        (PruningError, lambda: scores.synflow(script, data)),
        (PosteriorError, lambda: sp.MeanField(script, n_data=8)),
        (PosteriorError, lambda: fit_posterior(script, data, n_data=8, curvature=asdl)),
    ):
        with pytest.raises(error, match=r"is a torch\.jit\..*: give the Python module"):
            use()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_diagonals_only_need_gradients_and_take_torchscript():
    torch.manual_seed(0)
    python = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    script = torch.jit.script(python)
    data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    for method in (sp.CurvatureMethod(), sp.CurvatureMethod(estimator="exact")):
        expected, found = (
            fit_posterior(model, data, n_data=8, curvature=method).precision()
            for model in (python, script)
        )
        for name, precision in expected.items():
            torch.testing.assert_close(found[name], precision)


def test_full_precision_is_undone():
    def now():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = now()
    with full_precision():
        assert not torch.backends.cuda.matmul.allow_tf32
    assert now() == before


class Counting(nn.Module):
    """Counts its calls, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.b(torch.relu(self.a(x)))


MEASURES = {
    "sketch": lambda model, data: fit_posterior(model, data, n_data=8).curvature.diag,
    "exact": lambda model, data: (
        fit_posterior(
            model, data, n_data=8, curvature=CurvatureMethod(estimator="exact")
        ).curvature.diag
    ),
    "snip": scores.snip,
    "grasp": scores.grasp,
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("small", [10**9, 1], ids=["small", "large"])  # which sketches stream
def test_hooks_on_gradients_change_no_curvature_and_no_score(measure, small, monkeypatch):
    """Clipping in training is no part of the loss."""
    monkeypatch.setattr(import_module("spamprune.bayes.curvature.sketch"), "_SMALL", small)
    torch.manual_seed(0)
    model = Counting()
    data = [(torch.randn(8, 6), torch.randint(3, (8,)))]
    expected = measure(model, data)
    called = []
    for parameter in model.parameters():
        parameter.register_hook(lambda g: g.clamp(-1e-4, 1e-4))
    model.a.register_full_backward_hook(lambda *_: called.append("after"))
    model.b.register_full_backward_pre_hook(lambda _, slopes: (slopes[0] * 0,))
    found = measure(model, data)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert not called
    model(
        data[0][0].requires_grad_()
    ).sum().backward()  # where they are wanted they are there again
    assert called
    assert all(float(p.grad.abs().max()) <= 1e-4 for p in model.parameters())
    assert not model.a.weight.grad.any()


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_buffers_are_left_as_they_were(measure):
    model = Counting()
    measure(model, [(torch.randn(8, 6), torch.randint(3, (8,)))])
    assert model.calls == 0
