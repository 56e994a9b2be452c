"""Pruning during training, in the report."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from spamprune.report import page, tables, terminal
from spamprune.report.compare import compare
from spamprune.report.cuts import gradual_steps, online_steps, post_hoc, quality
from spamprune.report.results import (
    GradualCut,
    OnlineCut,
    Quality,
    Results,
    write_results,
)
from spamprune.report.schedules import gradual_curves, online_curves
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
    table = tables.online_table(results).markdown()
    assert "Post hoc, plain" in table
    assert "stay zero" in table
    assert "84.50 ± 0.50" in table
    table = tables.gradual_table(results).markdown()
    assert "10 % of MACs → 9 %" in table
    assert "conv1 4, fc 20" in table


@pytest.mark.usefixtures("blank_figures")
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


@pytest.fixture
def collapsed(results: Results) -> Results:
    """The results, with accuracies of "held" that masks and smaller networks easily keep."""
    plain = results.cells[0]
    for cell in results.cells:
        if cell.training == "held":
            cell.dense.accuracy = 20.0
            cell.masked = [m.model_copy(update={"requested": 0.999}) for m in plain.masked]
            cell.compacted = [
                c.model_copy(update={"size": c.size.model_copy(update={"bytes": 4})})
                for c in plain.compacted
            ]
    return results


def test_networks_that_training_pruned_make_no_headline(collapsed: Results, tmp_path: Path) -> None:
    write_results(tmp_path, collapsed)
    written = page.write(tmp_path).read_text()
    head, figures = written[: written.index("<h2>")], written[written.index("<h2>") :]
    assert "of the weights of plain go by" in head
    assert "fewer MACs at 89.3 % (unpruned 89.8 %; plain, opd, uniform)" in head
    assert "smallest networks pruned after training" in head
    assert "10.0× fewer bytes" in figures
    assert "60170.0× fewer bytes" not in figures
    assert "sp.load(&#x27;cells/plain-0/artifacts/" in figures


@pytest.mark.usefixtures("blank_figures")
def test_networks_that_training_pruned_are_called_unpruned_nowhere(
    collapsed: Results, tmp_path: Path
) -> None:
    collapsed.cells = [cell for cell in collapsed.cells if cell.training == "held"]
    write_results(tmp_path, collapsed)
    written = page.write(tmp_path).read_text()
    assert "unpruned" not in written[: written.index("<h2>")]


@pytest.mark.usefixtures("blank_figures")
def test_without_cuts_there_is_no_section(
    make_results: Callable[..., Results], tmp_path: Path
) -> None:
    write_results(tmp_path, make_results())
    written = page.write(tmp_path).read_text()
    assert "Online pruning" not in written
    assert "Gradual pruning" not in written


def test_epochs_are_in_order_where_a_seed_needs_fewer_cuts(results: Results) -> None:
    first, second = [cell for cell in results.cells if cell.training == "small"]
    first.gradual = [
        cut.model_copy(update={"epoch": epoch}) for epoch in (2, 6) for cut in first.gradual[:1]
    ]
    second.gradual = [
        cut.model_copy(update={"epoch": epoch}) for epoch in (2, 4, 6) for cut in second.gradual[:1]
    ]
    assert {e: len(cuts) for e, cuts in gradual_steps(results)["small"].items()} == {
        2: 2,
        4: 1,
        6: 2,
    }
    assert list(gradual_steps(results)["small"]) == [2, 4, 6]


def test_the_terminal_shows_the_last_cuts(results: Results) -> None:
    _, online, gradual, *_ = terminal.tables(results)
    rows = [list(column.cells) for column in online.columns]
    assert rows == [
        ["held", "paper"],
        ["90", "90"],
        ["76.50 ± 0.50", "76.50 ± 0.50"],
        ["84.50 ± 0.50", "–"],
    ]
    rows = [list(column.cells) for column in gradual.columns]
    assert rows == [["small"], ["10 % of MACs → 9 %"], ["70.00 ± 0.00"], ["85.50 ± 0.50"]]


@pytest.fixture
def compared(
    results: Results, make_run: Callable[..., str], tmp_path: Path, blank_figures: None
) -> Path:
    """Return the folder of a comparison of one run, whose results these are."""
    trainings = dict.fromkeys(("plain", "held", "paper", "small"), "spam")
    folder = Path(make_run("run", trainings=trainings))
    write_results(folder, results)
    return compare([folder], tmp_path / "out").parent


def test_a_comparison_of_one_run_has_sections_and_figures_of_them(compared: Path) -> None:
    text = (compared / "comparison.md").read_text(encoding="utf-8")
    assert "## Trained\n\nThose that were pruned in training are as they came out." in text
    online = "| held | opd | stay zero | 4 | 2 | 90 | 76.50 ± 0.50 | 84.50 ± 0.50 |"
    assert online in text
    assert "| paper | opd | grow again | 4 | 2 | 90 | 76.50 ± 0.50 | – |" in text
    (row,) = [line for line in text.splitlines() if "→ 9 %" in line]
    assert row == (
        "| small | opd | global | 4 | 2 | 10 % of MACs → 9 % | 70.00 ± 0.00 | 85.50 ± 0.50 | "
        "60,170 | 23,172 | 240,680 | conv1 4, fc 20 |"
    )
    assert {"online.svg", "gradual.svg"} <= {file.name for file in compared.iterdir()}


def test_a_comparison_has_their_numbers(compared: Path) -> None:
    with (compared / "comparison.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    held = [line for line in lines if line["kind"] == "online" and line["training"] == "held"]
    assert len(held) == 2 * 2 * 4  # cuts, stages, metrics
    (line,) = [
        line
        for line in held
        if (line["epoch"], line["stage"], line["metric"]) == ("4", "trained", "accuracy")
    ]
    assert (line["sparsity_pct"], line["criterion"], line["seeds"]) == ("90", "opd", "2")
    assert (float(line["value"]), float(line["err"])) == pytest.approx((84.5, 0.5))
    paper = [line for line in lines if line["kind"] == "online" and line["training"] == "paper"]
    assert {line["stage"] for line in paper} == {"pruned"}
    gradual = [line for line in lines if line["kind"] == "gradual"]
    assert len(gradual) == 2 * (2 * 4 + 3)  # cuts × (stages × metrics + costs)
    (macs,) = [line for line in gradual if (line["epoch"], line["metric"]) == ("4", "macs")]
    assert (macs["ranking"], macs["target"]) == ("global", "10 % of MACs")
    assert float(macs["value"]) == 23_172
    kinds = {
        line["training"]: line["kind"] for line in lines if line["kind"] in ("dense", "trained")
    }
    assert kinds == {"plain": "dense", **dict.fromkeys(("held", "paper", "small"), "trained")}


@pytest.mark.usefixtures("blank_figures")
def test_without_cuts_a_comparison_has_no_section(
    make_run: Callable[..., str], tmp_path: Path
) -> None:
    path = compare([make_run("run")], tmp_path / "out")
    text = path.read_text(encoding="utf-8")
    assert "## Unpruned" in text
    assert not any(word in text for word in ("## Online", "## Gradual", "## Trained"))
    assert not list(path.parent.glob("online.svg")) + list(path.parent.glob("gradual.svg"))


def test_sizes_are_means_over_seeds(results: Results) -> None:
    first, second = (cell for cell in results.cells if cell.training == "small")
    first.size = first.size.model_copy(update={"params": 3000})
    second.size = second.size.model_copy(update={"params": 4000})
    (row,) = [
        line for line in tables.dense_table(results).markdown().splitlines() if "| small |" in line
    ]
    assert "| 3,500 |" in row


def test_post_hoc_masks_are_one_shot(results: Results) -> None:
    assert post_hoc(results)
    for cell in results.cells:
        for masked in cell.masked:
            masked.schedule = "iterative"
    assert post_hoc(results) == {}


def test_post_hoc_is_of_one_experiment_at_each_sparsity(results: Results) -> None:
    first = results.cells[0]
    before = post_hoc(results)["plain"]
    first.masked += [
        first.masked[0].model_copy(
            update={"experiment": 2, "requested": s, "achieved": s, "pruned": _quality(1.0)}
        )
        for s in (0.9, 0.7)
    ]
    points = post_hoc(results)["plain"]
    assert list(points) == [0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99]
    assert {s: found for s, found in points.items() if s != 0.7} == before
