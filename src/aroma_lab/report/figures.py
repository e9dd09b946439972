"""The paper's figures, and one it lacks, drawn from frames of runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from aroma.errors import ConfigError, DataError, bad_value
from aroma.pictures import FAINT, MatrixRank, RankPanel, draw_ranks, new_figure, write_title

from .formats import counted
from .runs import Run, curve_of, evaluations_of, read_runs, rows_of
from .style import (
    Looks,
    count_in_whole_numbers,
    fit_axis,
    matching_module,
    metric_label,
    paper_modules,
    short_name,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
"""(step, value) pairs, steps ascending."""

_LINE = ["method", "seed", "step", "value"]
"""Columns of a frame that lines are drawn from."""
_MARKS = 7
"""Markers on a curve, to tell it from others in a print without colours."""
_COSTS = (
    ("average_parameters", "trainable parameters, average over the planned steps"),
    ("minutes", "training time, minutes"),
)
_OF_MODULES = ("curves", "cosines")
_OF_ONE_SEED = ("ranks", "cosines")


@dataclass(frozen=True)
class Choice:
    """What a figure shows.

    Args:
        folders: Whatever `read_runs` takes: output folders of grids, tables of runs, folders of runs.
        task: Name of the task; None if there is only one, or all are shown.
        methods: Labels of the methods, in the order shown; None for all.
        modules: Names of modules, or ends of them; None for the paper's.
        seed: Seed of the runs if one run of a method is shown; None for the lowest.
    """

    folders: tuple[str | os.PathLike[str], ...]
    task: str | None = None
    methods: tuple[str, ...] | None = None
    modules: tuple[str, ...] | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Shown:
    """The runs that a figure shows.

    Args:
        frame: Finished runs that are reported, by seed, with `given`, the position of the first folder that has them.
        methods: Labels of the methods shown, in order.
        tasks: Names of the tasks shown, in the grid's order.
        looks: How the methods are drawn.
        choice: What was asked for.
    """

    frame: pd.DataFrame
    methods: Sequence[str]
    tasks: Sequence[str]
    looks: Looks
    choice: Choice

    def of(self, method: str, task: str | None = None) -> pd.DataFrame:
        """Return the runs of a method, by seed."""
        frame = self.frame[self.frame.method == method]
        return frame if task is None else frame[frame.task == task]


def draw_figure(kind: str, choice: Choice) -> Figure:
    """Return a figure of finished runs.

    Args:
        kind: One of `FIGURES`.
        choice: What it shows.

    Raises:
        ConfigError: A choice names what is not there, or leaves open what has to be chosen.
        DataError: There are no finished runs, or too few.
        CheckpointError: A record or an adapter is missing or damaged.
    """
    if choice.modules is not None and kind not in _OF_MODULES:
        raise bad_value("--modules", " ".join(choice.modules), f"only for {' and '.join(_OF_MODULES)}")
    if choice.seed is not None and kind not in _OF_ONE_SEED:
        raise bad_value("--seed", choice.seed, f"only for {' and '.join(_OF_ONE_SEED)}; others show all seeds")
    shown = _find(choice)
    if kind != "pareto" and len(shown.tasks) > 1:
        raise bad_value("--task", None, f"this figure shows one task; choose one of {', '.join(shown.tasks)}")
    return FIGURES[kind](shown)


def curves_figure(shown: Shown) -> Figure:
    """Return Figure 1 for the runs of one task: five panels, a line for each method in each panel.

    A line is the mean over the seeds; if there are several, a band reaches from the lowest to the highest. A method
    without ranks has no line in the panels of ranks.

    Raises:
        ConfigError: Not two modules; or one is not adapted by any method, or not told apart by the name given.
        CheckpointError: A `curve.json` or `history.json` is missing or damaged.
    """
    curves = {run.where: curve_of(run) for run in rows_of(shown.frame)}
    chosen = _two_modules(shown.choice.modules, curves.values())
    figure = new_figure(12, 7.05)
    panels = figure.subplots(
        2, 3, gridspec_kw={"left": 0.055, "right": 0.985, "top": 0.845, "bottom": 0.075, "hspace": 0.36}
    )
    panels = list(panels.flat)
    parameters = {place: curve["parameters"] for place, curve in curves.items()}
    _draw_steps(panels[0], shown, "(a) trainable parameters", parameters)
    # A growing method ends at 0.
    fit_axis(panels[0], "y", [0, *(points[0][1] for points in parameters.values())])
    _draw_steps(panels[1], shown, "(b) total rank", {place: curve["total_rank"] for place, curve in curves.items()})
    for panel, letter, name in zip(panels[2:4], "cd", chosen, strict=False):
        ranks = {place: curve["ranks"].get(name, []) for place, curve in curves.items()}
        _draw_steps(panel, shown, f"({letter}) rank of {short_name(name)}", ranks)
    for panel, letter in list(zip(panels[2:4], "cd", strict=True))[len(chosen) :]:
        _draw_steps(panel, shown, f"({letter}) rank of a module", {})
    _draw_lines(panels[4], shown, f"(e) {metric_label(shown.frame.metric.iloc[0])}", _score_frame(shown))
    panels[5].set_axis_off()
    handles = [shown.looks.handle(m, f"{m} ({counted(len(shown.of(m)), 'seed')})") for m in shown.methods]
    panels[5].legend(handles=handles, loc="upper left", fontsize=9, frameon=False, handlelength=4, borderaxespad=0)
    write_title(figure, f"Training on {shown.tasks[0]}", " · ".join([*_seeds_text(shown), *_stop_text(shown)]))
    return figure


def ranks_figure(shown: Shown) -> Figure:
    """Return Figures 3 and 5: rank and effective rank of every matrix, for one seed of each method.

    Raises:
        ConfigError: No method has ranks, or one has no run of the seed.
    """
    chosen = [_one_seed(shown, method, shown.choice.seed) for method in shown.methods]
    panels = []
    for run in chosen:
        effective = run.result["effective_ranks"] if run.result["ranks"] else {}
        matrices = [MatrixRank(name, rank, effective[name]) for name, rank in run.result["ranks"].items()]
        if matrices:
            panels.append(RankPanel(f"{run.method} on {run.task}, seed {run.seed}", matrices))
    if not panels:
        methods = ", ".join(run.method for run in chosen)
        raise bad_value("--methods", methods, "none of them has ranks; choose methods with low-rank updates")
    return draw_ranks(panels)


def cosines_figure(shown: Shown) -> Figure:
    """Return Figure 4: cosines between the components of two methods at their lowest common seed, or of two runs.

    Raises:
        ConfigError: Not two runs.
        CheckpointError: An adapter is missing or damaged.
        DataError: The runs have no seed, or no module, in common.
    """
    from .cosines import cosine_panels, draw_cosines  # here alone, since it needs torch

    first, second = _pair(shown)
    return draw_cosines(cosine_panels(first, second, shown.choice.modules), first, second)


def pareto_figure(shown: Shown) -> Figure:
    """Return a row of two panels for each task: score against average trainable parameters, and against time.

    A mark is the mean over a method's seeds, and its whiskers reach from the lowest to the highest of both. It is
    filled if the method is on the Pareto front, which a line joins. Parameters are averaged over the planned steps,
    including those that a run which stopped early did not take: the axis and the subtitle say so.
    """
    height = 0.85 + 3.2 * len(shown.tasks)
    figure = new_figure(12, height)
    box = {
        "left": 0.065,
        "right": 0.81,
        "top": 1 - 1.15 / height,
        "bottom": 0.6 / height,
        "wspace": 0.18,
        "hspace": 0.4,
    }
    panels = figure.subplots(len(shown.tasks), 2, squeeze=False, gridspec_kw=box)
    frame = shown.frame.assign(minutes=shown.frame.training_seconds / 60, points=100 * shown.frame.score)
    for row, task in zip(panels, shown.tasks, strict=True):
        of_task = frame[frame.task == task]
        for axes, (cost, label) in zip(row, _COSTS, strict=True):
            style_axes(axes, task, label, metric_label(of_task.metric.iloc[0]) if cost == _COSTS[0][0] else "")
            _draw_points(axes, shown, of_task, cost)
            fit_axis(axes, "x", of_task[cost])
    from matplotlib.lines import Line2D

    handles = [shown.looks.handle(method, method, line=False) for method in shown.methods]
    handles.append(Line2D([], [], color=FAINT, linewidth=1.2, label="Pareto front"))
    corner = (0.825, box["top"])
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=corner, fontsize=9, frameon=False, borderaxespad=0)
    parts = [*_seeds_text(shown, "whiskers from lowest to highest"), "filled: on the Pareto front"]
    if shown.frame.stopped_early.any():
        parts.append("after an early stop nothing trains: the planned steps that are left count as 0 parameters")
    write_title(figure, "Score against cost", " · ".join(parts))
    return figure


FIGURES: Mapping[str, Callable[[Shown], Figure]] = {
    "curves": curves_figure,
    "ranks": ranks_figure,
    "cosines": cosines_figure,
    "pareto": pareto_figure,
}
"""The figures by name."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other beats, by ascending cost.

    A point is beaten by one that costs no more and scores no less, and is better in one of the two. Points that are
    equal in both are all on the front.

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


def held_values(points: Points, steps: Sequence[float]) -> Any:
    """Return the values of a step function at `steps`: a value holds from its step on, also beyond the run's end."""
    changes, values = np.array(points, dtype=float).T
    return values[np.searchsorted(changes, steps, side="right") - 1]


def _find(choice: Choice) -> Shown:
    """Return the chosen runs of the folders given.

    Raises:
        DataError: There is no finished run in one of them, or two are of the same task, method and seed.
        ConfigError: A folder has no runs at all, or a task or a method is not there.
    """
    frames, labels, names = [], [], []
    for given, folder in enumerate(choice.folders):
        runs = read_runs(folder)
        if runs.reported.empty:
            remedy = "no finished run in it that is reported; wait for one, or give another folder"
            raise bad_value("FOLDER", str(folder), remedy, DataError)
        frames.append(
            runs.reported.assign(given=given, place=[os.path.realpath(path) for path in runs.reported["where"]])
        )
        labels += runs.methods
        names += [task for task in runs.tasks if (runs.reported.task == task).any()]
    frame = pd.concat(frames).drop_duplicates("place").sort_values("seed", kind="stable", ignore_index=True)
    methods, tasks = list(dict.fromkeys(labels)), list(dict.fromkeys(names))
    if choice.task is not None:
        tasks = _only("--task", [choice.task], tasks)
    frame = frame[frame.task.isin(tasks)]
    twice = frame[frame.duplicated(["task", "method", "seed"], keep=False)]
    if len(twice):
        other, one = list(twice.sort_values(["task", "method", "seed"], kind="stable")["where"])[:2]
        raise bad_value("FOLDER", one, f"of the same task, method and seed as {other}; give one of them", DataError)
    present = [method for method in methods if (frame.method == method).any()]
    wanted = _only("--methods", choice.methods, present)
    return Shown(frame[frame.method.isin(wanted)], wanted, tasks, Looks.of(methods), choice)


def _only(field: str, wanted: Iterable[str] | None, known: Sequence[str]) -> list[str]:
    """Return those of `known` that are `wanted`, in the order wanted; all if None."""
    chosen = list(dict.fromkeys(known if wanted is None else wanted))
    for name in chosen:
        if name not in known:
            raise bad_value(field, name, f"no finished run has it; there are {', '.join(known)}")
    return chosen


def _one_seed(shown: Shown, method: str, seed: int | None) -> Run:
    runs = rows_of(shown.of(method))
    for run in runs:
        if seed in (None, run.seed):
            return run
    known = ", ".join(str(run.seed) for run in runs)
    raise bad_value("--seed", seed, f"{method} has no finished run of it; there are {known}")


def _pair(shown: Shown) -> tuple[Run, Run]:
    """Return the two runs to compare: two methods at their lowest common seed, or the only two runs there are."""
    if shown.choice.methods is None and shown.choice.seed is None and len(shown.frame) == 2:
        first, second = rows_of(shown.frame.sort_values("given", kind="stable"))
        return first, second
    if len(shown.methods) != 2:
        labels = ", ".join(shown.methods)
        raise ConfigError(
            f"--methods: cosines compare two runs; choose two of {labels}, or give the folders of two runs"
        )
    one, other = shown.methods
    seed = shown.choice.seed
    if seed is None:
        common = set(shown.of(one).seed) & set(shown.of(other).seed)
        if not common:
            raise DataError(
                f"--methods: {one} and {other} have no finished runs of the same seed; give the folders of two runs"
            )
        seed = min(common)
    return _one_seed(shown, one, seed), _one_seed(shown, other, seed)


def _two_modules(modules: Sequence[str] | None, curves: Iterable[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for curve in curves for name in curve["ranks"]))
    if modules is None:
        return paper_modules(names) if names else []
    if len(modules) != 2:
        raise bad_value("--modules", " ".join(modules), "Figure 1 shows two modules; give two")
    return [matching_module(module, names) for module in modules]


def _draw_steps(axes: Axes, shown: Shown, title: str, points: Mapping[str, Points]) -> None:
    """Draw step functions, given by run; a method of which a run has no values is left out."""
    rows = []
    marks: dict[str, list[int]] = {}
    for index, method in enumerate(shown.methods):
        runs = shown.of(method)
        changes = [points.get(place, []) for place in runs["where"]]
        if all(changes):
            end = int(runs.steps.max())
            # Each method has its markers at other steps, so that curves which lie on each other stay told apart.
            marks[method] = [
                round(end * (mark + (index + 0.5) / len(shown.methods)) / _MARKS) for mark in range(_MARKS)
            ]
            found = {step for of_run in changes for step, _ in of_run if step <= end} | {end, *marks[method]}
            # A value holds until the step before the next one.
            steps = sorted(found | {step - 1 for step in found if step > 0})
            for seed, of_run in zip(runs.seed, changes, strict=True):
                rows += [
                    (method, seed, step, value) for step, value in zip(steps, held_values(of_run, steps), strict=True)
                ]
    _draw_lines(axes, shown, title, pd.DataFrame(rows, columns=_LINE))
    for line, of_method in zip(axes.lines, marks.values(), strict=False):
        line.set_markevery(np.searchsorted(line.get_xdata(), of_method).tolist())
    count_in_whole_numbers(axes.yaxis)
    if rows:
        axes.set_ylim(bottom=-0.04 * axes.get_ylim()[1])
    else:
        axes.text(0.5, 0.5, "no method has ranks", ha="center", transform=axes.transAxes, fontsize=9, color=FAINT)


def _draw_lines(axes: Axes, shown: Shown, title: str, frame: pd.DataFrame) -> None:
    """Draw a line for each method, the mean over its seeds, and a band from the lowest to the highest."""
    import seaborn as sns

    style_axes(axes, title, "optimizer step")
    count_in_whole_numbers(axes.xaxis)
    if frame.empty:
        return
    drawn = [method for method in shown.methods if (frame.method == method).any()]
    sns.lineplot(
        frame,
        x="step",
        y="value",
        hue="method",
        style="method",
        hue_order=drawn,
        style_order=drawn,
        palette=dict(shown.looks.palette),
        dashes=dict(shown.looks.dashes),
        markers=dict(shown.looks.markers),
        errorbar=("pi", 100),
        err_kws={"linewidth": 0, "alpha": 0.15},
        linewidth=1.6,
        markersize=4.5,
        markeredgewidth=0,
        legend=False,
        ax=axes,
    )
    axes.set(xlabel="optimizer step", ylabel="")


def _score_frame(shown: Shown) -> pd.DataFrame:
    """Return scores on the reported examples ×100, by method, seed and step, from where all seeds were measured.

    Between its measurements a run's score is read on a straight line; the last one holds for a run that has ended.
    """
    rows = []
    for method in shown.methods:
        runs = [(run.seed, np.array(_score_points(run), dtype=float).T) for run in rows_of(shown.of(method))]
        steps = np.unique(np.concatenate([of_run[0] for _, of_run in runs]))
        steps = steps[steps >= max(of_run[0][0] for _, of_run in runs)]
        for seed, of_run in runs:
            rows += [(method, seed, step, value) for step, value in zip(steps, np.interp(steps, *of_run), strict=True)]
    return pd.DataFrame(rows, columns=_LINE)


def _score_points(run: Run) -> list[tuple[float, float]]:
    """Return a run's score by step, the mean over its reported splits ×100; the last one is the result's."""
    splits = run.result["reported"]
    evaluations = pd.DataFrame(list(evaluations_of(run)), columns=["step", "split", run.metric])
    by_step = evaluations[evaluations.split.isin(list(splits))].pivot_table(
        index="step", columns="split", values=run.metric
    )
    scores = by_step.mean(axis="columns")[by_step.notna().sum(axis="columns") == len(splits)]
    points = {**(100 * scores).to_dict(), run.steps: 100 * run.score}
    return sorted((float(step), float(value)) for step, value in points.items())


def _draw_points(axes: Axes, shown: Shown, frame: pd.DataFrame, cost: str) -> None:
    by_method = (
        frame.groupby("method")[[cost, "points"]].agg(["mean", "min", "max"]).reindex(list(shown.methods)).dropna()
    )
    means = by_method.xs("mean", axis="columns", level=1)
    # Rounded, so that equal scores stay equal whatever the order of their seeds.
    front = pareto_front(list(zip(means[cost], means.points.round(9), strict=True)))
    if len(front) > 1:
        line = means.iloc[front]
        axes.step(line[cost], line.points, where="post", color=FAINT, linewidth=1.2, zorder=1)
    for place, (method, row) in enumerate(by_method.iterrows()):
        colour, filled = shown.looks.palette[str(method)], place in front
        axes.errorbar(
            row[cost]["mean"],
            row.points["mean"],
            xerr=_whiskers(row[cost]),
            yerr=_whiskers(row.points),
            marker=shown.looks.markers[str(method)],
            markersize=8,
            color=colour,
            markerfacecolor=colour if filled else "white",
            elinewidth=0.9,
            linestyle="none",
            zorder=3 if filled else 2,
        )


def _whiskers(row: pd.Series[float]) -> list[list[float]]:
    # The mean of equal values can lie beside them by a rounding, and a whisker of negative length is refused.
    return [[max(0.0, row["mean"] - row["min"])], [max(0.0, row["max"] - row["mean"])]]


def _seeds_text(shown: Shown, spread: str = "lowest to highest shaded") -> list[str]:
    several = shown.frame.groupby(["task", "method"]).size().max() > 1
    return [f"mean over seeds, {spread}" if several else "one seed each"]


def _stop_text(shown: Shown) -> list[str]:
    """Return how runs that stopped early show, if there are any."""
    early, whole = int(shown.frame.stopped_early.sum()), len(shown.frame)
    held = "the last value is held until the longest run of the method ends"
    return [f"{early} of {counted(whole, 'run')} stopped early: {held}"] if early else []
