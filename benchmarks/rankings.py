"""How units of different layers are compared: a ResNet with BatchNorm, pruned by OPD.

The ResNet of ``benchmarks/latency.py``, trained there by SpaM, is pruned to a third of its MACs
under each ranking and fine-tuned as there. Accuracies are of held-out training images.

``python benchmarks/rankings.py`` prints means ± standard errors over seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import latency
import torch

import spamprune as sp
from spamprune.pruning import cost
from spamprune.pruning.compaction import Ranking
from spamprune.report.formats import plus_minus
from spamprune.report.summary import spread

MACS = 0.32
Row = tuple[float, float, float]  # parameters, accuracy just pruned, accuracy fine-tuned: percent


def measure(trained: latency.Trained, ranking: Ranking) -> Row:
    """Prune, fine-tune and measure."""
    model, example = trained.model, trained.images(1)
    scores = sp.scores.opd(model, trained.posterior)
    plan = sp.plan(
        model, example, scores, sp.Target(macs=MACS), ranking=ranking, round_to=latency.ROUND_TO
    )
    small = sp.apply(model, plan)
    before = latency.accuracy(small, trained.validation)
    latency.finetune(small, trained)
    print(f"seed {trained.seed}, {ranking}: {plan.widths()}", flush=True)
    share = 100 * cost.params(small) / cost.params(model)
    return share, before, latency.accuracy(small, trained.validation)


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/latency"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows: dict[Ranking, list[Row]] = {}
    for seed in options.seeds:
        folder = options.out / f"resnet-spam-{seed}"
        trained = latency.train("resnet", "spam", seed, folder)
        print(f"seed {seed}, dense: {latency.accuracy(trained.model, trained.validation):.2f}")
        for ranking in get_args(Ranking):
            rows.setdefault(ranking, []).append(measure(trained, ranking))
    print("| ranking | parameters / % | just pruned / % | fine-tuned / % |\n" + "|---" * 4 + "|")
    for ranking, mine in rows.items():
        cells = (plus_minus(spread(column), 1) for column in zip(*mine, strict=True))
        print(f"| {ranking} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
