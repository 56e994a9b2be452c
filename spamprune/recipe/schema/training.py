"""How networks are trained, and trained further after pruning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, model_validator

from spamprune.errors import SpampruneError
from spamprune.recipe.schema.section import Section, fault


class Optimiser(Section):
    """How weights move."""

    name: Literal["sgd", "adam"] = Field("sgd", description="The optimiser.")
    lr: float = Field(0.1, gt=0, le=1e6, description="Learning rate at the start.")
    min_lr: float = Field(1e-6, ge=0, description="Learning rate at the end of a cosine schedule.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd.")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="How the learning rate falls, step by step."
    )
    warmup: int = Field(
        0, ge=0, description="Epochs over which the learning rate of a cosine rises from min_lr."
    )

    @model_validator(mode="after")
    def _schedule_makes_sense(self) -> Optimiser:
        if self.warmup and self.schedule != "cosine":
            raise fault("a constant schedule has no warm-up: leave it out", "warmup")
        if self.min_lr > self.lr and self.schedule == "cosine":
            raise fault(f"{self.min_lr} is more than lr {self.lr}: a cosine falls", "min_lr")
        return self


def _check_warmup(optimiser: Optimiser, epochs: int) -> None:
    if optimiser.warmup >= epochs:
        raise fault(
            f"{optimiser.warmup} of {epochs} epochs leave none at full rate", "optimiser", "warmup"
        )


class Prior(Section):
    """The Gaussian prior on the weights."""

    structure: Literal["scalar", "layerwise", "unitwise", "parameterwise"] = Field(
        "parameterwise", description="How prior precisions are tied."
    )
    precision: float = Field(1.0, gt=0, description="δ₀, the precision at the start.")


class Curvature(Section):
    """How the curvature of the loss is computed."""

    labels: Literal["ef", "ggn"] = Field(
        "ef", description="ef: empirical Fisher; ggn: Gauss-Newton, with the model's own labels."
    )
    structure: Literal["diag", "kron"] = Field(
        "diag", description="kron: Kronecker factors for linear layers and convolutions."
    )
    estimator: Literal["sketch", "exact", "asdl"] | None = Field(
        None,
        description="sketch: random signs, one gradient pass; exact: per-sample squares; asdl: the "
        "asdl library. By default sketch for diag and exact for kron.",
    )
    samples: int | None = Field(
        10_000, ge=1, description="Samples seen by the curvature pass of an update; null means all."
    )
    draws: int | None = Field(
        None,
        ge=1,
        description="Sign vectors or drawn labels per sample: one in a sketch; an exact ggn goes "
        "through all classes by default.",
    )
    group: int | None = Field(
        None, ge=1, description="Samples of a sketch that share a square; whole batches by default."
    )
    rest: Literal["diagonal", "exclude"] = Field(
        "diagonal", description="What kron does with norms, scales, positions and lookup tables."
    )

    @model_validator(mode="after")
    def _goes_together(self, info: ValidationInfo) -> Curvature:
        if info.context:
            try:
                info.context["curvature"](**self.model_dump())
            except SpampruneError as e:
                raise ValueError(str(e)) from None
        return self


class Evidence(Section):
    """When and how the marginal likelihood tunes the prior."""

    update: Literal["adam", "exact", "mackay"] = Field(
        "adam",
        description="adam: steps on log δ; mackay: steps of a fixed point; exact: closed-form "
        "optimum of a parameterwise prior.",
    )
    burn_in: int = Field(0, ge=0, description="Epochs before the first update.")
    every: int = Field(5, ge=1, description="Epochs between updates.")
    last: int | None = Field(None, ge=1, description="No update after this epoch.")
    steps: int = Field(100, ge=1, description="Steps of an update.")
    lr: float = Field(0.1, gt=0, description="Learning rate of Adam's steps.")
    damping: float = Field(
        0.0, ge=0, lt=1, description="For exact: weight of the old log δ in the new one."
    )


class Train(Section):
    """One way of training the network."""

    method: Literal["spam", "map"] = Field(
        "spam", description="spam: the evidence tunes the prior; map: the prior stays as it is."
    )
    epochs: int = Field(100, ge=1, description="Passes over the training data.")
    batch_size: int = Field(128, ge=1, le=1_000_000, description="Samples in a step.")
    optimiser: Optimiser = Field(default_factory=Optimiser, description="How weights move.")
    prior: Prior = Field(default_factory=Prior, description="The Gaussian prior.")
    curvature: Curvature = Field(default_factory=Curvature, description="Of the loss.")
    evidence: Evidence = Field(default_factory=Evidence, description="Tuning of the prior.")
    temperature: float = Field(1.0, gt=0, description="T; larger is sparser.")

    @model_validator(mode="after")
    def _exact_needs_parameterwise(self) -> Train:
        exact = self.method == "spam" and self.evidence.update == "exact"
        if exact and self.prior.structure != "parameterwise":
            raise fault(
                "'exact' needs prior.structure 'parameterwise', not "
                f"{self.prior.structure!r}: use 'adam' or 'mackay'",
                "evidence",
                "update",
            )
        if exact and self.curvature.structure == "kron":
            raise fault(
                "'exact' needs curvature.structure 'diag': use 'adam'", "evidence", "update"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Train:
        _check_warmup(self.optimiser, self.epochs)
        return self

    @model_validator(mode="after")
    def _evidence_falls_due(self) -> Train:
        evidence = self.evidence
        final = min(self.epochs, evidence.last or self.epochs)
        last_due = final - final % evidence.every
        if self.method == "spam" and last_due <= evidence.burn_in:
            raise fault(
                f"with every {evidence.every}, burn_in {evidence.burn_in} and {final} epochs no "
                "update ever falls due: choose shorter ones, or method 'map'",
                "evidence",
                "every",
            )
        return self


class FineTune(Section):
    """Training after pruning, under a fixed N(0, 1/precision) prior."""

    epochs: int = Field(10, ge=1, description="Passes over the training data.")
    batch_size: int = Field(128, ge=1, le=1_000_000, description="Samples in a step.")
    optimiser: Optimiser = Field(
        default_factory=lambda: Optimiser(lr=0.01), description="How weights move."
    )
    precision: float = Field(1.0, gt=0, description="Prior precision while fine-tuning.")

    @model_validator(mode="after")
    def _warmup_ends(self) -> FineTune:
        _check_warmup(self.optimiser, self.epochs)
        return self
