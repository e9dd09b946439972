"""The paper's figures, and some it lacks, drawn from frames of runs."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from aroma.errors import CheckpointError, ConfigError, DataError, bad_value
from aroma.pictures import FAINT, INK, MatrixRank, draw_ranks, new_figure

from ..run.files import TrialFiles
from .formats import counted
from .learnt import not_learnt
from .runs import Run, check, has_fixed_rank, read_runs, rows_of
from .style import fit_axis, looks, matching_module, paper_modules, short_name, style_axes, write_title

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COSTS = {
    "average_parameters": "trainable parameters, average over the planned steps",
    "minutes": "training time, minutes",
}
_OF_MODULES = ("curves", "cosines")
_OF_TASKS = ("budget", "pareto", "memory")
_OF_ONE_SEED = ("ranks", "cosines")
_COSINES_OF = "layer.10.attention.output.dense"
"""The module that Figure 4 shows."""
_MOST_NUMBERS = 12
"""Components up to which a cell of cosines has room for its value."""


@dataclass(frozen=True)
class Shown:
    """The runs that a figure shows, by seed, and what else was chosen, see `draw_figure`; `looks` is from `style`, and
    `unlearnt` are the tasks that no method has learnt."""

    frame: pd.DataFrame
    methods: Sequence[str]
    tasks: Sequence[str]
    looks: Mapping[str, Mapping[str, Any]]
    modules: Sequence[str] | None
    seed: int | None
    unlearnt: Collection[str]

    def of(self, method: str) -> pd.DataFrame:
        """Return the runs of a method, by seed."""
        return self.frame[self.frame.method == method]


def draw_figure(
    kind: str,
    folders: Sequence[str | os.PathLike[str]],
    task: str | None = None,
    methods: Sequence[str] | None = None,
    modules: Sequence[str] | None = None,
    seed: int | None = None,
) -> Figure:
    """Return a figure of finished runs.

    Args:
        kind: One of `FIGURES`.
        folders: Whatever `read_runs` takes: output folders of grids, tables of runs, folders of runs.
        task: Name of the task; None if there is only one, or all are shown.
        methods: Labels of the methods, in the order shown; None for all.
        modules: Names of modules, or ends of them; None for the paper's.
        seed: Seed of the runs if one run of a method is shown; None for the lowest.

    Raises:
        ConfigError: A choice names what is not there, or leaves open what has to be chosen.
        DataError: There are no finished runs, or too few.
        CheckpointError: A record or an adapter is missing or damaged.
    """
    if modules is not None and kind not in _OF_MODULES:
        raise bad_value("--modules", " ".join(modules), f"only for {' and '.join(_OF_MODULES)}")
    if seed is not None and kind not in _OF_ONE_SEED:
        raise bad_value("--seed", seed, f"only for {' and '.join(_OF_ONE_SEED)}; others show all seeds")
    frame, labels, tasks = _read(folders)
    unlearnt = not_learnt(frame)  # of all methods, for head-only may not be shown
    tasks = _only("--task", None if task is None else [task], tasks)
    if kind not in _OF_TASKS and len(tasks) > 1:
        raise bad_value("--task", None, f"this figure shows one task; choose one of {', '.join(tasks)}")
    frame = frame[frame.task.isin(tasks)]
    chosen = _only("--methods", methods, [label for label in labels if (frame.method == label).any()])
    frame = frame[frame.method.isin(chosen)]
    return FIGURES[kind](Shown(frame, chosen, tasks, looks(labels), modules, seed, unlearnt))


def curves_figure(shown: Shown) -> Figure:
    """Return Figure 1 for the runs of one task: five panels, a line for each method in each panel.

    A line is the mean over the seeds; if there are several, a band reaches from the lowest to the highest. A method
    without ranks has no line in the panels of ranks.
    """
    for run in rows_of(shown.frame):
        for file, value in (("curve", run.curve), ("history", run.evaluations)):
            if value is None:
                raise CheckpointError(f"{run.where}/{file}.json: missing; restore it, or run the trial again")
    names = list(dict.fromkeys(name for curve in shown.frame.curve for name in curve["ranks"]))
    if shown.modules is not None and len(shown.modules) != 2:
        raise bad_value("--modules", " ".join(shown.modules), "Figure 1 shows two modules; give two")
    modules = paper_modules(names) if shown.modules is None else [matching_module(one, names) for one in shown.modules]
    series: dict[str, Callable[[Run], Any]] = {
        "trainable parameters": lambda run: run.curve["parameters"],
        "total rank": lambda run: run.curve["total_rank"],
        **{f"rank of {short_name(name)}": partial(_module_ranks, name) for name in modules},
        f"{shown.frame.metric.iloc[0]} × 100": _scores,
    }
    figure = new_figure(12, 7)
    *panels, corner = figure.subplots(2, 3).flat
    for axes, letter, (title, of_run) in zip(panels, "abcde", series.items(), strict=False):
        _draw_lines(axes, shown, f"({letter}) {title}", of_run)
    fit_axis(panels[0], "y", [0, *(max(count for _, count in curve["parameters"]) for curve in shown.frame.curve)])
    handles, labels = panels[0].get_legend_handles_labels()
    counts = [f"{label} ({counted(len(shown.of(label)), 'seed')})" for label in labels]
    corner.legend(handles, counts, loc="upper left", fontsize=9, frameon=False, handlelength=4)
    for axes in (*panels[len(series) :], corner):
        axes.set_axis_off()
    remarks = [_seeds_text(shown, "lowest to highest shaded")]
    if early := int(shown.frame.stopped_early.sum()):
        held = "the last value is held until the longest run of the method ends"
        remarks.append(f"{early} of {counted(len(shown.frame), 'run')} stopped early: {held}")
    write_title(figure, f"Training on {shown.tasks[0]}", " · ".join(remarks))
    return figure


def ranks_figure(shown: Shown) -> Figure:
    """Return Figures 3 and 5: rank and effective rank of every matrix, for one seed of each method."""
    panels = {}
    for run in [_one_seed(shown, method, shown.seed) for method in shown.methods]:
        ranks = run.result["ranks"]
        matrices = [MatrixRank(name, rank, run.result["effective_ranks"][name]) for name, rank in ranks.items()]
        if matrices:
            panels[f"{run.method} on {run.task}, seed {run.seed}"] = matrices
    if not panels:
        labels = ", ".join(shown.methods)
        raise bad_value("--methods", labels, "none of them has ranks; choose methods with low-rank updates")
    return draw_ranks(panels)


def cosines_figure(shown: Shown) -> Figure:
    """Return Figure 4: cosines between the components of two methods at their lowest common seed, or of two runs."""
    import seaborn as sns
    from matplotlib.patches import Rectangle

    first, second = _pair(shown)
    panels = _cosines(first, second, shown.modules)
    figure = new_figure(6 * len(panels), 6)
    for axes, (name, cosines) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        rows, columns = (range(1, 1 + count) for count in cosines.shape)
        values = pd.DataFrame(cosines.numpy().round(2) + 0.0, rows, columns)  # adding 0 makes −0.00 0.00
        annotated = max(values.shape) <= _MOST_NUMBERS
        sns.heatmap(values, vmin=-1, vmax=1, cmap="PuOr", square=True, annot=annotated, fmt=".2f", ax=axes)
        for place in range(min(values.shape)):
            axes.add_patch(Rectangle((place, place), 1, 1, fill=False, edgecolor=INK, linewidth=1.6, clip_on=False))
        diagonal = float(cosines.diagonal().abs().mean())
        axes.set_title(f"{short_name(name)}\nmean |cosine| on the diagonal {diagonal:.2f}", fontsize=9, loc="left")
        axes.set(xlabel="component", ylabel="component")
    labels = [f"{run.method}, seed {run.seed}" for run in (first, second)]
    remarks = f"rows: {labels[0]} · columns: {labels[1]} · framed: components of the same position"
    write_title(figure, f"Cosines of components on {first.task}", remarks)
    return figure


def planted_figure(shown: Shown) -> Figure:
    """Return found against planted ranks: a mark for every matrix of every seed, and a line where they are equal."""
    import seaborn as sns
    from matplotlib.ticker import MaxNLocator

    frames = []
    for run in rows_of(shown.frame):
        planted = run.result.get("planted")
        if planted is None:
            raise bad_value("--task", run.task, "nothing is planted in it; this figure is of tasks that plant ranks")
        check(f"{run.where}/result.json", planted, {"ranks": {...: "a whole number"}})
        found = run.result["ranks"]
        if found:
            pairs = {"planted": planted["ranks"].values(), "found": [found.get(name, 0) for name in planted["ranks"]]}
            frames.append(pd.DataFrame(pairs).assign(method=run.method, spearman=planted.get("spearman")))
    if not frames:
        raise bad_value("--methods", ", ".join(shown.methods), "none of them has ranks; choose methods that have")
    matrices = pd.concat(frames)
    methods = [method for method in shown.methods if (matrices.method == method).any()]
    fits = pd.to_numeric(matrices.spearman).groupby(matrices.method).mean()
    names = {one: one if math.isnan(fits[one]) else f"{one} (Spearman {fits[one]:.2f})" for one in methods}
    figure = new_figure(9, 5.5)
    axes = figure.subplots()
    style_axes(axes, shown.tasks[0], "planted rank", "found rank")
    largest = max(matrices.planted.max(), 1)
    axes.plot([0, largest], [0, largest], color=FAINT, linewidth=1.2, zorder=1)
    # Matrices of equal rank lie side by side, methods apart.
    sns.stripplot(
        matrices.assign(method=matrices.method.map(names)),
        x="planted",
        y="found",
        hue="method",
        hue_order=names.values(),
        palette={names[one]: shown.looks["palette"][one] for one in methods},
        native_scale=True,
        dodge=len(methods) > 1,
        jitter=0.15,
        alpha=0.7,
        ax=axes,
    )
    axes.set_ylim(bottom=-0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    seeds = counted(shown.frame.seed.nunique(), "seed")
    write_title(figure, "Found against planted ranks", f"a mark for every matrix, {seeds} · grey: equal")
    return figure


def memory_figure(shown: Shown) -> Figure:
    """Return two panels against the number of pairs: the mean rank that was found, and the share that is recalled."""
    import seaborn as sns

    memories = [trial["task"].get("kind") == "memory" for trial in shown.frame.trial]
    recipes = [(trial.get("data") or {}).get("task") == "memory" for trial in shown.frame.trial]
    frame = shown.frame[np.logical_or(memories, recipes)]
    if frame.empty:
        raise bad_value("--task", " ".join(shown.tasks), "no pairs are remembered in it; give tasks of kind memory")
    pairs = [result["examples"]["train"] for result in frame.result]
    frame = frame.assign(pairs=pairs, average_rank=pd.to_numeric(frame.average_rank), points=100 * frame.score)
    figure = new_figure(12, 4.5)
    panels = {"average_rank": "mean rank found", "points": "bits recalled, %"}
    drawn: dict[str, Any] = {}
    for axes, (key, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        style_axes(axes, title, "pairs to remember")
        there = frame.dropna(subset=[key])
        methods = [method for method in shown.methods if (there.method == method).any()]
        sns.lineplot(
            there,
            x="pairs",
            y=key,
            hue="method",
            style="method",
            hue_order=methods,
            style_order=methods,
            palette={method: shown.looks["palette"][method] for method in methods},
            markers={method: shown.looks["markers"][method] for method in methods},
            dashes=False,
            errorbar=("pi", 100),
            err_kws={"linewidth": 0, "alpha": 0.15},
            ax=axes,
        )
        handles, labels = axes.get_legend_handles_labels()
        drawn |= dict(zip(labels, handles, strict=True))
        axes.legend().remove()
        axes.set(xscale="log", xlabel="pairs to remember", ylabel="")
        fit_axis(axes, "y", there[key])
    figure.legend(drawn.values(), drawn, loc="outside right upper", fontsize=9, frameon=False)
    write_title(figure, "Memory", _seeds_text(replace(shown, frame=frame), "lowest to highest shaded"))
    return figure


def budget_figure(shown: Shown) -> Figure:
    """Return a panel for each task: score against trained rank, a line through the fixed ranks of LoRA.

    A task on which no LoRA has run has a panel only if none has. A mark is the mean over a method's seeds, and its
    whiskers are one standard error of both long. Methods that adapt no matrices have no trained rank, and are a
    line across.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    frame = shown.frame.assign(
        trained=pd.to_numeric(shown.frame.trained_rank),
        points=100 * shown.frame.score,
        fixed=shown.frame.trial.map(has_fixed_rank),
    )
    compared = {*frame[frame.fixed].task}
    tasks = [task for task in shown.tasks if task in compared] or shown.tasks
    columns = min(len(tasks), 3)
    rows = math.ceil(len(tasks) / columns)
    figure = new_figure(1.6 + 4.2 * columns, 1 + 3.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    drawn: dict[str, Any] = {}
    for axes, task in itertools.zip_longest(panels, tasks):
        if task is None:
            axes.set_axis_off()
            continue
        of_task = frame[frame.task == task]
        style_axes(axes, _title_of(shown, task), "trained rank, mean over matrices and steps", _unit(of_task))
        drawn |= _draw_budgets(axes, shown, of_task)
        axes.set_xscale("log", base=2)
        ranks = sorted({round(rank) for rank in of_task.trained[of_task.fixed].dropna()})
        found = of_task.groupby("method").trained.mean().dropna().tolist()
        axes.xaxis.set(major_locator=FixedLocator(ranks or found), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter("{x:.3g}")
    figure.legend(drawn.values(), drawn, loc="outside right upper", fontsize=9, frameon=False)
    write_title(figure, "Score against trained rank", _seeds_text(shown, "whiskers: one standard error"))
    return figure


def _draw_budgets(axes: Axes, shown: Shown, frame: pd.DataFrame) -> dict[str, Any]:
    marks: dict[str, Any] = {}
    curve = []
    for method in shown.methods:
        runs = frame[frame.method == method]
        if runs.empty:
            continue
        colour, marker = (shown.looks[part][method] for part in ("palette", "markers"))
        x, y = runs.trained.mean(), runs.points.mean()
        if math.isnan(x):
            marks[method] = axes.axhline(y, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            continue
        up, across = (
            0.0 if len(runs) < 2 else float(runs[key].std() / len(runs) ** 0.5) for key in ("points", "trained")
        )
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 8, "linestyle": "none", "zorder": 3}
        marks[method] = axes.errorbar(x, y, up, across, elinewidth=0.9, **look)
        if runs.fixed.iloc[0]:
            curve.append((x, y))
    if curve:
        axes.plot(*np.transpose(sorted(curve)), color=FAINT, linewidth=1.2, zorder=1)
    return marks


def pareto_figure(shown: Shown) -> Figure:
    """Return a row of two panels for each task: score against average trainable parameters, and against time.

    A mark is the mean over a method's seeds, and its whiskers reach from the lowest to the highest of both. It is
    filled if the method is on the Pareto front, which a line joins. Parameters are averaged over the planned steps,
    including those that a run which stopped early did not take: the axis and the remarks say so.
    """
    figure = new_figure(12, 1 + 3.2 * len(shown.tasks))
    frame = shown.frame.assign(minutes=shown.frame.training_seconds / 60, points=100 * shown.frame.score)
    drawn: dict[str, Any] = {}
    for row, task in zip(figure.subplots(len(shown.tasks), 2, squeeze=False), shown.tasks, strict=True):
        of_task = frame[frame.task == task]
        for axes, (cost, label) in zip(row, _COSTS.items(), strict=True):
            style_axes(axes, _title_of(shown, task), label, _unit(of_task))
            drawn |= _draw_points(axes, shown, of_task, cost)
            fit_axis(axes, "x", of_task[cost])
    figure.legend(drawn.values(), drawn, loc="outside right upper", fontsize=9, frameon=False)
    remarks = [_seeds_text(shown, "whiskers from lowest to highest"), "filled: on the Pareto front"]
    if shown.frame.stopped_early.any():
        remarks.append("after an early stop nothing trains: the planned steps that are left count as 0 parameters")
    write_title(figure, "Score against cost", " · ".join(remarks))
    return figure


FIGURES: Mapping[str, Callable[[Shown], Figure]] = {
    "curves": curves_figure,
    "ranks": ranks_figure,
    "cosines": cosines_figure,
    "planted": planted_figure,
    "memory": memory_figure,
    "budget": budget_figure,
    "pareto": pareto_figure,
}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other beats, by ascending cost.

    A point is beaten by one that costs no more and scores no less, and is better in one of the two. Points that are
    equal in both are all on the front.

    Args:
        points: (cost, score) pairs.
    """

    def beaten(cost: float, score: float) -> bool:
        return any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)

    front = [index for index, point in enumerate(points) if not beaten(*point)]
    return sorted(front, key=lambda index: points[index])


def _read(folders: Sequence[str | os.PathLike[str]]) -> tuple[pd.DataFrame, list[str], list[str]]:
    frames, labels, tasks = [], [], []
    for given, folder in enumerate(folders):
        runs = read_runs(folder)
        if runs.reported.empty:
            remedy = "no finished run in it that is reported; wait for one, or give another folder"
            raise bad_value("FOLDER", str(folder), remedy, DataError)
        places = [os.path.realpath(path) for path in runs.reported["where"]]
        frames.append(runs.reported.assign(given=given, place=places))
        labels += runs.methods
        tasks += [task for task in runs.tasks if (runs.reported.task == task).any()]
    frame = pd.concat(frames).drop_duplicates("place").sort_values(["seed"], kind="stable", ignore_index=True)
    twice = frame[frame.duplicated(["task", "method", "seed"], keep=False)]
    if len(twice):
        other, one = twice.sort_values(["task", "method", "seed"], kind="stable")["where"].iloc[:2]
        raise bad_value("FOLDER", one, f"of the same task, method and seed as {other}; give one of them", DataError)
    return frame, list(dict.fromkeys(labels)), list(dict.fromkeys(tasks))


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


def _pair(shown: Shown) -> list[Run]:
    """Return the two runs to compare: two methods at their lowest common seed, or the only two runs there are."""
    if len(shown.frame) == 2 and shown.seed is None:
        order = shown.frame.method.map(shown.methods.index)
        return rows_of(shown.frame.assign(order=order).sort_values(["order", "given"]))
    if len(shown.methods) != 2:
        labels = ", ".join(shown.methods)
        remedy = f"cosines compare two runs; choose two of {labels}, or give the folders of two runs"
        raise ConfigError(f"--methods: {remedy}")
    one, other = shown.methods
    common = set(shown.of(one).seed) & set(shown.of(other).seed)
    if shown.seed is None and not common:
        remedy = f"{one} and {other} have no finished runs of the same seed; give the folders of two runs"
        raise DataError(f"--methods: {remedy}")
    seed = min(common) if shown.seed is None else shown.seed
    return [_one_seed(shown, method, seed) for method in shown.methods]


def _cosines(first: Run, second: Run, modules: Sequence[str] | None) -> dict[str, torch.Tensor]:
    """Return by module a matrix with a row for each component of the first run, a column for each of the second."""
    from aroma.spectra import component_cosines

    ours, others = _updates(first), _updates(second)

    def grew_in_both(name: str) -> bool:
        one, other = ours[name], others[name]
        return one.shape == other.shape and bool(one.B.any()) and bool(other.B.any())

    shared = [name for name in ours if name in others and grew_in_both(name)]
    if not shared:
        remedy = f"its adapter has no grown module in common with that of {first.where}; give runs of one model"
        raise bad_value("FOLDER", second.where, remedy, DataError)
    papers = [name for name in shared if name.endswith(_COSINES_OF)]
    grown_most = max(shared, key=lambda name: min(len(ours[name].A), len(others[name].A)))
    chosen = [matching_module(one, shared) for one in modules or ()] or papers[:1] or [grown_most]
    # Components have rank r in methods that train one after the other, and 1 in those that train all at once.
    ranks = [run.trial["options"].get("r", 1) if run.kind in ("aroma", "relora") else 1 for run in (first, second)]
    return {
        name: component_cosines(ours[name].B, ours[name].A, others[name].B, others[name].A, *ranks) for name in chosen
    }


def _updates(run: Run) -> Mapping[str, Any]:
    from aroma.saved import read_adapter

    if not run.steps:
        raise bad_value("--methods", run.method, "it trains nothing, so it has no components; choose others")
    adapter = TrialFiles(Path(run.where)).adapter
    if not adapter.is_dir():  # records are often kept, and passed on, without what was trained
        remedy = "the adapter of this run is not kept there, and cosines are of adapters; run the trial again"
        raise bad_value("FOLDER", run.where, remedy, CheckpointError)
    return read_adapter(adapter).updates


def _draw_lines(axes: Axes, shown: Shown, title: str, of_run: Callable[[Run], Any]) -> None:
    """Draw a line for each method, the mean over its seeds, and a band from the lowest to the highest.

    `of_run` gives the (step, value) pairs of a run. Scores lie on straight lines between their steps, other values
    hold from their step on. A method of which a run has none is left out.
    """
    import seaborn as sns
    from matplotlib.ticker import MaxNLocator

    style_axes(axes, title, "optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    is_score = of_run is _scores
    frames = []
    for method in shown.methods:
        runs = rows_of(shown.of(method))
        values = pd.DataFrame({run.seed: pd.Series(dict(of_run(run)), dtype=float) for run in runs}).sort_index()
        if not values.notna().any().all():
            continue
        if is_score:
            values = values.interpolate("index", limit_area="inside")
        else:
            end = max(run.steps for run in runs)
            values = values.reindex(values.index.union([end])).loc[:end]
        # The last value holds for a run that has ended; a line begins where all seeds have a value.
        values = values.ffill().dropna().rename_axis("step").reset_index()
        frames.append(values.melt("step", var_name="seed").assign(method=method))
    if not frames:
        axes.text(0.5, 0.5, "no method has ranks", ha="center", transform=axes.transAxes, fontsize=9, color=FAINT)
        return
    sns.lineplot(
        pd.concat(frames),
        x="step",
        y="value",
        hue="method",
        style="method",
        palette=dict(shown.looks["palette"]),
        dashes=dict(shown.looks["dashes"]),
        errorbar=("pi", 100),
        err_kws={"linewidth": 0, "alpha": 0.15, **({} if is_score else {"step": "post"})},
        drawstyle="default" if is_score else "steps-post",
        ax=axes,
    ).legend().remove()  # its entries stay, for the legend in the corner
    for line in axes.lines:
        if len(line.get_path()) == 1:  # of one evaluation no line is seen
            line.set_marker("o")
    axes.set(xlabel="optimizer step", ylabel="")
    if not is_score:
        axes.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        axes.set_ylim(bottom=-0.04 * axes.get_ylim()[1])


def _module_ranks(name: str, run: Run) -> Any:
    return run.curve["ranks"].get(name, ())


def _scores(run: Run) -> dict[float, float]:
    """Return a run's score by step, the mean over its reported splits ×100; the last one is the result's."""
    splits = list(run.result["reported"])
    evaluations = pd.DataFrame(list(run.evaluations), columns=["step", "split", run.metric])
    by_step = evaluations.pivot_table(index="step", columns="split", values=run.metric).reindex(columns=splits)
    return {**(100 * by_step.mean(axis="columns", skipna=False).dropna()).to_dict(), run.steps: 100 * run.score}


def _draw_points(axes: Axes, shown: Shown, frame: pd.DataFrame, cost: str) -> dict[str, Any]:
    by_method = {method: runs for method in shown.methods if len(runs := frame[frame.method == method])}
    # Rounded, so that equal scores stay equal whatever the order of their seeds.
    means = [(float(runs[cost].mean()), round(float(runs.points.mean()), 9)) for runs in by_method.values()]
    front = pareto_front(means) if frame.task.iloc[0] not in shown.unlearnt else []
    if front:
        axes.step(*np.transpose([means[place] for place in front]), where="post", color=FAINT, linewidth=1.2, zorder=1)
    marks = {}
    for place, (method, runs) in enumerate(by_method.items()):
        x, y = means[place]
        xerr, yerr = _whiskers(runs[cost], x), _whiskers(runs.points, y)
        look = {"color": shown.looks["palette"][method], "marker": shown.looks["markers"][method], "markersize": 8}
        fill = look["color"] if place in front else "white"
        marks[method] = axes.errorbar(x, y, yerr, xerr, **look, mfc=fill, elinewidth=0.9, linestyle="none")
    return marks


def _title_of(shown: Shown, task: str) -> str:
    return f"{task}: not learnt, so no method is compared" if task in shown.unlearnt else task


def _unit(of_task: pd.DataFrame) -> str:
    return f"{of_task.metric.iloc[0]} × 100"


def _whiskers(values: pd.Series[float], mean: float) -> Any:
    # The mean of equal values can lie beside them by a rounding, and a whisker of negative length is refused.
    return np.clip([[mean - values.min()], [values.max() - mean]], 0, None)


def _seeds_text(shown: Shown, spread: str) -> str:
    several = shown.frame.groupby(["task", "method"]).size().max() > 1
    return f"mean over seeds, {spread}" if several else "one seed each"
