"""Latency of a pruned ResNet and a pruned ViT on Fashion-MNIST: OPD beside torch-pruning's scores.

Each network is trained by SpaM and by MAP. A plan with OPD on the SpaM network has the target
``LATENCY`` at batch ``BATCHES[-1]``; the MACs that it reaches are the budget of every other method
for that network and seed. All are fine-tuned alike. "longer" is the dense network after the same
fine-tuning. "opd", "obd" and "squares" (of the weights) are plans of ours; "tp-" are importances in
torch-pruning's ``BasePruner``, with a global ranking and the smallest ratio that fits the budget.

``python benchmarks/latency.py`` appends each row to a JSON-lines file and saves each network, so
that a stopped study goes on; then it times all networks of a seed in turns and prints the tables.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from accelerate import Accelerator
from timm.layers import Attention
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import spamprune as sp
from spamprune import data
from spamprune.data.base import seeded
from spamprune.data.tensors import TensorSplit
from spamprune.engine.fit import Job, fit
from spamprune.engine.methods import ByPrior
from spamprune.errors import PruningError
from spamprune.pruning import cost
from spamprune.pruning.compaction import Ranking
from spamprune.recipe.schema import Optimiser
from spamprune.report import measure

IMAGES = 20_000  # of the training set, another draw for each seed
EPOCHS, FINETUNE_EPOCHS = 6, 2
LATENCY = 0.42
BATCHES = (1, 64)
ROUND_TO = 8
#: Images that Taylor's and Hessian's gradients are of, in batches of 128.
GRADIENT_IMAGES = 2560


@dataclass(frozen=True)
class Network:
    """An architecture, how OPD ranks its units, and how its weights move."""

    create: Callable[[], nn.Module]
    ranking: Ranking
    optimiser: Optimiser
    finetune: Optimiser


def _resnet() -> nn.Module:
    """Return a ResNet of one basic block per stage; the first stage works on 14 by 14 pixels."""
    model = ResNet(
        BasicBlock, layers=(1, 1, 1, 1), channels=(24, 48, 96, 192), in_chans=1, num_classes=10
    )
    model.conv1 = nn.Conv2d(1, 64, 3, stride=2, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def _vit() -> nn.Module:
    return VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=96, depth=4, num_heads=4
    )


NETWORKS = {
    "resnet": Network(_resnet, "uniform", Optimiser(lr=0.05, warmup=1), Optimiser(lr=0.02)),
    "vit": Network(
        _vit, "global", Optimiser(name="adam", lr=1e-3, warmup=1), Optimiser(name="adam", lr=5e-4)
    ),
}


@dataclass(frozen=True)
class Trained:
    """A dense network, and what it was trained on."""

    model: nn.Module
    posterior: sp.Posterior
    network: Network
    train: TensorSplit
    validation: data.Split
    test: data.Split
    seed: int

    def images(self, number: int) -> Tensor:
        """Return a batch of held-out images, ``(number, 1, 28, 28)``."""
        return next(iter(self.validation.loader(number)))[0]


def train(name: str, training: str, seed: int, folder: Path) -> Trained:
    """Train a network, or load the checkpoint of its training, and fit its posterior."""
    images = data.load("fashion_mnist", validation=5 / 60)
    assert isinstance(images.train, TensorSplit)
    chosen = torch.randperm(len(images.train), generator=seeded(seed))[:IMAGES]
    split = replace(images.train, rows=images.train.rows[chosen])
    torch.manual_seed(seed)
    network = NETWORKS[name]
    model = network.create().to(memory_format=torch.channels_last)
    spam = sp.SpaM(
        model,
        len(split),
        prior="unitwise",
        curvature=sp.CurvatureMethod(samples=2000),
        burn_in=0 if training == "spam" else None,
        every=1,
        steps=20,
        seed=seed,
    )
    job = Job(
        split, EPOCHS, 128, network.optimiser, seed, checkpoint=folder / "checkpoint.safetensors"
    )
    folder.mkdir(parents=True, exist_ok=True)
    fit(model, ByPrior(spam), job, Accelerator(cpu=True))
    posterior = spam.posterior(split.loader(128))
    assert images.validation is not None
    return Trained(model, posterior, network, split, images.validation, images.test, seed)


def finetune(small: nn.Module, trained: Trained) -> None:
    """Train in place under a fixed N(0, 1) prior, the same for every method."""
    small.to(memory_format=torch.channels_last)
    spam = sp.SpaM(small, len(trained.train), prior="scalar", burn_in=None)
    job = Job(trained.train, FINETUNE_EPOCHS, 128, trained.network.finetune, trained.seed)
    fit(small, ByPrior(spam), job, Accelerator(cpu=True))


def by_plan(trained: Trained, scores: sp.scores.Scores, budget: float | None) -> nn.Module:
    """Prune by a plan of our own, for a budget of MACs or, without one, for the latency."""
    model, one = trained.model, trained.images(1)

    def plan(example: Tensor, target: sp.Target) -> sp.Plan:
        ranking = trained.network.ranking
        return sp.plan(model, example, scores, target, ranking=ranking, round_to=ROUND_TO)

    if budget is None:
        # on a busy machine a search by latency may be led astray: the middle one of several
        plans = [plan(trained.images(BATCHES[-1]), sp.Target(latency=LATENCY)) for _ in range(5)]
        sizes = sorted(cost.macs(sp.apply(model, p), one) for p in plans)
        print("MACs of five plans for the latency, in millions:", [f"{n / 1e6:.2f}" for n in sizes])
        budget = sizes[2] / cost.macs(model, one)
    chosen = plan(one, sp.Target(macs=budget))
    small = sp.apply(model, chosen)
    sp.verify(model, small, chosen, one)
    return small


def by_torch_pruning(
    trained: Trained, importance: tp.importance.Importance, gradients: str, budget: float
) -> nn.Module:
    """Prune by torch-pruning, with the smallest ratio that fits the budget.

    Args:
        trained: The dense network.
        importance: One of torch-pruning's.
        gradients: What it finds in ``parameter.grad``: see :func:`_gradients`.
        budget: Fraction of the MACs that may remain.
    """
    found = _gradients(trained, gradients)
    most = budget * cost.macs(trained.model, trained.images(1))

    def fitting(ratio: float) -> nn.Module | None:
        # a global ranking may take every head of a layer: then fewer heads, by the next ratio down
        fewer = (ratio * i / 16 for i in range(16, 0, -1))
        small = next(s for heads in fewer if (s := _step(trained, importance, found, ratio, heads)))
        return small if cost.macs(small, trained.images(1)) <= most else None

    # not monotone: torch-pruning leaves a layer whole that would lose everything
    coarse = next((i for i in range(1, 64) if fitting(i / 64)), None)
    if coarse is None:
        raise PruningError(
            f"{type(importance).__name__}: no ratio reaches {budget:.2f} of the MACs"
        )
    return next(small for i in range(8) if (small := fitting((coarse - 1 + (i + 1) / 8) / 64)))


def _step(
    trained: Trained,
    importance: tp.importance.Importance,
    gradients: dict[str, Tensor],
    ratio: float,
    heads: float,
) -> nn.Module | None:
    """Return what one step of a BasePruner leaves; None where a layer has no head left."""
    small = copy.deepcopy(trained.model)
    classifier: Any = small.get_submodule("fc" if isinstance(small, ResNet) else "head")
    for name, parameter in small.named_parameters():
        parameter.grad = gradients[name].clone() if gradients else None
    attentions = [m for m in small.modules() if isinstance(m, Attention)]
    for attention in attentions:
        attention.fused_attn = False  # torch-pruning cannot trace the fused one
    pruner = tp.pruner.BasePruner(
        small,
        trained.images(1),
        importance,
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[classifier],
        round_to=ROUND_TO,
        num_heads={attention.qkv: attention.num_heads for attention in attentions},
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=heads,
        # its defaults are shared by all pruners of a process
        in_channel_groups={},
        out_channel_groups={},
        channel_groups={},
    )
    pruner.step()
    for attention in attentions:
        attention.num_heads = pruner.num_heads[attention.qkv]
        if attention.num_heads == 0:
            return None
        attention.attn_dim = attention.qkv.out_features // 3
        attention.head_dim = attention.attn_dim // attention.num_heads
        attention.fused_attn = True
    small.zero_grad()
    return small


def _gradients(trained: Trained, kind: str) -> dict[str, Tensor]:
    """Return what an importance expects in ``parameter.grad``.

    Args:
        trained: The dense network.
        kind: ``"first"``: gradients of the loss, summed over batches as its examples do;
            ``"second"``: means of squared per-sample gradients, which is what its
            ``accumulate_grad`` is meant to collect (that of 1.6.1 keeps the last sample only);
            ``""``: nothing.
    """
    model = trained.model
    rows = trained.train.rows[:GRADIENT_IMAGES]
    loader = replace(trained.train, rows=rows).loader(128)
    if kind == "second":
        method = sp.CurvatureMethod(labels="ef", estimator="exact")
        posterior = sp.fit_posterior(model, loader, curvature=method)
        return {n: h / len(rows) for n, h in posterior.curvature.diag.items()}
    if kind == "first":
        model.eval().zero_grad()
        for inputs, targets in loader:
            F.cross_entropy(model(inputs), targets).backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found
    return {}


#: Scores in plans of our own.
PLANNED: dict[str, Callable[[nn.Module, sp.Posterior], sp.scores.Scores]] = {
    "opd": sp.scores.opd,
    "obd": sp.scores.obd,
    "squares": lambda model, _: {n: p.detach().square() for n, p in model.named_parameters()},
}
#: Importances in torch-pruning's pruner, and the gradients that they need.
IN_TORCH_PRUNING: dict[str, tuple[Callable[[sp.Posterior], tp.importance.Importance], str]] = {
    "tp-opd": (lambda posterior: sp.OPDImportance(posterior, normalizer="mean"), ""),
    "tp-magnitude": (lambda _: tp.importance.GroupMagnitudeImportance(), ""),
    "tp-taylor": (lambda _: tp.importance.GroupTaylorImportance(), "first"),
    "tp-hessian": (lambda _: tp.importance.GroupHessianImportance(), "second"),
    "tp-lamp": (lambda _: tp.importance.LAMPImportance(), ""),
    "tp-fpgm": (lambda _: tp.importance.FPGMImportance(), ""),
}
METHODS = ("dense", "longer", *PLANNED, *IN_TORCH_PRUNING)


def accuracy(model: nn.Module, split: data.Split) -> float:
    """Return the accuracy in percent."""
    return measure.quality(model, split.loader(1000)).accuracy


def row(trained: Trained, method: str, budget: float | None, folder: Path) -> dict[str, Any]:
    """Prune, fine-tune, measure and save; without a budget a plan is made for the latency."""
    dense, example = trained.model, trained.images(1)
    if method in ("dense", "longer"):
        small = copy.deepcopy(dense)
    elif method in PLANNED:
        small = by_plan(trained, PLANNED[method](dense, trained.posterior), budget)
    else:
        assert budget is not None
        create, gradients = IN_TORCH_PRUNING[method]
        small = by_torch_pruning(trained, create(trained.posterior), gradients, budget)
    just_pruned = accuracy(small, trained.validation)
    if method != "dense":
        finetune(small, trained)
    sp.save(small, folder / method, factory=trained.network.create)
    return {
        "just_pruned": just_pruned,
        "validation": accuracy(small, trained.validation),
        "test": accuracy(small, trained.test),
        "macs": cost.macs(small, example) / cost.macs(dense, example),
        "params": cost.params(small) / cost.params(dense),
    }


@torch.no_grad()
def latencies(network: str, folder: Path) -> dict[str, dict[str, float]]:
    """Return the median milliseconds at each batch size of all networks that were saved.

    They are timed in turns, so that all see the same machine, each time in another order: what ran
    before decides what is in the caches.
    """
    load = partial(sp.load, factory=NETWORKS[network].create)
    models = {
        method: load(folder / method).to(memory_format=torch.channels_last)
        for method in METHODS
        if (folder / method).exists()
    }
    found: dict[str, dict[str, float]] = {method: {} for method in models}
    for batch in BATCHES:
        example = torch.randn(batch, 1, 28, 28).to(memory_format=torch.channels_last)
        seconds: dict[str, list[float]] = {method: [] for method in models}
        for _ in range(max(60, 300 // batch)):
            for method in random.sample(list(models), len(models)):
                start = time.perf_counter()
                models[method](example)
                seconds[method].append(time.perf_counter() - start)
        for method, values in seconds.items():
            found[method][str(batch)] = 1000 * statistics.median(values)
    return found


def table(lines: Iterable[dict[str, Any]]) -> str:
    """Return a Markdown table of means ± standard errors over seeds."""
    head = ["training", "method", "seeds", "MACs", "parameters"]
    head += [f"speed-up, batch {n}" for n in BATCHES]
    head += ["just pruned, held out", "fine-tuned, held out", "test", "test, against dense"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["training"], line["method"]), []).append(line)
    for (training, method), mine in groups.items():
        dense = {x["seed"]: x for x in groups[training, "dense"]}
        cells = [
            _cell([100 * x["macs"] for x in mine], "%"),
            _cell([100 * x["params"] for x in mine], "%"),
            *(_cell([_speedup(x, dense, n) for x in mine], "×", 2) for n in BATCHES),
            *(_cell([x[key] for x in mine]) for key in ("just_pruned", "validation", "test")),
            _cell([x["test"] - dense[x["seed"]]["test"] for x in mine], digits=2, sign="+"),
        ]
        rows.append(f"| {training} | {method} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _speedup(line: dict[str, Any], dense: dict[int, dict[str, Any]], batch: int) -> float:
    times = (x["milliseconds"][str(batch)] for x in (dense[line["seed"]], line))
    return next(times) / next(times)


def _cell(values: list[float], unit: str = "", digits: int = 1, sign: str = "") -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
    return f"{statistics.mean(values):{sign}.{digits}f} ± {error:.{digits}f}{unit}"


def main() -> None:
    """Run what is missing, then print the tables of what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--trainings", nargs="*", default=["spam", "map"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, default=Path("runs/latency"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "rows.jsonl"

    def lines() -> list[dict[str, Any]]:
        return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []

    def find(*key: str | int) -> dict[str, Any] | None:
        names = ("network", "training", "seed", "method")
        return next((x for x in lines() if tuple(x[n] for n in names) == key), None)

    cells = list(itertools.product(options.trainings, options.networks, options.seeds))
    for training, network, seed in cells:
        folder = options.out / f"{network}-{training}-{seed}"
        trained: Trained | None = None
        for method in options.methods:
            if find(network, training, seed, method):
                continue
            trained = trained or train(network, training, seed, folder)
            ours = find(network, "spam", seed, "opd")
            found = row(trained, method, ours["macs"] if ours else None, folder)
            key = {"network": network, "training": training, "seed": seed, "method": method}
            with file.open("a") as out:
                out.write(json.dumps(key | found) + "\n")
    timed = []
    for training, network, seed in cells:
        times = latencies(network, options.out / f"{network}-{training}-{seed}")
        for method, milliseconds in times.items():
            line = find(network, training, seed, method)
            timed += [line | {"milliseconds": milliseconds}] if line else []
    print(f"Load of the machine: {os.getloadavg()[0]:.1f}")
    for network in options.networks:
        print(f"\n### {network}\n\n{table(x for x in timed if x['network'] == network)}")


if __name__ == "__main__":
    main()
