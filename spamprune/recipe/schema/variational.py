"""Mean-field variational inference, and Bayesian model reduction while it trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from spamprune.recipe.schema.section import Section, fault


class Reduction(Section):
    """When weights go whose removal the evidence favours (arXiv 2309.12095).

    After the warm-up come blocks of epochs of equal length, each after a reduction. The last layer
    stays whole.
    """

    warm_up: int = Field(ge=1, description="Epochs before the first reduction.")
    blocks: int = Field(
        5,
        ge=1,
        description="Reductions, each followed by training: the epochs after the warm-up are "
        "shared out evenly.",
    )
    iterations: int = Field(
        4, ge=0, description="Steps towards the odds that each layer learns; 0: even odds."
    )

    def due(self, epochs: int) -> range:
        """Return after which epochs of a training a reduction falls due."""
        return range(self.warm_up, epochs, max((epochs - self.warm_up) // self.blocks, 1))

    def check(self, epochs: int, *path: str) -> None:
        """Raise unless the blocks fit a training of ``epochs``; ``path`` leads to the section."""
        rest = epochs - self.warm_up
        if rest < self.blocks or rest % self.blocks:
            raise fault(
                f"{epochs} epochs less a warm-up of {self.warm_up} do not make {self.blocks} "
                "blocks of equal length: change one of them",
                *(*path, "blocks"),
            )


class Variational(Section):
    """Mean-field variational inference: a Gaussian for every weight."""

    prior: Literal["gaussian", "horseshoe"] = Field(
        "gaussian",
        description="gaussian: one learned scale for each layer; horseshoe: one for each row too, "
        "with heavy tails.",
    )
    draws: int = Field(
        100, ge=1, description="Draws of the weights that a Bayesian prediction averages over."
    )
    reduction: Reduction | None = Field(
        None, description="Pruning during training by Bayesian model reduction; none by default."
    )
