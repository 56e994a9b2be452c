"""How small a network should become."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real

from spamprune.errors import PruningError
from spamprune.pruning.evidence import Evidence


@dataclass(frozen=True)
class Target:
    """How small the network should become; exactly one field is given.

    Attributes:
        ratio: Fraction of units removed, in [0, 1).
        macs: Fraction of multiply-accumulates that may remain, in (0, 1).
        params: Fraction of parameters that may remain, in (0, 1).
        bytes: Fraction of the parameters' and buffers' bytes that may remain, in (0, 1).
        latency: Fraction of the time of a forward pass of the example that may remain, in (0, 1),
            measured where the model is.
        evidence: Of the network: it becomes as small as that says.
    """

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    evidence: Evidence | None = None

    def __post_init__(self) -> None:
        """Refuse none or several fields, and values out of range."""
        names = [field.name for field in fields(self)]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if len(given) != 1:
            valid = ", ".join(names)
            raise PruningError(f"a target is one of {valid}, not {given or 'nothing'}")
        if self.evidence is not None:
            if not isinstance(self.evidence, Evidence):
                raise PruningError(
                    f"target evidence={self.evidence!r} is not the evidence of a network: give "
                    "spamprune.Evidence(model, posterior, data)"
                )
            return
        ((key, value),) = given.items()
        if (
            not isinstance(value, Real)
            or not (0 <= float(value) < 1)
            or (key != "ratio" and value == 0)
        ):
            raise PruningError(f"target {key}={value!r} is out of range: a fraction below 1")

    def named(self) -> tuple[str, float]:
        """Return the field that is given, and its value; 1 for evidence, which has none."""
        if self.evidence is not None:
            return "evidence", 1.0
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        ((key, value),) = ((k, v) for k, v in found if v is not None)
        return key, value
