"""What a network costs: multiply-accumulates and parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spamprune.bayes.parameters import evaluation_mode


def macs(model: nn.Module, example: Tensor) -> int:
    """Return the multiply-accumulates of one forward pass on ``example``.

    Counted are matrix products and convolutions, as PyTorch's own counter sees them.
    """
    with evaluation_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    return int(counter.get_total_flops()) // 2


def params(model: nn.Module) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())
