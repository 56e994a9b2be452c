"""Heads, their dimensions and hidden units of timm's attention, fused and eager."""

from __future__ import annotations

import pytest
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

from spamprune.errors import PruningError
from spamprune.pruning.compaction import apply, verify
from spamprune.pruning.plan import Target, plan
from tests.pruning.test_trace import disturbed, inputs, random_scores

SMALL = {"num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 4}
PATCHES = {"img_size": 16, "patch_size": 4}


def levit():
    return Levit(
        img_size=64, num_classes=5, embed_dim=(32, 48), key_dim=8, depth=(1, 1), num_heads=(4, 6)
    )  # fmt: skip


def maxvit():
    config = MaxxVitCfg(
        embed_dim=(32, 64), depths=(1, 1), block_type=("M", "M"), stem_width=16, head_hidden_size=32
    )
    return MaxxVit(config, img_size=(64, 64), num_classes=5)


NETWORKS = {
    "vit": lambda: VisionTransformer(**SMALL, **PATCHES),
    "vit, q/k norm": lambda: VisionTransformer(**SMALL, **PATCHES, qk_norm=True),
    "vit, no biases": lambda: VisionTransformer(**SMALL, **PATCHES, qkv_bias=False),
    "beit": lambda: Beit(**SMALL, **PATCHES, use_rel_pos_bias=True),
    "eva, joint": lambda: Eva(**SMALL, **PATCHES, use_rot_pos_emb=True, qkv_fused=True),
    "dinov3": lambda: Eva(
        **SMALL, **PATCHES, use_rot_pos_emb=True, rope_type="dinov3", rope_rotate_half=True,
        dynamic_img_size=True, use_abs_pos_emb=False, num_reg_tokens=2,
    ),
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


#: Whether heads, dimensions of heads and hidden units go, and can be compared: ``mixed`` where a
#: norm spans them, ``bound`` where code takes the number of heads × depth from the width.
EXPECTED = {
    "vit": ("exact", "exact", "exact"),
    "vit, q/k norm": ("exact", "mixed", "exact"),
    "vit, no biases": ("exact", "exact", "exact"),
    "beit": ("bound", "bound", "exact"),
    "eva, joint": ("bound", "bound", "exact"),
    "dinov3": ("bound", "bound", "exact"),
    "eva, split, gated": ("bound", "exact", "mixed"),
    "swin": ("exact", "exact", "exact"),
    "cait": ("bound", "bound", "exact"),
    "xcit": ("bound", "bound", "exact"),
    "levit": ("exact", "exact", "exact"),
    "maxvit": ("exact", "exact", "exact"),
}


def both_paths(model, example):
    """Return the outputs of the fused and the eager path."""
    outputs = []
    for fused in (True, False):
        switch(model, fused)
        with torch.no_grad():
            outputs.append(model(example))
    return outputs


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        pytest.param(name, kind, expected, id=f"{name}: {kind}")
        for name, found in EXPECTED.items()
        for kind, expected in zip(("heads", "head_dims", "hidden"), found, strict=True)
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_a_half_goes_and_both_paths_agree_with_the_mask(name, kind, expected, fused):
    model, example = case(name)
    switch(model, fused)
    kinds, before = (kind,), sum(p.numel() for p in model.parameters())
    if expected == "bound":
        with pytest.raises(PruningError, match=r"to follow that of units|takes their number from"):
            plan(model, example, random_scores(model), Target(ratio=0.5), kinds=kinds)
        if kind == "head_dims":
            return
        kinds = ("heads", "width")
    found = plan(model, example, random_scores(model), Target(ratio=0.5), kinds=kinds)
    assert found.comparable == (expected == "exact")
    assert all(len(g.pruned) == g.units // 2 for g in found.groups if g.kind == kind)
    assert any(g.kind == kind for g in found.groups)
    small = apply(model, found)
    apart = verify(model, small, found, example, tolerance=1e-8)
    assert apart <= 1e-8 or expected != "exact"
    assert sum(p.numel() for p in small.parameters()) < 0.95 * before
    torch.testing.assert_close(*both_paths(small, example), rtol=1e-8, atol=1e-8)
    small.train()(example).square().sum().backward()


def test_plans_do_not_depend_on_the_path():
    model, example = case("vit")
    plans = []
    for fused in (True, False):
        switch(model, fused)
        plans.append(
            plan(model, example, random_scores(model), Target(ratio=0.5), kinds=("head_dims",))
        )
    assert plans[0] == plans[1]
    assert plans[0].scalings


class Attention(nn.Module):
    """Two heads of eight dimensions each; what queries and keys are is for subclasses."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 3)

    def heads(self, x):
        return x.view(*x.shape[:2], 2, -1).transpose(1, 2)

    def queries_and_keys(self, x):
        return self.heads(self.q(x)), self.heads(self.k(x))

    def bias(self, q):
        return None

    def forward(self, x):
        q, k = self.queries_and_keys(x)
        y = F.scaled_dot_product_attention(q, k, self.heads(self.v(x)), attn_mask=self.bias(q))
        return self.out(y.transpose(1, 2).flatten(2))


class QueriesMakeABiasToo(Attention):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(5, 8))

    def bias(self, q):
        return q @ self.positions.T


class QueriesAreShifted(Attention):
    def queries_and_keys(self, x):
        q, k = super().queries_and_keys(x)
        return q + 1, k


class QueriesAreSquashedInPlace(Attention):
    def queries_and_keys(self, x):
        q, k = super().queries_and_keys(x)
        return q.tanh_(), k


class QueriesAreScaledInPlace(Attention):
    def queries_and_keys(self, x):
        q, k = super().queries_and_keys(x)
        return q.mul_(1.5), k


class TemperatureOfHeads(Attention):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(2, 1, 1))

    def queries_and_keys(self, x):
        q, k = super().queries_and_keys(x)
        return q * self.temperature, k


class GroupedQueries(Attention):
    def __init__(self):
        super().__init__()
        self.q, self.out = nn.Linear(16, 32), nn.Linear(32, 3)

    def queries_and_keys(self, x):
        q = self.q(x).view(*x.shape[:2], 4, -1).transpose(1, 2)
        return q, self.heads(self.k(x)).repeat_interleave(2, 1)

    def forward(self, x):
        q, k = self.queries_and_keys(x)
        v = self.heads(self.v(x)).repeat_interleave(2, 1)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OneLayerForBoth(Attention):
    def queries_and_keys(self, x):
        return self.heads(self.k(x)), self.heads(self.k(x.flip(1)))


@pytest.mark.parametrize(
    "make",
    [
        Attention, QueriesMakeABiasToo, QueriesAreShifted, QueriesAreSquashedInPlace,
        QueriesAreScaledInPlace, TemperatureOfHeads, GroupedQueries,
    ],
)  # fmt: skip
def test_the_scale_of_the_logits_goes_into_parameters_that_scale_nothing_else(make):
    torch.manual_seed(0)
    model = make().double()
    with torch.no_grad():
        for parameter in (model.q.weight, model.k.weight):
            parameter.mul_(4)
    example = inputs((2, 5, 16))
    found = plan(model, example, random_scores(model), Target(ratio=0.5))
    small = apply(model, found)
    assert small.q.out_features == model.q.out_features // 2
    assert found.comparable
    assert verify(model, small, found, example, tolerance=1e-10) <= 1e-10


def test_dimensions_stay_where_queries_and_keys_come_from_one_layer():
    torch.manual_seed(0)
    model = OneLayerForBoth().double()
    example = inputs((2, 5, 16))
    found = plan(model, example, random_scores(model), Target(ratio=0.5))
    small = apply(model, found)
    assert small.k.out_features == 16
    assert small.v.out_features == 8
    assert any("the scale of the logits" in note for note in found.notes)
    assert verify(model, small, found, example, tolerance=1e-10) <= 1e-10
