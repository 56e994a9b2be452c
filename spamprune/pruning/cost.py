"""What a network costs: multiply-accumulates and parameters."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from spamprune.modules import evaluation_mode


@torch.no_grad()
def macs(model: nn.Module, example: Tensor) -> int:
    """Return the multiply-accumulates of one forward pass on ``example``.

    Counted are convolutions, linear and recurrent layers and matrix products; not biases,
    normalisation, activations and pooling. A mask saves nothing here: multiplying by zero is
    counted.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    trainable = [p for p in model.parameters() if p.requires_grad]
    # fused attention hides its matrix products from the counter
    torch.backends.mha.set_fastpath_enabled(False)
    for parameter in trainable:  # the counter's hooks fail on some that modules hand on
        parameter.requires_grad_(False)
    try:
        with (
            evaluation_mode(model),
            FlopCounterMode(display=False, custom_mapping=_FUSED) as counter,
            sdpa_kernel(SDPBackend.MATH),
        ):
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for parameter in trainable:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops()) // 2


def _recurrent(inputs: Sequence[int], weights: Iterable[Sequence[int]]) -> int:
    """Return the flops of multiplying each step of ``inputs`` by ``weights``; all are shapes."""
    return 2 * math.prod(inputs[:-1]) * sum(map(math.prod, weights))


#: Recurrent layers in one operation, which torch's counter does not know.
_FUSED = {
    torch.ops.aten.mkldnn_rnn_layer: lambda x, *args, **_: _recurrent(x, args[:2]),
    torch.ops.aten._cudnn_rnn: lambda x, tensors, *_, **__: _recurrent(
        x, [shape for shape in tensors if len(shape) == 2]
    ),
}


def params(model: nn.Module) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def nonzero(model: nn.Module) -> int:
    """Return the number of parameters that are not exactly zero, tied ones once."""
    return sum(int(p.count_nonzero()) for p in model.parameters())


@torch.no_grad()
def latency(model: nn.Module, example: Tensor, *, repeats: int = 15) -> float:
    """Return the median wall-clock seconds of a forward pass of ``example``, after a warm-up."""
    seconds = []
    with evaluation_mode(model):
        for _ in range(_WARM_UP + repeats):
            _wait(example)
            start = time.perf_counter()
            model(example)
            _wait(example)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[_WARM_UP:])


_WARM_UP = 3


def _wait(x: Tensor) -> None:
    """Wait until the accelerator that holds ``x`` has nothing left to do."""
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)
