"""What a plan notes, for people: alike notes on many layers become one."""

from __future__ import annotations

import re
from collections.abc import Iterable


def grouped(notes: Iterable[str]) -> list[str]:
    """Return one line for all layers of which the same is said, in the order of the first.

    ``blocks.0.fc: why``, ``blocks.1.fc: why`` become ``blocks.*.fc (2 layers): why``.
    """
    layers: dict[str, list[str]] = {}
    for note in notes:
        layer, _, reason = note.partition(": ")
        layers.setdefault(reason, []).append(layer)
    return [f"{_together(names)}: {reason}" for reason, names in layers.items()]


def _together(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    patterns = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
    shown = ", ".join(patterns[:_SHOWN]) + (", …" if len(patterns) > _SHOWN else "")
    return f"{shown} ({len(names)} layers)"


_SHOWN = 3
