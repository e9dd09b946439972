"""How figures look and what they call things: looks of methods, axes, names of modules and metrics."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from aroma.errors import bad_value
from aroma.pictures import FAINT, GRID, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe and Ito's colours without the yellow, which is too pale on white. The three lists have lengths without a common
# divisor, so that the first 385 methods all look different, and two that share a colour differ in line and marker.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_DASHES: tuple[Any, ...] = ("", (5, 2), (5, 1.5, 1, 1.5), (1, 1.2), (8, 1.5, 1, 1.5, 1, 1.5))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
_METRICS = {
    "accuracy": "accuracy, %",
    "f1": "F1, %",
    "macro_f1": "macro F1, %",
    "mcc": "Matthews correlation × 100",
    "pearson": "Pearson correlation × 100",
    "spearman": "Spearman correlation × 100",
}


@dataclass(frozen=True)
class Looks:
    """How methods are drawn, in every figure of a grid: by label, as seaborn takes it."""

    palette: Mapping[str, str]
    dashes: Mapping[str, Any]
    markers: Mapping[str, str]

    @classmethod
    def of(cls, methods: Sequence[str]) -> Looks:
        """Return the looks of a grid's methods, in its order: a method looks the same whatever others are shown."""
        return cls(*({m: parts[i % len(parts)] for i, m in enumerate(methods)} for parts in _PARTS))

    def handle(self, method: str, label: str, line: bool = True) -> Any:
        """Return an entry of a legend."""
        from matplotlib.lines import Line2D

        dashes: Any = (0, self.dashes[method]) if self.dashes[method] else "solid"
        style: dict[str, Any] = {"color": self.palette[method], "marker": self.markers[method]}
        return Line2D([], [], linestyle=dashes if line else "none", markersize=5 if line else 8, label=label, **style)


_PARTS: tuple[Sequence[Any], ...] = (_COLOURS, _DASHES, _MARKERS)


def metric_label(metric: str) -> str:
    """Return how an axis names a metric whose values are drawn ×100."""
    return _METRICS.get(metric, f"{metric} × 100")


def style_axes(axes: Axes, title: str, xlabel: str, ylabel: str = "") -> None:
    """Give a panel of curves or points its plain look, and its names."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(xlabel, color=INK, fontsize=9)
    axes.set_ylabel(ylabel, color=INK, fontsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def count_in_whole_numbers(axis: Axis) -> None:
    """Give an axis of counts, such as ranks and steps, ticks at whole numbers; by default they can be at 2.5."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def fit_axis(axes: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """Fit an axis of sizes to `values`: from 0, or logarithmic if the positive ones span more than a factor of 30.

    A logarithmic axis still has room for zeros if there are any, below the smallest positive value. Ticks read as 1k
    and 1M.
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


def matching_module(wanted: str, names: Sequence[str]) -> str:
    """Return the one of `names` that is, or ends in, `wanted`.

    Raises:
        ConfigError: None does, or several do.
    """
    matches = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        remedy = f"{len(matches)} modules end so, such as {', '.join(matches[:2])}; give a longer end of the name"
        raise bad_value("--modules", wanted, remedy)
    near = difflib.get_close_matches(wanted, [short_name(name) for name in names], n=1, cutoff=0.0)
    raise bad_value("--modules", wanted, f"no module here ends so; the nearest is {near[0] if near else 'none'}")


def paper_modules(names: Sequence[str]) -> list[str]:
    """Return the two modules of Figure 1: the first layer's attention output, and value at 3/4 of the depth.

    If names are of another make, return the first and the last.
    """
    layers = [int(match[1]) for name in names if (match := re.search(r"\.(\d+)\.", name))]
    deep = int(0.75 * (1 + max(layers, default=0)))
    ends = (r"\.0\.attention\.output\.dense$", rf"\.{deep}\.attention\.self\.value$")
    found = [name for end in ends for name in [name for name in names if re.search(end, name)][:1]]
    return found if len(found) == 2 else list(dict.fromkeys([names[0], names[-1]]))


def short_name(name: str) -> str:
    """Return the name from its last part before the first number on: `layer.0.attention.output.dense`."""
    match = re.search(r"(?:^|\.)((?:[^.]+\.)?\d+(?:\..*)?)$", name)
    return match[1] if match else name
