"""timm's own networks in the form for 32×32 images, beside the paper's without normalisation.

Residual networks have a 3×3 stem of stride 1 and no pooling after it; the others small patches.
"""

from __future__ import annotations

from typing import Any

from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnet import BasicBlock, ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from spamprune.models.register import register


@register
def resnet18_cifar(**kwargs: Any) -> ResNet:
    """ResNet-18 with BatchNorm; 11 173 962 parameters with 10 classes."""
    defaults: dict[str, Any] = {"block": BasicBlock, "layers": (2, 2, 2, 2), "num_classes": 10}
    model = ResNet(**{**defaults, **kwargs})
    model.conv1 = _stem(model.conv1)
    model.maxpool = nn.Identity()
    return model


@register
def wrn16_4_cifar(**kwargs: Any) -> ResNetV2:
    """WRN-16-4 with BatchNorm, before activations; 2 748 890 parameters with 10 classes."""
    defaults: dict[str, Any] = {
        "layers": (2, 2, 2),
        "channels": (64, 128, 256),
        "stem_chs": 16,
        "basic": True,
        "bottle_ratio": 1.0,
        "conv_layer": create_conv2d,
        "norm_layer": BatchNormAct2d,
        "num_classes": 10,
    }
    model = ResNetV2(**{**defaults, **kwargs})
    model.stem = _stem(model.stem.conv)
    return model


@register
def vit_tiny_cifar(**kwargs: Any) -> VisionTransformer:
    """ViT-Tiny on 64 patches of 4×4 pixels; 5 362 762 parameters with 10 classes."""
    defaults: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 4,
        "num_classes": 10,
        "embed_dim": 192,
        "depth": 12,
        "num_heads": 3,
    }
    return VisionTransformer(**{**defaults, **kwargs})


@register
def mixer_s_cifar(**kwargs: Any) -> MlpMixer:
    """Mixer-S on 64 patches of 4×4 pixels; 17 110 026 parameters with 10 classes."""
    defaults: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 4,
        "num_classes": 10,
        "embed_dim": 512,
        "num_blocks": 8,
    }
    return MlpMixer(**{**defaults, **kwargs})


def _stem(stem: nn.Conv2d) -> nn.Conv2d:
    """Return what stands for a stem of timm's, initialised as timm does it."""
    conv = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
