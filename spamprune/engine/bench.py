"""What every stage of a cell works with: the recipe, the data, a device, and how to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor, nn

from spamprune import data, models
from spamprune.data import DataSet, Split
from spamprune.engine import network
from spamprune.engine.fit import Job
from spamprune.engine.objective import Teacher, objective_of
from spamprune.errors import ModelError, OutputError
from spamprune.files import write_text
from spamprune.models.build import PLACEMENT
from spamprune.recipe.schema import Recipe, Train, Training
from spamprune.report import measure
from spamprune.report.results import EpochRecord, Quality, Record, Size

OnEpoch = Callable[[str, EpochRecord], None]
R = TypeVar("R", bound=Record)


def load_data(recipe: Recipe) -> DataSet:
    """Load the recipe's data set; the validation split is the same for every seed.

    Images in a folder are normalised and cropped as the weights that timm publishes expect it,
    where the network starts from those.
    """
    found = data.load(
        recipe.data.name,
        root=recipe.data.root,
        validation=recipe.data.validation,
        image_size=recipe.data.image_size,
    )
    if found.name == "image_folder" and recipe.model.weights == network.PRETRAINED:
        found = network.prepare(found, recipe.model.name)
    return found


def create_model(recipe: Recipe, seed: int) -> nn.Module:
    """Create the recipe's network with fresh weights that depend on ``seed`` alone."""
    torch.manual_seed(seed)
    return models.create(recipe.model.name, **_arguments(recipe))


def initial_model(recipe: Recipe, seed: int) -> nn.Module:
    """Create the recipe's network as its training starts: fresh, or with ``model.weights``."""
    if recipe.model.weights is None:
        return create_model(recipe, seed)
    torch.manual_seed(seed)  # of a classifier for other classes
    return network.start(recipe.model.name, _arguments(recipe), recipe.model.weights)


def _arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the model's arguments, which must not reach for weights: timm may unpickle them."""
    for name in PLACEMENT & recipe.model.kwargs.keys():
        raise ModelError(
            f"model.kwargs has {name!r}, which is not about the architecture: leave it out, and "
            "choose weights with model.weights"
        )
    return recipe.model.kwargs


@dataclass(frozen=True)
class Bench:
    """What the stages of one cell share.

    Attributes:
        recipe: The experiment.
        training: Name of the way of training.
        seed: The cell's seed.
        out: The run's folder.
        data: The data set.
        accelerator: Device and precision.
        on_epoch: Called with a stage's name after each of its epochs.
    """

    recipe: Recipe
    training: str
    seed: int
    out: Path
    data: DataSet
    accelerator: Accelerator
    on_epoch: OnEpoch

    @property
    def config(self) -> Train:
        """How the cell's network is trained."""
        return self.recipe.train[self.training]

    @property
    def relative(self) -> str:
        """The cell's folder, relative to the run's."""
        return f"{self.training}/seed{self.seed}"

    @property
    def folder(self) -> Path:
        """The cell's folder."""
        return self.out / self.relative

    def example(self, batch: int = 1) -> Tensor:
        """Return the first ``batch`` validation inputs (training ones if there are none)."""
        split = self.data.validation or self.data.train
        inputs, _ = next(iter(split.loader(batch)))
        return inputs.to(self.accelerator.device)

    def job(self, settings: Training, teacher: Teacher | None = None) -> Job:
        """Return what a network is trained on, as settings say."""
        return Job(
            train=self.data.train,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            optimiser=settings.optimiser,
            seed=self.seed,
            augment=self.recipe.data.augment,
            objective=objective_of(settings.loss, self.data.classes, teacher),
            norms=settings.norms,
            channels_last=self.recipe.arithmetic.channels_last,
        )

    def quality(self, model: nn.Module, split: Split) -> Quality:
        """Measure how well ``model`` predicts ``split``."""
        evaluate = self.recipe.evaluate
        return measure.quality(model, split.loader(evaluate.batch_size), bins=evaluate.bins)

    def size(self, model: nn.Module) -> Size:
        """Measure what ``model`` costs."""
        evaluate = self.recipe.evaluate
        return measure.size(
            model,
            self.example(),
            latency_batches=tuple(evaluate.latency_batches),
            repeats=evaluate.latency_repeats,
        )

    def once(self, name: str, kind: type[R], make: Callable[[], R]) -> R:
        """Return the record ``name`` from the cell's folder, made first where it is missing.

        Raises:
            OutputError: The record is there but damaged.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            record = make()
            write_text(path, record.model_dump_json(indent=1))
        try:
            return kind.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise OutputError(f"{path} is damaged: delete it to make it again") from error
