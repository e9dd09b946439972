"""Figure 4: cosine similarity between the components of two runs, module by module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..report.records import Run
from .components import CosinePanel
from .modules import short_name
from .style import INK, new_figure, write_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_CELL, _LARGEST = 0.55, 4.6
"""Inches of a cell's side, and the most of a panel's."""
_LEFT, _GAP, _TOP, _BOTTOM, _BAR = 0.8, 0.8, 1.3, 0.95, 0.75
_LEAST_WIDTH, _LEAST_HEIGHT, _TITLE = 5.4, 1.4, 2.6
_MOST_NUMBERS = 12
"""Up to so many components a side, every cell says its value."""


def draw_cosines(panels: Sequence[CosinePanel], first: Run, second: Run) -> Figure:
    """Return Figure 4: a matrix of cells for each module, the diagonal framed.

    Colour says the sign as well as the size; in a print without colours the hatched cells are the negative ones.

    Args:
        panels: The modules.
        first: The run in the rows.
        second: The run in the columns.
    """
    layout = _Layout([panel.cosines.shape for panel in panels])
    figure = new_figure(*layout.size)
    for index, panel in enumerate(panels):
        axes = figure.add_axes(layout.plot_box(index))
        image = _draw_matrix(axes, panel)
    bar = figure.add_axes(layout.bar_box())
    figure.colorbar(image, cax=bar, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    bar.set_title("cosine", fontsize=8.5, color=INK)
    rows, columns = (f"{run.method}, seed {run.seed}" for run in (first, second))
    write_title(figure, f"Cosines of components on {first.task}", f"rows: {rows} · columns: {columns}")
    width, height = layout.size
    figure.text(
        0.25 / width, 0.2 / height, "hatched: negative · framed: components of the same place", fontsize=9, color=INK
    )
    return figure


@dataclass(frozen=True)
class _Layout:
    """Where things go on paper, in inches; cells are squares.

    Args:
        shapes: Rows and columns of every panel.
    """

    shapes: Sequence[Sequence[int]]

    @property
    def size(self) -> tuple[float, float]:
        return max(self._bar_left + _BAR, _LEAST_WIDTH), _TOP + self._height + _BOTTOM

    def plot_box(self, panel: int) -> tuple[float, float, float, float]:
        rows, columns = self.shapes[panel]
        return self._box(_LEFT + panel * self._step, columns * self._cell, rows * self._cell)

    def bar_box(self) -> tuple[float, float, float, float]:
        return self._box(self._bar_left, 0.18, self._height)

    @property
    def _cell(self) -> float:
        return min(_CELL, _LARGEST / max(max(shape) for shape in self.shapes))

    @property
    def _height(self) -> float:
        return max(_LEAST_HEIGHT, max(rows for rows, _ in self.shapes) * self._cell)

    @property
    def _step(self) -> float:
        """From the left side of a panel to that of the next; its title has room."""
        return max(_TITLE, max(columns for _, columns in self.shapes) * self._cell) + _GAP

    @property
    def _bar_left(self) -> float:
        return _LEFT + len(self.shapes) * self._step - _GAP / 2

    def _box(self, left: float, width: float, height: float) -> tuple[float, float, float, float]:
        """Return a box whose upper side is that of all panels."""
        whole_width, whole_height = self.size
        bottom = whole_height - _TOP - height
        return left / whole_width, bottom / whole_height, width / whole_width, height / whole_height


def _draw_matrix(axes: Axes, panel: CosinePanel) -> AxesImage:
    from matplotlib.patches import Rectangle

    values = panel.cosines.numpy().round(2)
    image = axes.imshow(values, cmap="PuOr", vmin=-1, vmax=1)
    colours = image.to_rgba(values)
    rows, columns = values.shape
    for row in range(rows):
        for column in range(columns):
            value, corner = float(values[row, column]), (column - 0.5, row - 0.5)
            if value < 0:
                colour = "white" if value < -0.4 else "#A0A0A0"
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor=colour, linewidth=0))
            if row == column:
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=INK, linewidth=1.6, zorder=3))
            if max(rows, columns) <= _MOST_NUMBERS:
                _write_number(axes, column, row, value, background=colours[row, column])
    axes.set_title(f"{short_name(panel.name)}\n{panel.caption()}", fontsize=9, color=INK, loc="left")
    axes.set_xlabel("component", color=INK, fontsize=9)
    axes.set_ylabel("component", color=INK, fontsize=9)
    _number_ticks(axes, rows, columns)
    return image


def _write_number(axes: Axes, x: int, y: int, value: float, background: Any) -> None:
    """Write a value on the colour of its cell, so that hatching does not strike it through."""
    colour = "white" if abs(value) > 0.6 else INK
    text = f"{value + 0.0:.2f}".replace("-", "−")  # adding 0 makes −0.00 0.00
    box = {"facecolor": background, "edgecolor": "none", "pad": 1.2}
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=colour, bbox=box, zorder=4)


def _number_ticks(axes: Axes, rows: int, columns: int) -> None:
    """Count components from 1; a tick at each, or at so many that they stay readable."""
    for count, put in ((rows, axes.set_yticks), (columns, axes.set_xticks)):
        places = range(0, count, 1 + (count - 1) // 16)
        put(list(places), [str(place + 1) for place in places])
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
