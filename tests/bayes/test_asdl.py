import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from spamprune.bayes.curvature.asdl import asdl_curvature
from spamprune.errors import PosteriorError
from spamprune.models.classic import MLP, LeNet
from tests.bayes import reference

asdl = pytest.importorskip("asdl")


class Pool(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(-1)


class Fixup(nn.Module):
    """A residual block with the papers' scalar biases and scales."""

    def __init__(self):
        super().__init__()
        self.before, self.scale, self.after = asdl.Bias(), asdl.Scale(), asdl.Bias()
        self.conv = nn.Conv2d(2, 2, 3, stride=1, padding=1, bias=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return x + self.after(self.scale(self.act(self.conv(self.before(x)))))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.fc(x).relu())


class Aside(nn.Module):
    """Calls a layer whose output nobody uses."""

    def __init__(self):
        super().__init__()
        self.fc, self.aside = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        self.aside(x)
        return self.fc(x)


class BehindItsBack(nn.Module):
    """Calls its layer once as a module and once through its weight."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.fc(x).relu(), self.fc.weight)


def frozen():
    model = MLP((4, 5), 3)
    model.fc1.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    return model


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def convolutions(*layers):
    return nn.Sequential(*layers, nn.ReLU(), Pool(), nn.Linear(4, 3))


def few_pixels():
    return nn.Sequential(nn.Conv2d(6, 30, 3), nn.ReLU(), Pool(), nn.Linear(30, 3))


def data(shape, classes=3, n=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randint(0, classes, (n,), generator=generator)


def batches(inputs, targets, size=3):
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def randomised(model, seed=0):
    """Give every parameter a random value, as zeros would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / max(1, p[0].numel()) ** 0.5)
    return model


RIGHT = {
    "mlp": (lambda: MLP((4, 6, 5), 3), (4,)),
    "frozen": (frozen, (4,)),
    "lenet": (lambda: LeNet(num_classes=3), (1, 28, 28)),
    "stride and padding": (
        lambda: convolutions(
            nn.Conv2d(2, 3, 3, stride=2, padding=(1, 2)), nn.Conv2d(3, 4, 2, padding="valid")
        ),
        (2, 9, 9),
    ),
    "one pixel": (lambda: convolutions(nn.Conv2d(6, 4, 3)), (6, 3, 3)),
    "fixup": (
        lambda: nn.Sequential(asdl.Bias(), Fixup(), Fixup(), asdl.Scale(), Pool(), nn.Linear(2, 3)),
        (2, 5, 5),
    ),
}


@pytest.mark.parametrize("labels", ["ef", "ggn"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", RIGHT)
def test_it_equals_squared_per_sample_gradients(name, dtype, labels):
    build, shape = RIGHT[name]
    model = randomised(build()).to(dtype)
    inputs, targets = data(shape, dtype=dtype)
    got = asdl_curvature(model, batches(inputs, targets), n_data=7, labels=labels)
    model.double()
    exact = (
        reference.squared(model, inputs.double(), targets)
        if labels == "ef"
        else reference.gauss_newton(model, inputs.double())
    )
    assert set(got.diag) == set(exact) == set(got.how)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}[dtype]
    for key, diag in exact.items():
        assert diag.max() > 0
        assert got.diag[key].dtype == dtype
        torch.testing.assert_close(
            got.diag[key].double(), diag, rtol=tolerance, atol=tolerance * diag.max().item()
        )
    loss = F.cross_entropy(model(inputs.double()), targets, reduction="sum").item()
    assert got.loss == pytest.approx(loss, rel=1e-5)


def test_a_fraction_of_the_data_is_scaled_to_all_of_it():
    model, (inputs, targets) = randomised(MLP((4, 6), 3)).double(), data((4,))
    scaled = asdl_curvature(model, batches(inputs, targets), n_data=70, samples=5)
    for name, diag in reference.squared(model, inputs[:5], targets[:5]).items():
        torch.testing.assert_close(scaled.diag[name], 14 * diag)


def test_images_of_several_sizes():
    model = randomised(few_pixels()).double()
    parts = [data((6, size, size)) for size in (9, 8)]
    got = asdl_curvature(model, parts, n_data=14)
    exact = [reference.squared(model, *part) for part in parts]
    for name in got.diag:
        torch.testing.assert_close(got.diag[name], exact[0][name] + exact[1][name])
    with pytest.raises(PosteriorError, match="only 4 output pixels"):
        asdl_curvature(model, [*parts, data((6, 4, 4))], n_data=21)


def test_a_layer_without_influence_has_no_curvature():
    model, (inputs, targets) = randomised(Aside()).double(), data((4,))
    got = asdl_curvature(model, batches(inputs, targets), n_data=7)
    assert (got.diag["aside.weight"] == 0).all()
    torch.testing.assert_close(got.diag, reference.squared(model, inputs, targets))


WRONG = {
    "vision transformer": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=8, patch_size=4, depth=1, num_classes=3
        ),
        (3, 8, 8),
        "'cls_token'.*neither the weight nor the bias",
    ),
    "batch normalisation": (
        lambda: convolutions(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)),
        (2, 6, 6),
        r"'1\.weight'.*BatchNorm2d",
    ),
    "depthwise": (
        lambda: convolutions(nn.Conv2d(4, 4, 3, groups=4)),
        (4, 6, 6),
        r"'0\.weight'.*groups=4",
    ),
    "ConvNeXt": (
        lambda: timm.create_model("convnext_atto", num_classes=3),
        (3, 32, 32),
        r"'stem\.1\.weight'.*LayerNorm2d",
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)),
        (5, 4),
        r"'0\.weight'.*inputs \(\d, 5, 4\).*per row",
    ),
    "folded tokens": (
        lambda: nn.Sequential(
            nn.Flatten(0, 1), nn.Linear(4, 4), nn.Unflatten(0, (-1, 5)), nn.Flatten(), nn.ReLU()
        ),
        (5, 4),
        r"'1\.weight'.*meets 15 rows where there are 3 samples",
    ),
    "few pixels": (
        few_pixels,
        (6, 4, 4),
        r"'0\.weight'.*only 4 output pixels",
    ),
    "dilation": (lambda: convolutions(nn.Conv2d(2, 4, 3, dilation=2)), (2, 6, 6), "dilation"),
    "same": (lambda: convolutions(nn.Conv2d(2, 4, 3, padding="same")), (2, 6, 6), "padding=same"),
    "reflection": (
        lambda: convolutions(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")),
        (2, 6, 6),
        "reflect padding",
    ),
    "one dimension": (lambda: convolutions(nn.Conv1d(2, 4, 3)), (2, 6), "Conv1d"),
    "tied": (tied, (4,), r"'0\.weight'.*tied to '2\.weight'"),
    "twice": (Twice, (4,), r"'fc\.weight'.*called 2 times"),
    "never": (
        lambda: nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}),
        (4,),
        r"'b\.weight'.*called 0 times",
    ),
    "behind its back": (BehindItsBack, (4,), r"'fc\.weight'.*not its squared gradient"),
    "half": (
        lambda: MLP((4, 5), 3).to(torch.bfloat16),
        (4,),
        r"'fc1\.weight'.*bfloat16",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_known_to_be_wrong_is_refused_by_name(name):
    build, shape, message = WRONG[name]
    model = randomised(build())
    if name == "never":
        model.forward = lambda x: model["a"](x)
    inputs, targets = data(shape, dtype=next(model.parameters()).dtype)
    with pytest.raises(PosteriorError, match=message) as caught:
        asdl_curvature(model, batches(inputs, targets), n_data=7)
    assert "'exact' or 'sketch'" in str(caught.value)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model, (inputs, targets) = randomised(MLP((4, 6, 5), 3)).double(), data((4,))
    model.train()
    model.fc2.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = [set(vars(x)) for x in (*model.modules(), *model.parameters())]
    values = [p.clone() for p in model.parameters()]
    if fails:  # half-way through a backward pass, where asdl has switched gradients off
        calls = iter(range(100))

        def interrupt(gradient):
            if next(calls) == 3:  # after the proof's two and one batch
                raise KeyboardInterrupt

        def hook(module, inputs, output):
            if output.requires_grad:
                output.register_hook(interrupt)

        handle = model.fc1.register_forward_hook(hook)
        with pytest.raises(KeyboardInterrupt):
            asdl_curvature(model, batches(inputs, targets), n_data=7)
        handle.remove()
    else:
        asdl_curvature(model, batches(inputs, targets), n_data=7)
    assert [set(vars(x)) for x in (*model.modules(), *model.parameters())] == before
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True, True, True]
    assert (model.head.weight.grad == 1).all()
    assert model.fc1.weight.grad is None
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    for p, value in zip(model.parameters(), values, strict=True):
        torch.testing.assert_close(p, value, rtol=0, atol=0)


def test_ignored_targets_are_refused_where_asdl_would_count_them():
    model, (inputs, targets) = randomised(MLP((4, 6), 3)).double(), data((4,))
    targets[4] = -100
    with pytest.raises(PosteriorError, match="cannot ignore targets"):
        asdl_curvature(model, batches(inputs, targets), n_data=7, labels="ggn")
    got = asdl_curvature(model, batches(inputs, targets), n_data=7)
    kept = targets != -100
    for name, diag in reference.squared(model, inputs[kept], targets[kept]).items():
        torch.testing.assert_close(got.diag[name], diag)


def test_dense_outputs_are_refused():
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    inputs, targets = torch.randn(2, 2, 5, 5), torch.zeros(2, 3, 3, dtype=torch.long)
    with pytest.raises(PosteriorError, match=r"logits \(B, classes\)"):
        asdl_curvature(model, [(inputs, targets)], n_data=2)


def test_a_missing_library_is_an_error_with_the_way_out(monkeypatch):
    model, (inputs, targets) = MLP((4, 5), 3).double(), data((4,))
    monkeypatch.setitem(sys.modules, "asdl", None)
    with pytest.raises(PosteriorError, match=r'pip install "spamprune\[asdl\]"'):
        asdl_curvature(model, batches(inputs, targets), n_data=7)
    monkeypatch.setitem(sys.modules, "asdl", sys)  # any other module
    with pytest.raises(PosteriorError, match="not the one"):
        asdl_curvature(model, batches(inputs, targets), n_data=7)
