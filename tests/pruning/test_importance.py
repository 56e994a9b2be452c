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


class Attention(nn.Module):
    """Embedding, free parameters, fused attention, norms, and a gated linear unit."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
        self.gated = nn.Linear(8, 12)
        self.out = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        y = self.embed(tokens) * self.scale
        z = self.norm(y)
        y = y + self.attention(z, z, z)[0]
        value, gate = self.gated(y).chunk(2, -1)
        return self.head((y + self.out(value * gate.sigmoid())).mean(1))


class Exotic(nn.Module):
    """Grouped and transposed convolutions, other norms, PReLU, and a recurrent reader."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 8, 2, stride=2)
        self.group_norm = nn.GroupNorm(2, 8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.instance_norm = nn.InstanceNorm2d(12, affine=True)
        self.prelu = nn.PReLU(12)
        self.shared_slope = nn.PReLU()
        self.down = nn.Conv2d(12, 6, 1)
        self.rnn = nn.LSTM(6, 5, bidirectional=True, batch_first=True)

    def forward(self, x):
        y = self.grouped(self.group_norm(self.up(x)))
        y = self.down(self.shared_slope(self.prelu(self.instance_norm(y))))
        return self.rnn(y.mean(2).transpose(1, 2))[0]


class Reused(nn.Module):
    """One module called twice, and one activation concatenated with itself."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.shared = nn.Linear(5, 5)
        self.wide = nn.Linear(10, 3)

    def forward(self, x):
        y = self.shared(self.shared(self.first(x)).relu())
        return self.wide(torch.cat([y, y], 1))


def random_scores(model):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}


def by_pruning(model, group_of, scores, units):
    """Sum the scores of what torch-pruning itself removes with some units, by watching it do so.

    Scores ride along as the model's parameters; what disappears is the units' importance.
    """
    carrier = group_of.model_with(scores)
    before = sum(p.double().sum() for p in carrier.parameters())
    group_of(carrier, units).prune()
    return before - sum(p.double().sum() for p in carrier.parameters())


class Root:
    """A layer of a network; ``together`` are units that can only be pruned together."""

    def __init__(self, make, example, layer, together=((0,), (1,), (2,), (3,))):
        self.make, self.example, self.layer, self.together = make, example, layer, together

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


TOKENS = torch.arange(6).reshape(2, 3)
IMAGE = torch.randn(1, 3, 4, 4)


def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3)


CASES = {
    "lenet conv": Root(lenet, torch.randn(1, 1, 28, 28), "conv1"),
    "lenet before flatten": Root(lenet, torch.randn(1, 1, 28, 28), "conv3"),
    "residual and concatenation": Root(Branches, torch.randn(1, 3, 4, 4), "stem"),
    "second part of a concatenation": Root(Branches, torch.randn(1, 3, 4, 4), "other"),
    "linear": Root(Branches, torch.randn(1, 3, 4, 4), "fc"),
    "attention width": Root(Attention, TOKENS, "out"),
    "embedding": Root(Attention, TOKENS, "embed"),
    "gated linear unit": Root(Attention, TOKENS, "gated"),
    "read by a grouped convolution": Root(Exotic, IMAGE, "up", [(0, 2, 4, 6), (1, 3, 5, 7)]),
    "grouped, normalised": Root(Exotic, IMAGE, "grouped"),
    "read by an LSTM": Root(Exotic, IMAGE, "down"),
    "module called twice": Root(Reused, torch.randn(2, 4), "first"),
    "timm resnet": Root(resnet, torch.randn(1, 3, 64, 64), "layer1.0.conv1"),
    "timm resnet residual": Root(resnet, torch.randn(1, 3, 64, 64), "conv1.0"),
}


@pytest.mark.parametrize("case", CASES)
def test_importance_is_the_sum_of_all_that_goes_with_a_unit(case):
    root = CASES[case]
    model = root.make()
    scores = random_scores(model)
    got = ScoreImportance(scores)(root(model))
    for units in root.together:
        expected = by_pruning(model, root, scores, list(units)).item()
        assert got[list(units)].sum().item() == pytest.approx(expected, rel=1e-4)


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


def test_opd_importance_of_small_weights_in_half_precision_is_not_zero():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    data = [(torch.randn(8, 4), torch.randint(2, (8,)))]
    posterior = fit_posterior(model, data, n_data=8, prior=1e6)
    for p in model.parameters():
        nn.init.constant_(p, 1.5e-4)  # its square is 0 in float16
    group = tp.DependencyGraph().build_dependency(model, torch.randn(1, 4))
    group = group.get_pruning_group(model[0], tp.prune_linear_out_channels, [0, 1, 2])
    single = OPDImportance(posterior)(group)
    model.half()
    torch.testing.assert_close(OPDImportance(posterior)(group), single, rtol=1e-2, atol=0)


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


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens).mean(1))


def test_tied_weights_count_once_and_stay_aligned_when_pruning_unties_them():
    model = Tied()
    scores = {"embed.weight": torch.rand(7, 4)}
    root = Root(Tied, TOKENS, "embed")
    importance = ScoreImportance(scores)
    torch.testing.assert_close(importance(root(model)), scores["embed.weight"].sum(0))
    root(model, [1]).prune()  # unseen: another graph
    with pytest.raises(PosteriorError, match=r"'embed\.weight'.*pruned where"):
        importance(root(model))
    model = Tied()
    group = root(model)
    importance(group)
    group.prune([1])
    assert model.head.weight is not model.embed.weight
    torch.testing.assert_close(
        importance(root(model)), 2 * scores["embed.weight"].sum(0)[[0, 2, 3]]
    )


def test_some_units_of_a_layer_are_scored_as_among_all():
    root = CASES["residual and concatenation"]
    model = root.make()
    importance = ScoreImportance(random_scores(model))
    some = [6, 1, 4]
    torch.testing.assert_close(importance(root(model, some)), importance(root(model))[some])


REDUCTIONS = ["sum", "mean", "max", "prod", "first", "gate", None]


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_magnitude_scores_rank_as_torch_prunings_group_magnitude(p, reduction):
    """Equal where the definitions coincide.

    That is: biases counted (``bias=True``), only layers that torch-pruning's counts (convolutions
    that are not depthwise, linear and batch or layer normalisation), no entry reached twice.
    """
    model = resnet().eval()
    scores = {n: q.detach().abs().pow(p) for n, q in model.named_parameters()}
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 3, 64, 64))
    for normalizer in (None, "mean", "sum", "max", "standarization", "gaussian", "sentinel_0.5"):
        if reduction in ("prod", None) and normalizer:
            continue  # products underflow, and rows are not normalized one by one
        arguments = {"group_reduction": reduction, "normalizer": normalizer}
        theirs = tp.importance.GroupMagnitudeImportance(p=p, bias=True, **arguments)
        ours = ScoreImportance(scores, **arguments)
        for group in graph.get_all_groups():
            torch.testing.assert_close(ours(group), theirs(group), rtol=1e-4, atol=2e-5)


def test_reductions_and_normalizers_that_torch_pruning_lacks_are_refused_at_once():
    with pytest.raises(PruningError, match="group_reduction 'median'"):
        ScoreImportance({}, group_reduction="median")
    for normalizer in ("men", "sentinel", 3):
        with pytest.raises(PruningError, match="normalizer"):
            ScoreImportance({}, normalizer=normalizer)
    ScoreImportance({}, normalizer=lambda importance: importance / 2)


def test_importances_that_are_not_finite_are_an_error_by_name():
    root = CASES["linear"]
    model = root.make()
    scores = random_scores(model)
    with pytest.raises(PruningError, match=r"fc: .*not finite: look at their scores"):
        ScoreImportance(scores | {"fc.bias": torch.full((6,), torch.nan)})(root(model))
    zeros = {name: torch.zeros_like(s) for name, s in scores.items()}
    cancelling = zeros | {"fc.bias": torch.tensor([1.0, -1.0, 0, 0, 0, 0])}
    with pytest.raises(PruningError, match=r"fc: .*not finite: look at 'sum' of them"):
        ScoreImportance(cancelling, normalizer="sum")(root(model))
    assert not ScoreImportance(zeros, normalizer="mean")(root(model)).any()


def test_scores_of_another_model_are_refused_by_name():
    model = lenet()
    group = CASES["lenet conv"](model)
    scores = random_scores(model)
    with pytest.raises(PosteriorError, match=r"'conv1\.weight' is not in the scores: make"):
        ScoreImportance({})(group)
    with pytest.raises(PosteriorError, match=r"'conv1\.weight'.*make the scores anew"):
        ScoreImportance(scores | {"conv1.weight": torch.rand(2, 1, 5, 5)})(group)
    with pytest.raises(PosteriorError, match=r"'conv7\.weight' of the scores is not in the model"):
        ScoreImportance(scores | {"conv7.weight": torch.rand(2)})(group)
    with pytest.raises(PruningError, match="OPDImportance needs a posterior, not a dict"):
        OPDImportance(scores)


def test_a_group_without_trainable_parameters_is_left_to_torch_pruning():
    model = lenet()
    group = CASES["lenet conv"](model)
    for p in model.parameters():
        p.requires_grad_(False)
    assert ScoreImportance(random_scores(model))(group) is None
