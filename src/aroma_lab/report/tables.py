"""The tables of a grid's runs: scores of tasks or sets, and ranks with the difference to the best fixed one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from aroma.errors import bad_value

from .formats import EMPTY, Table, decimals, points
from .protocol import common_notes, holds_out, protocol, seeds_sentence
from .runs import Runs, has_fixed_rank, rows_of
from .statistics import not_learnt, paired_difference, spread

KINDS = ("main", "sets", "ranks")
"""Kinds of tables."""


def make_table(runs: Runs, kind: str = "main", baseline: str | None = None) -> Table:
    """Return a table of the runs.

    Args:
        kind: One of `KINDS`.
        baseline: For `main` and `sets`, label of the method that others are compared with; None: `lora-r8` if it has
            run, else none.

    Raises:
        ConfigError: A baseline without finished runs, or no runs that such a table is of.
    """
    finished = runs.finished_methods()
    if baseline is not None and baseline not in finished:
        raise bad_value("--baseline", baseline, f"no run of it has finished; give one of {', '.join(finished)}")
    if baseline is None and "lora-r8" in finished:
        baseline = "lora-r8"
    if kind == "ranks":
        table = ranks_table(runs)
    else:
        table = scores_table(runs, _task_scores(runs) if kind == "main" else _set_scores(runs), baseline)
    table.caption += f" {protocol(runs)}"
    table.notes += common_notes(runs)
    return table


def scores_table(runs: Runs, scores: pd.DataFrame, baseline: str | None) -> Table:
    """Return the paper's Tables 2 and 3: scores, average, trainable parameters, and the difference to a baseline.

    Args:
        scores: A row for each run and column of the table: `task`, `key` and `title` of the column, `method`, `seed`,
            `value`.
    """
    table = Table(runs.methods, len(runs.seeds))
    unlearnt = not_learnt(runs.reported)
    for (task, key, title), of_column in scores.groupby(["task", "key", "title"], sort=False):
        shown = f"{title}, not learnt" if task in unlearnt else str(title)
        heads = [f"{key}_{name}" for name in ("mean", "std", "seeds")]
        table.spread(shown, heads, spread(of_column, "value", runs.methods), points, mark=task not in unlearnt)
    compared = [task for task in scores.task.unique() if task not in unlearnt]
    # A run that lacks a set has no average, nor a seed that lacks a task.
    means = scores[scores.task.isin(compared)].groupby(["method", "task", "seed"]).value
    averages = means.agg(lambda values: values.mean(skipna=False)).reset_index()
    if scores.key[scores.task.isin(compared)].nunique() > 1:
        over_tasks = averages.groupby(["method", "seed"]).value.agg(["mean", "count"])
        complete = over_tasks["mean"].where(over_tasks["count"] == len(compared)).rename("value").reset_index()
        heads = ["average_mean", "average_std", "average_seeds"]
        table.spread("average", heads, spread(complete, "value", runs.methods), points, mark=True)
    for title, key in (("trainable at start", "initial_parameters"), ("trainable on average", "average_parameters")):
        parameters = runs.reported.groupby(["method", "task"])[key].mean().groupby("method").mean()
        table.numbers(title, key, parameters.reindex(runs.methods).tolist(), lambda value: f"{value:,.0f}")
    table.caption = f"{seeds_sentence(runs)} Scores in points (100 × metric); parameters without the head's."
    if baseline is not None and compared:
        paired = averages.pivot_table(index=["task", "seed"], columns="method", values="value")
        found = [paired_difference(paired, method, baseline) for method in runs.methods]
        table.difference(f"− {baseline}", pd.DataFrame(found, columns=["difference", "error", "pairs"]))
        table.caption += f" Difference to {baseline}: of runs of the same task and seed, mean ± standard error."
    table.notes = [*unlearnt.values()]
    return table


def ranks_table(runs: Runs) -> Table:
    """Return scores beside those of the best fixed rank, which ranks were found, and how they fit planted ones."""
    cells = [(method, task) for task in runs.tasks for method in runs.methods if len(runs.of(method, task))]
    table = Table([method for method, _ in cells], len(runs.seeds))
    table.add("task", [task for _, task in cells], task=[task for _, task in cells])
    planted = [result.get("planted") or {} for result in runs.reported.result]
    losses = [result.get("held_out_loss") if holds_out(result) else None for result in runs.reported.result]
    fits = ("spearman", "pearson", "grew") if any(planted) else ()
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "score": ("score", points),
        "average_rank": ("rank found", decimals),
        "trained_rank": ("rank trained", decimals),
        **{key: (key, points if key == "grew" else decimals) for key in fits},
    }
    frame = runs.reported.assign(**{key: [one.get(key) for one in planted] for key in fits})
    # Planted tasks are scored by their squared error already.
    if not fits and any(loss is not None for loss in losses):
        frame = frame.assign(held_out_loss=pd.Series(losses, dtype=float, index=frame.index))
        columns["held_out_loss"] = ("held-out loss", lambda value: decimals(value, 3))
    for key, (title, words) in columns.items():
        one_by_one = [spread(frame[frame.task == task], key, [method]) for method, task in cells]
        heads = [f"{key}_{name}" for name in ("mean", "std", "seeds")]
        # A method without ranks has runs, and no values.
        found = pd.concat(one_by_one).assign(count=[len(runs.of(*cell)) for cell in cells])
        table.spread(title, heads, found, words)
    table.caption = (
        "Rank found: at the end, mean over the matrices; rank trained: trainable parameters, averaged over the "
        f"planned steps, over those of rank 1 in all matrices. {seeds_sentence(runs)} Scores in points (100 × metric)."
    )
    unlearnt = not_learnt(runs.reported)
    best = _best_fixed(runs, [*unlearnt])
    if best:
        found = _over_best(runs, cells, best)
        table.add("best fixed", found.best.fillna(EMPTY).tolist(), best=found.best)
        table.difference("difference to it", found)
        table.caption += (
            " Best fixed: of the LoRA of one rank with the most seeds, the highest mean on the reported examples, "
            "known only afterwards. Difference: of runs of the same seed, mean ± standard error."
        )
    table.notes = [*unlearnt.values()]
    if "held_out_loss" in columns:
        table.caption += " Held-out loss: on the examples that chose the settings; no run was trained on them."
    if fits:
        table.caption += (
            " Spearman and Pearson: correlations of found and planted ranks over the matrices; grew: share of the "
            "matrices, in percent, whose rank at the end is above that of the start."
        )
    return table


def _best_fixed(runs: Runs, unlearnt: Sequence[str]) -> dict[str, str]:
    """Return the best LoRA of one rank by learnt task, of those with the most seeds; the smaller one of equals."""
    fixed = [one for one in runs.finished_methods("lora") if has_fixed_rank(runs.of(one).trial.iloc[0])]
    frame = runs.reported[runs.reported.method.isin(fixed) & ~runs.reported.task.isin(unlearnt)]
    frame = frame.assign(rank=pd.to_numeric(frame.trained_rank)).groupby(["task", "method"])
    means = frame.agg(seeds=("score", "size"), score=("score", "mean"), rank=("rank", "mean")).reset_index()
    ordered = means.sort_values(["seeds", "score", "rank"], ascending=[False, False, True])
    return dict(ordered.drop_duplicates("task").set_index("task").method)


def _over_best(runs: Runs, cells: Sequence[tuple[str, str]], best: Mapping[str, str]) -> pd.DataFrame:
    """Return a row for each method and task of `cells`: the best fixed rank, and the paired difference to it."""
    scores = runs.reported.pivot_table(index=["task", "seed"], columns="method", values="score")
    found = [
        (best.get(task), *paired_difference(scores.loc[[task]], method, best.get(task))) for method, task in cells
    ]
    return pd.DataFrame(found, columns=["best", "difference", "error", "pairs"])


def _task_scores(runs: Runs) -> pd.DataFrame:
    frame = pd.concat([runs.of(task=task) for task in runs.tasks])
    metrics = frame.groupby("task").metric.unique().map("/".join)
    return frame.assign(value=frame.score, key=frame.task, title=frame.task + " (" + frame.task.map(metrics) + ")")


def _set_scores(runs: Runs) -> pd.DataFrame:
    """Return a row for each run and reported set of its task, with its score as `value`; NaN if a run lacks it."""
    rows = [
        (run.task, label, run.method, run.seed, metrics.get(run.metric))
        for task in runs.tasks
        for run in rows_of(runs.of(task=task))
        for label, metrics in run.result["reported"].items()
    ]
    sets = pd.DataFrame(rows, columns=["task", "label", "method", "seed", "value"]).astype({"value": float})
    if sets.value.isna().all():
        raise bad_value("--kind", "sets", "no run has reported a set with its score; give the main table")
    # A run that lacks one of its task's sets gets a row without value.
    every = sets[["task", "label"]].drop_duplicates().merge(sets[["task", "method", "seed"]].drop_duplicates())
    sets = every.merge(sets, how="left")
    titles = sets.label if len(runs.tasks) == 1 else sets.task + ": " + sets.label
    return sets.assign(key=sets.task + "_" + sets.label, title=titles)
