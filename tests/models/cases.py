"""Every network of ours: what it is at full size, and a small version for slow references."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spamprune.models import create

GREY, COLOUR = (1, 28, 28), (3, 32, 32)


@dataclass(frozen=True)
class Case:
    """A network.

    Attributes:
        shape: Of an input at full size.
        parameters: At full size, with the default number of classes.
        classes: That default.
        small: Arguments of a small version.
        small_shape: Of its inputs.
    """

    shape: tuple[int, ...]
    parameters: int
    classes: int = 10
    small: dict[str, Any] = field(default_factory=dict)
    small_shape: tuple[int, ...] = (3, 8, 8)


CASES = {
    "fc_cancer": Case((30,), 13_402, 2, {"widths": (30, 12, 10)}, (30,)),
    "fc_mnist": Case(GREY, 203_530, 10, {"widths": (16, 12)}, (1, 4, 4)),
    "residual_mlp_mnist": Case(
        GREY, 1_428_186, 10, {"in_features": 16, "width": 12, "hidden": 10}, (1, 4, 4)
    ),
    "lenet": Case(GREY, 60_170, 10, {"widths": (4, 6, 12, 10)}, GREY),
    "lenet_cifar": Case(COLOUR, 62_006, 10, {"widths": (4, 6, 12, 10)}, COLOUR),
    "fixup_resnet18": Case(COLOUR, 10_992_372, 10, {"depth": 10, "width": 4}),
    "fixup_wrn16_4": Case(COLOUR, 2_745_306, 10, {"depth": 10, "widen": 1}),
    "simple_vit_mnist": Case(
        GREY,
        335_360,
        10,
        {"img_size": 8, "patch_size": 4, "embed_dim": 12, "num_heads": 4, "head_dim": 6}
        | {"hidden": 10, "depth": 2},
        (1, 8, 8),
    ),
    "vit_mnist": Case(
        GREY,
        142_730,
        10,
        {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 4, "depth": 2},
        (1, 8, 8),
    ),
    "mixer_mnist": Case(GREY, 280_940, 10, {"img_size": 8, "embed_dim": 16}, (1, 8, 8)),
    "bmr_mlp": Case(GREY, 1_149_010, 10, {"in_features": 16, "widths": (12, 10)}, (1, 4, 4)),
    "bmr_lenet": Case(
        GREY, 61_706, 10, {"img_size": 8, "kernel": 3, "widths": (4, 6, 12, 10)}, (1, 8, 8)
    ),
    "bmr_lenet_cifar": Case(
        COLOUR, 550_362, 10, {"img_size": 10, "kernel": 3, "widths": (4, 6, 12, 10)}, (3, 10, 10)
    ),
    "bmr_vit": Case(
        GREY,
        3_183_114,
        10,
        {"img_size": 8, "embed_dim": 16, "num_heads": 4, "depth": 2},
        (1, 8, 8),
    ),
    "bmr_mixer": Case(
        GREY, 1_895_472, 10, {"img_size": 8, "embed_dim": 16, "num_blocks": 2}, (1, 8, 8)
    ),
    "resnet18_cifar": Case(
        COLOUR, 11_173_962, 10, {"layers": (1, 1, 1, 1), "channels": (64, 8, 8, 8)}
    ),
    "wrn16_4_cifar": Case(
        COLOUR, 2_748_890, 10, {"layers": (1, 1, 1), "channels": (8, 16, 24), "stem_chs": 8}
    ),
    "vit_tiny_cifar": Case(
        COLOUR, 5_362_762, 10, {"img_size": 8, "embed_dim": 24, "depth": 2}, (3, 8, 8)
    ),
    "mixer_s_cifar": Case(
        COLOUR, 17_110_026, 10, {"img_size": 8, "embed_dim": 16, "num_blocks": 2}, (3, 8, 8)
    ),
}


def small(name: str, samples: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the small version as it starts, in float64, with random inputs and targets."""
    case = CASES[name]
    torch.manual_seed(0)
    model = create(name, **case.small).double()
    inputs = torch.randn(samples, *case.small_shape, dtype=torch.float64)
    return model, inputs, torch.arange(samples) % case.classes


def shaken(model: nn.Module) -> nn.Module:
    """Return the model in evaluation mode with nothing at zero or at one, so that all counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model.eval()
