"""The paper's numbers beside ours."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.published import print_table

LINE = {
    "dataset": "cancer",
    "model": "fc_cancer",
    "hessian": "Diag",
    "prior": "MAP",
    "kind": "unstructured",
    "stage": "pruned",
    "criterion": "opd",
    "sparsity_pct": "80",
    "metric": "accuracy",
    "err": "",
}


def test_rows_of_ours_that_agree_are_told_apart_by_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        ("map", "prune.0 of a", "91"),
        ("map", "prune.1 of a", "92"),
        ("b", "prune.0 of b", "93"),
    ]
    path = tmp_path / "comparison.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*LINE, "training", "experiment", "value"])
        writer.writeheader()
        for training, experiment, value in runs:
            own = {"training": training, "experiment": experiment, "value": value}
            writer.writerow({**LINE, **own})
    print_table("1", path)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    of = [row for row in rows if row[0] == "opd" and row[2] == "MAP"]
    assert [(row[3], row[4]) for row in of] == [
        ("paper", "88.1 ± 0.1"),
        ("prune.0 of a, map", "91.0"),
        ("prune.1 of a, map", "92.0"),
        ("prune.0 of b, b", "93.0"),
    ]
    assert rows[0] == ["Table 1: ResNet18-fixup, CIFAR-10, acc; ours: cancer, fc_cancer"]
    (missing,) = [
        row for row in rows if row[3:4] == ["ours"] and row[0] == "grasp" and row[2] == "MAP"
    ]
    assert set(missing[4:]) == {"–"}


def test_a_row_that_is_the_only_one_is_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "comparison.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*LINE, "training", "experiment", "value", "schedule"])
        writer.writeheader()
        own = {"training": "map", "experiment": "prune.0 of a", "value": "91"}
        writer.writerow({**LINE, **own})
        later = {"experiment": "prune.1 of a", "value": "93", "schedule": "iterative"}
        writer.writerow({**LINE, **own, **later})
    print_table("1", path)
    text = capsys.readouterr().out
    assert text.startswith("Table 1: ResNet18-fixup, CIFAR-10, acc; ours: cancer, fc_cancer, ")
    assert "| opd |  | MAP | ours | 91.0 |" in text
