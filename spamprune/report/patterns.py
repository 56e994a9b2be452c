"""Semi-structured prunings as the report shows them: grouped over seeds, and in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from spamprune.report.results import Cell, Patterned, Quality, Results
from spamprune.report.summary import Spread, Stage, spread, spread_of

_TIMED = (
    "Speed-up is of the forward pass in half precision with torch's compressed weights, against "
    "the same with plain ones; a dash means that nothing was compressed. "
)
_NOTE = (
    "Torch computes with 2:4 on NVIDIA GPUs only. Elsewhere zeros in a pattern save neither time "
    "nor memory, only bytes once a file is compressed."
)


@dataclass(frozen=True)
class Pattern:
    """The networks that one semi-structured pruning made, one per seed.

    Attributes:
        experiment: Its position in the recipe's ``prune``.
        members: Each pruned network with the cell that it came from.
    """

    experiment: int
    training: str
    criterion: str
    pattern: str
    members: list[tuple[Cell, Patterned]] = field(default_factory=list)

    def accuracy(self, stage: Stage) -> Spread | None:
        """Return the accuracy at ``stage`` in percent, or None if it was not measured."""
        measured: list[Quality | None] = [getattr(p, stage) for _, p in self.members]
        present = [quality for quality in measured if quality is not None]
        return spread_of(present, "accuracy") if present else None

    def dense_accuracy(self) -> Spread:
        """Return the accuracy of the networks that these came from, in percent."""
        return spread_of([cell.dense for cell, _ in self.members], "accuracy")

    def zeros(self) -> Spread:
        """Return the percentage of all weights that are zero."""
        return spread(100 * p.achieved for _, p in self.members)

    def speedup(self, batch: int) -> Spread | None:
        """Return how many times faster compressed weights are, or None if that was not measured."""
        ratios = [
            p.half_latency[batch] / p.compressed_latency[batch]
            for _, p in self.members
            if batch in p.compressed_latency
        ]
        return spread(ratios) if ratios else None

    def notes(self) -> Iterable[str]:
        """Return what was left whole, and why, each once."""
        return dict.fromkeys(note for _, p in self.members for note in p.notes)


def patterns(results: Results) -> list[Pattern]:
    """Return every semi-structured pruning, in the order of the results."""
    groups: dict[tuple[int, str, str, str], Pattern] = {}
    for cell in results.cells:
        for p in cell.patterned:
            key = (p.experiment, cell.training, p.criterion, p.pattern)
            groups.setdefault(key, Pattern(*key)).members.append((cell, p))
    return sorted(groups.values(), key=lambda pattern: pattern.experiment)


def note(shown: Iterable[Pattern]) -> str:
    """Return what a reader of the table must know."""
    return _TIMED + _NOTE if batches(shown) else _NOTE


def batches(shown: Iterable[Pattern]) -> list[int]:
    """Return the batch sizes at which compressed weights were timed."""
    return sorted({b for pattern in shown for _, p in pattern.members for b in p.half_latency})
