"""What planning costs beside torch-pruning's pruner: ratios in one process.

``sp.plan`` traces, scores, chooses and tries the pruned network; ``BasePruner`` traces, scores and
prunes in place. Both take out half of the units of every kind by squared weights. CPU time, since
other work on the machine would disturb wall-clock time.

``python benchmarks/planning.py``
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

import spamprune as sp

MODELS = ["resnet50", "vit_base_patch16_224", "mixer_b16_224", "convnext_tiny"]


def ours(model: nn.Module, example: Tensor) -> None:
    """Plan with spamprune."""
    scores = {name: p.detach().square() for name, p in model.named_parameters()}
    sp.plan(model, example, scores, sp.Target(ratio=0.5))


def theirs(model: nn.Module, example: Tensor) -> None:
    """Prune with torch-pruning."""
    heads: dict[Any, Any] = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model.get_classifier()],  # type: ignore[operator]
        num_heads=heads,
        prune_num_heads=True,
        head_pruning_ratio=0.5,
        pruning_ratio_dict={},
        channel_groups={},
    )
    pruner.step()


def seconds(run: Callable[[nn.Module, Tensor], None], model: nn.Module, example: Tensor) -> float:
    """Return the CPU time of one call on a copy of the model."""
    copied = copy.deepcopy(model)
    gc.collect()  # neither is to pay for what the other left behind
    start = time.process_time()
    run(copied, example)
    return time.process_time() - start


def main() -> None:
    """Print one row per model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print("| model | forward s | sp.plan s | BasePruner s | ratio |\n|---|---|---|---|---|")
    for name in args.models:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        example = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            model(example)
            start = time.process_time()
            model(example)
            forward = time.process_time() - start
        mine, other = [], []
        for _ in range(args.rounds):
            mine.append(seconds(ours, model, example))
            try:
                other.append(seconds(theirs, model, example))
            except Exception as error:  # not every network can be pruned by torch-pruning
                failure = type(error).__name__
        planned = statistics.median(mine)
        if other:
            pruned = statistics.median(other)
            last = f"{pruned:.2f} | {planned / pruned:.2f}"
        else:
            last = f"{failure} | –"
        print(f"| {name} | {forward:.2f} | {planned:.2f} | {last} |", flush=True)


if __name__ == "__main__":
    main()
