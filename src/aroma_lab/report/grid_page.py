"""The page of a grid: its methods compared, task by task, and the ranks that were found."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from aroma.errors import DataError, bad_value
from aroma.report.page import Chart, Table, render
from aroma.report.run import Grid, MatrixFacts, grid_of

from .formats import EMPTY, counted, decimals, points
from .formats import Table as LabTable
from .learnt import not_learnt
from .protocol import seeds_sentence
from .run_page import short_revision
from .runs import Run, Runs, read_runs, rows_of
from .tables import make_table

ASSETS = Path(__file__).parent / "assets"
_TABLES = {"ranks": ("Ranks found and trained", "average_rank"), "time": ("Time of an epoch", "epoch_seconds")}
"""Title of further tables, by kind, and the column without whose values there is none."""


class Panel(NamedTuple):
    """The ranks that one method found on one task, mean over the seeds."""

    title: str
    grid: Grid


def grid_page(source: str | os.PathLike[str]) -> str:
    """Return the page of a grid, as HTML.

    Args:
        source: Whatever `read_runs` takes.

    Raises:
        ConfigError: There are no runs.
        DataError: None of them has finished.
        CheckpointError: A file is damaged or edited.
    """
    whole = read_runs(source)
    runs, absent = _begun(whole)
    if runs.reported.empty:
        remedy = "no finished run in it that is reported; wait for one, or give another folder"
        raise bad_value("RUN", str(source), remedy, DataError)
    unlearnt = not_learnt(runs.reported)
    tasks = runs.tasks
    scores = {f"scores-{place}": _scores(runs, task) for place, task in enumerate(tasks)}
    budgets = {f"budget-{place}": chart for place, task in enumerate(tasks) if (chart := _budget(runs, task))}
    metrics = {task: "/".join(runs.of(task=task).metric.unique()) for task in tasks}
    return render(
        "grid.html",
        {**scores, **budgets},
        ASSETS,
        title=_title(runs),
        about=_about(runs, tasks),
        tiles=_tiles(runs, tasks),
        seeds=seeds_sentence(runs),
        absent=absent,
        main=_shown(make_table(runs, "main")),
        tables={
            title: _shown(make_table(runs, kind))
            for kind, (title, column) in _TABLES.items()
            if runs.reported[column].notna().any()
        },
        scores=dict(zip(scores, tasks, strict=True)),
        budgets={name: tasks[int(name.rpartition("-")[2])] for name in budgets},
        metrics=metrics,
        unlearnt=unlearnt,
        panels=_panels(runs, tasks),
        recipe=yaml.safe_dump(dict(whole.grid), sort_keys=False) if whole.grid else None,
        versions=_versions(runs),
        command="aroma lab run grid.yaml" if runs.grid else None,
    )


def _begun(runs: Runs) -> tuple[Runs, str | None]:
    """Return the runs, with a grid that names only methods and tasks that have a finished one; and what it lacks."""
    methods, tasks = set(runs.reported.method), set(runs.reported.task)
    missing = [one for one in runs.methods if one not in methods], [one for one in runs.tasks if one not in tasks]
    words = [f"{kind} {', '.join(names)}" for kind, names in zip(("methods", "tasks"), missing, strict=True) if names]
    rows = [row for row in runs.rows if row["method"] in methods and row["task"] in tasks]
    parts = {"methods": methods, "tasks": tasks}
    grid = {
        key: {name: one for name, one in value.items() if name in parts[key]} if key in parts else value
        for key, value in runs.grid.items()
    }
    lacks = f"No finished run yet of the {' and the '.join(words)}." if words else None
    return Runs(runs.source, rows, runs.selection, grid), lacks


def _title(runs: Runs) -> str:
    named = runs.grid.get("output") or (runs.source.parent if runs.source.is_file() else runs.source).resolve()
    return Path(str(named)).name or "grid"


def _about(runs: Runs, tasks: Sequence[str]) -> list[str]:
    models = [Path(model).name for model in runs.reported.model.unique()]
    numbers = [counted(len(runs.finished_methods()), "method"), counted(len(tasks), "task")]
    return [f"model {', '.join(models)}", *numbers, f"up to {counted(len(runs.seeds), 'seed')}"]


def _tiles(runs: Runs, tasks: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return title, number and remark: how many runs there are, and the method with the best score of each task."""
    failed = len(runs.in_state("failed"))
    tiles = [("finished runs", str(len(runs.reported)), f"{failed} failed" if failed else "none failed")]
    unlearnt = not_learnt(runs.reported)
    for task in [task for task in tasks if task not in unlearnt][:5]:
        means = runs.of(task=task).groupby("method").score.agg(["mean", "count"])
        tiles.append((f"best on {task}", points(float(means["mean"][_best(means)])), _named_best(means)))
    return tiles


def _best(means: pd.DataFrame) -> str:
    """Return the method with the best of `mean`, of those with the largest `count` of seeds, which alone compare."""
    return str(means["mean"][means["count"] == means["count"].max()].idxmax())


def _named_best(means: pd.DataFrame) -> str:
    """Return the same with the number of seeds, where one with fewer has a better mean."""
    best = _best(means)
    is_beaten = means["mean"].max() > means["mean"][best]
    return f"{best}, of those with {counted(int(means['count'][best]), 'seed')}" if is_beaten else best


def _shown(table: LabTable) -> dict[str, Any]:
    """Return heads, rows of text and whether it is the best, caption and notes."""
    shown = table.shown
    rows = [
        [(str(text), (row, column) in table.best) for column, text in enumerate(cells)]
        for row, cells in enumerate(shown.itertuples(index=False, name=None))
    ]
    caption = table.caption_with("Bold")
    return {"head": list(shown.columns), "rows": rows, "about": [caption, *table.notes]}


# Charts --------------------------------------------------------------------------------------------------------------


def _scores(runs: Runs, task: str) -> Chart:
    frame = _in_order(runs, task)
    means = frame.groupby("method", sort=False).score.agg(["mean", "std", "count"])
    rows = [
        [str(one.Index), points(one.mean), EMPTY if math.isnan(one.std) else points(one.std), str(one.count)]
        for one in _named(means)
    ]
    scores = ", ".join(f"{row[0]} {row[1]}" for row in rows)
    label = f"Scores on {task}: {scores}. The best mean: {_named_best(means)}."
    data = {
        "seeds": _columns(
            method=frame.method, seed=frame.seed, points=_rounded(frame.score), own=frame.kind == "aroma"
        ),
        "means": _columns(
            method=means.index,
            points=_rounded(means["mean"]),
            own=means.index.isin(_growing(runs)),
        ),
    }
    head = ["method", "mean", "deviation", "seeds"]
    return Chart("methods", label, data, ("means", "points", "method"), Table(head, rows))


def _budget(runs: Runs, task: str) -> Chart | None:
    """Return score against trained rank on a task; None where fewer than two methods have one."""
    frame = _in_order(runs, task)
    frame = frame.assign(trained=pd.to_numeric(frame.trained_rank)).dropna(subset="trained")
    frame = frame[frame.trained > 0]
    means = frame.groupby("method", sort=False).agg({"score": ["mean", "std", "count"], "trained": "mean"})
    means.columns = pd.Index(["mean", "std", "count", "trained"])
    if len(means) < 2:
        return None
    error = (means["std"] / means["count"] ** 0.5).fillna(0.0)
    rows = [[str(one.Index), decimals(one.trained), points(one.mean)] for one in _named(means)]
    data = {
        "budget": _columns(
            method=means.index,
            trained=[float(f"{value:.4g}") for value in means.trained],
            points=_rounded(means["mean"]),
            low=_rounded(means["mean"] - error),
            high=_rounded(means["mean"] + error),
            own=means.index.isin(_growing(runs)),
        )
    }
    label = f"Score against trained rank on {task}: " + ", ".join(f"{row[0]} {row[2]} at {row[1]}" for row in rows)
    table = Table(["method", "trained rank", "score"], rows)
    return Chart("budget", f"{label}.", data, ("budget", "trained", "points"), table)


def _in_order(runs: Runs, task: str) -> pd.DataFrame:
    """Return the reported runs of a task, in the order of the methods, then by seed."""
    frame = runs.of(task=task)
    order = frame.method.map(runs.methods.index)
    return frame.assign(order=order).sort_values(["order", "seed"], kind="stable")


def _growing(runs: Runs) -> list[str]:
    return runs.finished_methods("aroma")


def _named(frame: pd.DataFrame) -> list[Any]:
    return list(frame.itertuples())


def _rounded(scores: Any) -> list[float]:
    """Return scores in points."""
    return [round(100 * float(score), 3) for score in scores]


def _columns(**columns: Any) -> Mapping[str, Sequence[Any]]:
    return {name: pd.Series(column).tolist() for name, column in columns.items()}


# Ranks, and how it was made ------------------------------------------------------------------------------------------


def _panels(runs: Runs, tasks: Sequence[str]) -> list[Panel]:
    panels = []
    for task in tasks:
        for method in _growing(runs):
            found = [run for run in rows_of(runs.of(method, task)) if run.result.get("ranks")]
            if found:
                panels.append(Panel(f"{task}, {method}", _mean_ranks(found)))
    return panels


def _mean_ranks(found: Sequence[Run]) -> Grid:
    matrices, spreads = [], {}
    for name in found[0].result["ranks"]:
        ranks = [run.result["ranks"][name] for run in found if name in run.result["ranks"]]
        effective = [run.result["effective_ranks"][name] for run in found if name in run.result["effective_ranks"]]
        mean = sum(ranks) / len(ranks)
        matrices.append(MatrixFacts(name, mean, sum(effective) / len(effective) if effective else None))
        spreads[name] = ("over the seeds", f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else str(ranks[0]))
    return grid_of(matrices, more=spreads)


def _versions(runs: Runs) -> dict[str, str]:
    results = list(runs.reported.result)
    names = dict.fromkeys(name for result in results for name in result["versions"])
    found = {name: [result["versions"].get(name) for result in results] for name in names}
    found |= {name: [result.get(name) for result in results] for name in ("platform", "device")}
    found["source"] = [short_revision(result.get("git_revision")) for result in results]
    return {
        name: ", ".join(dict.fromkeys(str(value) for value in values if value is not None)) or EMPTY
        for name, values in found.items()
    }
