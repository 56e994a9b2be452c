"""What a recipe may say: pydantic models, one per section, defaults those of the paper's code.

Every field is described here and nowhere else: ``spamprune schema`` prints these descriptions, and
unknown keys are errors.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from spamprune.errors import SpampruneError, nearest


def _known(kind: str) -> AfterValidator:
    """Look a name up with the function that recipe.load passes in the context, if any."""

    def check(name: str, info: ValidationInfo) -> str:
        if info.context:
            try:
                info.context[kind](name)
            except SpampruneError as e:
                raise ValueError(str(e)) from None
        return name

    return AfterValidator(check)


def _fault(message: str, *path: str | int) -> PydanticCustomError:
    """Return the error of a rule between fields that blames the field at ``path``."""
    return PydanticCustomError("rule", "{message}", {"message": message, "path": path})


def _distinct(values: list[Any]) -> list[Any]:
    """Refuse repeated entries, which would count as further measurements."""
    for i, value in enumerate(values):
        if value in values[:i]:
            raise _fault("repeats an earlier entry: leave it out", i)
    return values


T = TypeVar("T")
Distinct = Annotated[list[T], Field(min_length=1), AfterValidator(_distinct)]
Criterion = Annotated[str, _known("criterion")]
UnitKind = Literal["heads", "head_dims", "groups", "group_dims", "width", "hidden"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe; unknown keys are errors and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    """Which data set, from where, and how it is split."""

    name: Annotated[str, _known("data set")] = Field(
        description="Name of the data set: `spamprune data` lists them."
    )
    root: str | None = Field(
        None,
        description="Folder with the raw files in their standard names, gzipped or not; by default "
        "the places that the data set knows, else a download.",
    )
    validation: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Fraction of the training data held out for choices; 0 trains on all.",
    )
    augment: Literal["none", "flip", "flip_crop"] = Field(
        "none", description="Random horizontal flips, and crops after padding by 4 pixels."
    )
    image_size: int | None = Field(
        None, ge=1, description="Side that images of an image folder are resized to, in pixels."
    )


class Model(Section):
    """Which network: any name that timm's registry knows, ours included."""

    name: Annotated[str, _known("model")] = Field(description="Name of the architecture.")
    kwargs: dict[str, JsonValue] = Field(
        default_factory=dict, description="Further arguments of `timm.create_model`."
    )


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
            raise _fault("a constant schedule has no warm-up: leave it out", "warmup")
        if self.min_lr > self.lr and self.schedule == "cosine":
            raise _fault(f"{self.min_lr} is more than lr {self.lr}: a cosine falls", "min_lr")
        return self


def _check_warmup(optimiser: Optimiser, epochs: int) -> None:
    if optimiser.warmup >= epochs:
        raise _fault(
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
            raise _fault(
                "'exact' needs prior.structure 'parameterwise', not "
                f"{self.prior.structure!r}: use 'adam' or 'mackay'",
                "evidence",
                "update",
            )
        if exact and self.curvature.structure == "kron":
            raise _fault(
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
            raise _fault(
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
            raise _fault(
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
            raise _fault("it is compared with fine-tuning: give finetune too", "scratch")
        return self


Experiment = Annotated[Unstructured | Structured, Field(discriminator="kind")]


class Evaluate(Section):
    """What is measured."""

    batch_size: int = Field(1000, ge=1, le=1_000_000, description="Samples in an evaluation batch.")
    bins: int = Field(15, ge=1, le=10_000, description="Equal-width bins of the calibration error.")
    latency_batches: list[Annotated[int, Field(ge=1, le=65_536)]] = Field(
        [1, 128], description="Batch sizes at which latency is measured."
    )
    latency_repeats: int = Field(
        30, ge=1, le=10_000, description="Timed repeats; the median is reported."
    )


class Recipe(Section):
    """An experiment: train the model in each way, for each seed, prune it, and report."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="Short name; names the run's folder."
    )
    description: str = Field("", description="What the experiment shows and how long it takes.")
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        [0], min_length=1, description="Each seed is a repetition."
    )
    threads: int = Field(
        1,
        ge=1,
        le=1024,
        description="CPU threads of each process; part of what makes a run repeatable.",
    )
    data: Data = Field(description="The data set.")
    model: Model = Field(description="The network.")
    train: dict[str, Train] = Field(
        min_length=1, description="Ways of training, by a name that appears in the report."
    )
    prune: list[Experiment] = Field(
        default_factory=list, description="Experiments on each trained network."
    )
    evaluate: Evaluate = Field(default_factory=Evaluate, description="What is measured.")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if len(set(self.seeds)) != len(self.seeds):
            raise _fault(f"{self.seeds} are not distinct", "seeds")
        for name in self.train:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise _fault(
                    f"{name!r} cannot name a training: use letters, digits, - and _", "train", name
                )
        for i, experiment in enumerate(self.prune):
            if isinstance(experiment, Structured) and experiment.trainings is not None:
                for j, name in enumerate(experiment.trainings):
                    if name not in self.train:
                        raise _fault(
                            f"no training is called {name!r}: {nearest(name, self.train)}",
                            *("prune", i, "trainings", j),
                        )
        return self


class RecipeFile(Recipe):
    """What a file may say besides: both are worked in when it is loaded, and gone thereafter."""

    extends: str | None = Field(
        None,
        description="Another recipe that this one changes: a path relative to this file, or the "
        "name of a bundled recipe. Mappings are merged, all else is replaced, null takes away.",
    )
    variants: dict[str, dict[str, JsonValue]] = Field(
        default_factory=dict,
        description="Named sets of changes to this recipe, written as one that extends it: "
        "`spamprune run RECIPE@smoke` runs the one called smoke.",
    )
