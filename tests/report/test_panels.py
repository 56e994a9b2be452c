from __future__ import annotations

from collections.abc import Callable

import pytest

from spamprune.report.panels import figures, finetuning_panels, training_panels
from spamprune.report.results import Results
from tests.report.drawings import words_in

GRID = {"map": "map", **{f"spam-{i}": "spam" for i in range(8)}}
CRITERIA = ("opd", "grasp", "snip", "magnitude")


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"trainings": GRID, "criteria": CRITERIA}, ["trainings", "finetuning"]),
        ({"trainings": {"map": "map"}, "criteria": CRITERIA}, ["finetuning"]),
        ({}, ["finetuning"]),
    ],
)
def test_what_is_drawn(
    how: dict[str, object], expected: list[str], make_results: Callable[..., Results]
) -> None:
    assert [name for name, _, _ in figures(make_results(**how), 0)] == expected


def test_trainings_side_by_side(make_results: Callable[..., Results]) -> None:
    drawn = training_panels(make_results(GRID, criteria=CRITERIA), 0)
    assert {*GRID, *CRITERIA, "as trained", "99"} <= words_in(drawn)


def test_before_and_after_fine_tuning(make_results: Callable[..., Results]) -> None:
    results = make_results(GRID, criteria=CRITERIA)
    drawn = words_in(finetuning_panels(results, 0))
    assert {*GRID, *CRITERIA, "just pruned", "fine-tuned", "as trained"} <= drawn


def test_without_fine_tuning(make_results: Callable[..., Results]) -> None:
    assert not list(figures(make_results(finetuned=False), 0))
