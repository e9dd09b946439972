"""A picture of the ranks of an adapter: each matrix is a double circle, layers left to right, kinds top to bottom.

matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import bad_value
from .files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
"""Kinds of files that a picture can be written to."""
INK, FAINT, GRID = "#222222", "#767676", "#E4E4E4"
"""Colours of text, of secondary text, and of grid lines."""

# Two colours of Okabe and Ito that differ in lightness as much as in hue, so that a greyscale print stays readable.
_OUTER: dict[str, Any] = {"marker": "o", "color": "#BFDDF0", "edgecolor": "#0072B2", "linewidth": 1.1}
_EFFECTIVE: dict[str, Any] = {"marker": "o", "color": "#D55E00", "linewidth": 0}
_AFTER: dict[str, Any] = {"marker": "o", "color": "#0072B2", "linewidth": 0}
_CROSS: dict[str, Any] = {"marker": "x", "color": FAINT, "linewidth": 1.3, "s": 40}
_UNIT = 0.55
"""Inches between two matrices."""
_CURVE, _WIDE = 2.9, 10.0
"""Height, and most width in inches, of the curves of a compression."""
_LARGEST = 900
"""Area of the largest rank's circle, in points², as `Axes.scatter` takes it."""


class MatrixRank(NamedTuple):
    """Rank of one matrix, as `aroma.ranks.RankRow` and `aroma.ModuleSummary` have it, too."""

    name: str
    rank: int
    effective_rank: float


class Position(NamedTuple):
    """Index of a matrix's layer, None outside the numbered ones, and its name without it: `attention.self.query`."""

    layer: int | None
    kind: str


def rank_picture(matrices: Sequence[Any], path: str | os.PathLike[str], title: str = "Ranks") -> None:
    """Draw ranks and effective ranks of matrices in the order of the model, with the attributes of `MatrixRank`.

    Raises:
        ConfigError: `path` ends in none of .png, .svg and .pdf, or there are no matrices.
    """
    require_picture_name("plot", path)
    save_picture(draw_ranks({title: matrices}), path)


def draw_ranks(panels: Mapping[str, Sequence[Any]]) -> Figure:
    """Return a picture of adapters, their matrices by title, one below the other, on one scale and with one legend.

    The area of the outer circle is proportional to the rank, which is the number, that of the inner one to the
    effective rank. A cross marks a matrix of rank 0.

    Raises:
        ConfigError: A panel has no matrices.
    """
    if not panels or not all(panels.values()):
        raise bad_value("matrices", [], "there is nothing to draw; give an adapter with at least one matrix")
    rows = {
        f"{title}\n{_summary(matrices)}": [(one.name, one.rank, one.effective_rank, one.rank) for one in matrices]
        for title, matrices in panels.items()
    }
    return _circles(rows, {"rank": _OUTER, "effective rank": _EFFECTIVE, "rank 0": _CROSS})[0]


def compression_picture(found: Any, path: str | os.PathLike[str]) -> None:
    """Draw what each size of an adapter keeps, if examples were measured, and below it the ranks before and after.

    `found`: a `Compression`.
    """
    size = found.size
    title = f"Ranks: {size.directions} of {found.curve[-1].directions} directions stay"
    rows = {title: [(name, before, after, after) for name, (before, after) in found.ranks.items()]}
    legend = {"rank before": _OUTER, "rank after": _AFTER, "nothing kept": _CROSS}
    figure, top = _circles(rows, legend, above=0.0 if size.effect is None else _CURVE)
    values = {"Effect kept": "effect", "Right answers": "score", "Loss": "loss"}
    shown = {name: key for name, key in values.items() if getattr(size, key) is not None}
    shown = dict([*shown.items()][:2])  # the loss where there is no score
    axes = top.subplots(1, len(shown), squeeze=False).flat if shown else ()
    for one, (name, key) in zip(axes, shown.items(), strict=True):
        _curve(one, found, name, key)
    save_picture(figure, path)


def _curve(axes: Any, found: Any, title: str, key: str) -> None:
    """Draw one value of an adapter against its size, and mark the chosen size."""
    points = found.curve[1:]  # without the adapter's updates its share is 0
    x, y = [one.share for one in points], [getattr(one, key) for one in points]
    form = "{:.4g}" if key == "loss" else "{:.1%}"
    now, before = (form.format(getattr(one, key)) for one in (found.size, points[-1]))
    said = "" if key == "effect" else f" (whole {before})"
    axes.set_title(f"{title}: {now}{said}", loc="left", fontsize=10, color=INK)
    axes.axvline(found.size.share, color=_EFFECTIVE["color"], linewidth=1, linestyle=":")
    axes.plot(x, y, color=_AFTER["color"], marker="o", markersize=4, linewidth=1.3)
    ring = {"facecolor": "white", "edgecolor": _EFFECTIVE["color"], "linewidth": 2, "zorder": 3}
    axes.scatter(found.size.share, getattr(found.size, key), s=70, **ring)
    if key == "effect":
        low, high = (
            [value + sign * (one.standard_error or 0.0) for value, one in zip(y, points, strict=True)]
            for sign in (-1, 1)
        )
        axes.fill_between(x, low, high, color=_OUTER["color"], linewidth=0)
        side = {"xytext": (-5, 0), "ha": "right"} if found.size.share > 0.2 else {"xytext": (5, 0), "ha": "left"}
        words = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "fontsize": 9, "color": INK}
        axes.annotate(f"chosen: {found.size.share:.1%} of the size", (found.size.share, 0.06), **words, **side)
    axes.set_xscale("log")
    ticks = [tick for tick in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if tick >= min(x) * 0.9]
    axes.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks])
    axes.minorticks_off()
    if key != "loss":
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    axes.set_xlabel("share of the adapter's parameters", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(color=GRID)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _circles(
    panels: Mapping[str, Sequence[tuple[str, int, float, int]]], legend: Mapping[str, Any], above: float = 0.0
) -> tuple[Figure, Any]:
    """Return a grid of layers and kinds for each title, with a double circle for each matrix.

    Args:
        panels: Name, areas of the outer and the inner circle, and number of each matrix, by title.
        legend: The looks of outer circle, inner circle and cross, by what they mean.
        above: Inches of an empty part above, which is returned, too.
    """
    names = list(dict.fromkeys(row[0] for rows in panels.values() for row in rows))
    positions = positions_of(names)
    # Modules outside the numbered layers come last.
    layers = sorted({place.layer for place in positions}, key=lambda layer: (layer is None, layer or 0))
    kinds = list(dict.fromkeys(place.kind for place in positions))
    places = {
        name: (layers.index(layer), kinds.index(kind)) for name, (layer, kind) in zip(names, positions, strict=True)
    }
    width = max(0.9 + 0.085 * max(map(len, kinds)) + _UNIT * len(layers), 7.5)
    height = 0.4 + len(panels) * (1.15 + _UNIT * len(kinds))
    figure, top = new_figure(width, above + height), None
    part: Any = figure
    if above:
        top, part = figure.subfigures(2, 1, squeeze=False, height_ratios=[above, height]).flat
    if top is not None and width > _WIDE:
        top = top.subfigures(1, 2, width_ratios=[_WIDE, width - _WIDE])[0]
    scale = _LARGEST / max(1, *(outer for rows in panels.values() for _, outer, _, _ in rows))
    outer_look, inner_look, cross = legend.values()
    for axes, (title, rows) in zip(part.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True):
        axes.set(xlim=(-0.5, len(layers) - 0.5), ylim=(len(kinds) - 0.5, -0.5), xlabel="layer", frame_on=False)
        axes.set_xticks(range(len(layers)), ["other" if layer is None else str(layer) for layer in layers])
        axes.set_yticks(range(len(kinds)), kinds)
        axes.tick_params(length=0, labelsize=9)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        for name, outer, inner, count in rows:
            place = places[name]
            if outer:
                axes.scatter(*place, s=scale * outer, **outer_look)
                axes.annotate(str(count), place, (14, -17), textcoords="offset points", fontsize=7, color=INK)
            axes.scatter(*place, **({"s": scale * inner, **inner_look} if count else cross))
    handles = [
        part.axes[-1].scatter([], [], label=meaning, **{"s": size, **look})
        for size, (meaning, look) in zip((120, 60, 40), legend.items(), strict=True)
    ]
    part.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=9, frameon=False)
    return figure, top


def positions_of(names: Sequence[str]) -> list[Position]:
    """Split module names at their first number: `encoder.layer.3.output.dense` is `output.dense` of layer 3.

    If there are several stacks of numbered layers, such as an encoder and a decoder, the kind begins with the stack.
    """
    parts = [re.split(r"(?:^|\.)(\d+)(?:\.|$)", name, maxsplit=1) for name in names]
    has_stacks = len({part[0] for part in parts if len(part) > 1}) > 1
    positions = []
    for stack, *layer_and_rest in parts:
        if not layer_and_rest:
            positions.append(Position(None, stack))
            continue
        layer, rest = layer_and_rest
        kind = ".".join(filter(None, (stack, rest))) if has_stacks else rest or stack
        positions.append(Position(int(layer), kind))
    return positions


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of that size in inches. It belongs to no window, and pyplot does not know it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def require_picture_name(field: str, path: str | os.PathLike[str]) -> None:
    """Raise ConfigError unless `path` has the suffix of a picture."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise bad_value(field, str(path), f"unknown kind of picture; its name must end in {', '.join(SUFFIXES)}")


def save_picture(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write `figure` to `path` atomically, in the format of its suffix. The same figure gives the same bytes."""
    import matplotlib

    drawn = io.BytesIO()  # so that its size is known before anything is written
    form = Path(path).suffix.lower().removeprefix(".")
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[form]
    with matplotlib.rc_context({"svg.hashsalt": "aroma"}):
        figure.savefig(drawn, format=form, dpi=120, metadata=undated)
    write_bytes(path, drawn.getvalue())


def _summary(matrices: Sequence[Any]) -> str:
    """Return the number of matrices, their ranks, and the effective rank as a share of the rank (Appendix C)."""
    ranks = [matrix.rank for matrix in matrices]
    effective = sum(matrix.effective_rank for matrix in matrices)
    share = f" ({effective / sum(ranks):.0%} of the rank)" if sum(ranks) else ""
    count = f"{len(ranks)} {'matrix' if len(ranks) == 1 else 'matrices'}"
    return f"{count} · ranks {min(ranks)} to {max(ranks)}, total {sum(ranks)} · effective {effective:.1f}{share}"
