"""By what, and how far, networks are pruned, after training or during it."""

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

Criterion = Annotated[str, known("criterion")]
UnitKind = Literal["heads", "head_dims", "groups", "group_dims", "width", "hidden"]


class Target(Section):
    """How small the network becomes; exactly one of the fields."""

    ratio: Fraction | None = Field(None, description="Fraction of units removed.")
    macs: OpenFraction | None = Field(None, description="Fraction of the MACs that may remain.")
    params: OpenFraction | None = Field(
        None, description="Fraction of the parameters that may remain."
    )
    bytes: OpenFraction | None = Field(
        None, description="Fraction of the bytes of parameters and buffers that may remain."
    )
    evidence: Literal[True] | None = Field(
        None, description="true: as small as the evidence says, found for each network."
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


class Units(Section):
    """Which units may go, and how they are compared."""

    ranking: Literal["uniform", "global", "per_cost", "isomorphic"] = Field(
        "uniform",
        description="uniform: the same ratio in each layer (the paper's); global: units compete; "
        "per_cost: by importance over what a unit saves of the target's cost; isomorphic: those of "
        "like layers compete.",
    )
    kinds: Distinct[UnitKind] = Field(
        ["heads", "groups", "width", "hidden"], description="Which kinds of units may go."
    )
    round_to: int = Field(1, ge=1, description="Channels that remain are a multiple of this.")
    min_units: int = Field(1, ge=1, description="Units that each layer keeps at least.")
    ignored: list[str] = Field(
        default_factory=list, description="Layers, or patterns, whose outputs stay."
    )

    def choices(self) -> dict[str, Any]:
        """Return what ``spamprune.plan`` is told besides scores and target."""
        return {name: getattr(self, name) for name in Units.model_fields}
