"""Mean-field inference and sparsity by evidence: what they cost, and where the choice lies.

``python benchmarks/bmr.py cost NETWORK…`` times steps and scoring beside MAP's steps, ``memory
NETWORK [PRIOR]`` measures what tensors take at most, and how far a process grows.
``python benchmarks/bmr.py evidence RUN TRAINING…`` takes the networks of a finished run on
Fashion-MNIST, lets the evidence choose their sparsity, and puts the choice beside fixed ones;
``units RUN TRAINING…`` does so with their widths.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import spamprune as sp
from spamprune.bayes.reduction import surplus
from spamprune.data import load
from spamprune.data.base import Loader
from spamprune.engine.automatic import masks_by_evidence
from spamprune.engine.bench import Bench
from spamprune.engine.cell import accelerator
from spamprune.engine.subject import Subject
from spamprune.models import create
from spamprune.pruning.masks import Masks, apply_masks, global_masks, sparsity_of
from spamprune.recipe import load as load_recipe
from spamprune.report import measure

DATA = "fashion_mnist"
BATCH = 128
ROUNDS = 5  # of steps of each kind in turn, so that a busy machine slows all of them
FIXED = [0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94]
FIXED += [0.95, 0.96, 0.97, 0.98, 0.99]
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LOST = 0.5  # points of accuracy


def trainer(
    model: nn.Module, prior: str | None, batch: tuple[Tensor, Tensor]
) -> tuple[Callable[[], None], nn.Module]:
    """Return a function that takes a step, MAP's where there is no mean-field prior."""
    trained = model if prior is None else sp.MeanField(model, 60_000, prior=prior)  # type: ignore[arg-type]
    optimizer = create_optimizer_v2(
        list(trained.parameters()), opt="adabelief", lr=1e-3, weight_decay=0.0
    )
    inputs, targets = batch

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(trained(inputs), targets)
        if isinstance(trained, sp.MeanField):
            loss = loss + trained.penalty()
        loss.backward()
        optimizer.step()

    return step, trained


def peak(work: Callable[[], None]) -> float:
    """Return by how many bytes a process grows at most while it works."""
    process, done, most = psutil.Process(), threading.Event(), 0
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, process.memory_info().rss - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return most


def tensors(work: Callable[[], None]) -> float:
    """Return how many bytes all tensors that some work makes take at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocated = [e["args"] for e in events if e.get("name") == "[memory]"]
    before = allocated[0]["Total Allocated"] - allocated[0]["Bytes"]
    return max(row["Total Allocated"] for row in allocated) - before


def cost(names: list[str]) -> None:
    """Print processor seconds of a step, and of scoring, for MAP and mean-field inference."""
    print("| network | parameters | MAP step / ms | mean field | horseshoe | scoring / s | epoch |")
    print("|---|---|---|---|---|---|---|")
    data = load(DATA, validation=0)
    batch = next(iter(data.train.loader(BATCH, seed=0)))
    for name in names:
        torch.manual_seed(0)
        model = create(name)
        made = {
            prior: trainer(copy.deepcopy(model), prior, batch)
            for prior in (None, "gaussian", "horseshoe")
        }
        taken: dict[str | None, list[float]] = {prior: [] for prior in made}
        for step, _ in made.values():
            step()
        for _ in range(ROUNDS):
            for prior, (step, _) in made.items():
                start = time.process_time()
                step()
                taken[prior].append(time.process_time() - start)
        seconds = {prior: statistics.median(values) for prior, values in taken.items()}
        field = made["gaussian"][1]
        assert isinstance(field, sp.MeanField)
        start = time.process_time()
        surplus(field.gains())
        scoring = time.process_time() - start
        epoch = seconds["gaussian"] * math.ceil(60_000 / BATCH)
        print(
            f"| {name} | {sum(p.numel() for p in model.parameters()):,} "
            f"| {1000 * seconds[None]:.1f} | {seconds['gaussian'] / seconds[None]:.2f}× "
            f"| {seconds['horseshoe'] / seconds[None]:.2f}× | {scoring:.3f} | {epoch:.0f} |",
            flush=True,
        )


def memory(name: str, prior: str | None) -> None:
    """Print what a few steps need, the network included; each kind wants a process of its own."""
    data = load(DATA, validation=0)
    batch = next(iter(data.train.loader(BATCH, seed=0)))

    def work() -> None:
        torch.manual_seed(0)
        step, _ = trainer(create(name), prior, batch)
        for _ in range(3):
            step()

    grown, held = peak(work) / 1e6, tensors(work) / 1e6
    print(f"{name} {prior or 'map'}: tensors {held:.0f} MB, process {grown:.0f} MB")


@dataclass(frozen=True)
class Trained:
    """A trained network of a finished run, with how it is measured.

    Attributes:
        subject: The network, its posterior and its cell.
        test: The test data.
    """

    subject: Subject
    test: Loader

    @property
    def name(self) -> str:
        """Training and seed, as two columns of a table."""
        return f"{self.subject.bench.training} | {self.subject.bench.seed}"

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy of a network on the test data in percent."""
        return measure.quality(model, self.test).accuracy


def trained(run: Path, names: Sequence[str]) -> Iterator[Trained]:
    """Yield the networks of some trainings of a run that are there."""
    recipe = load_recipe(run / "recipe.yaml")
    data = load(DATA, validation=recipe.data.validation)
    for name in names:
        for folder in sorted((run / name).glob("seed*")):
            if not (folder / "posterior.safetensors").exists():
                continue
            model = create(recipe.model.name, **recipe.model.kwargs)
            state = load_file(folder / "checkpoint.safetensors")
            model.load_state_dict(
                {k.removeprefix("model/"): t for k, t in state.items() if k.startswith("model/")}
            )
            posterior = sp.load_posterior(folder / "posterior.safetensors")
            seed = int(folder.name.removeprefix("seed"))
            bench = Bench(recipe, name, seed, run, data, accelerator(), lambda *_: None)
            yield Trained(Subject(bench, model, posterior), data.test.loader(1000))


def evidence(run: Path, names: Sequence[str]) -> None:
    """Print, for each cell of some trainings, the sparsity chosen and what fixed ones lose."""
    print(
        "| training | seed | dense / % | chosen | accuracy / % | loses | determined weights "
        "| log evidence | sparsest fixed that loses no more | sparsest within half a point |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for network in trained(run, names):
        model = network.subject.model
        scores = sp.scores.opd(model, network.subject.posterior)
        masks, found = masks_by_evidence(network.subject, scores)

        def accuracy(masks: Masks, network: Trained = network) -> float:
            pruned = copy.deepcopy(network.subject.model)
            apply_masks(pruned, masks)
            return network.accuracy(pruned)

        dense, kept, chosen = network.accuracy(model), accuracy(masks), sparsity_of(masks)
        fixed = {s: accuracy(global_masks(scores, s)) for s in FIXED}
        as_good = max((s for s, a in fixed.items() if a >= kept), default=0.0)
        half = max((s for s, a in fixed.items() if a >= dense - LOST), default=0.0)
        print(
            f"| {network.name} | {dense:.2f} | {chosen:.3f} | {kept:.2f} | {dense - kept:.2f} "
            f"| {found.effective:,.0f} | {found.before:,.0f} → {found.after:,.0f} "
            f"| {max(as_good, chosen):.3f} | {half:.2f} |",
            flush=True,
        )


def units(run: Path, names: Sequence[str]) -> None:
    """Print, for each cell of some trainings, the widths chosen and what fixed ratios lose."""
    print("| training | seed | dense / % | chosen | units gone | accuracy / % | fixed ratios |")
    print("|---|---|---|---|---|---|---|")
    for network in trained(run, names):
        subject = network.subject
        scores, example = sp.scores.opd(subject.model, subject.posterior), subject.bench.example()

        def pruned(
            target: sp.Target,
            subject: Subject = subject,
            scores: Mapping[str, Tensor] = scores,
            example: Tensor = example,
        ) -> tuple[nn.Module, sp.Plan]:
            plan = sp.plan(subject.model, example, scores, target, ranking="global")
            return sp.apply(subject.model, plan), plan

        small, plan = pruned(sp.Target(evidence=subject.evidence))
        gone = sum(len(g.pruned) for g in plan.groups) / sum(g.units for g in plan.groups)
        fixed = {r: network.accuracy(pruned(sp.Target(ratio=r))[0]) for r in RATIOS}
        print(
            f"| {network.name} | {network.accuracy(subject.model):.2f} "
            f"| {'-'.join(map(str, plan.widths().values()))} | {gone:.2f} "
            f"| {network.accuracy(small):.2f} "
            f"| {', '.join(f'{r:g}: {a:.1f}' for r, a in fixed.items())} |",
            flush=True,
        )


def main() -> None:
    """Run a part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    costs = parts.add_parser("cost")
    costs.add_argument("names", nargs="+")
    memories = parts.add_parser("memory")
    memories.add_argument("name")
    memories.add_argument("prior", nargs="?")
    for name in ("evidence", "units"):
        part = parts.add_parser(name)
        part.add_argument("run", type=Path)
        part.add_argument("trainings", nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if given.part == "cost":
        cost(given.names)
    elif given.part == "memory":
        memory(given.name, given.prior)
    else:
        {"evidence": evidence, "units": units}[given.part](given.run, given.trainings)


if __name__ == "__main__":
    main()
