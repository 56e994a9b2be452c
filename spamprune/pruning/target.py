"""How small a network should become."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from spamprune.errors import PruningError


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
    """

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        """Refuse none or several fields, and values out of range."""
        given = {k: v for k, v in asdict(self).items() if v is not None}
        if len(given) != 1:
            valid = ", ".join(asdict(self))
            raise PruningError(f"a target is one of {valid}, not {given or 'nothing'}")
        ((key, value),) = given.items()
        if not (0 <= value < 1) or (key != "ratio" and value == 0):
            raise PruningError(f"target {key}={value} is out of range: a fraction below 1")

    def named(self) -> tuple[str, float]:
        """Return the field that is given, and its value."""
        ((key, value),) = ((k, v) for k, v in asdict(self).items() if v is not None)
        return key, value
