"""How figures look: colours, line styles, and the way from a figure to an SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from spamprune.report.results import Results

P = ParamSpec("P")

INK = "#1f2933"
GREY = "#6b7280"
ZERO = "#b9bec6"  # of weights that are exactly zero

# the palette of Okabe and Ito, safe for colour-blind readers, without its yellow
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#332288")
_CRITERION_COLOURS = {
    "opd": "#0072b2",
    "magnitude": "#d55e00",
    "snip": "#009e73",
    "grasp": "#cc79a7",
    "synflow": "#e69f00",
    "obd": "#56b4e9",
    "taylor": "#882255",
    "bmr": "#332288",
    "block_opd": "#117733",
    "fisher": "#999933",
    "random": GREY,
}
_MARKERS = dict(zip(_CRITERION_COLOURS, "osD^vPXhp>d", strict=True))
_DASHES: dict[str, Any] = {
    "opd": "-",
    "magnitude": (0, (5, 1.5)),
    "snip": (0, (1, 1)),
    "grasp": (0, (3, 1, 1, 1)),
    "synflow": (0, (3, 1, 1, 1, 1, 1)),
    "obd": (0, (8, 2)),
    "taylor": (0, (8, 2, 1, 2)),
    "bmr": (0, (1, 3)),
    "block_opd": (0, (6, 1, 1, 1)),
    "fisher": (0, (5, 3, 1, 3)),
    "random": (0, (2, 4)),
}

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=_PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.dpi": 200,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    # text stays text: it can be searched and read aloud
    "svg.fonttype": "none",
    "svg.hashsalt": "spamprune",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 9,
    "ytick.color": INK,
    "ytick.labelsize": 9,
}


def svg(draw: Callable[P, Figure]) -> Callable[P, str]:
    """Turn a function that draws a figure into one that returns it as SVG text.

    The same data give the same text: element ids are salted and no date is written.
    """

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # a user's matplotlibrc must not change the report
            matplotlib.rcParams.update(_STYLE)
            buffer = io.StringIO()
            draw(*args, **kwargs).savefig(
                buffer, format="svg", metadata={"Date": None, "Creator": None}
            )
        return buffer.getvalue()

    return drawn


def training_colours(results: Results) -> dict[str, str]:
    """Return the colour of each training: grey for the first MAP one, the baseline.

    Once the palette is used up it comes again, darker each time.
    """
    colours: dict[str, str] = {}
    for cell in results.cells:
        if cell.training not in colours:
            baseline = cell.method == "map" and GREY not in colours.values()
            used = sum(colour != GREY for colour in colours.values())
            lap, place = divmod(used, len(_PALETTE))
            red, green, blue = to_rgb(_PALETTE[place])
            shade = 0.55**lap
            colour = to_hex((shade * red, shade * green, shade * blue))
            colours[cell.training] = GREY if baseline else colour
    return colours


def _looks(names: Iterable[str], fixed: dict[str, Any]) -> dict[str, Any]:
    """Return the fixed look of each known name, and one for each other: unused, if any is.

    A name with a word behind a comma, such as "synflow, 100 rounds", has the look of what stands
    before it where that is not shown.
    """
    names = list(names)
    bases = {name: name.partition(",")[0] for name in names}
    fixed = fixed | {n: fixed[b] for n, b in bases.items() if b in fixed and b not in names}
    spare = [look for name, look in fixed.items() if name not in names] or list(fixed.values())
    others = [name for name in names if name not in fixed]
    looks = {name: fixed[name] for name in names if name in fixed}
    return looks | {name: spare[i % len(spare)] for i, name in enumerate(others)}


def criterion_colours(names: Iterable[str]) -> dict[str, str]:
    """Return the colour of each criterion."""
    return _looks(names, _CRITERION_COLOURS)


def criterion_dashes(names: Iterable[str]) -> dict[str, Any]:
    """Return the line style of each criterion."""
    return _looks(names, _DASHES)


def criterion_markers(names: Iterable[str]) -> dict[str, str]:
    """Return the marker of each criterion."""
    return _looks(names, _MARKERS)


def legend(figure: Figure, handles: list[Any]) -> None:
    """Put one legend below all panels, where it covers no data; fewer columns for long names."""
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    fitting = int(figure.get_figwidth() * 72 // (60 + 6 * longest))  # in points: symbol and letters
    columns = max(min(5, len(handles), fitting), 1)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def band(axes: Axes, x: list[float], mean: list[float], error: list[float], colour: str) -> None:
    """Shade ± one standard error around a line."""
    low = [m - e for m, e in zip(mean, error, strict=True)]
    high = [m + e for m, e in zip(mean, error, strict=True)]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
