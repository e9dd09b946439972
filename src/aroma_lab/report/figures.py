"""Figures of finished runs, by seaborn: a line or a mark for each method, mean over its seeds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from aroma.errors import DataError, bad_value
from aroma.pictures import MatrixRank, draw_ranks

from .runs import has_fixed_rank, read_runs, rows_of
from .statistics import not_learnt

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        ConfigError: A kind, task or method that does not exist, or a task that has to be named.
        DataError: There are no finished runs.
        CheckpointError: A record is damaged.
    """
    runs = read_runs(folder)
    frame = runs.reported.sort_values("seed", kind="stable", ignore_index=True)
    if frame.empty:
        raise bad_value("FOLDER", str(folder), "no finished run in it that is reported; wait for one", DataError)
    tasks = [one for one in runs.tasks if (frame.task == one).any()]
    tasks = _only("--task", None if task is None else [task], tasks)
    if kind == "ranks" and len(tasks) > 1:
        raise bad_value("--task", None, f"this figure shows one task; choose one of {', '.join(tasks)}")
    frame = frame[frame.task.isin(tasks)]
    labels = _only("--methods", methods, [label for label in runs.methods if (frame.method == label).any()])
    return FIGURES[kind](frame[frame.method.isin(labels)], labels, tasks)


def ranks_figure(frame: pd.DataFrame, methods: Sequence[str], tasks: Sequence[str]) -> Figure:
    """Return Figures 3 and 5: rank and effective rank of every matrix, for the lowest seed of each method."""
    panels = {}
    for method in methods:
        run = rows_of(frame[frame.method == method])[0]
        effective = run.result["effective_ranks"]
        matrices = [MatrixRank(name, rank, effective[name]) for name, rank in run.result["ranks"].items()]
        if matrices:
            panels[f"{run.method} on {run.task}, seed {run.seed}"] = matrices
    if not panels:
        remedy = "none of them has ranks; choose methods with low-rank updates"
        raise bad_value("--methods", ", ".join(methods), remedy)
    return draw_ranks(panels)


def budget_figure(frame: pd.DataFrame, methods: Sequence[str], tasks: Sequence[str]) -> Figure:
    """Return a panel for each task: score against the mean rank that is saved, and a line through LoRA's fixed ranks.

    A mark is the mean over a method's seeds, and its whiskers are one standard error long. A method that adapts no
    matrices has no rank, and no mark.
    """
    import seaborn as sns
    from matplotlib import pyplot

    unlearnt = not_learnt(frame)
    saved = frame.groupby(["task", "method"]).average_rank.transform(lambda ranks: pd.to_numeric(ranks).mean())
    frame = frame.assign(saved=saved, points=100 * frame.score).dropna(subset="saved")
    if frame.empty:
        raise bad_value("--methods", " ".join(methods), "none of them has a rank; choose others")
    there = [method for method in methods if (frame.method == method).any()]
    of_methods = {"hue": "method", "hue_order": there, "style": "method", "style_order": there}
    panels = [task for task in tasks if (frame.task == task).any()]
    of_tasks = {"col": "task", "col_order": panels, "col_wrap": min(3, len(panels)), "height": 3.6}
    look = {
        "palette": "colorblind",
        "kind": "line",
        "dashes": False,
        "markers": True,
        "markersize": 8,
        "err_style": "bars",
        "errorbar": "se",
    }
    apart = {"sharex": False, "sharey": False}
    grid = sns.relplot(frame, x="saved", y="points", facet_kws=apart, **of_methods, **of_tasks, **look)
    for task, axes in grid.axes_dict.items():
        fixed = frame[(frame.task == task) & frame.trial.map(has_fixed_rank)]
        line = fixed.groupby("saved").points.mean()
        axes.plot(line.index, line, color="#767676", linewidth=1.2, zorder=1)
        axes.grid(color="#E4E4E4", linewidth=0.8)
        axes.set_xscale("symlog", base=2, linthresh=0.5)  # a rank may be 0
        axes.xaxis.set_major_formatter("{x:.3g}")
        metric = frame.metric[frame.task == task].iloc[0]
        axes.set(title=f"{task}, not learnt" if task in unlearnt else task, ylabel=f"{metric} × 100")
    grid.set_xlabels("mean rank of the saved adapter")
    grid.tight_layout()
    pyplot.close(grid.figure)
    figure: Figure = grid.figure
    return figure


FIGURES: Mapping[str, Callable[[pd.DataFrame, Sequence[str], Sequence[str]], Figure]] = {
    "ranks": ranks_figure,
    "budget": budget_figure,
}


def _only(field: str, wanted: Iterable[str] | None, known: Sequence[str]) -> list[str]:
    """Return those of `known` that are `wanted`, in the order wanted; all if None."""
    chosen = list(dict.fromkeys(known if wanted is None else wanted))
    for name in chosen:
        if name not in known:
            raise bad_value(field, name, f"no finished run has it; there are {', '.join(known)}")
    return chosen
