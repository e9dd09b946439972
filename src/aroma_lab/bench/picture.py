"""The result as a picture: a row for every case; time, bytes kept for backward, peak memory from left to right."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .result import BenchResult, CaseResult
from .table import headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito; what belongs together is also told apart by its name at the left.
_AROMA, _LORA, _OTHER = "#D55E00", "#0072B2", "#767676"
_INK, _FAINT, _GRID = "#222222", "#767676", "#E4E4E4"

_ROW = 0.27
"""Inches between two cases."""
_TOP, _BOTTOM = 0.95, 1.0
_WIDTH = 11.0
_LABEL_CHARACTER = 0.078
"""Inches of one character of a case's name."""
_GAP = 0.3


def bench_picture(result: BenchResult, path: str | os.PathLike[str]) -> None:
    """Draw the result and write it to `path`, a .png, .svg or .pdf file."""
    figure = draw_bench(result)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def draw_bench(result: BenchResult) -> Figure:
    """Return the picture as a matplotlib figure that belongs to no window; see `bench_picture`.

    A filled circle is forward and backward, with a line over its quartiles; a hollow one is the whole step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = result.cases
    height = _TOP + len(cases) * _ROW + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasAgg(figure)
    peaks = [case.footprint.peak_bytes for case in cases]
    has_peaks = any(peak is not None for peak in peaks)
    axes = _make_axes(figure, cases, height, amounts=2 if has_peaks else 1)
    _draw_times(axes[0], cases)
    _draw_amounts(axes[1], cases, [case.footprint.kept_bytes for case in cases], "kept for backward, MiB")
    if has_peaks:
        _draw_amounts(axes[2], cases, peaks, "peak memory, MiB")
    left = 0.2 / _WIDTH
    figure.text(left, 1 - 0.35 / height, "Cost of one training step", fontsize=12, fontweight="bold", color=_INK)
    figure.text(left, 1 - 0.6 / height, headline(result), fontsize=9, color=_FAINT)
    figure.text(left, 0.2 / height, _LEGEND, fontsize=8.5, color=_INK)
    return figure


_LEGEND = (
    "● forward + backward, median and quartiles    ○ whole step, with optimizer and method    "
    "both over forward + backward of the floor, round by round"
)


def _make_axes(figure: Figure, cases: Sequence[CaseResult], height: float, amounts: int) -> list[Axes]:
    """Add a wide panel for times, and to its right `amounts` narrower ones."""
    left = 0.3 + _LABEL_CHARACTER * max(len(case.name) for case in cases)
    unit = (_WIDTH - left - 0.25 - amounts * _GAP) / (2 + amounts)
    axes: list[Axes] = []
    for width in (2 * unit, *[unit] * amounts):
        box = (left / _WIDTH, _BOTTOM / height, width / _WIDTH, len(cases) * _ROW / height)
        axes.append(figure.add_axes(box))
        left += width + _GAP
    for index, panel in enumerate(axes):
        panel.set_ylim(len(cases) - 0.5, -0.5)
        panel.set_yticks(range(len(cases)), [case.name for case in cases] if index == 0 else [""] * len(cases))
        panel.tick_params(length=0, labelsize=8.5, labelcolor=_INK)
        panel.set_frame_on(False)
        panel.set_axisbelow(True)
        panel.grid(color=_GRID, linewidth=0.8)
    return axes


def _draw_times(axes: Axes, cases: Sequence[CaseResult]) -> None:
    axes.axvline(1, color=_FAINT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    for row, case in enumerate(cases):
        colour = _colour(case)
        inner, whole = case.forward_backward_ratio, case.step_ratio
        axes.plot(whole.median, row, "o", markersize=7, markerfacecolor="white", markeredgecolor=colour, zorder=2)
        axes.plot([inner.lower, inner.upper], [row, row], color=colour, linewidth=1.6, zorder=3)
        axes.plot(inner.median, row, "o", markersize=5, color=colour, zorder=4)
    axes.set_xlabel("time, × floor", color=_INK)


def _draw_amounts(axes: Axes, cases: Sequence[CaseResult], amounts: Sequence[int | None], label: str) -> None:
    for row, (case, amount) in enumerate(zip(cases, amounts, strict=True)):
        if amount is None:
            axes.text(0, row, "  not measured", va="center", fontsize=7.5, color=_FAINT)
        else:
            axes.barh(row, amount / 2**20, height=0.55, color=_colour(case), zorder=2)
    axes.set_xlim(left=0)
    axes.set_xlabel(label, color=_INK)


def _colour(case: CaseResult) -> str:
    if case.key.startswith("aroma"):
        return _AROMA
    return _LORA if case.key.startswith("lora") else _OTHER
