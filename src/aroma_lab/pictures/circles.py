"""Figures 3 and 5: every matrix a double circle, layers from left to right, kinds of matrix from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aroma.errors import bad_value

from .places import columns_of, places_of
from .style import FAINT, GRID, INK, new_figure, write_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Two colours of Okabe and Ito that differ in lightness as much as in hue, so that the picture survives a print without
# colours.
_RANK_FACE, _RANK_EDGE = "#BFDDF0", "#0072B2"
_EFFECTIVE = "#D55E00"

_UNIT = 0.55
"""Inches between two matrices; lengths in the plot are multiples of it."""
_LARGEST_RADIUS = 0.38
"""Radius of the largest rank's circle."""
_HEAD, _FOOT, _BOTTOM = 0.75, 0.5, 0.75
"""Inches above a panel's plot and below it, and of the legend at the end."""
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
class Grown:
    """A matrix of a finished run; a `Matrix`."""

    name: str
    rank: int
    effective_rank: float


@dataclass(frozen=True)
class RankPanel:
    """One run's matrices.

    Args:
        title: Which run it is.
        matrices: Its matrices, in the order of the model.
    """

    title: str
    matrices: Sequence[Matrix]

    def caption(self) -> str:
        """Return number of matrices, ranks, and the effective rank's proportion of the rank (Appendix C)."""
        ranks = [matrix.rank for matrix in self.matrices]
        effective = sum(matrix.effective_rank for matrix in self.matrices)
        share = f" ({effective / sum(ranks):.0%} of the rank)" if sum(ranks) else ""
        count = f"{len(ranks)} {'matrix' if len(ranks) == 1 else 'matrices'}"
        range_of_ranks = f"ranks {min(ranks)} to {max(ranks)}, in all {sum(ranks)}"
        return f"{count} · {range_of_ranks} · effective {effective:.1f}{share}"


def draw_rank_panels(panels: Sequence[RankPanel]) -> Figure:
    """Return the panels one below the other, on one scale and with one legend.

    The area of the outer circle is proportional to the rank, that of the inner one to the effective rank, on the same
    scale; the number is the rank. A cross marks a matrix that ended at rank 0.

    Raises:
        ConfigError: A panel has no matrices.
    """
    if not panels or not all(panel.matrices for panel in panels):
        raise bad_value("matrices", [], "there is nothing to draw; give an adapter with at least one matrix")
    names = list(dict.fromkeys(matrix.name for panel in panels for matrix in panel.matrices))
    places = dict(zip(names, places_of(names), strict=True))
    columns = columns_of(list(places.values()))
    kinds = list(dict.fromkeys(place.kind for place in places.values()))
    layout = _Layout(len(panels), len(columns), len(kinds), longest_label=max(map(len, kinds)))
    figure = new_figure(*layout.size)
    largest = max(1, *(matrix.rank for panel in panels for matrix in panel.matrices))
    for index, panel in enumerate(panels):
        axes = figure.add_axes(layout.plot_box(index))
        _draw_grid(axes, columns, kinds)
        for matrix in panel.matrices:
            place = places[matrix.name]
            _draw_matrix(axes, columns.index(place.layer), kinds.index(place.kind), matrix, largest)
        write_title(figure, panel.title, panel.caption(), top=index * layout.panel_height)
    _draw_legend(figure.add_axes(layout.legend_box()), largest)
    return figure


@dataclass(frozen=True)
class _Layout:
    """Where things go on paper, in inches.

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


def _draw_grid(axes: Axes, columns: Sequence[int | None], kinds: Sequence[str]) -> None:
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), ["other" if layer is None else str(layer) for layer in columns])
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
    """Draw circles of up to three ranks, one of them with its effective rank, and the cross, with their meaning."""
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
