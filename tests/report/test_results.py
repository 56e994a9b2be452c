from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from spamprune.errors import OutputError
from spamprune.report.results import Results, read_results, write_results


def test_round_trip(tmp_path: Path, make_results: Callable[..., Results]) -> None:
    results = make_results()
    results.cells[0].history[0].loss = math.inf
    path = write_results(tmp_path / "run", results)
    assert read_results(path.parent) == results
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"results\.json.*finished run"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "the file"),
        (lambda text: text.replace('"seed"', '"sead"', 1), r"cells\.0\.s"),
    ],
)
def test_damaged(
    tmp_path: Path,
    make_results: Callable[..., Results],
    damage: Callable[[str], str],
    message: str,
) -> None:
    path = write_results(tmp_path, make_results(compacted=False))
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(OutputError, match=message) as caught:
        read_results(tmp_path)
    assert "\n" not in str(caught.value)


def test_failed_write_keeps_the_old_file(
    tmp_path: Path, make_results: Callable[..., Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_results(compacted=False)
    write_results(tmp_path, old)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_results(tmp_path, make_results())
    assert read_results(tmp_path) == old
