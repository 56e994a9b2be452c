"""How numbers, targets and their absence are written, in every table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from spamprune.report.summary import Spread

DIGITS = {"accuracy": 2, "nll": 3, "ece": 3, "brier": 3}
ABSENT = "–"


def number(value: float, digits: int) -> str:
    """Return ``value`` with ``digits`` decimals and grouped thousands; NaN and ∞ by their names."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    return f"{value:,.{digits}f}".replace("-", "−")


def plus_minus(value: Spread | None, digits: int) -> str:
    """Return "mean ± standard error", the mean alone for one seed, a dash for nothing."""
    if value is None:
        return ABSENT
    error = "" if value.error is None else f" ± {value.error:,.{digits}f}"
    return number(value.mean, digits) + error


def count(value: float) -> str:
    """Return a count with grouped thousands."""
    return number(value, 0)


def milliseconds(seconds: Sequence[float]) -> str:
    """Return the median of latencies in seconds, in milliseconds."""
    if not seconds:
        return ABSENT
    value = 1000 * median(seconds)
    return count(value) if value >= 100 else f"{value:#.3g}"


def target(values: dict[str, float]) -> str:
    """Return a target such as "10 % of MACs"."""
    if "evidence" in values:
        return "most evidence"
    names = {
        "macs": "% of MACs",
        "params": "% of params",
        "bytes": "% of bytes",
        "ratio": "% of units removed",
    }
    return ", ".join(f"{100 * v:.6g} {names.get(k, k)}" for k, v in values.items())
