"""Pictures of parameters: how their prior precisions spread, and which weights are left."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from spamprune.report.style import GREY, ZERO, legend, svg

_MOST_TENSORS = 24
_STATES = {"dense": "Trained", "masked": "Masked", "compacted": "Compacted"}


def varied(posteriors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return the prior precisions that vary within some tensor: others have no histogram.

    Args:
        posteriors: Training → parameter name → prior precision δ, shaped like the parameter.

    Returns:
        The same, without tensors that are constant and trainings that have no other.
    """
    spread = {
        training: {n: d for n, d in deltas.items() if d.numel() > 1 and bool(d.min() < d.max())}
        for training, deltas in posteriors.items()
    }
    return {training: deltas for training, deltas in spread.items() if deltas}


@svg
def precision_histograms(
    posteriors: dict[str, dict[str, Tensor]], colours: dict[str, str]
) -> Figure:
    """Draw the histogram of log10 δ in each of the largest parameter tensors.

    Args:
        posteriors: What :func:`varied` returned, with at least one training.
        colours: Training → colour.
    """
    sizes = {n: d.numel() for deltas in posteriors.values() for n, d in deltas.items()}
    largest = set(sorted(sizes, key=lambda n: -sizes[n])[:_MOST_TENSORS])
    names = [name for name in sizes if name in largest]
    rows = -(-len(names) // 4)
    columns = -(-len(names) // rows)
    figure = Figure(figsize=(9.6, 0.9 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    logs = {t: {n: d.double().log10() for n, d in ds.items()} for t, ds in posteriors.items()}
    drawn = [log for by_name in logs.values() for n, log in by_name.items() if n in largest]
    low, high = min(float(v.min()) for v in drawn), max(float(v.max()) for v in drawn)
    for axes, name in zip(grid.flat, names, strict=False):
        # few values need wide bins
        edges = np.linspace(low, high, int(np.clip(np.sqrt(sizes[name]), 8, 40)) + 1)
        for training, by_name in logs.items():
            if name in by_name:
                share, _ = np.histogram(by_name[name].numpy(force=True), edges)
                share = 100 * share / share.sum()
                axes.stairs(share, edges, color=colours[training], lw=1.5)
                axes.stairs(share, edges, color=colours[training], alpha=0.15, fill=True)
        axes.set_title(f"{name}  ({sizes[name]:,})", fontsize=9)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    for column in range(columns):
        last = (len(names) - 1 - column) // columns
        grid[last, column].set_xlabel("log₁₀ δ")
        grid[last, column].tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("Share / %")
    legend(figure, [Line2D([], [], color=colours[t], lw=3, label=t) for t in posteriors])
    return figure


@svg
def filter_banks(banks: list[tuple[str, dict[str, Tensor | None]]]) -> Figure:
    """Draw layers' weights as matrices, output units × (inputs · kernel), all to one scale a row.

    Args:
        banks: Layer name and its weights under ``"dense"``, ``"masked"`` and ``"compacted"``; a
            state that is missing or None stays empty. At least one layer, each with one weight.
    """
    states = [state for state in _STATES if any(bank.get(state) is not None for _, bank in banks)]
    figure = Figure(figsize=(9.6, 0.8 + 1.75 * len(banks)), layout="constrained")
    grid = figure.subplots(len(banks), len(states), squeeze=False)
    colour_map = colormaps["RdBu_r"].with_extremes(bad=ZERO)
    for panels, (layer, bank) in zip(grid, banks, strict=True):
        matrices = {
            state: weight.flatten(1).float().numpy(force=True)
            for state, weight in bank.items()
            if weight is not None
        }
        height = max(matrix.shape[0] for matrix in matrices.values())
        width = max(matrix.shape[1] for matrix in matrices.values())
        magnitudes = np.abs(np.concatenate([matrix.ravel() for matrix in matrices.values()]))
        magnitudes = magnitudes[magnitudes > 0]
        # the few largest weights would leave all others pale
        largest = float(np.quantile(magnitudes, 0.99)) if magnitudes.size else 1.0
        for axes, state in zip(panels, states, strict=True):
            axes.grid(False)
            axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
            axes.spines[:].set_visible(False)
            matrix = matrices.get(state)
            if matrix is None:
                continue
            out, into = matrix.shape
            image = axes.imshow(
                np.ma.masked_equal(matrix, 0.0),
                cmap=colour_map,
                vmin=-largest,
                vmax=largest,
                interpolation="nearest",
                extent=(0, into, out, 0),
                aspect="auto",
            )
            axes.set(xlim=(0, width), ylim=(height, 0))
            frame = Rectangle((0, 0), into, out, fill=False, color=GREY, lw=0.8, clip_on=False)
            axes.add_patch(frame)
            kept = 100 * float(np.mean(matrix != 0))
            text = f"{out} × {into}" + (f", {kept:.3g} % nonzero" if kept < 100 else "")
            axes.set_xlabel(text, fontsize=9, loc="left")
        panels[0].set_ylabel(layer)
        bar = figure.colorbar(image, ax=list(panels), fraction=0.02, pad=0.01, aspect=12)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8)
    for axes, state in zip(grid[0], states, strict=True):
        axes.set_title(_STATES[state])
    zero = Line2D([], [], color=ZERO, lw=8, label="exactly zero")
    legend(figure, [zero])
    return figure
