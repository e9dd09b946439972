"""How all figures look: colours, line styles and markers that survive colour blindness and a print without colours."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aroma.errors import bad_value
from aroma.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

INK, FAINT, GRID = "#222222", "#767676", "#E4E4E4"

# Okabe and Ito's, without the yellow, which a white page swallows. The three lists have lengths without a common
# divisor, so no two of the first 385 methods look alike, and two that share a colour differ in line and marker.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_LINES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)), (0, (8, 1.5, 1, 1.5, 1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")


@dataclass(frozen=True)
class Style:
    """How one method is drawn, in every figure of a grid.

    Args:
        colour: Of line and marker.
        line: Line style as matplotlib takes it.
        marker: Marker as matplotlib takes it.
    """

    colour: str
    line: Any
    marker: str


_METRICS = {
    "accuracy": "accuracy, %",
    "f1": "F1, %",
    "macro_f1": "macro F1, %",
    "mcc": "Matthews correlation × 100",
    "pearson": "Pearson correlation × 100",
    "spearman": "Spearman correlation × 100",
}


def metric_label(metric: str) -> str:
    """Return how an axis names a metric whose values are drawn ×100."""
    return _METRICS.get(metric, f"{metric} × 100")


def style_of(index: int) -> Style:
    """Return the style of the method at place `index` of the grid."""
    return Style(_COLOURS[index % len(_COLOURS)], _LINES[index % len(_LINES)], _MARKERS[index % len(_MARKERS)])


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of that size in inches that belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def write_title(figure: Figure, title: str, subtitle: str, x: float = 0.25, top: float = 0.0) -> None:
    """Write title and subtitle, `x` inches from the left and `top` inches from the top."""
    width, height = figure.get_size_inches()
    figure.text(x / width, 1 - (top + 0.32) / height, title, fontsize=12, fontweight="bold", color=INK)
    figure.text(x / width, 1 - (top + 0.55) / height, subtitle, fontsize=9, color=FAINT)


def style_axes(axes: Axes) -> None:
    """Give a panel of curves or points its plain look."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def count_in_whole_numbers(axis: Axis) -> None:
    """Give an axis of counts, as ranks and steps, ticks at whole numbers; matplotlib's own can be at 2.5 and 7.5."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def spread(axes: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """Fit an axis of sizes to `values`: from 0, or logarithmic if the positive ones span more than a factor of 30.

    A logarithmic axis still has a place for zeros if there are any, below the smallest positive value. Ticks read as
    1k and 1M.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    values = list(values)
    positive = [value for value in values if value > 0]
    set_scale = axes.set_xscale if which == "x" else axes.set_yscale
    set_limits = axes.set_xlim if which == "x" else axes.set_ylim
    smallest, largest = min(positive, default=1.0), max(positive, default=1.0)
    if largest <= 30 * smallest:
        set_limits(-0.04 * largest, 1.08 * largest)
    elif len(positive) < len(values):
        linear_below = 10 ** math.floor(math.log10(smallest))
        set_scale("symlog", linthresh=linear_below, linscale=0.5)
        set_limits(-0.3 * linear_below, 2 * largest)
    else:
        set_scale("log")
        set_limits(smallest / 2, 2 * largest)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(size_text))
    axis.set_minor_formatter(NullFormatter())


def size_text(value: float, position: int | None = None) -> str:
    """Return a size as an axis shows it: 0.5, 20, 1k, 3.5M; matplotlib's own would have 500m for 0.5."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="").format_eng(value) if abs(value) >= 1 else f"{value:g}"


def require_picture_name(field: str, path: str | os.PathLike[str]) -> None:
    """Raise unless `path` ends as a picture does.

    Raises:
        ConfigError: Naming the field.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise bad_value(field, str(path), f"unknown kind of picture; its name must end in {', '.join(SUFFIXES)}")


def save_picture(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write `figure` to `path` atomically, as its suffix says; the same figure gives the same bytes."""
    import matplotlib

    kind = Path(path).suffix.lower().removeprefix(".")
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
    with replacing(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "aroma"}):
        figure.savefig(temporary, format=kind, dpi=160, metadata=undated)
