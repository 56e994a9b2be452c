"""Reductions and normalisation."""

from __future__ import annotations

from spamprune.pruning.axes.axis import Axis, factor, fix, mix, tie
from spamprune.pruning.axes.call import Axes, Call, Shadow, rule, same
from spamprune.pruning.axes.rules.elementwise import pointwise


@rule("sum", "mean", "amax", "amin", "any", "all", "prod", "var", "std", "var_mean", "std_mean")
@rule("logsumexp", "norm", "linalg_vector_norm", "nansum")
def _reduce(call: Call) -> list[Axes]:
    axes = call.of("self")
    dims = call["dim"]
    if dims is None or dims == []:
        dims = range(len(axes))
    gone = {d % len(axes) for d in (dims if isinstance(dims, (list, tuple, range)) else [dims])}
    for d in gone:
        mix(axes[d], call.why)
    keep = [Axis(1) if d in gone else axis for d, axis in enumerate(axes)]
    if not call["keepdim"]:
        keep = [axis for d, axis in enumerate(keep) if d not in gone]
    return [keep for _ in call.shapes]


@rule("max", "min", "median")
def _extreme(call: Call) -> list[Axes]:
    if isinstance(call["other"], Shadow):  # of two tensors
        return pointwise(call)
    if len(call.shapes) == 2:  # values, and where they are
        call.places = call.of("self")[call["dim"]]
    return _reduce(call)


@rule("argmax", "argmin")
def _position_of(call: Call) -> list[Axes]:
    axes = call.of("self")
    for axis in axes if call["dim"] is None else [axes[call["dim"]]]:
        fix(axis, call.why)
    return _reduce(call)


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(call: Call) -> list[Axes]:
    axes = call.of("self")
    mix(axes[call["dim"]], call.why)
    return [axes]


@rule("native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(call: Call) -> list[Axes]:
    axes = call.of("input")
    normalised = axes[-len(call["normalized_shape"]) :]
    for axis in normalised:
        mix(axis, call.why)
    for name in ("weight", "bias"):
        if isinstance(call[name], Shadow):
            for a, b in zip(normalised, call.of(name), strict=True):
                tie(a, b)
    return same(call, axes)


@rule("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "batch_norm")
@rule("_native_batch_norm_legit_no_training", "_batch_norm_no_update", "native_group_norm")
def _channel_norm(call: Call) -> list[Axes]:
    axes = call.of("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(call[name], Shadow):
            tie(axes[1], call.of(name)[0])
    if call.name == "native_group_norm":
        groups = factor(axes[1], [call["group"], axes[1].size // call["group"]])
        mixed = [axes[1] if groups is None else groups[1], *axes[2:]]
    elif call["training"]:
        mixed = [axes[0], *axes[2:]]
    else:
        mixed = []
    for axis in mixed:
        mix(axis, call.why)
    return same(call, axes)
