"""Pruning in several steps: what is cached stays aligned with the shrinking parameters."""

import copy

import pytest
import timm
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from spamprune.bayes.posterior import fit_posterior
from spamprune.errors import PosteriorError
from spamprune.pruning.importance import OPDImportance, ScoreImportance

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit():
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=8, num_classes=3
    )


def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3)


class Net(nn.Module):
    """Grouped and depthwise convolutions, a concatenation, a sum, and a layer scale."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 16, 1, groups=2)
        self.scale = nn.Parameter(torch.rand(1, 16, 1, 1))
        self.other = nn.Conv2d(3, 6, 3, padding=1)
        self.fc = nn.Linear(22, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        y = self.deep(self.norm(self.stem(x)).relu())
        y = torch.cat([self.grouped(y) * self.scale, self.other(x)], 1)
        return self.head(self.fc(y.mean((2, 3))).relu())


def net():
    torch.manual_seed(0)
    return Net()


def pruner_of(model, importance, cls=tp.pruner.BasePruner, ratio=0.5, steps=5, **arguments):
    """Build a pruner; torch-pruning shares its default dicts between pruners, so give new ones."""
    qkv = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    unwrapped = [(model.scale, 1)] if isinstance(model, Net) else None
    return cls(
        model,
        IMAGES,
        importance=importance,
        pruning_ratio=ratio,
        iterative_steps=steps,
        ignored_layers=[list(model.children())[-1]],
        in_channel_groups={},
        out_channel_groups={},
        num_heads=qkv,
        unwrapped_parameters=unwrapped,
        **arguments,
    )


class Twin:
    """A copy of a model whose parameters hold the original positions of their entries."""

    def __init__(self, model):
        self.model = copy.deepcopy(model).double()
        unwrapped = [(self.model.scale, 1)] if isinstance(model, Net) else None
        self.graph = tp.DependencyGraph().build_dependency(
            self.model, IMAGES.double(), unwrapped_parameters=unwrapped
        )
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.arange(p.numel()).reshape(p.shape))

    def prune(self, group):
        """Repeat what ``group`` is about to do to the model."""
        root = group.items[0]
        module = self.model.get_submodule(group._DG._module2name[root.dep.target.module])
        self.graph.get_pruning_group(module, root.dep.handler, root.idxs).prune()

    def sliced(self, originals):
        """Return what is left of tensors that were shaped like the parameters."""
        return {
            name: originals[name].flatten()[p.long().flatten()].reshape(p.shape)
            for name, p in self.model.named_parameters()
        }


def random_scores(model):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}


def assert_aligned(pruner, importance, expected):
    """Compare the importances of all groups with those of hand-sliced scores."""
    reference = ScoreImportance(expected)
    groups = list(pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types))
    assert groups
    for group in groups:
        torch.testing.assert_close(importance(group), reference(group))


def tune(model):
    """Train a little, so that no weight stays what it was."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(IMAGES).square().sum().backward()
        optimizer.step()


MODES = {
    "local": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
    "rounded": {"round_to": 2},
    "heads": {
        "global_pruning": True,
        "prune_num_heads": True,
        "prune_head_dims": False,
        "head_pruning_ratio": 5 / 16,  # torch-pruning must find a head in each step
    },
    "head dimensions": {"prune_head_dims": True},
}


@pytest.mark.parametrize("make", [net, resnet, vit])
@pytest.mark.parametrize("mode", MODES)
def test_scores_stay_aligned_over_five_steps(make, mode):
    model = make()
    scores = random_scores(model)
    importance = ScoreImportance(scores)
    pruner = pruner_of(model, importance, **MODES[mode])
    twin = Twin(model)
    before = sum(p.numel() for p in model.parameters())
    for _ in range(5):
        for group in pruner.step(interactive=True):
            twin.prune(group)
            group.prune()
        assert_aligned(pruner, importance, twin.sliced(scores))
    assert sum(p.numel() for p in model.parameters()) < 0.8 * before


@pytest.mark.parametrize("make", [net, resnet])
def test_precisions_stay_aligned_while_the_weights_are_tuned(make):
    model = make()
    posterior = fit_posterior(model, [(IMAGES, torch.tensor([0, 1, 2, 0]))], n_data=4)
    importance = OPDImportance(posterior)
    pruner = pruner_of(model, importance, global_pruning=True)
    twin = Twin(model)
    for _ in range(5):
        for group in pruner.step(interactive=True):
            twin.prune(group)
            group.prune()
        tune(model)
        precision = twin.sliced(posterior.precision())
        now = dict(model.named_parameters())
        assert_aligned(
            pruner, importance, {n: p * now[n].detach().square() for n, p in precision.items()}
        )


@pytest.mark.parametrize(
    "cls", [tp.pruner.MetaPruner, tp.pruner.GroupNormPruner, tp.pruner.GrowingRegPruner]
)
def test_other_pruners_take_it(cls):
    model = resnet()
    pruner = pruner_of(model, ScoreImportance(random_scores(model)), cls)
    width = model.layer1[0].conv1.out_channels
    for _ in range(5):
        model(IMAGES).square().sum().backward()
        pruner.update_regularizer()
        if cls is not tp.pruner.MetaPruner:
            pruner.regularize(model)
        pruner.step()
        model.zero_grad()
    assert model.layer1[0].conv1.out_channels == width / 2
    assert model(IMAGES).shape == (4, 3)


def test_the_heads_of_least_importance_go():
    """Units are input channels of the projection: torch-pruning takes it as an attention's root."""
    model = vit().eval()
    importance = ScoreImportance(random_scores(model))
    attentions = [block.attn for block in model.blocks]
    pruner = tp.pruner.BasePruner(
        model,
        IMAGES,
        importance=importance,
        pruning_ratio=0.5,  # at 0 torch-pruning would not touch heads either
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        num_heads={attention.qkv: 8 for attention in attentions},
        ignored_layers=[model.patch_embed.proj, *(block.mlp for block in model.blocks), model.head],
        in_channel_groups={},
        out_channel_groups={},
    )
    kept = []
    for attention in attentions:
        group = pruner.DG.get_pruning_group(
            attention.proj, tp.prune_linear_in_channels, list(range(32))
        )
        by_head = importance(group).reshape(8, 4).mean(1)
        dims = by_head.argsort()[4:].sort().values[:, None] * 4 + torch.arange(4)
        kept.append(attention.proj.weight.detach()[:, dims.flatten()].clone())
    pruner.step()
    for attention, expected in zip(attentions, kept, strict=True):
        torch.testing.assert_close(attention.proj.weight.detach(), expected)
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.attn_dim = 16
        assert attention.num_heads == 4
    assert model(IMAGES).shape == (4, 3)


def graph_of(model):
    return tp.DependencyGraph().build_dependency(model, IMAGES)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 2), min_size=1)), max_size=5))
def test_whatever_is_pruned_by_hand_is_followed(cuts):
    """Each cut is a group and some of its units; several may go between two scorings."""
    model = resnet()
    scores = random_scores(model)
    importance = ScoreImportance(scores)
    twin = Twin(model)
    graph = graph_of(model)
    groups = list(graph.get_all_groups(ignored_layers=[model.fc]))
    importance(groups[0])
    for which, units in cuts:
        root = groups[which].items[0].dep
        twin.prune(graph.get_pruning_group(root.target.module, root.handler, sorted(units)))
        groups[which].prune(idxs=sorted(units))
    reference = ScoreImportance(twin.sliced(scores))
    for group in graph_of(model).get_all_groups(ignored_layers=[model.fc]):  # a new graph as well
        torch.testing.assert_close(importance(group), reference(group))


def test_cuts_that_nobody_reported_are_an_error_by_name():
    model = net()
    importance = ScoreImportance(random_scores(model))
    graph = graph_of(model)
    group = graph.get_pruning_group(model.fc, tp.prune_linear_out_channels, list(range(10)))
    importance(group)
    tp.prune_linear_out_channels(model.fc, [0])
    tp.prune_linear_in_channels(model.head, [0])
    group = graph.get_pruning_group(model.fc, tp.prune_linear_out_channels, list(range(9)))
    with pytest.raises(PosteriorError, match=r"'fc\.weight' has shape .*make the scores anew"):
        importance(group)
    group.prune([1])  # goes on without it
    group = graph.get_pruning_group(model.fc, tp.prune_linear_out_channels, list(range(8)))
    with pytest.raises(PosteriorError, match=r"'fc\.weight'"):
        importance(group)


def test_one_importance_serves_several_copies_and_several_importances_one_model():
    model = net()
    scores = random_scores(model)
    importance, other = ScoreImportance(scores), ScoreImportance(scores, group_reduction="max")
    widths = []
    for ratio in (0.2, 0.5):
        small = copy.deepcopy(model)
        pruner = pruner_of(small, importance, ratio=ratio, steps=1)
        for group in pruner.DG.get_all_groups(pruner.ignored_layers):
            assert other(group).shape == importance(group).shape
        pruner.step()
        for group in pruner.DG.get_all_groups(pruner.ignored_layers):
            assert other(group).shape == importance(group).shape
        widths.append(small.fc.out_features)
    assert widths == [8, 5]


def test_frozen_parameters_that_torch_pruning_thaws_stay_out():
    model = net()
    frozen = ("norm.weight", "fc.bias")
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    scores = random_scores(model)
    importance = ScoreImportance({n: s for n, s in scores.items() if n not in frozen})
    pruner = pruner_of(model, importance)
    twin = Twin(model)
    for _ in range(2):
        for group in pruner.step(interactive=True):
            twin.prune(group)
            group.prune()
    assert model.fc.bias.requires_grad  # torch-pruning's doing
    zeros = {n: torch.zeros_like(scores[n]) for n in frozen}
    assert_aligned(pruner, importance, twin.sliced(scores | zeros))


def test_nothing_is_kept_alive():
    import gc
    import weakref

    model = net()
    importance = ScoreImportance(random_scores(model))
    pruner = pruner_of(model, importance)
    pruner.step()
    ref = weakref.ref(model)
    del model, pruner
    gc.collect()
    assert ref() is None
    assert not importance._of_model
