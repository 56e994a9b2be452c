"""The parameters that Bayes sees, the trainable ones, once each, by name; and checks of input."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from spamprune.errors import PosteriorError, nearest


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of ``model`` by name, tied ones under their first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_positive(**numbers: float) -> None:
    """Check that ``numbers`` are positive and finite.

    Raises:
        PosteriorError: One is not; it is named.
    """
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise PosteriorError(f"{name} must be a positive number, not {number}")


def check_shapes(
    parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str
) -> None:
    """Check that ``tensors`` has exactly one tensor of the right shape per parameter of a model.

    Raises:
        PosteriorError: A parameter is missing, unknown or of another shape; it is named.
    """
    for name, parameter in parameters.items():
        if name not in tensors:
            raise PosteriorError(
                f"{what} lacks parameter {name!r} of the model: fit it on this model"
            )
        if tensors[name].shape != parameter.shape:
            raise PosteriorError(
                f"{what} has shape {tuple(tensors[name].shape)} for parameter {name!r}, the model "
                f"has {tuple(parameter.shape)}: it belongs to another model, or to this one "
                "before it was pruned"
            )
    for name in tensors:
        if name not in parameters:
            raise PosteriorError(
                f"{what} has parameter {name!r}, which the model lacks: {nearest(name, parameters)}"
            )
