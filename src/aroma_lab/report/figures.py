"""Figures of finished runs, by seaborn: a line or a mark for each method, mean over its seeds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from aroma.errors import DataError, bad_value
from aroma.pictures import MatrixRank, draw_ranks

from .runs import has_fixed_rank, read_runs, rows_of
from .statistics import not_learnt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OF_TASKS = ("budget", "memory")
"""Figures that show several tasks."""
_FAINT, _PALETTE = "#767676", "colorblind"


@dataclass(frozen=True)
class Shown:
    """The runs that a figure shows, by seed, and methods and tasks in their order; see `draw_figure`."""

    frame: pd.DataFrame
    methods: Sequence[str]
    tasks: Sequence[str]


def draw_figure(
    kind: str,
    folder: str | os.PathLike[str],
    task: str | None = None,
    methods: Sequence[str] | None = None,
) -> Figure:
    """Return a figure of finished runs.

    Args:
        kind: One of `FIGURES`.
        folder: Whatever `read_runs` takes: output folder of a grid, table of runs, folder of a run.
        task: Name of the task; None if there is only one, or all are shown.
        methods: Labels of the methods, in the order shown; None for all.

    Raises:
        ConfigError: A choice names what is not there, or leaves open what has to be chosen.
        DataError: There are no finished runs.
        CheckpointError: A record is damaged.
    """
    runs = read_runs(folder)
    frame = runs.reported.sort_values("seed", kind="stable", ignore_index=True)
    if frame.empty:
        raise bad_value("FOLDER", str(folder), "no finished run in it that is reported; wait for one", DataError)
    tasks = [one for one in runs.tasks if (frame.task == one).any()]
    tasks = _only("--task", None if task is None else [task], tasks)
    if kind not in _OF_TASKS and len(tasks) > 1:
        raise bad_value("--task", None, f"this figure shows one task; choose one of {', '.join(tasks)}")
    frame = frame[frame.task.isin(tasks)]
    labels = _only("--methods", methods, [label for label in runs.methods if (frame.method == label).any()])
    return FIGURES[kind](Shown(frame[frame.method.isin(labels)], labels, tasks))


def ranks_figure(shown: Shown) -> Figure:
    """Return Figures 3 and 5: rank and effective rank of every matrix, for the lowest seed of each method."""
    panels = {}
    for method in shown.methods:
        run = rows_of(shown.frame[shown.frame.method == method])[0]
        effective = run.result["effective_ranks"]
        matrices = [MatrixRank(name, rank, effective[name]) for name, rank in run.result["ranks"].items()]
        if matrices:
            panels[f"{run.method} on {run.task}, seed {run.seed}"] = matrices
    if not panels:
        labels = ", ".join(shown.methods)
        raise bad_value("--methods", labels, "none of them has ranks; choose methods with low-rank updates")
    return draw_ranks(panels)


def planted_figure(shown: Shown) -> Figure:
    """Return found against planted ranks: a mark for every matrix of every seed, and a line where they are equal."""
    import seaborn as sns

    frames = []
    for run in rows_of(shown.frame):
        planted = run.result.get("planted")
        if planted is None:
            raise bad_value("--task", run.task, "nothing is planted in it; this figure is of tasks that plant ranks")
        if found := run.result["ranks"]:
            pairs = {"planted": planted["ranks"].values(), "found": [found.get(name, 0) for name in planted["ranks"]]}
            frames.append(pd.DataFrame(pairs).assign(method=run.method))
    if not frames:
        raise bad_value("--methods", ", ".join(shown.methods), "none of them has ranks; choose methods that have")
    matrices = pd.concat(frames)
    methods = [method for method in shown.methods if (matrices.method == method).any()]
    look: dict[str, Any] = {"native_scale": True, "dodge": len(methods) > 1, "jitter": 0.15, "alpha": 0.7}
    # Matrices of equal rank lie side by side, methods apart.
    look |= {"palette": _PALETTE, "aspect": 1.6}
    grid = sns.catplot(matrices, x="planted", y="found", hue="method", hue_order=methods, **look)
    grid.ax.axline((0, 0), slope=1, color=_FAINT, linewidth=1.2, zorder=1)
    grid.ax.set(title=shown.tasks[0], xlabel="planted rank", ylabel="found rank")
    return _finished(grid)


def memory_figure(shown: Shown) -> Figure:
    """Return two panels against the number of pairs: the mean rank that was found, and the share that is recalled."""
    frame = shown.frame[shown.frame.metric == "recalled"]
    if frame.empty:
        raise bad_value("--task", " ".join(shown.tasks), "no pairs are remembered in it; give tasks of kind memory")
    pairs = [result["examples"]["train"] for result in frame.result]
    panels = {"mean rank found": pd.to_numeric(frame.average_rank), "bits recalled, %": 100 * frame.score}
    both = pd.concat([frame.assign(pairs=pairs, value=value, panel=title) for title, value in panels.items()])
    grid = _grid(both, "pairs", "value", shown.methods, "panel", errorbar=("pi", 100), markers=True)
    return _finished(grid.set_titles("{col_name}").set_axis_labels("pairs to remember", ""))


def budget_figure(shown: Shown) -> Figure:
    """Return a panel for each task: score against trained rank, and a line through the fixed ranks of LoRA.

    A mark is the mean over a method's seeds, and its whiskers are one standard error long. A method that adapts no
    matrices has no trained rank, and no mark.
    """
    cells = shown.frame.groupby(["task", "method"]).trained_rank
    trained = cells.transform(lambda ranks: pd.to_numeric(ranks).mean())
    frame = shown.frame.assign(trained=trained, points=100 * shown.frame.score).dropna(subset="trained")
    if frame.empty:
        raise bad_value("--methods", " ".join(shown.methods), "none of them has a trained rank; choose others")
    look = {"col_order": [one for one in shown.tasks if (frame.task == one).any()], "markers": True, "markersize": 8}
    grid = _grid(frame, "trained", "points", shown.methods, "task", err_style="bars", errorbar="se", **look)
    unlearnt = not_learnt(shown.frame)
    for task, axes in grid.axes_dict.items():
        fixed = frame[(frame.task == task) & frame.trial.map(has_fixed_rank)]
        line = fixed.groupby("trained").points.mean()
        axes.plot(line.index, line, color=_FAINT, linewidth=1.2, zorder=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.3g}")
        metric = frame.metric[frame.task == task].iloc[0]
        axes.set(title=f"{task}, not learnt" if task in unlearnt else task, ylabel=f"{metric} × 100")
    grid.set_xlabels("trained rank")
    return _finished(grid)


FIGURES: Mapping[str, Callable[[Shown], Figure]] = {
    "ranks": ranks_figure,
    "planted": planted_figure,
    "memory": memory_figure,
    "budget": budget_figure,
}


def _grid(frame: pd.DataFrame, x: str, y: str, methods: Sequence[str], panels: str, **look: Any) -> Any:
    """Return seaborn's grid of panels, with a line of its own look for each method."""
    import seaborn as sns

    there = [method for method in methods if (frame.method == method).any()]
    of_methods = {"hue": "method", "style": "method", "hue_order": there, "style_order": there, "palette": _PALETTE}
    of_panels = {"col": panels, "col_wrap": min(3, frame[panels].nunique()), "height": 3.6}
    apart = {"sharex": False, "sharey": False}
    grid = sns.relplot(frame, kind="line", x=x, y=y, dashes=False, facet_kws=apart, **of_methods, **of_panels, **look)
    for axes in grid.axes.flat:
        axes.grid(color="#E4E4E4", linewidth=0.8)
    return grid


def _finished(grid: Any) -> Figure:
    """Return the figure of a grid, which pyplot forgets."""
    from matplotlib import pyplot

    grid.tight_layout()
    pyplot.close(grid.figure)
    figure: Figure = grid.figure
    return figure


def _only(field: str, wanted: Iterable[str] | None, known: Sequence[str]) -> list[str]:
    """Return those of `known` that are `wanted`, in the order wanted; all if None."""
    chosen = list(dict.fromkeys(known if wanted is None else wanted))
    for name in chosen:
        if name not in known:
            raise bad_value(field, name, f"no finished run has it; there are {', '.join(known)}")
    return chosen
