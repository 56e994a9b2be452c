"""Small members of timm's families at small input sizes, in float64."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.metaformer import MetaFormer, Pooling
from timm.models.mlp_mixer import Affine, GatedMlp, MlpMixer, ResBlock, SpatialGatingBlock
from torch import nn

from spamprune.pruning import cost
from spamprune.pruning.compaction import apply, verify
from spamprune.pruning.plan import Target, plan
from tests.pruning.test_trace import disturbed, inputs, random_scores


def named(name, **arguments):
    return lambda: timm.create_model(name, num_classes=5, **arguments)


def mixer(**arguments):
    return lambda: MlpMixer(5, img_size=64, patch_size=8, num_blocks=2, embed_dim=48, **arguments)


def poolformer():
    return MetaFormer(
        num_classes=5, depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), token_mixers=Pooling
    )


#: Name → model, and the fraction of parameters that at most remains when half of every kind of unit
#: goes; more where heads are few or bound to the width.
FAMILIES = {
    "byobnet": (named("test_byobnet"), 0.35),
    "efficientnet, evonorm": (named("test_efficientnet_evos"), 0.35),
    "nfnet": (named("test_nfnet"), 0.35),
    "convnext": (named("test_convnext3"), 0.35),
    "mambaout": (named("test_mambaout"), 0.35),
    "vit": (named("test_vit3", img_size=64), 0.45),
    "ghostnet": (named("ghostnetv2_100"), 0.35),
    "mobilenetv3": (named("mobilenetv3_small_050"), 0.35),
    "dla": (named("dla46_c"), 0.35),
    "edgenext": (named("edgenext_xx_small"), 0.45),
    "pvt": (named("pvt_v2_b0"), 0.35),
    "coat": (named("coat_lite_tiny", img_size=64), 0.7),
    "poolformer": (poolformer, 0.35),
    "mixer": (mixer(), 0.45),
    "gmlp": (mixer(block_layer=SpatialGatingBlock, mlp_layer=GatedMlp, mlp_ratio=6), 0.45),
    "resmlp": (mixer(block_layer=ResBlock, norm_layer=Affine, mlp_ratio=4), 0.45),
    "starnet": (named("starnet_s050"), 0.35),
    "shvit": (named("shvit_s1"), 0.35),
}
#: Those whose norms span what goes, so that a mask's zeros count.
MIXED = {"convnext", "mambaout", "vit", "edgenext", "pvt", "poolformer", "mixer", "gmlp"}
MIXED |= {"efficientnet, evonorm", "nfnet", "shvit"}

#: Those that have norms inside of their blocks.
MIXED_INSIDE = {"efficientnet, evonorm", "nfnet", "poolformer", "gmlp"}


def case(name):
    torch.manual_seed(0)
    return disturbed(FAMILIES[name][0]()), inputs((1, 3, 64, 64))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_small_member_loses_half_and_trains(name):
    model, example = case(name)
    found = plan(model, example, random_scores(model), Target(ratio=0.5))
    small = apply(model, found)
    assert cost.params(small) <= FAMILIES[name][1] * cost.params(model)
    assert found.comparable == (name not in MIXED)
    verify(model, small, found, example, tolerance=1e-8)
    assert small(example).shape == (1, 5)
    small.train()
    for module in small.modules():  # one value for each channel is too few for them
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    small(example).square().sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in small.parameters())


@pytest.mark.parametrize("ranking", ["global", "isomorphic"])
@pytest.mark.parametrize("name", ["byobnet", "vit", "pvt"])
def test_a_budget_is_met_and_measured(name, ranking):
    model, example = case(name)
    found = plan(model, example, random_scores(model), Target(macs=0.5), ranking=ranking)
    small = apply(model, found)
    achieved = cost.macs(small, example) / cost.macs(model, example)
    assert achieved == pytest.approx(found.achieved["macs"], rel=1e-12)
    assert 0.4 < achieved <= 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_inside_of_blocks_agrees_with_the_mask(name):
    model, example = case(name)
    kinds = ("heads", "groups", "hidden")
    found = plan(model, example, random_scores(model), Target(ratio=0.5), kinds=kinds)
    small = apply(model, found)
    assert cost.params(small) < cost.params(model)
    verify(model, small, found, example, tolerance=1e-8)
    assert found.comparable == (name not in MIXED_INSIDE)
