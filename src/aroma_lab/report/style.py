"""How figures look and what they call things: looks of methods, axes, names of modules and metrics."""

from __future__ import annotations

import difflib
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from aroma.errors import bad_value
from aroma.pictures import FAINT, GRID, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without the yellow, which is too pale on white. The lists have lengths without a common
# divisor, so that the first 35 methods all look different on curves, and 77 as points.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_DASHES: tuple[Any, ...] = ("", (5, 2), (5, 1.5, 1, 1.5), (1, 1.2), (8, 1.5, 1, 1.5, 1, 1.5))
_LETTERS = 13
"""Letters of a remark in an inch."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")


def looks(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return `palette`, `dashes` and `markers` as seaborn takes them, by method.

    A method of a grid looks the same whatever others are shown with it. AROMA's own come first and LoRA's ranks next,
    so that these look the same in most grids.
    """
    parts = {"palette": _COLOURS, "dashes": _DASHES, "markers": _MARKERS}
    ordered = sorted(methods, key=_family)
    return {name: {m: part[i % len(part)] for i, m in enumerate(ordered)} for name, part in parts.items()}


def _family(method: str) -> int:
    families = (r"aroma.*", r"lora-r\d+")
    return next((place for place, family in enumerate(families) if re.fullmatch(family, method)), len(families))


def write_title(figure: Figure, title: str, remarks: str) -> None:
    """Write a title above a figure, and remarks below it, in as many lines as they need."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    lines = textwrap.fill(remarks, round(_LETTERS * figure.get_figwidth()))
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=9, color=FAINT)


def style_axes(axes: Axes, title: str, xlabel: str, ylabel: str = "") -> None:
    """Give a panel of curves or points its plain look, and its names."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set(xlabel=xlabel, ylabel=ylabel, axisbelow=True)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def fit_axis(axes: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """Fit an axis of sizes to `values`: from 0, and logarithmic if the positive ones span more than a factor of 30.

    Ticks read as 0.5, 20, 1k and 3.5M; matplotlib's own engineering format would have 500m for 0.5.
    """
    from matplotlib.ticker import EngFormatter

    positive = [value for value in values if value > 0] or [1.0]
    smallest, largest = min(positive), max(positive)
    low, high = -0.04 * largest, 1.08 * largest
    if largest > 30 * smallest:
        linear_below = 10 ** math.floor(math.log10(smallest))
        getattr(axes, f"set_{which}scale")("symlog", linthresh=linear_below, linscale=0.5)
        low, high = -0.3 * linear_below, 2 * largest
    axes.set(**{f"{which}lim": (low, high)})
    engineering = EngFormatter(sep="")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(lambda value, _: engineering(value) if abs(value) >= 1 else f"{value:g}")


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
    return found if len(found) == 2 else list(dict.fromkeys([*names[:1], *names[-1:]]))


def short_name(name: str) -> str:
    """Return the name from its last part before the first number on: `layer.0.attention.output.dense`."""
    match = re.search(r"(?:^|\.)((?:[^.]+\.)?\d+(?:\..*)?)$", name)
    return match[1] if match else name
