"""Semi-structured prunings in the report."""

from __future__ import annotations

from collections.abc import Callable

from spamprune.report.patterns import note, patterns
from spamprune.report.results import Patterned, Results
from spamprune.report.tables import patterns_table


def test_the_note_tells_of_speed_only_where_it_was_measured(
    make_results: Callable[..., Results],
) -> None:
    results = make_results({"map": "map"}, seeds=1)
    (cell,) = results.cells
    record = Patterned(
        experiment=2,
        criterion="opd",
        pattern="2:4",
        achieved=0.5,
        nonzero=30_000,
        notes=[],
        pruned=cell.dense,
        artifact="map/seed0/prune2-opd-2:4",
    )
    cell.patterned = [record]
    shown = patterns(results)
    assert "Speed-up" not in note(shown)
    table = patterns_table(shown).markdown()
    assert "As trained / %" in table
    assert "Speed-up" not in table
    record.half_latency = {1: 2e-4}
    assert "Speed-up" in note(shown)
    assert "Speed-up" in patterns_table(shown).markdown()
