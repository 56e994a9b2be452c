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


def test_rows_of_ours_that_agree_stand_side_by_side_by_name(
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
        ("cancer, fc_cancer, map, prune.0 of a", "91.0"),
        ("cancer, fc_cancer, map, prune.1 of a", "92.0"),
        ("cancer, fc_cancer, b, prune.0 of b", "93.0"),
    ]
    (missing,) = [
        row for row in rows if row[3:4] == ["ours"] and row[0] == "grasp" and row[2] == "MAP"
    ]
    assert set(missing[4:]) == {"–"}
