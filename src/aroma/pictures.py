"""The picture of an adapter's ranks: each matrix a double circle, layers left to right, kinds top to bottom.

matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import bad_value
from .files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
"""Kinds of files that a picture can be written to."""
INK, FAINT, GRID = "#222222", "#767676", "#E4E4E4"
"""Colours of text, of secondary text, and of grid lines."""

# Two colours of Okabe and Ito that differ in lightness as much as in hue, so that a greyscale print stays readable.
_RANK_FACE, _RANK_EDGE = "#BFDDF0", "#0072B2"
_EFFECTIVE = "#D55E00"
_UNIT = 0.55
"""Inches between two matrices. Lengths within the plot are multiples of it."""
_LARGEST_RADIUS = 0.38
"""Radius of the largest rank's circle."""
_HEAD, _FOOT, _BOTTOM = 0.75, 0.5, 0.75
"""Inches above a panel's plot and below it, and of the legend at the bottom of the picture."""
_LEGEND_WIDTH = 4.6


class Matrix(Protocol):
    """What is drawn of a matrix. `aroma.export.RankRow` and `aroma.ModuleSummary` have it."""

    @property
    def name(self) -> str:
        """Module name in the base model."""

    @property
    def rank(self) -> int:
        """Rank of its update."""

    @property
    def effective_rank(self) -> float:
        """Effective rank of its update."""


@dataclass(frozen=True)
class MatrixRank:
    """Rank of one matrix, where nothing else is known of it: a `Matrix`."""

    name: str
    rank: int
    effective_rank: float


@dataclass(frozen=True)
class RankPanel:
    """The matrices of one adapter.

    Args:
        title: Title of the panel.
        matrices: The matrices, in the order of the model.
    """

    title: str
    matrices: Sequence[Matrix]

    def caption(self) -> str:
        """Return the number of matrices, their ranks, and the effective rank as a share of the rank (Appendix C)."""
        ranks = [matrix.rank for matrix in self.matrices]
        effective = sum(matrix.effective_rank for matrix in self.matrices)
        share = f" ({effective / sum(ranks):.0%} of the rank)" if sum(ranks) else ""
        count = f"{len(ranks)} {'matrix' if len(ranks) == 1 else 'matrices'}"
        return f"{count} · ranks {min(ranks)} to {max(ranks)}, total {sum(ranks)} · effective {effective:.1f}{share}"


@dataclass(frozen=True)
class Position:
    """Where a matrix stands in the picture.

    Args:
        layer: Index of its layer; None for a module outside the numbered layers.
        kind: Its name without the layer, such as `attention.self.query`.
    """

    layer: int | None
    kind: str


def rank_picture(
    matrices: Sequence[Matrix], path: str | os.PathLike[str], title: str = "Ranks grown by AROMA"
) -> None:
    """Draw ranks and effective ranks, and write the picture to `path`.

    Args:
        matrices: The matrices, in the order of the model.
        path: File to write: .png, .svg or .pdf.
        title: Title of the picture.

    Raises:
        ConfigError: Another suffix, or no matrices.
    """
    require_picture_name("plot", path)
    save_picture(draw_ranks([RankPanel(title, matrices)]), path)


def draw_ranks(panels: Sequence[RankPanel]) -> Figure:
    """Return the panels one below the other, on one scale and with one legend.

    The area of the outer circle is proportional to the rank, the area of the inner one to the effective rank, both on
    the same scale. The number is the rank. A cross marks a matrix of rank 0.

    Raises:
        ConfigError: A panel has no matrices.
    """
    if not panels or not all(panel.matrices for panel in panels):
        raise bad_value("matrices", [], "there is nothing to draw; give an adapter with at least one matrix")
    names = list(dict.fromkeys(matrix.name for panel in panels for matrix in panel.matrices))
    positions = dict(zip(names, positions_of(names), strict=True))
    layers = _layers(list(positions.values()))
    kinds = list(dict.fromkeys(position.kind for position in positions.values()))
    layout = _Layout(len(panels), len(layers), len(kinds), longest_label=max(map(len, kinds)))
    figure = new_figure(*layout.size)
    largest = max(1, *(matrix.rank for panel in panels for matrix in panel.matrices))
    for index, panel in enumerate(panels):
        axes = figure.add_axes(layout.plot_box(index))
        _draw_grid(axes, layers, kinds)
        for matrix in panel.matrices:
            position = positions[matrix.name]
            _draw_matrix(axes, layers.index(position.layer), kinds.index(position.kind), matrix, largest)
        write_title(figure, panel.title, panel.caption(), top=index * layout.panel_height)
    _draw_legend(figure.add_axes(layout.legend_box()), largest)
    return figure


def positions_of(names: Sequence[str]) -> list[Position]:
    """Split module names at their first number: `encoder.layer.3.output.dense` is `output.dense` of layer 3.

    If there are several stacks of numbered layers, such as an encoder and a decoder, the kind begins with the part of
    the name that tells them apart.
    """
    matches = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    stacks = _short_stacks({name[: match.start()] for name, match in zip(names, matches, strict=True) if match})
    positions = []
    for name, match in zip(names, matches, strict=True):
        if match is None:
            positions.append(Position(None, name))
        else:
            prefix = name[: match.start()]
            kind = ".".join(filter(None, (stacks[prefix], name[match.end() :]))) or prefix
            positions.append(Position(int(match[1]), kind))
    return positions


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of that size in inches. It belongs to no window, and pyplot does not know it."""
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


def require_picture_name(field: str, path: str | os.PathLike[str]) -> None:
    """Raise unless `path` has the suffix of a picture.

    Raises:
        ConfigError: Naming the field.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise bad_value(field, str(path), f"unknown kind of picture; its name must end in {', '.join(SUFFIXES)}")


def save_picture(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write `figure` to `path` atomically, in the format of its suffix. The same figure gives the same bytes."""
    import matplotlib

    form = Path(path).suffix.lower().removeprefix(".")
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[form]
    with replacing(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "aroma"}):
        figure.savefig(temporary, format=form, dpi=160, metadata=undated)
        if form == "png":
            _reduce_colours(temporary)


def _reduce_colours(path: Path) -> None:
    """Rewrite a PNG with 256 colours, in which drawings look the same and take a third of the bytes."""
    from PIL import Image

    with Image.open(path) as image:
        whole = image.convert("RGB")
    # Of Pillow's methods this one stays closest to the colours of a colour bar: measured, 10 of 256 levels off.
    reduced = whole.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    reduced.save(path, "PNG", optimize=True, dpi=(160, 160))


@dataclass(frozen=True)
class _Layout:
    """Sizes and boxes on paper, in inches.

    Args:
        panels: Number of panels.
        columns: Number of layers.
        rows: Number of kinds.
        longest_label: Characters of the longest kind.
    """

    panels: int
    columns: int
    rows: int
    longest_label: int

    @property
    def panel_height(self) -> float:
        return _HEAD + self.rows * _UNIT + _FOOT

    @property
    def size(self) -> tuple[float, float]:
        width = max(self._left + self.columns * _UNIT + 0.25, _LEGEND_WIDTH + 0.5)
        return width, self.panels * self.panel_height + _BOTTOM

    def plot_box(self, panel: int) -> tuple[float, float, float, float]:
        bottom = self.size[1] - (panel + 1) * self.panel_height + _FOOT
        return self._box(self._left, bottom, self.columns * _UNIT, self.rows * _UNIT)

    def legend_box(self) -> tuple[float, float, float, float]:
        return self._box(0.25, 0.12, _LEGEND_WIDTH, _UNIT)

    @property
    def _left(self) -> float:
        return 0.3 + 0.078 * self.longest_label

    def _box(self, x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
        total_width, total_height = self.size
        return x / total_width, y / total_height, width / total_width, height / total_height


def _draw_grid(axes: Axes, layers: Sequence[int | None], kinds: Sequence[str]) -> None:
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xticks(range(len(layers)), ["other" if layer is None else str(layer) for layer in layers])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer", color=INK)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.set_frame_on(False)
    for row in range(len(kinds)):
        axes.axhline(row, color=GRID, linewidth=0.8, zorder=0)


def _draw_matrix(axes: Axes, x: float, y: float, matrix: Matrix, largest: int) -> None:
    if matrix.rank == 0:
        _draw_cross(axes, x, y)
        return
    _draw_circles(axes, x, y, _radius(matrix.rank, largest), _radius(matrix.effective_rank, largest))
    axes.text(x + 0.48, y + 0.5, str(matrix.rank), ha="right", va="bottom", fontsize=7, color=INK, zorder=4)


def _draw_circles(axes: Axes, x: float, y: float, outer: float, inner: float) -> None:
    from matplotlib.patches import Circle

    axes.add_patch(Circle((x, y), outer, facecolor=_RANK_FACE, edgecolor=_RANK_EDGE, linewidth=1.1, zorder=2))
    axes.add_patch(Circle((x, y), inner, facecolor=_EFFECTIVE, edgecolor="none", zorder=3))


def _draw_cross(axes: Axes, x: float, y: float) -> None:
    axes.plot(x, y, marker="x", color=FAINT, markersize=5.5, markeredgewidth=1.3, zorder=2)


def _radius(rank: float, largest: int) -> float:
    return _LARGEST_RADIUS * math.sqrt(rank / largest)


def _draw_legend(axes: Axes, largest: int) -> None:
    """Draw circles of up to three ranks, one effective rank, and the cross, with their meaning."""
    axes.set_xlim(0, _LEGEND_WIDTH / _UNIT)
    axes.set_ylim(0.5, -0.5)
    axes.set_axis_off()
    x = 0.4
    for rank in sorted({1, (1 + largest) // 2, largest}):
        _draw_circles(axes, x, 0, _radius(rank, largest), 0)
        axes.text(x + 0.48, 0.5, str(rank), ha="right", va="bottom", fontsize=7, color=INK)
        x += 1
    _explain(axes, x - 0.35, "rank")
    _draw_circles(axes, x + 1.1, 0, 0, _LARGEST_RADIUS / 2)
    _explain(axes, x + 1.5, "effective rank")
    _draw_cross(axes, x + 4.2, 0)
    _explain(axes, x + 4.5, "rank 0")


def _explain(axes: Axes, x: float, text: str) -> None:
    axes.text(x, 0, text, ha="left", va="center", fontsize=8.5, color=INK)


def _layers(positions: Sequence[Position]) -> list[int | None]:
    """Return the layers in order; None, for modules without one, comes last."""
    numbered = sorted({position.layer for position in positions if position.layer is not None})
    return [*numbered, None] if any(position.layer is None for position in positions) else [*numbered]


def _short_stacks(prefixes: set[str]) -> dict[str, str]:
    """Return each prefix without the parts, at its front and its back, that all prefixes share."""
    parts = {prefix: prefix.split(".") for prefix in prefixes}
    front = _common(list(parts.values()))
    short = {prefix: names[front:] for prefix, names in parts.items()}
    back = _common([names[::-1] for names in short.values()])
    return {prefix: ".".join(names[: len(names) - back]) for prefix, names in short.items()}


def _common(sequences: Sequence[Sequence[str]]) -> int:
    """Return how many items from the front all sequences share."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False)))
