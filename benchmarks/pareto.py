"""Accuracy against MACs, bytes and latency: our plans, torch-pruning, and training from scratch.

``spamprune run recipes/lenet_fashion_mnist_pareto.yaml --out runs/pareto`` (or the Mixer's) first;
then ``python benchmarks/pareto.py runs/pareto`` prunes the same trained networks to the same MACs
by torch-pruning (not with ``--rows`` and nothing after it), fine-tunes them alike, times all
networks of a seed in turns, leaves a figure (``pareto.svg``) in the run's folder and prints the
table. Rows are kept there, so that a stopped study goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_pruning as tp
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from torch import Tensor, nn

import spamprune as sp
from spamprune.engine import checkpoint
from spamprune.engine.bench import Bench, create_model, load_data
from spamprune.engine.cell import accelerator
from spamprune.engine.subject import train_on
from spamprune.errors import PruningError
from spamprune.pruning import cost
from spamprune.recipe import load
from spamprune.recipe.schema import Recipe, Structured
from spamprune.report import style
from spamprune.report.results import Cell, read_results
from spamprune.report.summary import criterion_of, spread

BATCHES = (1, 64)
GRADIENT_BATCHES = 20  # that torch-pruning's Taylor importance sees
SCRATCH = "from scratch"
SHOWN_FROM = 78  # percent: the figure leaves out networks that did not train again
SAME = 0.05  # costs that differ by less are taken for equal


@dataclass
class Point:
    """One small network; costs are of it, accuracies in percent on test data.

    Attributes:
        name: How it came about.
        target: Fraction of the MACs that was asked for; 1 for the dense network.
        folder: Its artifact, in the run's folder; a network from scratch has that of the pruned
            network of the same widths.
        milliseconds: Of a forward pass, by batch size.
    """

    name: str
    seed: int
    target: float
    macs: int
    bytes: int
    pruned: float | None
    final: float
    folder: str
    milliseconds: dict[int, float]


def ours(cell: Cell) -> list[Point]:
    """Return what the run measured of one cell."""
    common = (cell.seed, 1.0, cell.size.macs, cell.size.bytes, None)
    points = [Point(f"{cell.training}, dense", *common, cell.dense.accuracy, "", {})]
    for record in cell.compacted:
        assert record.finetuned is not None
        name = f"{cell.training}, {criterion_of(record)}"
        size = (cell.seed, record.target["macs"], record.size.macs, record.size.bytes)
        final = record.finetuned.accuracy
        points.append(Point(name, *size, record.pruned.accuracy, final, record.artifact, {}))
        if record.scratch is not None:
            scratch = record.scratch.accuracy
            points.append(Point(SCRATCH, *size, None, scratch, record.artifact, {}))
    return points


IMPORTANCES: dict[str, tuple[Callable[[], tp.importance.Importance], bool]] = {
    "Taylor, global": (tp.importance.GroupTaylorImportance, True),
    "Taylor, uniform": (tp.importance.GroupTaylorImportance, False),
    "magnitude, global": (tp.importance.GroupMagnitudeImportance, True),
}


def by_torch_pruning(bench: Bench, dense: nn.Module, row: str, target: float) -> nn.Module:
    """Prune with the smallest of 512 ratios that fits the budget of MACs."""
    create, ranked = IMPORTANCES[row]
    gradients = _gradients(bench, dense)
    example = bench.example()
    most = target * cost.macs(dense, example)
    for i in range(1, 512):
        small = copy.deepcopy(dense)
        for name, parameter in small.named_parameters():
            parameter.grad = gradients[name].clone()
        head = [m for m in small.modules() if isinstance(m, nn.Linear)][-1]
        pruner = tp.pruner.BasePruner(
            small,
            example,
            create(),
            global_pruning=ranked,
            pruning_ratio=i / 512,
            ignored_layers=[head],
            # its defaults are shared by all pruners of a process
            in_channel_groups={},
            out_channel_groups={},
            channel_groups={},
        )
        pruner.step()
        small.zero_grad()
        if cost.macs(small, example) <= most:
            return small
    raise PruningError(f"torch-pruning, {row}: no ratio reaches {target} of the MACs")


def _gradients(bench: Bench, model: nn.Module) -> dict[str, Tensor]:
    """Return gradients of the loss, summed over batches as torch-pruning's examples do."""
    model.eval().zero_grad()
    batches = bench.data.train.loader(bench.config.batch_size, seed=bench.seed)
    for inputs, targets in islice(batches, GRADIENT_BATCHES):
        F.cross_entropy(model(inputs), targets).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def their_point(bench: Bench, row: str, target: float) -> Point:
    """Prune the cell's network by torch-pruning, fine-tune, measure and save it."""
    finetune = next(e.finetune for e in bench.recipe.prune if isinstance(e, Structured))
    assert finetune is not None
    dense = create_model(bench.recipe, bench.seed)
    dense.load_state_dict(checkpoint.model_state(bench.folder / "checkpoint.safetensors"))
    small = by_torch_pruning(bench, dense, row, target)
    before = bench.quality(small, bench.data.test).accuracy
    name = f"tp-{row.replace(', ', '-')}-{target}"
    train_on(bench, small, finetune, name)
    sp.save(small, bench.folder / name, factory=partial(create_model, bench.recipe, bench.seed))
    return Point(
        name=f"{bench.training}, torch-pruning {row}",
        seed=bench.seed,
        target=target,
        macs=cost.macs(small, bench.example()),
        bytes=sum(p.numel() * p.element_size() for p in small.parameters()),
        pruned=before,
        final=bench.quality(small, bench.data.test).accuracy,
        folder=f"{bench.relative}/{name}",
        milliseconds={},
    )


@torch.no_grad()
def time_all(run: Path, recipe: Recipe, points: Sequence[Point], seed: int) -> None:
    """Time all networks of a seed in turns, so that all see the same machine."""
    factory = partial(create_model, recipe, seed)
    networks = {"": factory().eval()}
    for point in points:
        if point.folder and point.seed == seed:
            networks[point.folder] = sp.load(run / point.folder, factory=factory).eval()
    shape = load_data(recipe).shape
    for batch in BATCHES:
        example = torch.randn(batch, *shape)
        seconds: dict[str, list[float]] = {folder: [] for folder in networks}
        for _ in range(max(100, 400 // batch)):
            for folder in random.sample(list(networks), len(networks)):
                start = time.perf_counter()
                networks[folder](example)
                seconds[folder].append(time.perf_counter() - start)
        for point in points:
            if point.seed == seed:
                point.milliseconds[batch] = 1000 * statistics.median(seconds[point.folder])


def _groups(points: Sequence[Point]) -> dict[tuple[float, str], list[Point]]:
    """Return the points of each target and name, over seeds; the milder targets first."""
    groups: dict[tuple[float, str], list[Point]] = {}
    for point in sorted(points, key=lambda point: -point.target):
        groups.setdefault((point.target, point.name), []).append(point)
    return groups


def _mean(points: Sequence[Point], field: str) -> float:
    return spread(getattr(point, field) for point in points).mean


def _beaten(mine: Sequence[Point], groups: dict[tuple[float, str], list[Point]]) -> bool:
    """Tell whether others are more accurate by over a standard error, at no more MACs."""

    def better(other: Sequence[Point]) -> bool:
        theirs, own = (spread(p.final for p in points) for points in (other, mine))
        error = math.hypot(theirs.error or 0.0, own.error or 0.0)
        cheap = _mean(other, "macs") <= _mean(mine, "macs") * (1 + SAME)
        return cheap and theirs.mean - own.mean > error

    return any(better(other) for other in groups.values())


def table(points: Sequence[Point]) -> str:
    """Return a Markdown table of means ± standard errors over seeds."""
    groups = _groups(points)
    dense = {p.seed: p for p in reversed(points) if p.target == 1}
    head = ["MACs asked", "network", "seeds", "fewer MACs", "fewer bytes"]
    head += [f"speed-up, batch {n}" for n in BATCHES]
    head += ["just pruned / %", "test / %", "frontier"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (target, name), mine in groups.items():
        just = [p.pruned for p in mine if p.pruned is not None]
        cells = [
            f"{100 * target:g} %",
            name,
            str(len(mine)),
            *(
                _cell([getattr(dense[p.seed], f) / getattr(p, f) for p in mine], "×", 1)
                for f in ("macs", "bytes")
            ),
            *(
                _cell([dense[p.seed].milliseconds[n] / p.milliseconds[n] for p in mine], "×")
                for n in BATCHES
            ),
            _cell(just, digits=1) if just else "–",
            _cell([p.final for p in mine]),
            "" if _beaten(mine, groups) else "yes",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(values: Sequence[float], unit: str = "", digits: int = 2) -> str:
    found = spread(values)
    error = "" if found.error is None else f" ± {found.error:.{digits}f}"
    return f"{found.mean:.{digits}f}{error}{unit}"


def _training(point: Point) -> str:
    return point.name.partition(",")[0]


@style.svg
def figure(points: Sequence[Point]) -> Figure:
    """Draw accuracy against MACs, bytes and latency, a line for each way of pruning."""
    drawing = Figure(figsize=(11, 5.4), layout="constrained")
    names = [n for n in dict.fromkeys(p.name for p in points) if not n.endswith("dense")]
    trainings = dict.fromkeys(_training(p) for p in points if p.name != SCRATCH)
    markers = dict(zip(trainings, cycle("osD^v"), strict=False)) | {SCRATCH: "x"}
    axes_of: dict[str, Callable[[Point], float]] = {
        "MACs of one sample": lambda p: p.macs,
        "Bytes of parameters": lambda p: p.bytes,
        f"Latency, batch {BATCHES[-1]} / ms": lambda p: p.milliseconds[BATCHES[-1]],
    }
    handles = {}
    for axes, (label, cost_of) in zip(
        drawing.subplots(1, 3, sharey=True), axes_of.items(), strict=True
    ):
        for name in names:
            groups = [mine for (_, other), mine in _groups(points).items() if other == name]
            accuracies = [spread(p.final for p in mine) for mine in groups]
            handles[name] = axes.errorbar(
                [spread(map(cost_of, mine)).mean for mine in groups],
                [accuracy.mean for accuracy in accuracies],
                [accuracy.error or 0.0 for accuracy in accuracies],
                color=style.INK if name == SCRATCH else f"C{names.index(name)}",
                marker=markers[_training(groups[0][0])],
                ls="none" if name == SCRATCH else "--" if "torch-pruning" in name else "-",
                capsize=2,
                label=name,
            )
        dense = [mine for (_, name), mine in _groups(points).items() if name.endswith("dense")]
        for mine in dense:
            marker = markers[_training(mine[0])]
            look = {"ls": "none", "color": style.GREY, "mfc": "white", "ms": 8}
            (handles[mine[0].name],) = axes.plot(
                spread(map(cost_of, mine)).mean,
                _mean(mine, "final"),
                marker=marker,
                label=mine[0].name,
                **look,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
    drawing.axes[0].set_ylabel("Test accuracy / %")
    drawing.axes[0].set_ylim(bottom=SHOWN_FROM)
    style.legend(drawing, list(handles.values()))
    return drawing


def main() -> None:
    """Run what is missing, then print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the recipe's run")
    parser.add_argument("--rows", nargs="*", default=list(IMPORTANCES), choices=list(IMPORTANCES))
    parser.add_argument(
        "--trainings", nargs="*", default=["spam", "map"], help="as recipes call them"
    )
    parser.add_argument("--targets", nargs="*", type=float, default=[0.25, 0.1])
    options = parser.parse_args()
    recipe = load(options.run / "recipe.yaml")
    torch.set_num_threads(recipe.threads)
    torch.set_flush_denormal(True)
    file = options.run / "torch_pruning.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    theirs = [Point(**json.loads(line)) for line in lines]
    data = load_data(recipe)
    for row in options.rows:
        for training in options.trainings:
            for seed in recipe.seeds:
                bench = Bench(
                    recipe, training, seed, options.run, data, accelerator(), lambda *_: None
                )
                for target in options.targets:
                    name = f"{training}, torch-pruning {row}"
                    if any((p.name, p.seed, p.target) == (name, seed, target) for p in theirs):
                        continue
                    theirs.append(their_point(bench, row, target))
                    with file.open("a") as out:
                        out.write(json.dumps(asdict(theirs[-1])) + "\n")
    points = [p for cell in read_results(options.run).cells for p in ours(cell)] + theirs
    for seed in recipe.seeds:
        time_all(options.run, recipe, points, seed)
    (options.run / "pareto.svg").write_text(figure(points))
    print(table(points))


if __name__ == "__main__":
    main()
