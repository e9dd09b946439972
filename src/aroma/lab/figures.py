"""The rank picture: every matrix a circle, layers from left to right, kinds of matrix from top to bottom."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import bad_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

# Two colours of Okabe and Ito that differ in lightness as much as in hue, so that the picture survives a print without
# colours.
_RANK_FACE, _RANK_EDGE = "#BFDDF0", "#0072B2"
_EFFECTIVE = "#D55E00"
_INK, _FAINT, _GRID = "#222222", "#767676", "#E4E4E4"

_UNIT = 0.55
"""Inches between two matrices; lengths in the plot are multiples of it."""
_LARGEST_RADIUS = 0.4
"""Radius of the largest rank's circle."""
_TOP, _BOTTOM = 0.75, 1.25
_LEGEND_WIDTH = 4.6


class Matrix(Protocol):
    """What is drawn of a matrix; `aroma.export.RankRow` and `aroma.ModuleSummary` are such."""

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
class Place:
    """Where a matrix stands in the picture.

    Args:
        layer: Index of its layer; None for a module outside the numbered layers.
        kind: Its name without the layer, as `attention.self.query`.
    """

    layer: int | None
    kind: str


def rank_picture(
    matrices: Sequence[Matrix], path: str | os.PathLike[str], title: str = "Ranks grown by AROMA"
) -> None:
    """Draw ranks and effective ranks and write the picture to `path`.

    The area of the outer circle is proportional to the rank, that of the inner one to the effective rank, on the same
    scale; the number is the rank. A cross marks a matrix that ended at rank 0.

    Args:
        matrices: The matrices, in the order of the model.
        path: File to write: .png, .svg or .pdf.
        title: Title of the picture.

    Raises:
        ConfigError: Another suffix, or no matrices.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise bad_value("plot", str(path), f"unknown kind of picture; its name must end in {', '.join(SUFFIXES)}")
    if not matrices:
        raise bad_value("matrices", [], "there is nothing to draw; give an adapter with at least one matrix")
    figure = draw_ranks(matrices, title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def draw_ranks(matrices: Sequence[Matrix], title: str) -> Figure:
    """Return the picture as a matplotlib figure that belongs to no window; see `rank_picture`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = places_of([matrix.name for matrix in matrices])
    columns = _columns(places)
    kinds = list(dict.fromkeys(place.kind for place in places))
    layout = _Layout(len(columns), len(kinds), longest_label=max(map(len, kinds)))
    figure = Figure(figsize=layout.size)
    FigureCanvasAgg(figure)
    axes = figure.add_axes(layout.plot_box())
    _draw_grid(axes, columns, kinds)
    largest = max(1, *(matrix.rank for matrix in matrices))
    for matrix, place in zip(matrices, places, strict=True):
        _draw_matrix(axes, columns.index(place.layer), kinds.index(place.kind), matrix, largest)
    _draw_title(figure, layout, title, matrices)
    _draw_legend(figure.add_axes(layout.legend_box()), largest)
    return figure


def places_of(names: Sequence[str]) -> list[Place]:
    """Split module names at their first number: `encoder.layer.3.output.dense` is `output.dense` of layer 3.

    Where numbered layers stand in several stacks, as encoder and decoder, the kind begins with what tells them apart.
    """
    matches = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    stacks = _short_stacks({name[: match.start()] for name, match in zip(names, matches, strict=True) if match})
    places = []
    for name, match in zip(names, matches, strict=True):
        if match is None:
            places.append(Place(None, name))
        else:
            stack, kind = stacks[name[: match.start()]], name[match.end() :]
            places.append(Place(int(match[1]), ".".join(filter(None, (stack, kind))) or name[: match.start()]))
    return places


def _short_stacks(prefixes: set[str]) -> dict[str, str]:
    """Return each prefix without the parts, at its front and its back, that all have in common."""
    parts = {prefix: prefix.split(".") for prefix in prefixes}
    front = _common(list(parts.values()))
    short = {prefix: names[front:] for prefix, names in parts.items()}
    back = _common([names[::-1] for names in short.values()])
    return {prefix: ".".join(names[: len(names) - back]) for prefix, names in short.items()}


def _common(sequences: Sequence[Sequence[str]]) -> int:
    """Return how many items from the front all sequences share."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False)))


def _columns(places: Sequence[Place]) -> list[int | None]:
    """Return the layers in order, modules without one last."""
    numbered = sorted({place.layer for place in places if place.layer is not None})
    return [*numbered, None] if any(place.layer is None for place in places) else [*numbered]


@dataclass(frozen=True)
class _Layout:
    """Where things go on paper, in inches.

    Args:
        columns: Number of layers.
        rows: Number of kinds.
        longest_label: Characters of the longest kind.
    """

    columns: int
    rows: int
    longest_label: int

    @property
    def left(self) -> float:
        return 0.3 + 0.078 * self.longest_label

    @property
    def size(self) -> tuple[float, float]:
        plot = self.columns * _UNIT
        return max(self.left + plot + 0.25, _LEGEND_WIDTH + 0.5), _TOP + self.rows * _UNIT + _BOTTOM

    def plot_box(self) -> tuple[float, float, float, float]:
        return self._box(self.left, _BOTTOM, self.columns * _UNIT, self.rows * _UNIT)

    def legend_box(self) -> tuple[float, float, float, float]:
        return self._box(0.25, 0.12, _LEGEND_WIDTH, _UNIT)

    def _box(self, x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
        total_width, total_height = self.size
        return x / total_width, y / total_height, width / total_width, height / total_height


def _draw_grid(axes: Axes, columns: list[int | None], kinds: list[str]) -> None:
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), ["other" if layer is None else str(layer) for layer in columns])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer", color=_INK)
    axes.tick_params(length=0, labelsize=9, labelcolor=_INK)
    axes.set_frame_on(False)
    for row in range(len(kinds)):
        axes.axhline(row, color=_GRID, linewidth=0.8, zorder=0)


def _draw_matrix(axes: Axes, x: float, y: float, matrix: Matrix, largest: int) -> None:
    if matrix.rank == 0:
        _draw_cross(axes, x, y)
        return
    _draw_circles(axes, x, y, _radius(matrix.rank, largest), _radius(matrix.effective_rank, largest))
    axes.text(x + 0.48, y + 0.5, str(matrix.rank), ha="right", va="bottom", fontsize=7, color=_INK, zorder=4)


def _draw_circles(axes: Axes, x: float, y: float, outer: float, inner: float) -> None:
    from matplotlib.patches import Circle

    axes.add_patch(Circle((x, y), outer, facecolor=_RANK_FACE, edgecolor=_RANK_EDGE, linewidth=1.1, zorder=2))
    axes.add_patch(Circle((x, y), inner, facecolor=_EFFECTIVE, edgecolor="none", zorder=3))


def _draw_cross(axes: Axes, x: float, y: float) -> None:
    axes.plot(x, y, marker="x", color=_FAINT, markersize=5.5, markeredgewidth=1.3, zorder=2)


def _radius(rank: float, largest: int) -> float:
    return _LARGEST_RADIUS * math.sqrt(rank / largest)


def _draw_title(figure: Figure, layout: _Layout, title: str, matrices: Sequence[Matrix]) -> None:
    ranks = [matrix.rank for matrix in matrices]
    effective = sum(matrix.effective_rank for matrix in matrices)
    subtitle = (
        f"{len(ranks)} matrices · ranks {min(ranks)} to {max(ranks)}, in all {sum(ranks)} · effective {effective:.1f}"
    )
    height = layout.size[1]
    x = 0.25 / layout.size[0]
    figure.text(x, 1 - 0.32 / height, title, fontsize=12, fontweight="bold", color=_INK)
    figure.text(x, 1 - 0.55 / height, subtitle, fontsize=9, color=_FAINT)


def _draw_legend(axes: Axes, largest: int) -> None:
    """Draw circles of up to three ranks, one of them with its effective rank, and the cross, with their meaning."""
    axes.set_xlim(0, _LEGEND_WIDTH / _UNIT)
    axes.set_ylim(0.5, -0.5)
    axes.set_axis_off()
    x = 0.4
    for rank in sorted({1, (1 + largest) // 2, largest}):
        _draw_circles(axes, x, 0, _radius(rank, largest), 0)
        axes.text(x + 0.48, 0.5, str(rank), ha="right", va="bottom", fontsize=7, color=_INK)
        x += 1
    _explain(axes, x - 0.35, "rank")
    _draw_circles(axes, x + 1.1, 0, 0, _LARGEST_RADIUS / 2)
    _explain(axes, x + 1.5, "effective rank")
    _draw_cross(axes, x + 4.2, 0)
    _explain(axes, x + 4.5, "rank 0")


def _explain(axes: Axes, x: float, text: str) -> None:
    axes.text(x, 0, text, ha="left", va="center", fontsize=8.5, color=_INK)
