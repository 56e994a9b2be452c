"""Progress bars on a terminal, silence elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from spamprune.recipe.schema import Recipe, Structured
from spamprune.report.results import EpochRecord


class Progress:
    """Shows how far a run is: a bar for its cells, and one for each cell that is worked on.

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
        self._stages: dict[tuple[str, int], tuple[str, TaskID]] = {}

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

    def epoch(self, training: str, seed: int, stage: str, record: EpochRecord) -> None:
        """Show an epoch that a cell has finished in one of its stages."""
        shown, task = self._stages.get((training, seed), ("", None))
        if shown != stage:
            if task is not None:
                self._bars.remove_task(task)
            task = self._bars.add_task(
                f"{training} seed {seed}: {stage}", total=self._epochs(training, stage), note=""
            )
            self._stages[training, seed] = stage, task
        note = f"loss {record.loss:.4f}"
        if record.validation_accuracy is not None:
            note += f"  accuracy {record.validation_accuracy:.2f} %"
        if record.log_evidence is not None:
            note += f"  log evidence {record.log_evidence:.0f}"
        if task is not None:
            self._bars.update(task, completed=record.epoch, note=note)

    def cell_done(self, training: str, seed: int) -> None:
        """Count one more finished cell."""
        _, task = self._stages.pop((training, seed), ("", None))
        if task is not None:
            self._bars.remove_task(task)
        self._bars.advance(self._cells)

    def _epochs(self, training: str, stage: str) -> int:
        """Return how many epochs a stage has; pruning stages are named ``prune<index>-…``."""
        if stage == "train":
            return self._recipe.train[training].epochs
        index = int(stage.removeprefix("prune").partition("-")[0])
        experiment = self._recipe.prune[index]
        if isinstance(experiment, Structured) and stage.endswith(".scratch"):
            tunings = len(experiment.targets) if experiment.iterative else 1  # at most
            return experiment.scratch_epochs(self._recipe.train[training], tunings)
        finetune = experiment.finetune
        return finetune.epochs if finetune is not None else 0
