"""Operations over positions in space: pooling, resizing, padding, patches, shuffles."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spamprune.pruning.axes.axis import Axis, factor, fix, leaves, mix, product
from spamprune.pruning.axes.call import SPACE, Axes, Call, Rule, Shadow, rule, unknown


def window(call: Call, axes: Axes, sizes: Sequence[int]) -> Axes:
    """Return the axes of positions in space after a sliding window went over them."""
    window = call["weight"]
    one_filter = isinstance(window, Shadow) and math.prod(window.shape) == window.shape[-1]
    if one_filter and len(axes) == 1 and axes[0].size == sizes[0]:
        # over channels, as in efficient channel attention
        mix(axes[0], call.why)
        return axes
    for axis in axes:
        fix(axis, call.why)
    # positions of the input stay such, and channels that a window goes over stay channels
    return [Axis(n, fixed=next(leaves(axis)).fixed) for n, axis in zip(sizes, axes, strict=True)]


def _spatial(dims: int) -> Rule:
    def apply(call: Call) -> list[Axes]:
        axes = call.of("self" if isinstance(call["self"], Shadow) else "input")
        space = window(call, axes[-dims:], call.shape[-dims:])
        return [[*axes[:-dims], *space] for _ in call.shapes]

    return apply


for _names, _dims in (
    (("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "upsample_linear1d"), 1),
    (("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d"), 2),
    (("max_pool2d", "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d"), 2),
    (("upsample_bicubic2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"), 2),
    (("reflection_pad2d", "replication_pad2d", "grid_sampler_2d", "_fft_r2c", "_fft_c2r"), 2),
    (("max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "upsample_nearest3d"), 3),
):
    rule(*_names)(_spatial(_dims))


@rule("constant_pad_nd")
def _pad(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    pads = call["pad"]
    for i in range(len(pads) // 2):
        if pads[2 * i] or pads[2 * i + 1]:
            place = len(axes) - 1 - i
            fix(axes[place], call.why)
            axes[place] = Axis(call.shape[place], fixed=call.why)
    return [axes]


@rule("pixel_shuffle", "pixel_unshuffle")
def _pixel_shuffle(call: Call) -> list[Axes]:
    axes = call.of("self")
    if call.name == "pixel_shuffle":
        square = call["upscale_factor"] ** 2
        parts = factor(axes[-3], [axes[-3].size // square, square])
        channels = axes[-3] if parts is None else parts[0]
        if parts is None:
            return unknown(call)
        fix(parts[1], call.why)
    else:
        channels = product([axes[-3], Axis(call["downscale_factor"] ** 2, fixed=call.why)])
    for axis in axes[-2:]:
        fix(axis, call.why)
    return [[*axes[:-3], channels, *(Axis(n, fixed=call.why) for n in call.shape[-2:])]]


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    parts = factor(axes[1], [call["groups"], axes[1].size // call["groups"]])
    if parts is None:
        return unknown(call)
    axes[1] = product([parts[1], parts[0]])
    return [axes]


@rule("im2col")
def _im2col(call: Call) -> list[Axes]:
    axes = call.of("self")
    window = math.prod(call["kernel_size"])
    for axis in axes[-2:]:
        fix(axis, call.why)
    channels = product([axes[-3], Axis(window, fixed=call.why)])
    return [[*axes[:-3], channels, Axis(call.shape[-1], fixed=call.why)]]


@rule("col2im")
def _col2im(call: Call) -> list[Axes]:
    axes = call.of("self")
    window = math.prod(call["kernel_size"])
    parts = factor(axes[-2], [axes[-2].size // window, window])
    if parts is None:
        return unknown(call)
    fix(parts[1], SPACE)
    fix(axes[-1], SPACE)
    return [[*axes[:-2], parts[0], *(Axis(n, fixed=SPACE) for n in call.shape[-2:])]]


@rule("unfold")
def _unfold(call: Call) -> list[Axes]:
    axes = list(call.of("self"))
    dim = call["dimension"]
    fix(axes[dim], call.why)
    axes[dim] = Axis(call.shape[dim], fixed=call.why)
    return [[*axes, Axis(call.shape[-1], fixed=call.why)]]
