"""Residual networks without normalisation, of the SpaM paper (its appendix G.2).

Fixup (Zhang, Dauphin and Ma 2019, https://arxiv.org/abs/1901.09321) trains them by initialisation
alone: the last layer of each residual branch and the classifier start at zero, the other layers of
a branch of m layers are scaled by ``L^(-1/(2m-2))``, L being the number of branches, and scalar
biases and multipliers stand where normalisation would shift and scale. Here m = 2. Stems, about
which Fixup says only "a standard method", start as torch makes them, as in the paper's code.

The scalars have the shape ``(1,)`` and belong to no channel, so that pruning leaves them be.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spamprune.errors import ModelError
from spamprune.models.register import register


class FixupResNet(nn.Module):
    """ResNet of basic blocks in the CIFAR form: 3×3 stem, four stages, no pooling before them.

    Args:
        num_classes: Number of outputs.
        in_chans: Input channels.
        depth: Layers, ``8n + 2`` for n blocks in each stage.
        width: Channels of the stem and the first stage; each later stage has twice as many.

    Raises:
        ModelError: There is no such depth.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, depth: int = 18, width: int = 64):
        super().__init__()
        self.num_classes = num_classes
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.conv1 = _conv3x3(in_chans, width)
        self.bias1 = _bias()
        self.blocks = _blocks(FixupBlock, depth, 2, width, widths)
        self.bias2 = _bias()
        self.fc = _zero_linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``."""
        x = F.relu(self.conv1(x) + self.bias1)
        x = self.blocks(x)
        return self.fc(x.mean((2, 3)) + self.bias2)


class FixupWideResNet(nn.Module):
    """Wide ResNet (Zagoruyko and Komodakis 2016): pre-activation blocks in three stages.

    Args:
        num_classes: Number of outputs.
        in_chans: Input channels.
        depth: Layers, ``6n + 4`` for n blocks in each stage.
        widen: Widening factor: the stages have 16, 32 and 64 times as many channels.

    Raises:
        ModelError: There is no such depth.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, depth: int = 16, widen: int = 4):
        super().__init__()
        self.num_classes = num_classes
        widths = [16 * widen, 32 * widen, 64 * widen]
        self.conv1 = _conv3x3(in_chans, 16)
        self.bias1 = _bias()
        self.blocks = _blocks(FixupWideBlock, depth, 4, 16, widths)
        self.bias2 = _bias()
        self.fc = _zero_linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``."""
        x = self.conv1(x) + self.bias1
        x = F.relu(self.blocks(x))
        return self.fc(x.mean((2, 3)) + self.bias2)


class FixupBlock(nn.Module):
    """Basic block: two 3×3 convolutions beside a shortcut without parameters.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bias1a = _bias()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bias1b = _bias()
        self.bias2a = _bias()
        self.conv2 = _conv3x3(outputs, outputs)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias2b = _bias()
        self.shortcut = ZeroPadShortcut(stride, outputs - inputs) if outputs > inputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Map features ``(B, inputs, H, W)`` to ``(B, outputs, H/stride, W/stride)``."""
        biased = x + self.bias1a
        branch = F.relu(self.conv1(biased) + self.bias1b)
        branch = self.conv2(branch + self.bias2a) * self.scale + self.bias2b
        return F.relu(branch + (x if self.shortcut is None else self.shortcut(biased)))


class FixupWideBlock(nn.Module):
    """Pre-activation block: two 3×3 convolutions beside a 1×1 convolution where widths differ.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bias1 = _bias()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bias2 = _bias()
        self.bias3 = _bias()
        self.conv2 = _conv3x3(outputs, outputs)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias4 = _bias()
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            nn.init.kaiming_normal_(self.shortcut.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Map features ``(B, inputs, H, W)`` to ``(B, outputs, H/stride, W/stride)``."""
        active = F.relu(x + self.bias1)
        branch = F.relu(self.conv1(active) + self.bias2)
        branch = self.conv2(branch + self.bias3) * self.scale + self.bias4
        return branch + (x if self.shortcut is None else self.shortcut(active))


class ZeroPadShortcut(nn.Module):
    """Every ``stride``-th pixel, with channels of zeros behind those that there are.

    Args:
        stride: Of the pixels.
        extra: Channels of zeros; an attribute, so that pruning can make them fewer.
    """

    def __init__(self, stride: int, extra: int):
        super().__init__()
        self.stride = stride
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        """Map features ``(B, C, H, W)`` to ``(B, C + extra, H/stride, W/stride)``."""
        x = x[:, :, :: self.stride, :: self.stride]
        zeros = x.new_zeros(x.shape[0], self.extra, x.shape[2], x.shape[3])
        return torch.cat((x, zeros), 1)


def _blocks(
    block: type[FixupBlock | FixupWideBlock], depth: int, rest: int, inputs: int, widths: list[int]
) -> nn.Sequential:
    """Return all stages' blocks in one row, initialised; stages but the first halve the image.

    ``rest`` is how many layers of ``depth`` lie outside of the blocks' branches.
    """
    each, left = divmod(depth - rest, 2 * len(widths))
    if each < 1 or left:
        raise ModelError(
            f"depth {depth} is not {2 * len(widths)}n + {rest} for any n ≥ 1: the nearest is "
            f"{2 * len(widths) * max(each, 1) + rest}"
        )
    blocks: list[FixupBlock | FixupWideBlock] = []
    for stage, outputs in enumerate(widths):
        for i in range(each):
            blocks.append(block(inputs, outputs, stride=2 if stage and i == 0 else 1))
            inputs = outputs
    for built in blocks:
        nn.init.kaiming_normal_(built.conv1.weight, mode="fan_out")
        built.conv1.weight.data *= len(blocks) ** -0.5
        nn.init.zeros_(built.conv2.weight)
    return nn.Sequential(*blocks)


def _bias() -> nn.Parameter:
    return nn.Parameter(torch.zeros(1))


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@register
def fixup_resnet18(**kwargs: Any) -> FixupResNet:
    """ResNet-18 of the paper for 32×32 colour images, "inplanes 64"; 10 992 372 parameters.

    The default of the paper's code is a width of 32.
    """
    return FixupResNet(**kwargs)


@register
def fixup_wrn16_4(**kwargs: Any) -> FixupWideResNet:
    """WRN-16-4 of the paper for 32×32 colour images; 2 745 306 parameters with 10 classes."""
    return FixupWideResNet(**kwargs)
