from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from spamprune.report.results import Results
from spamprune.report.style import criterion_colours
from spamprune.report.summary import (
    best_family,
    best_sparsity,
    beyond,
    families,
    masked_series,
    spread,
    step_by_step,
)


def test_spread() -> None:
    assert spread([1.0, 2.0, 6.0]).mean == 3
    # the sample variance of 1, 2, 6 is 7
    assert spread([1.0, 2.0, 6.0]).error == pytest.approx(math.sqrt(7 / 3))
    assert spread([4.0]).error is None
    assert math.isnan(spread([1.0, math.nan]).mean)


def test_masked_series(make_results: Callable[..., Results]) -> None:
    series = masked_series(make_results(seeds=3), 0, "pruned")
    assert set(series) == {(t, c) for t in ("map", "spam-unitwise") for c in ("opd", "magnitude")}
    assert all(len(seeds) == 3 for points in series.values() for seeds in points.values())
    assert masked_series(make_results(finetuned=False), 0, "finetuned") == {}
    assert masked_series(make_results(), 1, "pruned") == {}


def test_best_family_is_the_smallest_within_a_point(make_results: Callable[..., Results]) -> None:
    shown = families(make_results())
    assert len(shown) == 2 * 2 * 2 * 4
    best = best_family(shown)
    assert best is not None
    assert best.final_accuracy().mean >= best.dense_accuracy().mean - 1
    assert best.saving("bytes") == pytest.approx(best.members[0][0].size.bytes / best.cost("bytes"))
    for family in shown:
        if family.cost("bytes") < best.cost("bytes"):
            assert family.final_accuracy().mean < family.dense_accuracy().mean - 1


def test_savings_are_of_the_averages_that_stand_beside_them(
    make_results: Callable[..., Results],
) -> None:
    family = families(make_results())[0]
    for (_, pruned), macs in zip(family.members, (20_000, 60_000), strict=True):
        pruned.size.macs = macs
    assert family.cost("macs") == 40_000
    assert family.saving("macs") == pytest.approx(231_720 / 40_000)


def test_best_family_of_none(make_results: Callable[..., Results]) -> None:
    assert best_family(families(make_results(compacted=False))) is None


def test_best_sparsity(make_results: Callable[..., Results]) -> None:
    results = make_results()
    best = best_sparsity(results)
    assert best is not None
    assert best.accuracy.mean >= best.dense_accuracy.mean - 1
    assert (best.training, best.finetuned) == ("spam-unitwise", True)
    assert best_sparsity(make_results(masked=False)) is None


def test_networks_that_were_fine_tuned_on_the_way_are_not_called_just_pruned(
    make_results: Callable[..., Results],
) -> None:
    results = make_results(finetuned=False)
    assert best_sparsity(results) is not None
    assert step_by_step(results, 0) == ""
    for cell in results.cells:
        for masked in cell.masked:
            masked.schedule = "iterative"
    assert best_sparsity(results) is None
    assert step_by_step(results, 0).startswith("Iterative: ")
    assert step_by_step(results, 1) == ""


def test_criteria_are_named_with_their_rounds(make_results: Callable[..., Results]) -> None:
    results = make_results()
    for cell in results.cells:
        for masked in cell.masked:
            if masked.criterion == "magnitude":
                masked.rounds = 20
    named = {criterion for _, criterion in masked_series(results, 0, "pruned")}
    assert named == {"opd", "magnitude, 20 rounds"}
    assert (
        criterion_colours(["magnitude, 20 rounds"])["magnitude, 20 rounds"]
        == (criterion_colours(["magnitude"])["magnitude"])
    )


def test_sparsities_that_training_went_beyond_are_left_out(
    make_results: Callable[..., Results],
) -> None:
    results = make_results({"held": "map"}, criteria=("opd",))
    for cell in results.cells:
        for masked in cell.masked:
            masked.achieved = max(masked.requested, 0.9) + 0.4 / cell.size.params  # as rounded
            masked.pruned.accuracy = cell.dense.accuracy
    assert list(masked_series(results, 0, "pruned")["held", "opd"]) == [0.9, 0.95, 0.99]
    assert "already pruned more" in beyond(results, 0)
    assert not beyond(results, 1)
    for cell in results.cells:
        cell.masked = cell.masked[:3]
    assert best_sparsity(results) is None
