"""Heads, their dimensions and hidden units of timm's attention, fused and eager."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.levit import Levit
from timm.models.maxxvit import MaxxVit, MaxxVitCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from torch import nn
from torch.utils._pytree import tree_leaves

from spamprune.pruning.compaction import apply, verify
from spamprune.pruning.plan import Target, plan
from tests.pruning.test_trace import disturbed, inputs, random_scores

SMALL = {"num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 4}
PATCHES = {"img_size": 16, "patch_size": 4}


def levit():
    return Levit(
        img_size=64, num_classes=5, embed_dim=(32, 48), key_dim=8, depth=(1, 1), num_heads=(4, 6),
        down_ops=(("Subsample", 8, 4, 2, 2, 2),),
    )  # fmt: skip


def maxvit():
    config = MaxxVitCfg(
        embed_dim=(16, 32), depths=(1, 1), block_type=("M", "M"), stem_width=16, head_hidden_size=32
    )
    return MaxxVit(config, img_size=(64, 64), num_classes=5)


NETWORKS = {
    "vit": lambda: VisionTransformer(**SMALL, **PATCHES),
    "vit, q/k norm": lambda: VisionTransformer(**SMALL, **PATCHES, qk_norm=True),
    "vit, no biases": lambda: VisionTransformer(**SMALL, **PATCHES, qkv_bias=False),
    "vit, registers": lambda: VisionTransformer(**SMALL, **PATCHES, reg_tokens=2),
    "beit": lambda: Beit(**SMALL, **PATCHES, use_rel_pos_bias=True),
    "eva, joint": lambda: Eva(**SMALL, **PATCHES, use_rot_pos_emb=True, qkv_fused=True),
    "eva, split, gated": lambda: Eva(
        **SMALL, **PATCHES, use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True
    ),
    "swin": lambda: SwinTransformer(
        img_size=32, patch_size=4, num_classes=5, embed_dim=32, depths=(2, 1), num_heads=(2, 4),
        window_size=4,
    ),
    "cait": lambda: Cait(**SMALL, **PATCHES),
    "xcit": lambda: Xcit(**{**PATCHES, "patch_size": 8}, **SMALL, cls_attn_layers=1),
    "levit": levit,
    "maxvit": maxvit,
}  # fmt: skip
SIZES = {"swin": 32, "levit": 64, "maxvit": 64}


def amplified(model):
    """Return the model with attention far from uniform, so that a wrong scale shows."""
    model = disturbed(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("qkv", "q_proj", "k_proj", ".q.", ".k.")):
                parameter.copy_(torch.randn_like(parameter) * (0.6 if parameter.dim() > 1 else 0.3))
    return model


def case(name):
    torch.manual_seed(0)
    size = SIZES.get(name, 16)
    return amplified(NETWORKS[name]()), inputs((2, 3, size, size))


def switch(model, fused):
    """Let every attention take its fused or its eager path."""
    found = [m for m in model.modules() if hasattr(m, "fused_attn")]
    for module in found:
        module.fused_attn = fused
    return bool(found)


def head_dimensions_go(name):
    """Tell whether code leaves dimensions of heads free, rather than C // num_heads."""
    return name not in ("xcit",)


@pytest.mark.parametrize("kind", ["heads", "head_dims", "hidden"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_half_goes_and_both_paths_agree_with_the_mask(name, kind):
    model, example = case(name)
    before = {n: p.shape for n, p in model.named_parameters()}
    results = []
    for fused in (True, False):
        switch(model, fused)
        try:
            found = plan(model, example, random_scores(model), Target(ratio=0.5), kinds=(kind,))
        except Exception as error:
            print(str(error)[:600])
            raise
        small = apply(model, found)
        assert {g.kind for g in found.groups} == {kind}
        assert found.comparable, [n for n in found.notes]
        assert verify(model, small, found, example, tolerance=1e-8) <= 1e-8
        changed = [n for n, p in small.named_parameters() if p.shape != before[n]]
        assert changed
        results.append(found)
        outputs = []
        for other in (True, False):
            switch(small, other)
            with torch.no_grad():
                outputs.append(small(example))
        torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-8)
    assert results[0].cuts == results[1].cuts


