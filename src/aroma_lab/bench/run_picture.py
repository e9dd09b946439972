"""A whole run as a picture: seconds of every epoch above, AROMA's growth below."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .accounting import ADALORA, AROMA, LORA, UNFROZEN
from .run_report import RunResult
from .run_table import headline, ratio_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito; lines are told apart by dashes and by their labels too.
_STYLES = {
    LORA: ("#0072B2", "-"),
    ADALORA: ("#767676", (0, (1, 1.5))),
    AROMA: ("#D55E00", "-"),
    UNFROZEN: ("#D55E00", (0, (4, 3))),
}
_RANK, _FINISHED = "#009E73", "#222222"
_INK, _FAINT, _GRID = "#222222", "#767676", "#E4E4E4"


def run_picture(result: RunResult, path: str | os.PathLike[str]) -> None:
    """Draw the result and write it to `path`, a .png, .svg or .pdf file."""
    figure = draw_run(result)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def draw_run(result: RunResult) -> Figure:
    """Return the picture as a matplotlib figure that belongs to no window; see `run_picture`.

    Seconds are drawn by step, so that a last epoch that was cut short stands at the same height.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 6.0))
    FigureCanvasAgg(figure)
    times = figure.add_axes((0.09, 0.46, 0.62, 0.38))
    growth = figure.add_axes((0.09, 0.1, 0.62, 0.28))
    for axes in (times, growth):
        _dress(axes)
    _draw_times(times, result)
    _draw_growth(growth, result)
    figure.text(0.03, 0.95, "Time of a whole run", fontsize=12, fontweight="bold", color=_INK)
    figure.text(0.03, 0.918, headline(result), fontsize=9, color=_FAINT)
    figure.text(0.03, 0.89, ratio_line(result), fontsize=9, color=_FAINT)
    return figure


def _draw_times(axes: Axes, result: RunResult) -> None:
    numbers = [epoch.number for epoch in result.epochs]
    ends = []
    for name, (colour, dashes) in _STYLES.items():
        values = [1000 * epoch.arms[name].seconds / epoch.steps for epoch in result.epochs]
        axes.plot(numbers, values, color=colour, linestyle=dashes, linewidth=1.8, marker="o", markersize=3)
        ends.append((values[-1], result.labels[name], colour))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("ms a step", color=_INK)
    _label_ends(axes, ends)


def _draw_growth(axes: Axes, result: RunResult) -> None:
    numbers = [epoch.number for epoch in result.epochs]
    ranks = [epoch.arms[AROMA].total_rank for epoch in result.epochs]
    finished = [epoch.arms[AROMA].finished for epoch in result.epochs]
    axes.plot(numbers, ranks, color=_RANK, linewidth=1.8, marker="s", markersize=3)
    axes.plot(numbers, finished, color=_FINISHED, linewidth=1.8, linestyle=(0, (4, 3)), marker="^", markersize=3)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch", color=_INK)
    of_all = f"finished modules (of {result.modules})"
    _label_ends(axes, [(ranks[-1], "total rank", _RANK), (finished[-1], of_all, _FINISHED)])


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write the name of every line at the height where it ends, names that would overlap being moved apart."""
    low, high = axes.get_ylim()
    # A name takes so much of the axis; the lowest names give way last.
    height = (high - low) * 0.07 * (0.38 / axes.get_position().height)
    at = low - height
    for value, label, colour in sorted(ends):
        at = max(value, at + height)
        position = (1.02, (at - low) / (high - low))
        axes.text(*position, label, transform=axes.transAxes, va="center", fontsize=8.5, color=colour)


def _dress(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_frame_on(False)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
