"""Networks of the paper on Bayesian model reduction (arXiv 2309.12095), registered with timm.

The sizes are those of its code, bmr4pml, for 28×28 grey images; the LeNet has a colour form too.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spamprune.errors import ModelError
from spamprune.models.register import register


class SwishMLP(nn.Sequential):
    """Fully connected network with swish on flattened inputs.

    Args:
        num_classes: Number of outputs.
        in_features: Size of a flattened input.
        widths: Sizes of the hidden layers.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_features: int = 784,
        widths: tuple[int, ...] = (500, 500, 500, 500),
    ):
        super().__init__()
        self.num_classes = num_classes
        self.flatten = nn.Flatten()
        for i, (before, after) in enumerate(pairwise((in_features, *widths)), start=1):
            self.add_module(f"fc{i}", nn.Linear(before, after))
            self.add_module(f"act{i}", nn.SiLU())
        self.head = nn.Linear(widths[-1], num_classes)


class LeNet5(nn.Module):
    """LeNet-5 with tanh and average pooling: two convolutions and two hidden layers.

    Args:
        num_classes: Number of outputs.
        in_chans: Input channels.
        img_size: Side of the images in pixels.
        padding: Pixels of zeros around them; two make 32×32 of 28×28.
        kernel: Size of both kernels.
        widths: Output sizes of the two convolutions and of the two hidden layers.

    Raises:
        ModelError: The image is too small for the kernels.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int = 28,
        padding: int = 2,
        kernel: int = 5,
        widths: tuple[int, int, int, int] = (6, 16, 120, 84),
    ):
        super().__init__()
        self.num_classes = num_classes
        side = ((img_size + 2 * padding - kernel + 1) // 2 - kernel + 1) // 2
        if side < 1:
            raise ModelError(f"img_size {img_size} is too small for two kernels of size {kernel}")
        self.conv1 = nn.Conv2d(in_chans, widths[0], kernel, padding=padding)
        self.conv2 = nn.Conv2d(widths[0], widths[1], kernel)
        self.fc1 = nn.Linear(widths[1] * side**2, widths[2])
        self.fc2 = nn.Linear(widths[2], widths[3])
        self.head = nn.Linear(widths[3], num_classes)
        self.pool = nn.AvgPool2d(2)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_chans, img_size, img_size)`` to logits ``(B, num_classes)``."""
        x = self.pool(self.act(self.conv1(x)))
        x = self.pool(self.act(self.conv2(x)))
        x = self.act(self.fc1(torch.flatten(x, 1)))
        return self.head(self.act(self.fc2(x)))


@register
def bmr_mlp(**kwargs: Any) -> SwishMLP:
    """MLP of four hidden layers of 500 units with swish; 1 149 010 parameters."""
    return SwishMLP(**kwargs)


@register
def bmr_lenet(**kwargs: Any) -> LeNet5:
    """LeNet-5 on 28×28 grey images padded to 32×32; 61 706 parameters."""
    return LeNet5(**kwargs)


@register
def bmr_lenet_cifar(**kwargs: Any) -> LeNet5:
    """LeNet-5, three times as wide, on 32×32 colour images; 550 362 parameters."""
    defaults: dict[str, Any] = {
        "in_chans": 3,
        "img_size": 32,
        "padding": 0,
        "widths": (18, 48, 360, 256),
    }
    return LeNet5(**{**defaults, **kwargs})


@register
def bmr_vit(**kwargs: Any) -> VisionTransformer:
    """ViT, timm's: six blocks of eight heads on patches of 4×4 pixels; 3 183 114 parameters."""
    defaults: dict[str, Any] = {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 256,
        "depth": 6,
        "num_heads": 8,
        "mlp_ratio": 2,
    }
    return VisionTransformer(**{**defaults, **kwargs})


@register
def bmr_mixer(**kwargs: Any) -> MlpMixer:
    """MLP-Mixer, timm's: six blocks on patches of 4×4 pixels; 1 895 472 parameters.

    Both of a block's MLPs, across tokens and across channels, have 512 hidden units.
    """
    defaults: dict[str, Any] = {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 256,
        "num_blocks": 6,
        "mlp_ratio": (2.0, 2.0),
    }
    return MlpMixer(**{**defaults, **kwargs})
