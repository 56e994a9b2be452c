from __future__ import annotations

import csv
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from spamprune.report.compare import compare
from spamprune.report.results import Results, read_results, write_results

MakeRun = Callable[..., str]


def tables(text: str) -> list[list[list[str]]]:
    """Return the Markdown tables in ``text`` as lists of rows of cells."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append(line.strip("| ").split(" | "))
        elif found[-1]:
            found.append([])
    return [rows for rows in found if rows]


@pytest.fixture
def two_runs(make_run: MakeRun) -> list[str]:
    return [make_run("a"), make_run("b", first_seed=2)]


def test_what_is_written(two_runs: list[str], tmp_path: Path) -> None:
    path = compare(two_runs, tmp_path / "out")
    written = {file.name for file in path.parent.iterdir()}
    assert path.name == "comparison.md"
    assert written == {
        "comparison.md",
        "comparison.csv",
        "training.svg",
        "finetuning-0.svg",
        "sparsity-0-pruned.svg",
        "sparsity-0-finetuned.svg",
        "cost-1.svg",
    }
    text = path.read_text(encoding="utf-8")
    assert all(f"]({name})" in text for name in written if name.endswith(".svg"))
    drawing = (path.parent / "sparsity-0-pruned.svg").read_text(encoding="utf-8")
    assert "spam-unitwise" in drawing
    assert "magnitude" in drawing


def test_the_same_runs_give_the_same_files(two_runs: list[str]) -> None:
    first, second = compare(two_runs, "x"), compare(two_runs, "y")
    for file in first.parent.iterdir():
        assert file.read_bytes() == (second.parent / file.name).read_bytes()


@pytest.mark.usefixtures("blank_figures")
def test_the_numbers_are_means_over_all_seeds(two_runs: list[str]) -> None:
    path = compare(two_runs, "out")
    accuracies = [
        m.pruned.accuracy
        for run in two_runs
        for cell in read_results(Path(run)).cells
        for m in cell.masked
        if (cell.training, m.criterion, m.requested) == ("map", "magnitude", 0.9)
    ]
    assert len(accuracies) == 4
    mean, error = statistics.mean(accuracies), statistics.stdev(accuracies) / 2
    with (path.parent / "comparison.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    wanted = {
        "dataset": "fashion_mnist",
        "model": "lenet",
        "training": "map",
        "method": "map",
        "hessian": "Diag",
        "prior": "MAP",
        "kind": "unstructured",
        "experiment": "prune.0 of a",
        "stage": "pruned",
        "criterion": "magnitude",
        "ranking": "",
        "sparsity_pct": "90",
        "metric": "accuracy",
        "seeds": "4",
    }
    (line,) = [line for line in lines if all(line[k] == v for k, v in wanted.items())]
    assert float(line["value"]) == pytest.approx(mean)
    assert float(line["err"]) == pytest.approx(error)
    masked = tables(path.read_text(encoding="utf-8"))[2]
    assert masked[0][:5] == ["Criterion", "Training", "Hessian", "Prior", "Seeds"]
    column = masked[0].index("90 %")
    (row,) = [row for row in masked if row[:2] == ["magnitude", "map"]]
    assert row[2:5] == ["Diag", "MAP", "4"]
    assert row[column].startswith(f"{mean:.2f} ± {error:.2f}")


@pytest.mark.usefixtures("blank_figures")
def test_every_number_has_one_line(two_runs: list[str]) -> None:
    path = compare(two_runs, "out")
    with (path.parent / "comparison.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    keys = [tuple(v for k, v in line.items() if k not in ("value", "err")) for line in lines]
    assert len(set(keys)) == len(keys)
    dense = 4 + 1 + 3  # metrics, evidence, costs
    masked = 2 * 6 * 2 * 4  # criteria, sparsities, stages, metrics
    compacted = 2 * 2 * 4 * (3 * 4 + 3)  # criteria, rankings, targets × (stages × metrics + costs)
    assert len(lines) == 2 * (dense + masked + compacted)


@pytest.mark.usefixtures("blank_figures")
def test_criteria_stand_together_as_in_the_paper(two_runs: list[str]) -> None:
    masked = tables(compare(two_runs, "out").read_text(encoding="utf-8"))[2]
    assert [row[:2] for row in masked[2:]] == [
        ["opd", "map"],
        ["opd", "spam-unitwise"],
        ["magnitude", "map"],
        ["magnitude", "spam-unitwise"],
    ]


@pytest.mark.usefixtures("blank_figures")
def test_models_get_a_column_where_there_are_several(make_run: MakeRun) -> None:
    a, b = make_run("a"), make_run("b", changes={"model.name": "fc_mnist"})
    dense = tables(compare([a, b], "out").read_text(encoding="utf-8"))[1]
    assert dense[0][:3] == ["Training", "Model", "Hessian"]
    assert [row[:2] for row in dense[2:]] == [
        ["map (a)", "lenet"],
        ["spam-unitwise (a)", "lenet"],
        ["map (b)", "fc_mnist"],
        ["spam-unitwise (b)", "fc_mnist"],
    ]


@pytest.mark.usefixtures("blank_figures")
def test_other_versions_are_said(make_run: MakeRun) -> None:
    a, b = make_run("a"), make_run("b", first_seed=2, environment={"torch": "9.9"})
    text = compare([a, b], "out").read_text(encoding="utf-8")
    assert "The runs differ in torch: 2.6.0, 9.9.\n" in text
    assert "differ in" not in compare([a], "alone").read_text(encoding="utf-8")


@pytest.mark.usefixtures("blank_figures")
def test_seeds_that_differ_within_a_row_are_said(make_run: MakeRun) -> None:
    a = make_run("a")
    b = make_run("b", first_seed=2, seeds=1, compacted=False, keep=("opd",))
    rows = tables(compare([a, b], "out").read_text(encoding="utf-8"))[2]
    assert [row[4] for row in rows[2:]] == ["3", "3", "2", "2"]


def test_dense_networks_alone(make_run: MakeRun, make_results: Callable[..., Results]) -> None:
    path = compare([make_run("a", masked=False, compacted=False)], "out")
    written = {file.name for file in path.parent.iterdir()}
    assert written == {"comparison.md", "comparison.csv", "training.svg"}
    assert len(tables(path.read_text(encoding="utf-8"))) == 2


@pytest.mark.usefixtures("blank_figures")
def test_targets_that_are_almost_the_same_are_not_one(make_run: MakeRun) -> None:
    run = make_run("a", trainings={"map": "map"}, masked=False, criteria=("opd",))
    results = read_results(Path(run))
    for cell in results.cells:
        cell.compacted = [
            cell.compacted[0].model_copy(
                update={"target": {"params": p}, "achieved": {"params": p}}
            )
            for p in (0.3001, 0.3004, 0.30040000001)
        ]
    write_results(Path(run), results)
    path = compare([run], "out")
    with (path.parent / "comparison.csv").open(encoding="utf-8", newline="") as file:
        found = [line for line in csv.DictReader(file) if line["metric"] == "macs"]
    found = [line for line in found if line["kind"] == "structured"]
    names = ["30.01 % of params", "30.04 % of params", "30.04 % of params"]
    assert [line["target"] for line in found] == names
    assert {line["seeds"] for line in found} == {"2"}
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if "% of params" in line]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == names
