"""A whole recipe, and what its file may say besides."""

from __future__ import annotations

import re
from typing import Annotated

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
            raise fault(f"{self.seeds} are not distinct", "seeds")
        for name in self.train:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise fault(
                    f"{name!r} cannot name a training: use letters, digits, - and _", "train", name
                )
        for i, experiment in enumerate(self.prune):
            if isinstance(experiment, Structured) and experiment.trainings is not None:
                for j, name in enumerate(experiment.trainings):
                    if name not in self.train:
                        raise fault(
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
