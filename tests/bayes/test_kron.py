import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spamprune.bayes.curvature import CurvatureMethod, exact, kron
from spamprune.bayes.posterior import fit_posterior
from spamprune.bayes.prior import Prior
from spamprune.errors import PosteriorError
from tests.bayes import reference
from tests.bayes.cases import case, randomise


def double_network(*layers):
    return randomise(nn.Sequential(*layers).double()).eval()


def data(n, *shape, classes=3):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, classes, (n,), generator=generator)


def patches(layer, images):
    """What a layer multiplies its weight with: (groups, in, samples · positions)."""
    if isinstance(layer, nn.Linear):
        return images.flatten(0, -2).mT[None]
    found = F.unfold(images, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return found.transpose(0, 1).flatten(1).unflatten(0, (layer.groups, -1))


def rows(layer, gradients):
    if isinstance(layer, nn.Linear):
        return gradients.flatten(0, -2).mT[None]
    return gradients.transpose(0, 1).flatten(1).unflatten(0, (layer.groups, -1))


def reference_factors(model, layer, inputs, targets, labels):
    """G and A of one layer from its own inputs and the gradients at its output."""
    calls = []
    hook = layer.register_forward_hook(lambda _, args, out: calls.append((args[0].detach(), out)))
    logits = model(inputs)
    hook.remove()
    columns = torch.cat([patches(layer, given) for given, _ in calls], -1)
    factor = columns @ columns.mT / columns.shape[-1]
    outer = 0
    weights = F.one_hot(targets, logits.shape[1]).double()
    if labels == "ggn":
        weights = logits.detach().softmax(1)
    for label in range(logits.shape[1]):
        losses = -weights[:, label].sqrt() * logits.log_softmax(1)[:, label]
        found = torch.autograd.grad(losses.sum(), [out for _, out in calls], retain_graph=True)
        for gradient in found:
            right = rows(layer, gradient)
            outer = outer + right @ right.mT
    return outer, factor


NETWORKS = {
    "linear": (lambda: double_network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,), "0"),
    "tokens": (
        lambda: double_network(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)),
        (6, 4),
        "0",
    ),
    "convolution": (
        lambda: double_network(
            nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3)
        ),
        (4, 5, 6),
        "0",
    ),
    "grouped": (
        lambda: double_network(
            nn.Conv2d(4, 6, 2, groups=2, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 3)
        ),
        (4, 5, 6),
        "0",
    ),
    "mostly padding": (
        lambda: double_network(
            nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)
        ),
        (4, 1, 1),
        "0",
    ),
    "many channels": (
        lambda: double_network(
            nn.Conv2d(32, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(192, 3)
        ),
        (32, 8, 8),
        "0",
    ),
    "small images": (
        lambda: double_network(
            nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)
        ),
        (4, 2, 2),
        "0",
    ),
    "depthwise": (
        lambda: double_network(
            nn.Conv2d(4, 4, 5, padding=2, stride=2, groups=4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        (4, 5, 6),
        "0",
    ),
    "wide": (
        lambda: double_network(nn.Linear(300, 5), nn.Tanh(), nn.Linear(5, 3)),
        (300,),
        "0",
    ),
    "called twice": (
        lambda: (lambda shared: double_network(shared, nn.Tanh(), shared, nn.Flatten()))(
            nn.Linear(4, 4)
        ),
        (4,),
        "0",
    ),
}


@pytest.mark.parametrize("labels", ["ef", "ggn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_factors_are_those_of_the_definition(name, labels):
    build, shape, layer = NETWORKS[name]
    model = build()
    inputs, targets = data(10, *shape)
    batches = [(inputs[:7], targets[:7]), (inputs[7:], targets[7:])]
    found = kron(model, batches, n_data=20, labels=labels)
    module = model.get_submodule(layer)
    outputs, factor = reference_factors(model, module, inputs, targets, labels)
    block = found.kron[f"{layer}.weight"]
    torch.testing.assert_close(block.outputs, 2 * outputs, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(block.inputs, factor, rtol=1e-9, atol=1e-13)
    bias = found.kron[f"{layer}.bias"]
    assert bias.inputs is None
    expected = 2 * outputs
    assert bias.outputs.diagonal(dim1=-2, dim2=-1).sum() == pytest.approx(
        expected.diagonal(dim1=-2, dim2=-1).sum().item()
    )


@pytest.mark.parametrize("labels", ["ef", "ggn"])
def test_one_sample_of_one_position_is_exact(labels):
    """``G ⊗ A`` then is the very sum of outer products: the diagonal must be the exact one."""
    model = double_network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    inputs, targets = data(1, 4)
    found = kron(model, [(inputs, targets)], n_data=1, labels=labels)
    truth = reference.one_at_a_time(model, inputs, targets, labels)
    for name, expected in truth.items():
        torch.testing.assert_close(found.diag[name], expected, rtol=1e-9, atol=1e-15)


def test_drawn_labels_average_to_all_classes():
    model = double_network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    batch = data(12, 4)
    truth = kron(model, [batch], n_data=12, labels="ggn").kron["0.weight"].outputs
    found = torch.stack(
        [
            kron(model, [batch], n_data=12, labels="ggn", draws=3, seed=s).kron["0.weight"].outputs
            for s in range(150)
        ]
    )
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - truth).abs() <= 4.5 * error).all()


def normed_network():
    return double_network(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )


def test_norms_get_an_exact_diagonal_by_default():
    model, (inputs, targets) = normed_network(), data(8, 2, 5, 5)
    found = kron(model, [(inputs, targets)], n_data=8)
    assert set(found.kron) == {"0.weight", "0.bias", "4.weight", "4.bias"}
    truth = exact(model, [(inputs, targets)], n_data=8)
    for name in ("1.weight", "1.bias"):
        torch.testing.assert_close(found.diag[name], truth.diag[name])
        assert found.how[name] == "exact: batch_norm"
    assert found.how["0.weight"] == "kron: conv2d"


class Aside(nn.Module):
    """A head whose output is kept for later and returned by nobody."""

    def __init__(self):
        super().__init__()
        self.body, self.aside, self.head = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, x):
        hidden = self.body(x).tanh()
        self.kept = self.aside(hidden)
        return self.head(hidden)


def test_a_layer_without_a_way_to_the_loss_has_no_curvature():
    model = Aside().double()
    found = kron(model, [data(8, 4)], n_data=8)
    assert list(found.diag) == [name for name, _ in model.named_parameters()]
    assert not found.diag["aside.weight"].any()


def test_excluded_norms_keep_their_prior_and_are_listed():
    model, batch = normed_network(), data(8, 2, 5, 5)
    method = CurvatureMethod(structure="kron", rest="exclude")
    posterior = fit_posterior(model, [batch], n_data=8, prior=3.0, curvature=method)
    precision = posterior.precision()
    assert (precision["1.weight"] == 3).all()
    coverage = posterior.coverage()
    assert set(coverage) == {n for n, _ in model.named_parameters()}
    assert coverage["1.bias"].startswith("excluded")
    assert coverage["4.weight"] == "kron: linear"


@pytest.mark.parametrize("structure", ["scalar", "layerwise", "unitwise", "parameterwise"])
def test_every_prior_goes_with_factors(structure):
    model, batch = normed_network(), data(8, 2, 5, 5)
    posterior = fit_posterior(
        model,
        [batch],
        n_data=8,
        prior=Prior(model, structure, 0.5),
        curvature=CurvatureMethod(structure="kron"),
        temperature=2.0,
    )
    block = posterior.curvature.kron["0.weight"]
    delta = torch.full(block.shape, 0.5, dtype=torch.float64)
    dense = reference.kronecker(block, delta, 2.0)
    torch.testing.assert_close(
        posterior.precision()["0.weight"].flatten(), dense.diagonal(), rtol=1e-6, atol=1e-9
    )


def test_a_derived_weight_and_attention_fall_to_the_policy():
    model, inputs, targets = case("timm ScaledStdConv2d")
    found = kron(model, [(inputs, targets)], n_data=6)
    assert "body.weight" not in found.kron
    truth = reference.one_at_a_time(model, inputs, targets)
    torch.testing.assert_close(found.diag["body.weight"], truth["body.weight"])
    model, inputs, targets = case("attention")
    assert "body.attention.in_proj_weight" in kron(model, [(inputs, targets)], n_data=6).kron


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"structure": "kron", "estimator": "sketch"}, "come from estimator 'exact'"),
        ({"estimator": "exact", "group": 4}, "has no groups"),
        ({"rest": "exclude"}, "is for structure 'kron'"),
        ({"estimator": "exact", "draws": 2}, "nothing to draw"),
        ({"estimator": "asdl", "draws": 2}, "has no draws"),
        ({"labels": "GGN"}, "unknown labels 'GGN': valid: ef, ggn"),
        ({"labels": None}, "unknown labels None"),
        ({"structure": "kron_"}, "unknown structure 'kron_': did you mean 'kron'"),
        ({"structure": "kfac"}, "unknown structure 'kfac': valid: diag, kron"),
        ({"estimator": "excat"}, "unknown estimator 'excat': did you mean 'exact'"),
        ({"structure": "kron", "rest": "excluded"}, "unknown rest 'excluded': did you mean"),
    ],
)
def test_choices_that_do_not_go_together(arguments, message):
    with pytest.raises(PosteriorError, match=message):
        CurvatureMethod(**arguments)
