"""What inference and evidence found, as tables, and as a star in the figure."""

import csv
from pathlib import Path

import pytest

from spamprune.report import bayes, page, terminal
from spamprune.report.compare import compare
from spamprune.report.plots import sparsity_curves
from spamprune.report.results import (
    ByEvidence,
    EpochRecord,
    Inference,
    Masked,
    Quality,
    Reduced,
    write_results,
)
from spamprune.report.summary import by_evidence, masked_series
from spamprune.report.tables import compacted_table

CHOSEN = ByEvidence(
    effective=1234.0,
    before=-900.0,
    after=-800.0,
    pruned={"fc": 0.93, "head": 0.0},
    notes=["evidence: look twice"],
)


def quality(accuracy):
    return Quality(accuracy=accuracy, nll=0.3, ece=0.02, quantile_ece=0.031, brier=0.2)


@pytest.fixture
def results(make_results):
    return make_results()


@pytest.fixture
def chosen(results):
    """The results of two trainings, with a sparsity by evidence for each seed of the first."""
    name = results.cells[0].training
    cells = []
    for cell in results.cells:
        if cell.training == name:
            mask = Masked(
                experiment=0,
                criterion="opd",
                requested=0.8 + 0.05 * cell.seed,
                achieved=0.8 + 0.05 * cell.seed,
                chosen=CHOSEN,
                nonzero=5,
                pruned=quality(88.0 + cell.seed),
                artifact="a",
            )
            cell = cell.model_copy(update={"masked": [*cell.masked, mask]})
        cells.append(cell)
    return results.model_copy(update={"cells": cells}), name


def test_choices_of_the_seeds_are_one_point_and_no_part_of_the_curves(results, chosen):
    found, name = chosen
    seeds = [cell.seed for cell in found.cells if cell.training == name]
    points = by_evidence(found, 0, "pruned")
    assert list(points) == [(name, "opd")]
    sparsity, qualities = points[name, "opd"]
    assert sparsity == pytest.approx(sum(0.8 + 0.05 * seed for seed in seeds) / len(seeds))
    assert [q.accuracy for q in qualities] == [88.0 + seed for seed in seeds]
    assert by_evidence(found, 0, "finetuned") == {}
    assert masked_series(found, 0, "pruned") == masked_series(results, 0, "pruned")
    assert "most evidence" in sparsity_curves(found, 0, "pruned")
    assert "most evidence" not in sparsity_curves(results, 0, "pruned")


def test_the_table_of_choices(results, chosen):
    found, _ = chosen
    table = bayes.evidence_table(found, 0).html()
    for words in ("1,234", "−900", "−800", "fc 93, head 0", "evidence: look twice", "80.0"):
        assert words in table
    assert "As trained" in table
    assert not bayes.evidence_table(results, 0).rows


@pytest.mark.usefixtures("blank_figures")
def test_the_page_names_stars_only_where_there_are_some(results, chosen, tmp_path):
    for name, shown in (("without", results), ("with", chosen[0])):
        write_results(tmp_path / name, shown)
        captions = page.write(tmp_path / name).read_text(encoding="utf-8").split("<figcaption>")
        (pruned,) = [c for c in captions if c.startswith("Quality") and "just pruned." in c]
        assert ("stars the sparsity of most evidence" in pruned) == (name == "with")


@pytest.mark.usefixtures("blank_figures")
def test_a_comparison_has_the_choices_and_inference(results, chosen, make_run, tmp_path):
    folder = Path(make_run("run"))
    found, _ = chosen
    inference = Inference(draws=20, averaged=quality(91.5), sparsity=0.71, pruned={"": 0.71})
    found.cells[0].inference = inference
    write_results(folder, found)
    text = compare([folder], tmp_path / "out").read_text(encoding="utf-8")
    assert "## Sparsity of most evidence (`prune.0 of run`)" in text
    assert "fc 93, head 0" in text
    assert "averaged, 20 draws" in text
    with (tmp_path / "out" / "comparison.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    shares = [(line["kind"], line["value"]) for line in lines if line["metric"] == "sparsity_pct"]
    assert [kind for kind, _ in shares] == ["dense", "unstructured"]
    assert [float(value) for _, value in shares] == pytest.approx([71, 82.5])
    (averaged,) = [
        line for line in lines if (line["stage"], line["metric"]) == ("averaged", "accuracy")
    ]
    assert float(averaged["value"]) == pytest.approx(91.5)


def test_tables_of_inference(results):
    assert not bayes.inference_table(results).rows
    assert not bayes.reductions_table(results).rows
    reduced = Reduced(
        proposed=0.93, sparsity=0.71, pruned={"fc": 0.9, "": 0.1}, before=-5e4, after=-4e4
    )
    epoch = EpochRecord(epoch=7, loss=0.4, lr=0.1, seconds=2.5, reduced=reduced)
    inference = Inference(draws=20, averaged=quality(91.5), sparsity=0.71, pruned=reduced.pruned)
    cells = [
        cell.model_copy(update={"inference": inference, "history": [epoch]})
        for cell in results.cells
    ]
    found = results.model_copy(update={"cells": cells})
    table = bayes.inference_table(found).html()
    for words in ("posterior means", "averaged, 20 draws", "91.50", "0.031", "71.0", "2.5"):
        assert words in table
    table = bayes.reductions_table(found).html()
    for words in ("93.0", "71.0", "−50,000", "−40,000", "fc 90, network 10"):
        assert words in table


def test_units_by_evidence_are_told_in_nats(results):
    cells = [
        cell.model_copy(
            update={
                "compacted": [
                    record.model_copy(
                        update={"target": {"evidence": 1.0}, "achieved": {"evidence": 321.0}}
                    )
                    for record in cell.compacted
                ]
            }
        )
        for cell in results.cells
    ]
    experiment = next(r.experiment for cell in results.cells for r in cell.compacted)
    found = results.model_copy(update={"cells": cells})
    assert "most evidence → +321 nats" in compacted_table(found, experiment).html()
    heads = [str(column.header) for column in terminal.tables(found)[-1].columns]
    assert heads[2:] == ["most evidence"]


def test_the_terminal_shows_what_the_evidence_chose(chosen):
    found, name = chosen
    _, masks, *_ = terminal.tables(found)
    heads = [str(column.header) for column in masks.columns]
    assert heads[2:] == ["0.2", "0.5", "0.8", "0.9", "0.95", "0.99", "most evidence"]
    assert next(iter(masks.columns[-1].cells)) == "88.5 @ 82.5 %"
    for cell in found.cells:
        cell.masked = [m for m in cell.masked if m.chosen]
    _, masks, *_ = terminal.tables(found)
    assert [list(column.cells) for column in masks.columns] == [[name], ["opd"], ["88.5 @ 82.5 %"]]
