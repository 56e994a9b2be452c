"""Scores from the weights alone, or from nothing."""

from __future__ import annotations

import torch
from torch import nn

from spamprune.bayes.parameters import named_parameters
from spamprune.scores.registry import Scores, criterion


@criterion("magnitude")
@torch.no_grad()
def magnitude(model: nn.Module) -> Scores:
    """Absolute value ``|θ_p|`` (Han et al. 2016)."""
    return {name: p.abs() for name, p in named_parameters(model).items()}


@criterion("random")
@torch.no_grad()
def random(model: nn.Module, *, seed: int = 0) -> Scores:
    """Uniform noise from ``seed``: what every criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator).to(p.device)
        for name, p in named_parameters(model).items()
    }
