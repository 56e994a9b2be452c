"""How long evidence updates take on a ViT-B/16's worth of parameters, with diagonal curvature.

``python benchmarks/evidence.py [--parameters 86e6] [--steps 100] [--threads 2]`` prints a table:
seconds for the exact rule, ``--steps`` Adam steps and 20 MacKay steps (which halve the distance to
the optimum each) under each prior structure, and by how much that raised the process's peak memory,
in copies of the parameters.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from typing import get_args

import torch
from torch import nn

from spamprune.bayes import evidence
from spamprune.bayes.curvature import Curvature
from spamprune.bayes.parameters import named_parameters
from spamprune.bayes.prior import Prior, Structure

WIDTH, PATCH, TOKENS, CLASSES = 768, 16, 197, 1000


def vision_transformer(parameters: float) -> nn.Module:
    """Return a module with the parameter tensors of a ViT-B/16, as deep as the number asks."""
    stem = [(WIDTH, 3, PATCH, PATCH), (WIDTH,), (1, 1, WIDTH), (1, TOKENS, WIDTH)]
    head = [(WIDTH,), (WIDTH,), (CLASSES, WIDTH), (CLASSES,)]
    block: list[tuple[int, ...]] = [(WIDTH,)] * 4
    for out, inp in [(3, 1), (1, 1), (4, 1), (1, 4)]:
        block += [(out * WIDTH, inp * WIDTH), (out * WIDTH,)]

    def size(shapes: Sequence[tuple[int, ...]]) -> int:
        return sum(torch.Size(shape).numel() for shape in shapes)

    depth = max(1, round((parameters - size(stem + head)) / size(block)))
    return nn.ParameterList(0.05 * torch.randn(s) for s in stem + depth * block + head)


def megabytes() -> float:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Time evidence updates.")
    parser.add_argument("--parameters", type=float, default=86e6)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = vision_transformer(options.parameters)
    parameters = named_parameters(model)
    diag = {name: torch.randn_like(p).mul_(2).exp_() for name, p in parameters.items()}
    curvature = Curvature(diag, 0.0, 50_000, "ef", "sketch")
    total = sum(p.numel() for p in parameters.values())
    copy = total * 4 / 2**20
    print(f"{total / 1e6:.1f} M parameters, {options.threads} threads, torch {torch.__version__}\n")
    print("| rule | prior | seconds | CPU seconds | memory / copies |")
    print("|---|---|---|---|---|")
    rules: list[tuple[str, Structure]] = [("exact", "parameterwise")]
    rules += [(rule, structure) for rule in ("adam", "mackay") for structure in get_args(Structure)]
    for rule, structure in rules:
        prior = Prior(model, structure)
        before, wall, cpu = megabytes(), time.perf_counter(), time.process_time()
        if rule == "exact":
            evidence.maximise(prior, parameters, curvature)
        elif rule == "adam":
            evidence.ascend(prior, parameters, curvature, steps=options.steps)
        else:
            evidence.mackay(prior, parameters, curvature, steps=20)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        memory = (megabytes() - before) / copy
        print(f"| {rule} | {structure} | {wall:.1f} | {cpu:.1f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
