"""What every stage of a cell works with: the recipe, the data, a device, and how to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor, nn

from spamprune import data, models
from spamprune.data import DataSet, Split
from spamprune.errors import OutputError
from spamprune.files import write_text
from spamprune.recipe.schema import Recipe, Train
from spamprune.report import measure
from spamprune.report.results import EpochRecord, Quality, Record, Size

OnEpoch = Callable[[str, EpochRecord], None]
R = TypeVar("R", bound=Record)


def load_data(recipe: Recipe) -> DataSet:
    """Load the recipe's data set; the validation split is the same for every seed."""
    return data.load(
        recipe.data.name,
        root=recipe.data.root,
        validation=recipe.data.validation,
        image_size=recipe.data.image_size,
    )


def create_model(recipe: Recipe, seed: int) -> nn.Module:
    """Create the recipe's network with fresh weights that depend on ``seed`` alone."""
    torch.manual_seed(seed)
    return models.create(recipe.model.name, **recipe.model.kwargs)


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
