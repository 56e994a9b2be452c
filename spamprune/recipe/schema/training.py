"""How networks are trained, and trained further after pruning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, model_validator

from spamprune.errors import SpampruneError
from spamprune.recipe.schema.schedules import Gradual, Online
from spamprune.recipe.schema.section import Section, fault, idle
from spamprune.recipe.schema.variational import Variational


class Optimiser(Section):
    """How weights move."""

    name: Literal["sgd", "adam", "adabelief"] = Field(
        "sgd", description="The optimiser; adabelief for method variational."
    )
    lr: float = Field(
        0.1,
        gt=0,
        le=1e6,
        description="Learning rate at the start; adam and adabelief have no default.",
    )
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
        if self.schedule != "cosine":
            idle(self, "a constant schedule does not fall", "min_lr")
        return self

    @model_validator(mode="after")
    def _rate_is_meant(self) -> Optimiser:
        if self.name != "sgd" and "lr" not in self.model_fields_set:
            raise fault(f"{self.lr} by default is for 'sgd': give {self.name!r} its rate", "lr")
        return self

    @model_validator(mode="after")
    def _momentum_is_used(self) -> Optimiser:
        if self.name != "sgd":
            idle(self, f"{self.name!r} has betas of its own: momentum is for 'sgd'", "momentum")
        return self


def _check_warmup(optimiser: Optimiser, epochs: int) -> None:
    if optimiser.warmup >= epochs:
        raise fault(
            f"{optimiser.warmup} of {epochs} epochs leave none at full rate", "optimiser", "warmup"
        )


def check_prior_step(optimiser: Optimiser, *path: str) -> None:
    """Raise unless a prior can act after the optimiser's steps; ``path`` leads to it."""
    if optimiser.name == "adabelief":
        raise fault(
            "a Gaussian prior acts after the steps of sgd and adam: choose one of them, or method "
            "'variational'",
            *(*path, "name"),
        )


class Prior(Section):
    """The Gaussian prior on the weights."""

    structure: Literal["scalar", "layerwise", "unitwise", "parameterwise"] = Field(
        "parameterwise",
        description="How prior precisions are tied; all stay alike where method map tunes none.",
    )
    precision: float = Field(
        1.0,
        gt=0,
        description="δ₀, the precision at the start. It pulls weights to zero, pretrained ones "
        "too, by T·δ₀/N of their size per unit of learning rate.",
    )


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

    @model_validator(mode="after")
    def _update_uses_them(self) -> Evidence:
        others = {"adam": ("damping",), "mackay": ("lr", "damping"), "exact": ("lr",)}
        idle(self, f"update {self.update!r} has no use for it", *others[self.update])
        return self


class Loss(Section):
    """What is minimised besides the prior: the cross-entropy of targets that may be softened."""

    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Weight of the uniform distribution in the targets, also in those that the "
        "evidence and the posterior are of.",
    )
    mixup: float = Field(
        0.0,
        ge=0,
        description="α of mixup: pairs of samples and of their targets are averaged, with weights "
        "from Beta(α, α); 0 is off. The evidence and the posterior are of the samples themselves.",
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        description="α of CutMix: a rectangle of an image comes from another one; 0 is off. With "
        "mixup too, each batch has one of the two, with equal odds.",
    )


class Training(Section):
    """What training and fine-tuning have in common."""

    method: Literal["spam", "map", "variational"] = Field(
        "spam",
        description="spam: the evidence tunes the prior; map: the prior stays as it is; "
        "variational: mean-field inference, with a prior of its own.",
    )
    epochs: int = Field(100, ge=1, description="Passes over the training data.")
    batch_size: int = Field(128, ge=1, le=1_000_000, description="Samples in a step.")
    optimiser: Optimiser = Field(default_factory=Optimiser, description="How weights move.")
    loss: Loss = Field(default_factory=Loss, description="What is minimised besides the prior.")
    norms: Literal["train", "frozen"] = Field(
        "train",
        description="BatchNorm while weights move. train: normalises by the batch; frozen: by the "
        "statistics that it has, which stay. Scales and shifts are trained either way.",
    )
    prior: Prior = Field(default_factory=Prior, description="The Gaussian prior.")
    curvature: Curvature = Field(default_factory=Curvature, description="Of the loss.")
    evidence: Evidence = Field(
        default_factory=Evidence,
        description="Tuning of the prior by method spam; map has no use for it.",
    )
    temperature: float = Field(1.0, gt=0, description="T; larger is sparser.")

    @model_validator(mode="after")
    def _prior_can_act(self) -> Training:
        if self.method != "variational":
            check_prior_step(self.optimiser, "optimiser")
        return self

    @model_validator(mode="after")
    def _exact_needs_parameterwise(self) -> Training:
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
    def _warmup_ends(self) -> Training:
        _check_warmup(self.optimiser, self.epochs)
        return self

    @model_validator(mode="after")
    def _evidence_falls_due(self) -> Training:
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


class Train(Training):
    """One way of training the network."""

    online: Online | None = Field(
        None, description="Masks that grow during training; none by default."
    )
    gradual: Gradual | None = Field(
        None, description="Units removed during training; none by default."
    )
    variational: Variational | None = Field(
        None, description="Settings of method variational; its defaults where there are none."
    )

    def inference(self) -> Variational | None:
        """Return the settings of method variational, None for other methods."""
        return (self.variational or Variational()) if self.method == "variational" else None

    def holds_masks(self) -> bool:
        """Return whether single weights are pruned in training and stay zero thereafter."""
        inference = self.inference()
        reduced = inference is not None and inference.reduction is not None
        return reduced or (self.online is not None and self.online.hold)

    @model_validator(mode="after")
    def _inference_stands_alone(self) -> Train:
        inference = self.inference()
        if inference is None:
            if self.variational is not None:
                raise fault(f"method {self.method!r} has no use for it", "variational")
            return self
        unused = ("prior", "curvature", "evidence", "temperature", "online", "gradual")
        idle(self, "method 'variational' has no use for it", *unused)
        for name in ("mixup", "cutmix"):
            if getattr(self.loss, name):
                raise fault(
                    "the bound of method 'variational' is of the samples themselves: leave it out",
                    *("loss", name),
                )
        if inference.reduction is not None:
            inference.reduction.check(self.epochs, "variational", "reduction")
        return self

    @model_validator(mode="after")
    def _cuts_fall_due(self) -> Train:
        if self.online is not None and self.gradual is not None:
            raise fault("choose one of online and gradual", "gradual")
        if self.online is not None:
            self.online.check(self.epochs, "online")
            if self.online.hold and self.curvature.structure == "kron":
                raise fault(
                    "Kronecker factors cannot leave out single weights: use curvature.structure "
                    "'diag', or hold: false",
                    *("online", "hold"),
                )
        if self.gradual is not None:
            self.gradual.check(self.epochs, "gradual")
        return self


class Distil(Section):
    """Knowledge distillation: the trained network teaches the pruned one (Hinton et al. 2015)."""

    weight: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Weight w of w·T²·KL(teacher ‖ student) + (1-w)·loss, between probabilities "
        "softened by the temperature T.",
    )
    temperature: float = Field(
        2.0, gt=0, description="T, which divides the logits of both networks."
    )


class FineTuneOptimiser(Optimiser):
    """How weights move after pruning."""

    lr: float = Field(
        0.01,
        gt=0,
        le=1e6,
        description="Learning rate at the start; adam has no default.",
    )


class FineTune(Training):
    """Training after pruning, by default under a fixed N(0, 1/prior.precision) prior."""

    method: Literal["spam", "map"] = Field(
        "map",
        description="map: the prior stays as it is; spam: the evidence of the weights that are "
        "left tunes it.",
    )
    epochs: int = Field(10, ge=1, description="Passes over the training data.")
    optimiser: FineTuneOptimiser = Field(
        default_factory=FineTuneOptimiser, description="How weights move."
    )
    distil: Distil | None = Field(
        None, description="Learn from the trained network as it was before pruning, too."
    )

    @model_validator(mode="after")
    def _prior_is_tuned(self) -> FineTune:
        if self.method == "map":
            idle(self, "it is for method 'spam'", "evidence")
            if self.prior.structure != Prior().structure:
                raise fault("it is for method 'spam': leave it out", "prior", "structure")
        return self
