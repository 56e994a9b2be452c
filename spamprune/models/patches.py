"""Transformers and mixers on patches of small images, of the SpaM paper (its appendix G.2).

The paper describes a ViT (Dosovitskiy et al. 2021) and an MLP-Mixer (Tolstikhin et al. 2021), while
its code trains networks without normalisation, the "Mixer" without patches even. Both are here,
each under the name of what it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spamprune.errors import ModelError
from spamprune.models.register import register


class SimpleViT(nn.Module):
    """Vision transformer of the paper's code: fixed positions, mean over tokens, no LayerNorm.

    After Beyer, Zhai and Kolesnikov 2022 (https://arxiv.org/abs/2205.01580), whose networks do
    normalise. Only the second layer of each MLP has a bias.

    Args:
        num_classes: Number of outputs.
        in_chans: Input channels.
        img_size: Side of the images in pixels.
        patch_size: Side of a patch in pixels.
        embed_dim: Size of a token, a multiple of 4.
        depth: Number of blocks.
        num_heads: Attention heads of a block.
        head_dim: Size of a head.
        hidden: Hidden units of a block's MLP.

    Raises:
        ModelError: Patches do not tile the image, or positions do not fit the tokens.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int = 28,
        patch_size: int = 7,
        embed_dim: int = 128,
        depth: int = 1,
        num_heads: int = 8,
        head_dim: int = 64,
        hidden: int = 256,
    ):
        super().__init__()
        if img_size % patch_size:
            raise ModelError(f"patch_size {patch_size} does not divide img_size {img_size}")
        self.num_classes = num_classes
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=False)
        positions = sincos_positions(img_size // patch_size, embed_dim)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(
            *(SimpleBlock(embed_dim, num_heads, head_dim, hidden) for _ in range(depth))
        )
        self.head = nn.Linear(embed_dim, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_chans, img_size, img_size)`` to logits ``(B, num_classes)``."""
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(1))


class SimpleBlock(nn.Module):
    """Attention and an MLP, each added to the tokens.

    Args:
        dim: Size of a token.
        num_heads: Attention heads.
        head_dim: Size of a head.
        hidden: Hidden units of the MLP.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, hidden: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=False)
        self.proj = nn.Linear(num_heads * head_dim, dim, bias=False)
        self.mlp = Mlp(dim, hidden, bias=(False, True))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, N, dim)`` to tokens."""
        samples, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(samples, tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def sincos_positions(side: int, dim: int) -> Tensor:
    """Return a row for each cell of a square grid: sines and cosines of its x, then of its y.

    Args:
        side: Cells along each side.
        dim: Length of a row, a multiple of 4.

    Returns:
        ``(side², dim)``, cells in row-major order; wavelengths go from 2π to 2π · 10⁴.

    Raises:
        ModelError: ``dim`` is no such number.
    """
    if dim % 4:
        raise ModelError(f"embed_dim {dim} is no multiple of 4, as positions need")
    frequencies = 10_000 ** -torch.linspace(0, 1, dim // 4)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (x, y)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


@register
def simple_vit_mnist(**kwargs: Any) -> SimpleViT:
    """ViT of the paper's code for 28×28 grey images: SimpleViT; 335 360 parameters.

    One block of 8 heads of 64 dimensions on 16 patches of 7×7 pixels.
    """
    return SimpleViT(**kwargs)


@register
def vit_mnist(**kwargs: Any) -> VisionTransformer:
    """ViT as the paper describes it for 28×28 grey images, timm's; 142 730 parameters.

    Class token, learned positions, LayerNorm. The paper gives no sizes; they are those of
    ``simple_vit_mnist``, but for heads of 16 dimensions, as 8 of them have to share 128.
    """
    defaults: dict[str, Any] = {
        "img_size": 28,
        "patch_size": 7,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 128,
        "depth": 1,
        "num_heads": 8,
        "mlp_ratio": 2,
    }
    return VisionTransformer(**{**defaults, **kwargs})


@register
def mixer_mnist(**kwargs: Any) -> MlpMixer:
    """MLP-Mixer as the paper describes it for 28×28 grey images: two blocks; 280 940 parameters.

    timm's, on 49 patches of 4×4 pixels. The paper gives the number of blocks alone; other
    sizes are ours, with the proportions of Tolstikhin et al. (hidden units: half of the token's
    size across tokens, four times across channels). The code's "Mixer" is ``residual_mlp_mnist``.
    """
    defaults: dict[str, Any] = {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 128,
        "num_blocks": 2,
    }
    return MlpMixer(**{**defaults, **kwargs})
