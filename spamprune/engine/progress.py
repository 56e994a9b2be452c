"""Progress bars on a terminal, silence elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from spamprune.engine.bench import OnEpoch
from spamprune.recipe.schema import Recipe
from spamprune.report.results import EpochRecord


class Progress:
    """Shows how far a run is: a bar for its cells and one for the training at hand.

    Args:
        recipe: What is run.
        cells: How many cells it has.
    """

    def __init__(self, recipe: Recipe, cells: int):
        console = Console(stderr=True)
        self._recipe = recipe
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._cells = self._bars.add_task(recipe.name, total=cells, note="")
        self._stage = self._bars.add_task("", total=None, note="", visible=False)
        self._name = ""

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def of_cell(self, training: str, seed: int) -> OnEpoch:
        """Return the function that a cell calls after each epoch."""

        def report(stage: str, record: EpochRecord) -> None:
            name = f"{training} seed {seed}: {stage}"
            if name != self._name:
                self._name = name
                total = self._recipe.train[training].epochs if stage == "train" else None
                self._bars.reset(self._stage, total=total, description=name, visible=True)
            note = f"loss {record.loss:.4f}"
            if record.validation_accuracy is not None:
                note += f"  accuracy {record.validation_accuracy:.2f} %"
            if record.log_evidence is not None:
                note += f"  log evidence {record.log_evidence:.0f}"
            self._bars.update(self._stage, completed=record.epoch, note=note)

        return report

    def cell_done(self) -> None:
        """Count one more finished cell."""
        self._bars.advance(self._cells)
