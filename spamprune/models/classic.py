"""Fully connected networks and LeNets of the SpaM paper (its appendix G), registered with timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spamprune.models.register import register


class MLP(nn.Sequential):
    """Fully connected ReLU network on flattened inputs.

    Args:
        widths: Sizes from the input to the last hidden layer, such as ``(30, 100, 100)``.
        num_classes: Number of outputs.
    """

    def __init__(self, widths: tuple[int, ...], num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.flatten = nn.Flatten()
        for i in range(1, len(widths)):
            self.add_module(f"fc{i}", nn.Linear(widths[i - 1], widths[i]))
            self.add_module(f"act{i}", nn.ReLU())
        self.head = nn.Linear(widths[-1], num_classes)


class ResidualMLP(nn.Module):
    """Residual fully connected network on flattened inputs: ``x + W₂ GELU(W₁ x)`` per block.

    Args:
        num_classes: Number of outputs.
        in_features: Size of a flattened input.
        width: Size of the residual stream.
        hidden: Hidden units of each block.
        depth: Number of blocks.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_features: int = 784,
        width: int = 784,
        hidden: int = 256,
        depth: int = 2,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.embedding = nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``(B, ...)`` of ``in_features`` numbers to logits ``(B, num_classes)``."""
        x = self.embedding(torch.flatten(x, 1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class LeNet(nn.Module):
    """LeNet of the paper: three convolutions, one hidden layer, no normalisation.

    For 28×28 inputs: 1→6 (5×5), 6→16 (3×3), 16→120 (5×5), 120→84→10; 60 170 parameters.

    Args:
        num_classes: Number of outputs.
        in_chans: Input channels.
        kernels: Sizes of the three kernels; the third must cover what pooling leaves.
        widths: Output sizes of the three convolutions and the hidden layer.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        kernels: tuple[int, int, int] = (5, 3, 5),
        widths: tuple[int, int, int, int] = (6, 16, 120, 84),
    ):
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, widths[0], kernels[0])
        self.conv2 = nn.Conv2d(widths[0], widths[1], kernels[1])
        self.conv3 = nn.Conv2d(widths[1], widths[2], kernels[2])
        self.fc = nn.Linear(widths[2], widths[3])
        self.head = nn.Linear(widths[3], num_classes)
        self.pool = nn.MaxPool2d(2)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``."""
        # pooling before the ReLU gives the same values as after it, on a quarter of the pixels
        x = self.act(self.pool(self.conv1(x)))
        x = self.act(self.pool(self.conv2(x)))
        x = self.act(self.conv3(x))
        x = self.act(self.fc(torch.flatten(x, 1)))
        return self.head(x)


@register
def fc_cancer(**kwargs: Any) -> MLP:
    """FC 30-100-100-2 of the paper for the breast-cancer data; 13 402 parameters."""
    defaults: dict[str, Any] = {"widths": (30, 100, 100), "num_classes": 2}
    return MLP(**{**defaults, **kwargs})


@register
def fc_mnist(**kwargs: Any) -> MLP:
    """FC 784-256-10 of the paper for MNIST-sized images; 203 530 parameters."""
    defaults: dict[str, Any] = {"widths": (784, 256), "num_classes": 10}
    return MLP(**{**defaults, **kwargs})


@register
def residual_mlp_mnist(**kwargs: Any) -> ResidualMLP:
    """What the paper's code calls MLP-Mixer: two residual blocks; 1 428 186 parameters.

    It mixes no tokens, has no patches and no normalisation. The network that the paper describes
    is ``mixer_mnist``.
    """
    return ResidualMLP(**kwargs)


@register
def lenet(**kwargs: Any) -> LeNet:
    """LeNet of the paper for 28×28 grey images; 60 170 parameters (its figure 17: 241 KB)."""
    return LeNet(**kwargs)


@register
def lenet_cifar(**kwargs: Any) -> LeNet:
    """LeNet of the paper for 32×32 colour images: 5×5 kernels throughout; 62 006 parameters."""
    defaults: dict[str, Any] = {"in_chans": 3, "kernels": (5, 5, 5)}
    return LeNet(**{**defaults, **kwargs})
