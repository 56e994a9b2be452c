"""How well a network predicts and what it costs."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from spamprune.errors import DataError
from spamprune.modules import device_of, evaluation_mode
from spamprune.pruning import cost
from spamprune.report.results import Quality, Size


@torch.no_grad()
def quality(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, bins: int = 15
) -> Quality:
    """Measure a classifier's predictions at its point estimate.

    Args:
        model: Maps inputs ``(B, ...)`` to logits ``(B, C)``; its modes are restored afterwards.
        loader: Batches of inputs and integer class labels ``(B,)``.
        bins: Equal-width bins of the calibration error.

    Returns:
        Accuracy in percent, mean negative log likelihood in nats, expected calibration error
        (l1, of the most probable class; torchmetrics' binning) in 0..1, the same with quantile
        bins, and Brier score summed over classes in 0..2.

    Raises:
        DataError: The loader is empty.
    """
    device = device_of(model)
    accuracy = calibration = None
    nll = brier = 0.0
    n = 0
    sure, right = [], []
    with evaluation_mode(model):
        for x, y in loader:
            logits, y = model(x.to(device)).float(), y.to(device)
            if accuracy is None or calibration is None:
                classes = logits.shape[1]
                accuracy = MulticlassAccuracy(classes, average="micro").to(device)
                calibration = MulticlassCalibrationError(classes, n_bins=bins, norm="l1").to(device)
            probabilities = logits.softmax(1)
            accuracy.update(probabilities, y)
            calibration.update(probabilities, y)
            # sums over a data set lose digits in single precision
            nll += F.cross_entropy(logits.double(), y, reduction="sum").item()
            truth = F.one_hot(y, logits.shape[1])
            brier += (probabilities.double() - truth).square().sum().item()
            confidence, guess = probabilities.max(1)
            sure.append(confidence)
            right.append(guess == y)
            n += len(y)
    if accuracy is None or calibration is None:
        raise DataError("there are no samples to evaluate on: the loader is empty")
    return Quality(
        accuracy=100 * accuracy.compute().item(),
        nll=nll / n,
        ece=calibration.compute().item(),
        quantile_ece=quantile_ece(torch.cat(sure), torch.cat(right)),
        brier=brier / n,
    )


def quantile_ece(confidence: Tensor, correct: Tensor, bins: int = 20) -> float:
    """Return the expected calibration error with bins of equal counts, in 0..1.

    So in the code of the paper on Bayesian model reduction (arXiv 2309.12095), with 20 bins. Where
    most confidences are near one, equal widths put nearly all samples into one bin.

    Args:
        confidence: Probabilities of the most probable class, ``(N,)``.
        correct: Whether it is the true one, ``(N,)``.
        bins: How many.
    """
    order = confidence.argsort(stable=True)
    gaps = correct[order].double() - confidence[order].double()
    return sum(abs(part.sum().item()) for part in gaps.tensor_split(bins)) / len(order)


@torch.no_grad()
def size(
    model: nn.Module,
    example: Tensor,
    *,
    latency_batches: Sequence[int] = (1, 128),
    repeats: int = 30,
) -> Size:
    """Measure what a forward pass of ``model`` costs, in evaluation mode and without gradients.

    Args:
        model: The network; its modes are restored afterwards.
        example: One input, ``(1, ...)``, on the model's device.
        latency_batches: Batch sizes at which to time it.
        repeats: Timed passes at each batch size, after a warm-up.

    Returns:
        Parameters (tied ones once) and those that are not exactly zero; MACs of one sample; bytes
        of the parameters as they are in memory, without buffers; median latency in seconds and
        the CPU threads that it was measured with.
    """
    parameters = list(model.parameters())
    with evaluation_mode(model):
        return Size(
            params=cost.params(model),
            nonzero=cost.nonzero(model),
            macs=cost.macs(model, example),
            bytes=sum(p.numel() * p.element_size() for p in parameters),
            latency=latencies(model, example, latency_batches, repeats),
            threads=torch.get_num_threads(),
        )


def latencies(
    model: nn.Module, example: Tensor, batches: Iterable[int], repeats: int
) -> dict[int, float]:
    """Return the median latency in seconds by batch size; the model's weights may be compressed."""
    return {
        size: cost.latency(
            model, example.expand(size, *example.shape[1:]).contiguous(), repeats=repeats
        )
        for size in batches
    }


def environment() -> dict[str, str]:
    """Return the versions and the hardware that results depend on, in words."""
    # torch's own word names its build too
    about = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("spamprune", "timm", "torch-pruning"):
        try:
            about[package] = version(package)
        except PackageNotFoundError:  # imported from a checkout that is not installed
            about[package] = "not installed"
    about["platform"] = platform.platform()
    about["cpu"] = _cpu()
    about["cores"] = str(os.cpu_count())
    about["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about


def _cpu() -> str:
    """Return the model of the processor, as well as this system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
