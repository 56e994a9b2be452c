"""Pruning while a network is trained: when it is cut, and how far each time."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from spamprune.recipe.schema.section import Fraction, Section, fault
from spamprune.recipe.schema.selection import Criterion, Target, Units


class Schedule(Section):
    """Cuts at epochs ``start``, ``start + every``, … ``end``."""

    #: Epochs that a training goes on after the last cut, at least.
    after: ClassVar[int] = 0

    start: int | None = Field(
        None, ge=1, description="Epoch of the first cut; `every` by default. Cuts end an epoch."
    )
    end: int | None = Field(
        None, ge=1, description="Epoch of the last cut; by default the last that falls due."
    )
    every: int = Field(10, ge=1, description="Epochs between cuts.")
    ramp: Literal["linear", "cubic", "stairs"] = Field(
        "cubic",
        description="How far the k-th of n cuts goes. linear: k/n of the way; cubic: "
        "1 - (1 - k/n)^3 (Zhu & Gupta 2017); stairs: by the epoch e, (e // every) / (end // every) "
        "(the SpaM paper's code), so that a late start begins further up.",
    )

    def shares(self, epochs: int) -> dict[int, float]:
        """Return how far the cut after each epoch goes, 1 being all the way, in order.

        Args:
            epochs: Those of the training.
        """
        due = self._due(epochs)
        if self.ramp == "stairs":
            return {epoch: (epoch // self.every) / (due[-1] // self.every) for epoch in due}
        shares = {epoch: k / len(due) for k, epoch in enumerate(due, start=1)}
        if self.ramp == "cubic":
            return {epoch: 1 - (1 - share) ** 3 for epoch, share in shares.items()}
        return shares

    def check(self, epochs: int, name: str) -> None:
        """Raise unless the schedule fits a training of ``epochs``; ``name`` is the section's."""
        last = epochs - self.after
        due = self._due(epochs)
        if not due:
            raise fault(
                f"no cut falls due from epoch {self.start or self.every} to {self.end or last}: "
                "begin earlier or cut more often",
                name,
                "start" if self.start else "every",
            )
        if self.end is None:
            return
        if self.end > last:
            why = f", {self.after} after the last cut" if self.after else ""
            raise fault(f"the training has {epochs} epochs{why}: end by {last}", name, "end")
        if due[-1] != self.end:
            raise fault(
                f"cuts fall on epochs {due[0]}, …, {due[-1]}, and {self.end} is none of them: "
                f"end on {due[-1]}, or change start or every",
                *(name, "end"),
            )

    def _due(self, epochs: int) -> range:
        last = epochs - self.after if self.end is None else self.end
        return range(self.start or self.every, last + 1, self.every)


class Online(Schedule):
    """Global masks during training (the SpaM paper's figure 1)."""

    initial: Fraction = Field(0.0, description="Sparsity that the ramp rises from.")
    final: Fraction = Field(description="Sparsity after the last cut.")
    criterion: Criterion = Field("opd", description="Scores to prune by, taken at each cut.")
    hold: bool = Field(
        True,
        description="Pruned weights stay zero; false, as in the paper's code: they train on and "
        "grow again until the next cut.",
    )

    def sparsities(self, epochs: int) -> dict[int, float]:
        """Return the sparsity after each cut, by its epoch."""
        shares = self.shares(epochs)
        return {e: self.final - (self.final - self.initial) * (1 - s) for e, s in shares.items()}

    @model_validator(mode="after")
    def _rises(self) -> Online:
        if self.final <= self.initial:
            raise fault(f"{self.final} is not above the initial sparsity {self.initial}", "final")
        return self


class Gradual(Schedule, Units):
    """Units removed for real while the network is trained, a few at each cut."""

    after: ClassVar[int] = 1

    target: Target = Field(
        description="How small the network is after the last cut: macs, params or bytes."
    )
    criterion: Criterion = Field("opd", description="Scores to prune by, taken at each cut.")

    def budgets(self, epochs: int) -> dict[int, float]:
        """Return what may remain after each cut, by its epoch, relative to the dense network."""
        (final,) = self.target.model_dump(exclude_none=True).values()
        return {epoch: final + (1 - final) * (1 - s) for epoch, s in self.shares(epochs).items()}

    @model_validator(mode="after")
    def _aims_at_a_cost(self) -> Gradual:
        for field in ("ratio", "evidence"):
            if getattr(self.target, field) is not None:
                raise fault(
                    "steps are measured by cost: give macs, params or bytes", "target", field
                )
        return self
