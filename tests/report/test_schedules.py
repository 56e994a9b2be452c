"""Pruning during training, in the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spamprune.report import page, tables
from spamprune.report.compare import compare
from spamprune.report.results import (
    GradualCut,
    OnlineCut,
    Quality,
    Results,
    read_results,
    write_results,
)
from spamprune.report.schedules import (
    gradual_curves,
    gradual_steps,
    online_curves,
    online_steps,
    post_hoc,
    quality,
)
from tests.report.drawings import words_in


def _quality(accuracy: float) -> Quality:
    return Quality(accuracy=accuracy, nll=0.3, ece=0.02, brier=0.15)


@pytest.fixture
def results(make_results: Callable[..., Results]) -> Results:
    """Results in which "held" and "paper" were pruned online, and "small" lost units."""
    names = dict.fromkeys(("plain", "held", "paper", "small"), "spam")
    made = make_results(names)
    for cell in made.cells:
        if cell.training != "plain":
            cell.masked, cell.compacted = [], []
            cell.artifact = f"{cell.folder}/trained"
        held = cell.training == "held"
        if cell.training in ("held", "paper"):
            cell.online = [
                OnlineCut(
                    epoch=epoch,
                    criterion="opd",
                    held=held,
                    sparsity=sparsity,
                    pruned=_quality(80 - epoch + cell.seed),
                    trained=_quality(88 - epoch + cell.seed) if held else None,
                )
                for epoch, sparsity in ((2, 0.5), (4, 0.9))
            ]
        if cell.training == "small":
            cell.gradual = [
                GradualCut(
                    epoch=epoch,
                    criterion="opd",
                    ranking="global",
                    target={"macs": share},
                    achieved={"macs": share - 0.01},
                    notes=[],
                    widths={"conv1": 4, "fc": 20},
                    residual=1e-7,
                    size=cell.size.model_copy(update={"macs": int(share * 231_720)}),
                    pruned=_quality(70),
                    trained=_quality(85 + cell.seed),
                )
                for epoch, share in ((2, 0.5), (4, 0.1))
            ]
    return made


def test_cuts_are_grouped_over_seeds_beside_networks_that_were_trained_whole(
    results: Results,
) -> None:
    steps = online_steps(results)
    assert list(steps) == ["held", "paper"]
    assert [len(cuts) for cuts in steps["held"].values()] == [2, 2]
    trained = quality(steps["held"][4], "trained")
    assert trained is not None
    assert (trained.mean, trained.error) == pytest.approx((84.5, 0.5))
    assert quality(steps["paper"][4], "trained") is None
    assert list(gradual_steps(results)) == ["small"]
    (points,) = post_hoc(results).values()
    expected = [
        m.pruned
        for cell in results.cells
        for m in cell.masked
        if cell.training == "plain" and (m.criterion, m.requested) == ("opd", 0.9)
    ]
    assert points[0.9] == expected


def test_figures_and_tables_name_what_they_show(results: Results) -> None:
    shown = words_in(online_curves(results))
    assert {"plain", "held", "paper", "post hoc", "online, just cut", "90", "50"} <= shown
    assert "online, trained on" in shown
    assert {"plain", "small", "just cut", "trained on"} <= words_in(gradual_curves(results))
    table = tables.online_table(results)
    assert "Post hoc, plain" in table
    assert "stay zero" in table
    assert "84.50 ± 0.50" in table
    table = tables.gradual_table(results)
    assert "10 % of MACs → 9 %" in table
    assert "conv1 4, fc 20" in table


def test_the_page_has_both_sections_and_calls_nothing_unpruned_that_is_not(
    results: Results, tmp_path: Path
) -> None:
    results.cells[2].dense.accuracy = 99.9  # of a held network
    write_results(tmp_path, results)
    written = page.write(tmp_path).read_text()
    assert "Online pruning" in written
    assert "Gradual pruning" in written
    assert "Trained networks" in written
    assert '<div class="soft">plain</div>' in written  # the headline's best is one trained whole
    assert (tmp_path / "figures" / "online.svg").is_file()


def test_without_cuts_there_is_no_section(
    make_results: Callable[..., Results], tmp_path: Path
) -> None:
    write_results(tmp_path, make_results())
    written = page.write(tmp_path).read_text()
    assert "Online pruning" not in written
    assert "Gradual pruning" not in written


def test_a_comparison_draws_them(make_run: Callable[..., str], tmp_path: Path) -> None:
    folder = Path(make_run("run"))
    assert not list(compare([folder], tmp_path / "without").parent.glob("online.svg"))
    found = read_results(folder)
    cut = OnlineCut(epoch=2, criterion="opd", held=True, sparsity=0.9, pruned=_quality(80))
    found.cells[0].online = [cut]
    write_results(folder, found)
    assert (compare([folder], tmp_path / "with").parent / "online.svg").is_file()
