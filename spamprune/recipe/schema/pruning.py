"""What is pruned, and how far."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from spamprune.recipe.schema.section import (
    Distinct,
    Fraction,
    OpenFraction,
    Section,
    fault,
    known,
)
from spamprune.recipe.schema.training import FineTune, Optimiser

Criterion = Annotated[str, known("criterion")]
UnitKind = Literal["heads", "head_dims", "groups", "group_dims", "width", "hidden"]


class Target(Section):
    """How small a structured experiment makes the network; exactly one of the fields."""

    ratio: Fraction | None = Field(None, description="Fraction of units removed.")
    macs: OpenFraction | None = Field(None, description="Fraction of the MACs that may remain.")
    params: OpenFraction | None = Field(
        None, description="Fraction of the parameters that may remain."
    )
    bytes: OpenFraction | None = Field(
        None, description="Fraction of the bytes of parameters and buffers that may remain."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Target:
        fields = list(type(self).model_fields)
        given = [k for k in fields if getattr(self, k) is not None]
        if len(given) != 1:
            raise fault(
                f"give exactly one of {', '.join(fields)}, not {' and '.join(given) or 'none'}"
            )
        return self


class Unstructured(Section):
    """Global one-shot masks over all parameters."""

    kind: Literal["unstructured"] = Field(description="Which kind of pruning this is.")
    criteria: Distinct[Criterion] = Field(["opd"], description="Scores to prune by.")
    sparsities: Distinct[Fraction] = Field(
        [0.2, 0.4, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99],
        description="Fractions of weights set to zero.",
    )
    threshold: Literal["global", "lamp"] = Field(
        "global",
        description="global: scores as they are; lamp: relative to the larger of their tensor.",
    )
    rounds: int = Field(
        1,
        ge=1,
        le=1000,
        description="How often weights are scored on the way to a sparsity; synflow's paper: 100.",
    )
    finetune: FineTune | None = Field(None, description="Training after pruning; none by default.")


class Structured(Section):
    """Units removed for real, coupled layers together."""

    kind: Literal["structured"] = Field(description="Which kind of pruning this is.")
    criteria: Distinct[Criterion] = Field(["opd"], description="Scores to prune by.")
    ranking: Literal["uniform", "global", "isomorphic"] = Field(
        "uniform",
        description="uniform: the same ratio in each layer (the paper's); global: units compete; "
        "isomorphic: those of like layers do.",
    )
    kinds: Distinct[UnitKind] = Field(
        ["heads", "groups", "width", "hidden"], description="Which kinds of units may go."
    )
    ratios: dict[str, Fraction] = Field(
        default_factory=dict,
        description="Fractions that go from layers of these names or patterns in any case.",
    )
    round_to: int = Field(1, ge=1, description="Channels that remain are a multiple of this.")
    ignored: list[str] = Field(
        default_factory=list, description="Layers, or patterns, whose outputs stay."
    )
    targets: Distinct[Target] = Field(description="How small the network becomes.")
    trainings: list[str] | None = Field(
        None,
        min_length=1,
        description="Names of the trainings this applies to; all by default.",
    )
    min_units: int = Field(1, ge=1, description="Units that each layer keeps at least.")
    finetune: FineTune | None = Field(None, description="Training after pruning; none by default.")
    scratch: Optimiser | None = Field(
        None,
        description="Also train the pruned architecture from fresh weights, with this optimiser "
        "and for as long as the fine-tuning takes: the honest baseline.",
    )

    def choices(self) -> dict[str, Any]:
        """Return what ``spamprune.plan`` is told besides scores and target."""
        names = ("ranking", "kinds", "ratios", "min_units", "round_to", "ignored")
        return {name: getattr(self, name) for name in names}

    @model_validator(mode="after")
    def _scratch_needs_finetune(self) -> Structured:
        if self.scratch is not None and self.finetune is None:
            raise fault("it is compared with fine-tuning: give finetune too", "scratch")
        return self


Experiment = Annotated[Unstructured | Structured, Field(discriminator="kind")]
