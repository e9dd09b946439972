"""Figure 1: trainable parameters, total rank, rank of two modules, and score, each against the training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from aroma.errors import bad_value

from .modules import matching_module, paper_modules, short_name
from .runs import MethodRuns, curve_of
from .series import Band, Points, band_of_points, band_of_steps, score_points
from .style import (
    FAINT,
    INK,
    Style,
    count_in_whole_numbers,
    metric_label,
    new_figure,
    spread,
    style_axes,
    write_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _TOP, _ROW = 12.0, 0.85, 3.1
_MARKS = 7
"""Markers on a curve, to tell it from others in a print without colours."""


def draw_curves(methods: Sequence[MethodRuns], modules: Sequence[str] | None = None) -> Figure:
    """Return Figure 1 for the runs of one task: five panels, a line for each method in each panel.

    A line is the mean over the seeds; where there are several, a band reaches from the lowest to the highest. A
    method without ranks has no line in the panels of ranks.

    Args:
        methods: The runs by method.
        modules: Names of the two modules shown, or ends of them; the paper's two by default.

    Raises:
        ConfigError: Not two modules; or one is not adapted by any method, or not told apart by the name given.
        CheckpointError: A `curve.json` or `history.json` is missing or damaged.
    """
    curves = {run.folder: curve_of(run) for method in methods for run in method.runs}
    names = list(dict.fromkeys(name for curve in curves.values() for name in curve["ranks"]))
    chosen = _choose(modules, names)
    figure = new_figure(_WIDTH, _TOP + 2 * _ROW)
    axes = _make_panels(figure)
    parameters = {folder: curve["parameters"] for folder, curve in curves.items()}
    _draw_steps(axes[0], methods, parameters, "(a) trainable parameters")
    spread(axes[0], "y", [0, *(points[0][1] for points in parameters.values())])  # a growing method ends at 0
    total = {folder: curve["total_rank"] for folder, curve in curves.items()}
    _draw_steps(axes[1], methods, total, "(b) total rank")
    for panel, letter, name in zip(axes[2:4], "cd", chosen, strict=False):
        ranks = {folder: curve["ranks"].get(name, []) for folder, curve in curves.items()}
        _draw_steps(panel, methods, ranks, f"({letter}) rank of {short_name(name)}")
    for panel in axes[2 + len(chosen) : 4]:
        _say_empty(panel)
    _draw_scores(axes[4], methods)
    _draw_key(axes[5], methods)
    write_title(figure, f"Training on {methods[0].runs[0].task}", _subtitle(methods))
    return figure


def _choose(modules: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    if modules is not None:
        if len(modules) != 2:
            raise bad_value("--modules", " ".join(modules), "Figure 1 shows two modules; give two")
        return [matching_module(module, names) for module in modules]
    return paper_modules(names) if names else []


def _make_panels(figure: Figure) -> list[Axes]:
    """Add two rows of three panels; the sixth holds the legend."""
    height = _TOP + 2 * _ROW
    left, gap, bottom = 0.65, 0.7, 0.55
    width = (_WIDTH - left - 0.2 - 2 * gap) / 3
    axes = []
    for row in (0, 1):
        for column in range(3):
            x, y = left + column * (width + gap), height - _TOP - (row + 1) * _ROW + bottom
            box = (x / _WIDTH, y / height, width / _WIDTH, (_ROW - bottom - 0.35) / height)
            axes.append(figure.add_axes(box))
    for panel in axes[:5]:
        style_axes(panel)
        panel.set_xlabel("optimizer step", color=INK, fontsize=9)
        count_in_whole_numbers(panel.xaxis)
    axes[5].set_axis_off()
    return axes


def _draw_steps(axes: Axes, methods: Sequence[MethodRuns], points: Mapping[Path, Points], title: str) -> None:
    """Draw step functions; a method of which a run has no values is left out."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    count_in_whole_numbers(axes.yaxis)
    for place, method in enumerate(methods):
        curves = [points[run.folder] for run in method.runs]
        if all(curves):
            end = max(run.result["steps"] for run in method.runs)
            # Each method has its markers at other steps: curves that lie on each other stay told apart.
            marks = [end * (mark + (place + 0.5) / len(methods)) / _MARKS for mark in range(_MARKS)]
            band = band_of_steps(curves, end, also=marks)
            _draw_band(axes, band, method.style, [int(np.searchsorted(band.steps, mark)) for mark in marks], "post")
    if axes.lines:
        axes.set_ylim(bottom=-0.04 * axes.get_ylim()[1])
    else:
        _say_empty(axes)


def _say_empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no method has ranks", ha="center", transform=axes.transAxes, fontsize=9, color=FAINT)


def _draw_scores(axes: Axes, methods: Sequence[MethodRuns]) -> None:
    metric = methods[0].runs[0].result["metric"]
    axes.set_title(f"(e) {metric_label(metric)}", fontsize=10, color=INK, loc="left")
    for method in methods:
        band = band_of_points([score_points(run) for run in method.runs])
        _draw_band(axes, band, method.style, list(range(len(band.steps))))


def _draw_band(axes: Axes, band: Band, style: Style, marks: list[int], step: Literal["post"] | None = None) -> None:
    axes.plot(
        band.steps,
        band.mean,
        color=style.colour,
        linestyle=style.line,
        linewidth=1.6,
        drawstyle="steps-post" if step else "default",
        marker=style.marker,
        markevery=marks,
        markersize=4.5,
        zorder=3,
    )
    if not np.array_equal(band.low, band.high):
        axes.fill_between(
            band.steps, band.low, band.high, step=step, color=style.colour, alpha=0.15, linewidth=0, zorder=2
        )


def _draw_key(axes: Axes, methods: Sequence[MethodRuns]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=method.style.colour,
            linestyle=method.style.line,
            linewidth=1.6,
            marker=method.style.marker,
            markersize=4.5,
            label=f"{method.method} ({len(method.runs)} {'seed' if len(method.runs) == 1 else 'seeds'})",
        )
        for method in methods
    ]
    axes.legend(handles=handles, loc="upper left", fontsize=9, frameon=False, handlelength=4, borderaxespad=0)


def _subtitle(methods: Sequence[MethodRuns]) -> str:
    runs = [run for method in methods for run in method.runs]
    parts = ["mean over seeds, lowest to highest shaded" if len(runs) > len(methods) else "one seed each"]
    if any(run.result["stopped_early"] for run in runs):
        parts.append(_stop_text(methods))
    return " · ".join(parts)


def _stop_text(methods: Sequence[MethodRuns]) -> str:
    """Return how runs that stopped by themselves show."""
    if not any(_has_shorter_stop(method) for method in methods):
        return "a line that ends early: its training stopped by itself"
    runs = [run for method in methods for run in method.runs]
    stopped = sum(bool(run.result["stopped_early"]) for run in runs)
    itself, their = ("itself", "its") if stopped == 1 else ("themselves", "their")
    return (
        f"{stopped} of {len(runs)} runs stopped by {itself}: {their} last value is held until the longest run of the "
        "method ends"
    )


def _has_shorter_stop(method: MethodRuns) -> bool:
    """Whether a run stopped before another one of the method ended, so that the line goes on without it."""
    longest = max(run.result["steps"] for run in method.runs)
    return any(run.result["stopped_early"] and run.result["steps"] < longest for run in method.runs)
