"""What the paper lacks: score against what it costs, in trainable parameters and in time, with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..report.records import Run
from .runs import MethodRuns
from .style import FAINT, INK, metric_label, new_figure, spread, style_axes, write_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL_WIDTH, _LEFT, _GAP, _TOP, _ROW = 4.2, 0.75, 0.75, 0.85, 3.2
_KEY_WIDTH = 2.3


def parameters_of(run: Run) -> float:
    """Return the adapter's trainable parameters, averaged over the planned steps; the head is not counted."""
    return float(run.result["parameters"]["average"])


def minutes_of(run: Run) -> float:
    """Return the minutes of training, evaluations not counted."""
    return float(sum(run.result["epoch_seconds"])) / 60


_COSTS: tuple[tuple[str, Callable[[Run], float]], ...] = (
    ("trainable parameters, average over the planned steps", parameters_of),
    ("training time, minutes", minutes_of),
)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other beats, by ascending cost.

    A point is beaten by one that costs no more and scores no less, and is better in one of the two. Of points that
    are equal in both, all are on the front.

    Args:
        points: (cost, score) pairs.
    """
    front = [
        index
        for index, (cost, score) in enumerate(points)
        if not any(
            other_cost <= cost and other_score >= score and (other_cost, other_score) != (cost, score)
            for other_cost, other_score in points
        )
    ]
    return sorted(front, key=lambda index: points[index])


def draw_pareto(tasks: Mapping[str, Sequence[MethodRuns]]) -> Figure:
    """Return a row of two panels for each task: score against average trainable parameters, and against time.

    A mark is the mean over a method's seeds, its whiskers reach from the lowest to the highest of both; it is filled
    if the method is on the Pareto front, which a line joins. Parameters are averaged over the planned steps, also
    those that a run which stopped early did not take: the axis and the subtitle say so.

    Args:
        tasks: By task, the runs by method.
    """
    width = _LEFT + 2 * _PANEL_WIDTH + _GAP + _KEY_WIDTH
    height = _TOP + len(tasks) * _ROW
    figure = new_figure(width, height)
    for row, (task, methods) in enumerate(tasks.items()):
        for column, (label, cost) in enumerate(_COSTS):
            x, y = _LEFT + column * (_PANEL_WIDTH + _GAP), height - _TOP - (row + 1) * _ROW + 0.6
            box = (x / width, y / height, _PANEL_WIDTH / width, (_ROW - 0.95) / height)
            axes = figure.add_axes(box)
            _draw_panel(axes, methods, cost)
            axes.set_title(task, fontsize=10, color=INK, loc="left")
            axes.set_xlabel(label, color=INK, fontsize=9)
            if column == 0:
                axes.set_ylabel(metric_label(methods[0].runs[0].result["metric"]), color=INK, fontsize=9)
    _draw_key(figure, [method for methods in tasks.values() for method in methods])
    write_title(figure, "Score against cost", _subtitle([method for methods in tasks.values() for method in methods]))
    return figure


def _subtitle(methods: Sequence[MethodRuns]) -> str:
    runs = [run for method in methods for run in method.runs]
    several = len(runs) > len(methods)
    parts = ["mean over seeds, whiskers from lowest to highest" if several else "one seed each"]
    parts.append("filled: on the Pareto front")
    if any(run.result["stopped_early"] for run in runs):
        parts.append("after an early stop nothing trains: the planned steps that are left count as 0 parameters")
    return " · ".join(parts)


def _draw_panel(axes: Axes, methods: Sequence[MethodRuns], cost: Callable[[Run], float]) -> None:
    style_axes(axes)
    clouds = [[(cost(run), 100 * run.result["score"]) for run in method.runs] for method in methods]
    means = [_mean(cloud) for cloud in clouds]
    front = pareto_front([(x, round(y, 9)) for x, y in means])  # equal scores stay equal whatever their seeds' order
    if len(front) > 1:
        axes.step(
            *zip(*(means[index] for index in front), strict=True), where="post", color=FAINT, linewidth=1.2, zorder=1
        )
    for index, (method, cloud) in enumerate(zip(methods, clouds, strict=True)):
        _draw_method(axes, method, cloud, filled=index in front)
    spread(axes, "x", [x for cloud in clouds for x, _ in cloud])


def _draw_method(axes: Axes, method: MethodRuns, cloud: Sequence[tuple[float, float]], filled: bool) -> None:
    costs, scores = zip(*cloud, strict=True)
    cost, score = _mean(cloud)
    axes.errorbar(
        cost,
        score,
        xerr=_whiskers(cost, costs),
        yerr=_whiskers(score, scores),
        marker=method.style.marker,
        markersize=8,
        color=method.style.colour,
        markerfacecolor=method.style.colour if filled else "white",
        elinewidth=0.9,
        linestyle="none",
        zorder=3 if filled else 2,
    )


def _whiskers(mean: float, values: Sequence[float]) -> list[list[float]]:
    # The mean of equal values can lie beside them by a rounding, and a whisker of negative length is refused.
    return [[max(0.0, mean - min(values))], [max(0.0, max(values) - mean)]]


def _draw_key(figure: Figure, methods: Sequence[MethodRuns]) -> None:
    from matplotlib.lines import Line2D

    styles = {method.method: method.style for method in methods}
    handles = [
        Line2D([], [], color=style.colour, linestyle="none", marker=style.marker, markersize=8, label=label)
        for label, style in styles.items()
    ]
    handles.append(Line2D([], [], color=FAINT, linewidth=1.2, label="Pareto front"))
    width, height = figure.get_size_inches()
    corner = (1 - (_KEY_WIDTH - 0.15) / width, 1 - (_TOP + 0.35) / height)
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=corner, fontsize=9, frameon=False, borderaxespad=0)


def _mean(cloud: Sequence[tuple[float, float]]) -> tuple[float, float]:
    costs, scores = zip(*cloud, strict=True)
    return sum(costs) / len(costs), sum(scores) / len(scores)
