"""Copies of networks that compute through functions."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spamprune as sp
from spamprune.copies import copied
from spamprune.engine.cell import accelerator
from spamprune.errors import PruningError
from spamprune.pruning.masks import iterative_masks
from spamprune.recipe.schema import Arithmetic

INPUTS = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 5)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))

    def doubled(self, x):
        return 2 * Net.forward(self, x)


class Lambda(Net):
    """Computes through a function that captures the network, in one of its attributes."""

    def __init__(self):
        super().__init__()
        self.mlp = lambda x: self.b(F.relu(self.a(x)))

    def forward(self, x):
        return self.mlp(x)


class Layers(Net):
    """Its function captures layers and a weight, in containers and default arguments."""

    def __init__(self):
        super().__init__()
        layers = {"all": [self.a]}

        def forward(x, weights=(self.b.weight,)):
            return F.linear(F.relu(layers["all"][0](x)), *weights)

        self.forward = forward


class Wrapper:
    """Calls a function."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


def compiled(model):
    model.forward = torch.compile(model.forward, backend="eager")


def wrapped(model):
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda x: forward(x))


def twice_wrapped(model):
    wrapper = Wrapper(functools.partial(model.forward))
    model.forward = lambda x: wrapper(x)


def held_by_an_object(model):
    forward = model.forward
    model.forward = Wrapper(lambda x: forward(x))


def by_a_bound_function(model):
    layers = model.a, model.b
    model.forward = (lambda self, x: layers[1](F.relu(layers[0](x)))).__get__(model)


def by_a_hook(model):
    model.a.register_forward_hook(lambda module, args, output: output + model.a.bias)


def by_a_hook_before(model):
    weight = model.a.weight
    model.a.register_forward_pre_hook(lambda module, args: (args[0] + weight[0],))


NETWORK = Net()


def by_a_global_variable(model):
    global NETWORK
    NETWORK = model
    model.forward = lambda x: torch.cat([NETWORK.b(F.relu(NETWORK.a(y))) for y in (x,)])


def made(change):
    torch.manual_seed(0)
    model = Net().eval()
    change(model)
    return model


CAPTURES = {
    compiled: "forward",
    wrapped: "forward",
    twice_wrapped: "forward",
    held_by_an_object: "forward",
    by_a_bound_function: "forward",
    by_a_hook: "a._forward_hooks",
    by_a_hook_before: "a._forward_pre_hooks",
    by_a_global_variable: "forward",
}


@pytest.mark.parametrize("change", CAPTURES)
def test_functions_that_have_captured_the_original_are_refused(change):
    with pytest.raises(PruningError, match=f"a function in '{CAPTURES[change]}' has captured"):
        copied(made(change))


@pytest.mark.parametrize(("kind", "place"), [(Lambda, "mlp"), (Layers, "forward")])
def test_so_are_those_that_a_network_is_made_with(kind, place):
    with pytest.raises(PruningError, match=rf"function in '0\.{place}'.*write .* as methods"):
        copied(nn.Sequential(kind()))


def test_so_are_those_of_a_part_that_capture_the_whole():
    whole = nn.Sequential(Net(), nn.ReLU())
    whole[0].register_forward_hook(lambda module, args, output: output + whole[0].b.bias)
    with pytest.raises(PruningError, match="'_forward_hooks'"):
        copied(whole[0])


def test_no_use_of_a_copy_gives_the_original_s_outputs():
    plain, model = made(lambda _: None), made(compiled)
    scores = sp.scores.magnitude(plain)
    plan = sp.plan(plain, INPUTS[:1], scores, sp.Target(params=0.5))
    small = sp.apply(plain, plan)
    for use in (
        lambda: sp.plan(model, INPUTS[:1], scores, sp.Target(params=0.5)),
        lambda: sp.apply(model, plan),
        lambda: sp.verify(model, small, plan, INPUTS),
        lambda: iterative_masks(model, sp.scores.magnitude, 0.5),
    ):
        # said once, not of each layer that a plan tries
        with pytest.raises(PruningError, match=r"^the Net cannot be copied"):
            use()
    compiled(small)  # afterwards it may be
    sp.verify(plain, small, plan, INPUTS)


def another_method(model):
    model.forward = model.doubled


def partial(model):
    model.forward = functools.partial(Net.forward, model)


def wrapper(model):
    model.forward = Wrapper(model.forward)


def unrelated_hook(model):
    seen, teacher = [], nn.Linear(16, 64)
    model.a.register_forward_hook(lambda module, args, output: seen.append(teacher(args[0])))


def a_method_s_hook(model):
    class Seen:
        def __init__(self):
            self.model = model

        def see(self, module, args, output):
            self.output = output.detach()

    model.a.register_forward_hook(Seen().see)


def prepared(model):
    accelerator(Arithmetic(precision="bf16")).prepare(model)


def compiled_in_place(model):
    model.compile(backend="eager")


REBOUND = [
    another_method,
    partial,
    wrapper,
    unrelated_hook,
    a_method_s_hook,
    prepared,
    compiled_in_place,
]


@torch.no_grad()
def check_copy(model):
    """Check that a copy computes with weights of its own."""
    before = model(INPUTS)
    copy = copied(model)
    torch.testing.assert_close(copy(INPUTS), before)
    for parameter in copy.parameters():
        parameter.add_(1)
    assert not torch.allclose(copy(INPUTS), before)
    torch.testing.assert_close(model(INPUTS), before)


@pytest.mark.parametrize("change", REBOUND)
def test_what_a_copy_gets_its_own_of_is_fine(change):
    check_copy(made(change))


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


class Checkpointed(Net):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Recurrent(16, 5),
        Checkpointed,
        lambda: torch.compile(Net(), backend="eager"),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 5)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 5)),
        lambda: nn.utils.spectral_norm(nn.Linear(16, 5)),
    ],
)
def test_so_are_torch_s_own_wrappers(make):
    torch.manual_seed(0)
    check_copy(make().eval())


def test_replaced_tensors_are_taken_wherever_they_are_used():
    model = made(lambda _: None)
    model.c = model.a
    weight = nn.Parameter(torch.zeros(64, 16))
    copy = copied(model, {id(model.a.weight): weight})
    assert copy.a.weight is copy.c.weight is weight
    pairs = itertools.product(model.parameters(), copy.parameters())
    assert not any(a is b for a, b in pairs)
