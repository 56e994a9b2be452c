import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn

from spamprune.bayes.posterior import fit_posterior
from spamprune.errors import PosteriorError, PruningError
from spamprune.models.classic import lenet
from spamprune.pruning.importance import OPDImportance, ScoreImportance
from spamprune.scores import opd


class Branches(nn.Module):
    """A residual sum, a concatenation, a depthwise and a grouped convolution, and a norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mix = nn.Conv2d(8, 8, 1)
        self.other = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(12, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        y = self.norm(self.stem(x)).relu()
        y = y + self.mix(self.deep(y))
        y = torch.cat([y, self.other(x)], 1)
        return self.head(self.fc(y.mean((2, 3))).relu())


def random_scores(model):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}


def by_zeroing(model, group_of, scores, unit):
    """Sum the scores of what torch-pruning itself removes with one unit, by watching it do so.

    Scores ride along as the model's parameters; what disappears is the unit's importance.
    """
    carrier = group_of.model_with(scores)
    before = sum(p.double().sum() for p in carrier.parameters())
    group_of(carrier, [unit]).prune()
    return before - sum(p.double().sum() for p in carrier.parameters())


class Root:
    def __init__(self, make, example, layer):
        self.make, self.example, self.layer = make, example, layer

    def model_with(self, scores):
        model = self.make()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(scores[name])
        return model

    def __call__(self, model, units=None):
        graph = tp.DependencyGraph().build_dependency(model.eval(), self.example)
        module = model.get_submodule(self.layer)
        pruner = graph.get_pruner_of_module(module)
        units = list(range(pruner.get_out_channels(module))) if units is None else units
        return graph.get_pruning_group(module, pruner.prune_out_channels, units)


def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3)


CASES = {
    "lenet conv": Root(lenet, torch.randn(1, 1, 28, 28), "conv1"),
    "lenet before flatten": Root(lenet, torch.randn(1, 1, 28, 28), "conv3"),
    "residual and concatenation": Root(Branches, torch.randn(1, 3, 4, 4), "stem"),
    "second part of a concatenation": Root(Branches, torch.randn(1, 3, 4, 4), "other"),
    "linear": Root(Branches, torch.randn(1, 3, 4, 4), "fc"),
    "timm resnet": Root(resnet, torch.randn(1, 3, 64, 64), "layer1.0.conv1"),
    "timm resnet residual": Root(resnet, torch.randn(1, 3, 64, 64), "conv1.0"),
}


@pytest.mark.parametrize("case", CASES)
def test_importance_is_the_sum_of_all_that_goes_with_a_unit(case):
    root = CASES[case]
    model = root.make()
    scores = random_scores(model)
    got = ScoreImportance(scores)(root(model))
    for unit in range(min(4, len(got))):
        expected = by_zeroing(model, root, scores, unit)
        assert got[unit].item() == pytest.approx(expected.item(), rel=1e-4)


class SelfCoupled(nn.Module):
    """Rows and columns of ``inner`` are the same units: ``inner[i, i]`` is reached twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        y = self.first(x)
        return self.head(y + self.inner(y))


def test_an_entry_that_is_reached_twice_counts_once():
    root = Root(SelfCoupled, torch.randn(2, 4), "first")
    model = SelfCoupled()
    s = random_scores(model)
    got = ScoreImportance(s)(root(model))
    inner = s["inner.weight"]
    for u in range(5):
        expected = s["first.weight"][u].sum() + s["first.bias"][u] + s["inner.bias"][u]
        expected += inner[u].sum() + inner[:, u].sum() - inner[u, u] + s["head.weight"][:, u].sum()
        torch.testing.assert_close(got[u], expected)


def loader(n=16):
    torch.manual_seed(0)
    return [(torch.randn(n, 1, 28, 28), torch.randint(0, 10, (n,)))]


def test_opd_importance_is_the_score_importance_of_opd_scores():
    torch.manual_seed(0)
    model = lenet()
    posterior = fit_posterior(model, loader(), n_data=16)
    group = CASES["lenet conv"](model)
    expected = ScoreImportance(opd(model, posterior))(group)
    torch.testing.assert_close(OPDImportance(posterior)(group), expected)


@pytest.mark.parametrize("global_pruning", [False, True])
def test_opd_importance_drives_torch_prunings_own_pruner(global_pruning):
    torch.manual_seed(0)
    model = lenet()
    example = torch.randn(1, 1, 28, 28)
    importance = OPDImportance(fit_posterior(model, loader(), n_data=16))
    expected = importance(CASES["lenet conv"](model)).argsort()[3:].sort().values
    kept = model.conv1.weight.detach()[expected].clone()
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=importance,
        global_pruning=global_pruning,
        pruning_ratio=0.5,
        ignored_layers=[model.head],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    pruner.step()
    assert model(example).shape == (1, 10)
    if not global_pruning:
        assert model.conv1.weight.shape[0] == 3
        torch.testing.assert_close(model.conv1.weight.detach(), kept)
    assert sum(p.numel() for p in model.parameters()) < 60_170


def test_indices_that_torch_pruning_gets_wrong_are_an_error_that_names_the_layer():
    """torch-pruning 1.6.1 loses its offsets where a concatenation is flattened."""

    class Flattened(Branches):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12 * 16, 6)

        def forward(self, x):
            y = self.norm(self.stem(x)).relu()
            y = torch.cat([y + self.mix(self.deep(y)), self.other(x)], 1)
            return self.head(self.fc(y.flatten(1)).relu())

    model = Flattened()
    group = Root(Flattened, torch.randn(1, 3, 4, 4), "stem")(model)
    with pytest.raises(PruningError, match=r"other: torch-pruning.*4"):
        ScoreImportance(random_scores(model))(group)


def test_scores_of_another_model_are_refused_by_name():
    model = lenet()
    group = CASES["lenet conv"](model)
    scores = random_scores(model)
    with pytest.raises(PosteriorError, match=r"lacks parameter 'conv1\.weight'"):
        ScoreImportance({})(group)
    with pytest.raises(PosteriorError, match=r"'conv1\.weight'.*fit it again"):
        ScoreImportance(scores | {"conv1.weight": torch.rand(2, 1, 5, 5)})(group)


def test_layers_that_cannot_be_scored_are_named():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 6)
            self.rnn = nn.LSTM(6, 3)

        def forward(self, x):
            return self.rnn(self.fc(x))[0]

    model = Recurrent()
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(2, 1, 4))
    group = graph.get_pruning_group(model.fc, tp.prune_linear_out_channels, [0, 1])
    with pytest.raises(PruningError, match=r"rnn: cannot score a LSTM"):
        ScoreImportance(random_scores(model))(group)


def test_a_group_without_trainable_parameters_is_left_to_torch_pruning():
    model = lenet()
    group = CASES["lenet conv"](model)
    for p in model.parameters():
        p.requires_grad_(False)
    assert ScoreImportance(random_scores(model))(group) is None
