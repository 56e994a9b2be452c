"""A whole recipe, and what its file may say besides."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from spamprune.errors import nearest
from spamprune.recipe.schema.data import Data, Model
from spamprune.recipe.schema.pruning import Experiment, Structured
from spamprune.recipe.schema.section import Section, fault
from spamprune.recipe.schema.training import Train


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


class Arithmetic(Section):
    """How numbers are held while weights move; all else is computed in float32."""

    precision: Literal["fp32", "bf16", "auto"] = Field(
        "fp32",
        description="bf16: mixed precision, bfloat16 where it is safe (torch.autocast); auto: bf16 "
        "on a GPU, fp32 on a CPU.",
    )
    channels_last: bool = Field(
        False,
        description="Keep the weights of 2D convolutions channels-last, as inputs are: faster on a "
        "GPU in bf16.",
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
    arithmetic: Arithmetic = Field(
        default_factory=Arithmetic, description="How numbers are held while weights move."
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
            raise fault(f"{self.seeds} are not distinct", "seeds")
        for name in self.train:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise fault(
                    f"{name!r} cannot name a training: use letters, digits, - and _", "train", name
                )
        for i, experiment in enumerate(self.prune):
            for j, name in enumerate(experiment.trainings or ()):
                if name not in self.train:
                    raise fault(
                        f"no training is called {name!r}: {nearest(name, self.train)}",
                        *("prune", i, "trainings", j),
                    )
            for name in experiment.trainings or self.train:
                if isinstance(experiment, Structured) and self.train[name].gradual is not None:
                    raise fault(
                        f"{name!r} loses its units in training (gradual), and targets are of "
                        "unpruned networks: name the other trainings",
                        *("prune", i, "trainings"),
                    )
                tune = experiment.finetune
                if (
                    tune is not None
                    and tune.curvature.structure == "kron"
                    and self.train[name].holds_masks()
                ):
                    raise fault(
                        f"{name!r} holds weights at zero, which Kronecker factors cannot leave "
                        "out: use 'diag', or name the other trainings",
                        *("prune", i, "finetune", "curvature", "structure"),
                    )
        return self

    @model_validator(mode="after")
    def _factors_are_there(self) -> Recipe:
        for i, experiment in enumerate(self.prune):
            field = experiment.needs_factors() if isinstance(experiment, Structured) else None
            for name in experiment.trainings or self.train:
                structure = self.train[name].curvature.structure
                if field is not None and structure != "kron":
                    raise fault(
                        f"it needs Kronecker factors, and the curvature of {name!r} is "
                        f"{structure!r}: name trainings with curvature.structure 'kron'",
                        *("prune", i, *field),
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
