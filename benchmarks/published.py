"""Print a table of the SpaM paper with our numbers under its own.

``python benchmarks/published.py TABLE COMPARISON.csv``, where TABLE is 1, 2, 3 or 4 and the CSV is
what ``spamprune compare`` leaves. Our rows are those of the same criterion, Hessian and prior, on
whatever data and network the runs were: the head names what all have in common, and rows that agree
are told apart by the rest.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable
from pathlib import Path

PUBLISHED = Path(__file__).parent / "published" / "spam_tables_1_to_4.csv"
METRICS = {"acc": ("accuracy", 1), "nll": ("nll", 2)}  # the paper's name → ours, digits shown
_NAMES = ("dataset", "model", "experiment", "training")  # what tells our rows apart
_PRIORS = {"SpaM param-wise": "parameterwise", "parameter-wise": "parameterwise"}

Row = tuple[str, str, str]  # criterion, Hessian, prior
Numbers = dict[Row, dict[str, dict[str, str]]]  # → whose → sparsity in percent → value and error


def published(table: str) -> tuple[Numbers, str, str]:
    """Return a table's numbers, what it is of, and its metric."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["table"] == table]
    metric = lines[0]["metric"]
    title = f"Table {table}: {lines[0]['model']}, {lines[0]['dataset']}, {metric}"
    return _numbers(lines, METRICS[metric][1], lambda _: "paper"), title, metric


def ours(path: Path, metric: str) -> tuple[Numbers, str]:
    """Return what masks did without fine-tuning, and what all rows have in common.

    Args:
        path: A CSV of ``spamprune compare``.
        metric: The paper's name of it.
    """
    name, digits = METRICS[metric]
    wanted = ("unstructured", "pruned", name)
    with path.open(encoding="utf-8", newline="") as file:
        lines = [
            line
            for line in csv.DictReader(file)
            if (line["kind"], line["stage"], line["metric"]) == wanted
            and line.get("schedule") != "iterative"  # whose later steps were fine-tuned before
        ]
    groups: dict[Row, list[dict[str, str]]] = {}
    for line in lines:
        groups.setdefault(_row(line), []).append(line)

    def whose(line: dict[str, str]) -> str:
        group = groups[_row(line)]
        several = [name for name in _NAMES if len({other[name] for other in group}) > 1]
        own = [line[name] for name in _NAMES if name in {*several, *differing}]
        return ", ".join(own) or "ours"

    values = {name: {line[name] for line in lines} for name in _NAMES}
    shared = [next(iter(found)) for found in values.values() if len(found) == 1]
    # a row's training says no more than the row does
    differing = {name for name, found in values.items() if len(found) > 1} - {"training"}
    return _numbers(lines, digits, whose), ", ".join(shared)


def _row(line: dict[str, str]) -> Row:
    prior = _PRIORS.get(line["prior"], line["prior"])
    return line["criterion"].lower(), "" if prior == "MAP" else line["hessian"], prior


def _numbers(
    lines: Iterable[dict[str, str]], digits: int, whose: Callable[[dict[str, str]], str]
) -> Numbers:
    found: Numbers = {}
    for line in lines:
        error = f" ± {float(line['err']):.{digits}f}" if line["err"] else ""
        text = f"{float(line['value']):.{digits}f}{error}"
        found.setdefault(_row(line), {}).setdefault(whose(line), {})[line["sparsity_pct"]] = text
    return found


def print_table(table: str, path: Path) -> None:
    """Print the table as Markdown, our rows under the paper's."""
    theirs, title, metric = published(table)
    here, common = ours(path, metric)
    sparsities = sorted({s for row in theirs.values() for s in row["paper"]}, key=float)
    print(f"{title}; ours: {common}\n")
    head = ["Criterion", "Hessian", "Prior", "", *(f"{s} %" for s in sparsities)]
    rows = [head, ["---"] * len(head)]
    for row, paper in theirs.items():
        for whose, values in {**paper, **here.get(row, {"ours": {}})}.items():
            rows.append([*row, whose, *(values.get(s, "–") for s in sparsities)])
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=["1", "2", "3", "4"], help="of the paper")
    parser.add_argument("comparison", type=Path, help="comparison.csv of spamprune compare")
    options = parser.parse_args()
    print_table(options.table, options.comparison)
