"""What curvature costs, over a plain gradient pass, beside other libraries.

``python benchmarks/curvature.py [--networks …] [--rounds …] [--ggn] [--memory]`` prints a Markdown
table. A gradient pass is forward, cross-entropy and backward with all weight gradients, in
evaluation mode, as all the others are. One process, one thread, CPU time; rounds are interleaved
and the fastest of each counts. ``1.40 + 0.8`` is 1.40 gradient passes for each batch, and 0.8 once
in a call, for checking the model before and putting the result together after; calls of one batch
and of ``--batches`` tell them apart. Geometric means are of the former.

First each row's diagonal is compared with single samples' squared gradients, in float64 on four
samples: ``wrong (98 %)`` is the error of the worst parameter tensor relative to that tensor, and
``misses 3`` the number of tensors left out; the price of a wrong answer follows in brackets.
Kronecker factors are only asked whether they are there. Peers need
``pip install asdfghjkl laplace-torch curvlinops-for-pytorch backpack-for-pytorch``.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import spamprune.models.classic  # noqa: F401  (registers LeNet with timm)
from spamprune.report.table import Entry, Table, Text

Batches = list[tuple[Tensor, Tensor]]
#: Goes over batches; returns the summed diagonal by name, or nothing to compare.
Run = Callable[[Batches], dict[str, Tensor] | None]
CLASSES = 10


@dataclass(frozen=True)
class Network:
    """A network at the size that it is measured with.

    Attributes:
        name: In timm's registry.
        shape: Of an input.
        batch: Samples in a batch.
        options: For timm.
    """

    name: str
    shape: tuple[int, int, int]
    batch: int
    options: Mapping[str, Any]

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the network with random heads, norms and statistics: zeros would hide errors."""
        torch.manual_seed(0)
        model = timm.create_model(self.name, num_classes=CLASSES, **self.options)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.2 / (p[0].numel() if p.dim() > 1 else 1) ** 0.5)
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.momentum = None  # an average over the following pass
            model.train()(self.data(1, self.batch)[0][0])
        return model.eval().to(dtype)

    def data(self, batches: int, size: int, dtype: torch.dtype = torch.float32) -> Batches:
        """Return batches of noise and random labels."""
        generator = torch.Generator().manual_seed(1)
        return [
            (
                torch.randn(size, *self.shape, generator=generator).to(dtype),
                torch.randint(0, CLASSES, (size,), generator=generator),
            )
            for _ in range(batches)
        ]


NETWORKS = {
    "LeNet": Network("lenet", (1, 28, 28), 128, {}),
    "resnet18@32": Network("resnet18", (3, 32, 32), 32, {}),
    "vit_tiny@32/p4": Network(
        "vit_tiny_patch16_224", (3, 32, 32), 32, {"img_size": 32, "patch_size": 4}
    ),
    "mixer_s32": Network("mixer_s32_224", (3, 224, 224), 16, {}),
    "convnext_atto@64": Network("convnext_atto", (3, 64, 64), 32, {}),
    "mobilenetv3@64": Network("mobilenetv3_small_050", (3, 64, 64), 64, {}),
}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradient_pass(model: nn.Module) -> Run:
    def run(batches: Batches) -> None:
        for inputs, targets in batches:
            loss = F.cross_entropy(model(inputs), targets)
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    return run


def ours(model: nn.Module, module: str, **options: Any) -> Run:
    estimator = getattr(importlib.import_module(f"spamprune.bayes.curvature.{module}"), module)

    def run(batches: Batches) -> dict[str, Tensor]:
        n_data = sum(len(targets) for _, targets in batches)
        return estimator(model, batches, n_data=n_data, **options).diag

    return run


def torch_func(model: nn.Module) -> Run:
    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")

    def run(batches: Batches) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in trainable(model).items()}
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        # whole batches take up to five times as long: their gradients leave every cache
        piece = max(1, 2**27 // sum(p.nbytes for p in parameters.values()))
        for inputs, targets in batches:
            for x, y in zip(inputs.split(piece), targets.split(piece), strict=True):
                for name, g in gradients(parameters, x, y).items():
                    total[name] += g.square().sum(0)
        return total

    return run


def asdl(model: nn.Module, kind: str, shape: str) -> Run:
    library = importlib.import_module("asdl")
    config = library.FisherConfig(
        fisher_type=kind, fisher_shapes=[shape], loss_type="cross_entropy", data_size=1
    )

    def run(batches: Batches) -> dict[str, Tensor]:
        maker = library.get_fisher_maker(model, config)
        for i, (inputs, targets) in enumerate(batches):
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, inputs), targets)
            maker.forward_and_backward(accumulate=i > 0)
        found = {
            f"{prefix}.{part}": values
            for prefix, module in model.named_modules()
            for part, values in asdl_found(module).items()
        }
        return {
            name: diagonal.reshape(p.shape)
            for name, p in trainable(model).items()
            if (diagonal := found.get(name)) is not None
        }

    return run


def asdl_found(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the diagonals that asdl left on a module, or those of the Kronecker factors there."""
    fisher: Any = getattr(module, "fisher", None)
    if fisher is None:
        return {}
    if fisher.has_diag:
        return {part: getattr(fisher.diag, part) for part in ("weight", "bias")}
    outputs, inputs = fisher.kron.B.diagonal(), fisher.kron.A.diagonal()
    found: dict[str, Tensor | None] = {"bias": outputs}
    weight: Any = module.weight
    if len(inputs) == weight[0].numel():  # those of grouped convolutions are no factors
        found["weight"] = outputs[:, None] * inputs
    return found


def laplace(model: nn.Module, backend: str) -> Run:
    curvature = getattr(importlib.import_module("laplace.curvature"), backend)
    curvature = curvature(model, "classification")

    def run(batches: Batches) -> dict[str, Tensor]:
        parameters = trainable(model)
        total: Tensor | float = 0.0
        for inputs, targets in batches:
            total = total + curvature.diag(inputs, targets)[1]
        parts = torch.as_tensor(total).split([p.numel() for p in parameters.values()])
        pairs = zip(parameters.items(), parts, strict=True)
        return {name: part.view(p.shape) for (name, p), part in pairs}

    return run


def curvlinops_kron(model: nn.Module) -> Run:
    library = importlib.import_module("curvlinops")

    def run(batches: Batches) -> None:
        operator = library.KFACLinearOperator(
            model,
            nn.CrossEntropyLoss(reduction="sum"),
            [p for p in model.parameters() if p.requires_grad],
            batches,
            fisher_type="empirical",
            check_deterministic=False,
        )
        operator.compute_kronecker_factors()

    return run


@dataclass(frozen=True)
class Row:
    """A way to get curvature.

    Attributes:
        prepare: Takes a network of its own; whatever it needs is imported here.
        exact: Whose labels its diagonal is the exact one of, if it is.
    """

    prepare: Callable[[nn.Module], Run]
    exact: str | None = None


GRADIENT = "gradient pass"
ROWS = {
    GRADIENT: Row(gradient_pass),
    "sketch (ours)": Row(partial(ours, module="sketch")),
    "exact EF (ours)": Row(partial(ours, module="exact"), "ef"),
    "EF, asdl": Row(partial(asdl, kind="fisher_emp", shape="diag"), "ef"),
    "EF, laplace-torch with curvlinops": Row(partial(laplace, backend="CurvlinopsEF"), "ef"),
    "EF, laplace-torch with backpack": Row(partial(laplace, backend="BackPackEF"), "ef"),
    "EF, torch.func": Row(torch_func, "ef"),
    "kron EF (ours)": Row(partial(ours, module="kron", labels="ef")),
    "kron EF, asdl": Row(partial(asdl, kind="fisher_emp", shape="kron")),
    "kron EF, curvlinops": Row(curvlinops_kron),
}
GGN_ROWS = {
    "exact GGN (ours)": Row(partial(ours, module="exact", labels="ggn"), "ggn"),
    "GGN, asdl": Row(partial(asdl, kind="fisher_exact", shape="diag"), "ggn"),
}


def single_squares(model: nn.Module, batches: Batches, labels: str) -> dict[str, Tensor]:
    """Return the exact diagonal from one sample, and one class, at a time."""
    parameters = trainable(model)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for inputs, targets in batches:
        for x, y in zip(inputs.split(1), targets.split(1), strict=True):
            log_p = model(x).log_softmax(-1)[0]
            for label in [int(y)] if labels == "ef" else range(len(log_p)):
                weight = 1.0 if labels == "ef" else log_p[label].exp().item()
                found = torch.autograd.grad(
                    -log_p[label], list(parameters.values()), retain_graph=True
                )
                for name, g in zip(parameters, found, strict=True):
                    total[name].addcmul_(g, g, value=weight)
    return total


def verdict(row: Row, network: Network) -> str:
    """Return what is wrong with a row's result on this network; empty if nothing is."""
    model, batches = network.build(torch.float64), network.data(1, 4, torch.float64)
    got = row.prepare(copy.deepcopy(model))(batches)
    if got is None:
        return ""
    missing = len(trainable(model).keys() - got.keys())
    errors = [0.0]
    if row.exact is not None:
        exact = single_squares(model, batches, row.exact)
        # some gradients are zero but for rounding, such as that of a constant before a LayerNorm
        rounding = 1e-20 * max(truth.norm() for truth in exact.values())
        errors += [
            ((got[name] - truth).norm() / (truth.norm() + rounding)).item()
            for name, truth in exact.items()
            if name in got
        ]
    worst = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
    words = [] if worst < 1e-4 else [f"wrong ({_percent(worst)})"]
    return ", ".join(words + ([f"misses {missing}"] if missing else []))


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %" if error < 10 else f"×{error:.1g}"


def failure(error: Exception) -> str:
    return "fails: " + (str(error).strip() or type(error).__name__).splitlines()[0][:60]


@dataclass(frozen=True)
class Cost:
    """Of a row, in CPU seconds.

    Attributes:
        batch: For each further batch of a call.
        once: In a call, whatever its length.
    """

    batch: float
    once: float


def seconds(run: Run, batches: Batches) -> float:
    start = time.process_time()
    run(batches)
    return time.process_time() - start


def measure_time(network: Network, rows: Mapping[str, Row], rounds: int, n: int) -> dict[str, Any]:
    """Return the cost of each row, or the exception that it ended in."""
    batches, model = network.data(n, network.batch), network.build()
    found: dict[str, Any] = {}
    runs: dict[str, Run] = {}
    for name, row in rows.items():
        try:
            runs[name] = row.prepare(copy.deepcopy(model))
            runs[name](batches[:1])  # warms up
        except Exception as error:
            runs.pop(name, None)
            found[name] = error
    short, long = (dict.fromkeys(runs, math.inf) for _ in range(2))
    for _ in range(rounds):
        for name, run in runs.items():
            short[name] = min(short[name], seconds(run, batches[:1]))
            long[name] = min(long[name], seconds(run, batches))
    for name in runs:
        batch = (long[name] - short[name]) / (n - 1)
        found[name] = Cost(batch, max(0.0, short[name] - batch))
    return found


def measure_memory(label: str, rows: Mapping[str, Row], n: int) -> dict[str, Any]:
    """Return the bytes at each row's peak above those before, each in a process of its own."""
    found: dict[str, Any] = {}
    for name in rows:
        command = [sys.executable, __file__, "--networks", label, "--batches", str(n)]
        result = subprocess.run(
            [*command, "--peak-of", name], capture_output=True, text=True, check=False
        )
        last = (result.stdout + result.stderr).strip().splitlines()[-1]
        found[name] = RuntimeError(last) if result.returncode else float(last)
    return found


def peak(network: Network, row: Row, n: int) -> int:
    """Return the bytes at the peak of one run above those before it; Linux only."""
    model, batches = network.build(), network.data(n, network.batch)
    run = row.prepare(model)
    run(network.data(1, 1))  # so that what the first pass loads does not count
    ctypes.CDLL(None).malloc_trim(0)  # nor hides what it left
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    run(batches)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def cell(value: Any, gradient: float, wrong: str) -> tuple[str, float | None]:
    """Return what the table shows, and the ratio if it counts."""
    if isinstance(value, Exception):
        return failure(value), None
    if isinstance(value, Cost):
        ratio = value.batch / gradient
        words = f"{ratio:.2f} + {value.once / gradient:.1f}"
    else:
        ratio = value / gradient
        words = f"{ratio:.2f}"
    return (f"{wrong} [{words}]", None) if wrong else (words, ratio)


def compare(labels: Sequence[str], rows: Mapping[str, Row], options: argparse.Namespace) -> None:
    cells: dict[str, list[str]] = {name: [] for name in rows}
    ratios: dict[str, list[float | None]] = {name: [] for name in rows}
    for label in labels:
        network = NETWORKS[label]
        if options.memory:
            found, unit = measure_memory(label, rows, options.batches), (2.0**20, "MiB")
        else:
            found = measure_time(network, rows, options.rounds, options.batches)
            unit = (1e-3, "ms")
        gradient = found[GRADIENT] if options.memory else found[GRADIENT].batch
        for name, row in rows.items():
            wrong = ""
            if not isinstance(found[name], Exception):
                wrong = verdict(row, network)
            text, ratio = cell(found[name], gradient, wrong)
            if name == GRADIENT:
                text = f"{gradient / unit[0]:.3g} {unit[1]}"
            cells[name].append(text)
            ratios[name].append(ratio)
        print(f"{label} done", file=sys.stderr, flush=True)
    head: list[Entry] = [
        Text("peak memory" if options.memory else "time"),
        *labels,
        "geometric mean",
    ]
    shown: list[list[Entry]] = [
        [Text(name), *cells[name], mean(ratios[name]) if name != GRADIENT else ""] for name in rows
    ]
    print(Table(head, shown).markdown())


def mean(ratios: Sequence[float | None]) -> str:
    """Return the geometric mean where every network has a ratio."""
    counting = [math.log(r) for r in ratios if r is not None]
    return "–" if len(counting) < len(ratios) else f"{math.exp(sum(counting) / len(counting)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS | GGN_ROWS, help="all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=4, help="in a long call; two at least")
    parser.add_argument("--ggn", action="store_true", help="all classes too: slow")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.batches < 2:
        parser.error(
            "--batches: a batch's cost is the difference of two calls, so give two or more"
        )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    every = ROWS | GGN_ROWS
    if options.peak_of:
        network = NETWORKS[options.networks[0]]
        print(peak(network, every[options.peak_of], options.batches))
        return
    chosen = options.rows or [*ROWS, *(GGN_ROWS if options.ggn else ())]
    rows = {name: every[name] for name in every if name in {GRADIENT, *chosen}}
    compare(options.networks, rows, options)


if __name__ == "__main__":
    main()
