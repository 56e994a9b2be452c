from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = """\
name: small
seeds: [0, 1]
data:
  name: cancer
  augment: none
model:
  name: fc_cancer
train:
  map:
    method: map
    epochs: 3
  spam:
    epochs: 5
    prior:
      structure: unitwise
    optimiser: {name: adam, lr: 1e-3}
prune:
  - kind: unstructured
    criteria: [opd, random]
  - kind: structured
    targets:
      - ratio: 0.5
    trainings: [spam]
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that writes a small recipe, with parts replaced, and gives its path."""
    monkeypatch.chdir(tmp_path)

    def make(*changes: tuple[str, str]) -> str:
        text = SMALL
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        Path("r.yaml").write_text(text, encoding="utf-8")
        return "r.yaml"

    return make
