"""The tables of a grid's runs: scores of tasks or sets, ranks, regret of not knowing the rank, inner criterion."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from aroma.errors import bad_value
from aroma.pictures import positions_of

from .formats import EMPTY, Table, decimals, plain, points
from .protocol import common_notes, holds_out, protocol, seeds_sentence
from .runs import Run, Runs, has_fixed_rank, rows_of
from .statistics import AVERAGE, chosen_by_trying, not_learnt, paired_difference, regrets, spread

_RANK_TRAINED = "trainable parameters, averaged over the planned steps, over those of rank 1 in all matrices"
"""What captions say of `trained_rank`."""


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
    if kind in ("main", "sets"):
        table = scores_table(runs, _task_scores(runs) if kind == "main" else _set_scores(runs), baseline)
    else:
        table = KINDS[kind](runs)
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
    compared = [task for task in runs.tasks if task not in unlearnt]
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
        table.difference(f"− {baseline}", "", pd.DataFrame(found, columns=["difference", "error", "pairs"]))
        table.caption += f" Difference to {baseline}: of runs of the same task and seed, mean ± standard error."
    table.notes = [*unlearnt.values()]
    return table


def ranks_table(runs: Runs) -> Table:
    """Return which ranks were found and trained, and how they fit the planted ones where these are known."""
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
    # What is planted is scored by its squared error already.
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
        f"Rank found: at the end, mean over the matrices; rank trained: {_RANK_TRAINED}. {seeds_sentence(runs)} "
        "Scores in points (100 × metric)."
    )
    if "held_out_loss" in columns:
        table.caption += " Held-out loss: on the examples that chose the settings; no run was trained on them."
    if fits:
        table.caption += (
            " Spearman and Pearson: correlations of found and planted ranks over the matrices; grew: share of the "
            "matrices, in percent, whose rank at the end is above that of the start."
        )
    return table


def regret_table(runs: Runs) -> Table:
    """Return what it costs not to have known the best fixed rank of each task, and not to have tried them all."""
    growing = [*runs.finished_methods("aroma"), *runs.finished_methods("evidence")]
    fixed = [one for one in runs.finished_methods("lora") if has_fixed_rank(runs.of(one).trial.iloc[0])]
    unlearnt = not_learnt(runs.reported)
    frame = runs.reported[~runs.reported.task.isin(unlearnt)]
    rows = regrets(frame, runs.tasks, growing, fixed, chosen_by_trying(runs.selecting, fixed, runs.chose_by))
    if rows.empty:
        remedy = f"no task of {runs.source} has runs of AROMA and of LoRA with a seed in common; run both"
        raise bad_value("--kind", "regret", remedy)
    table = Table(rows.method.tolist(), len(runs.seeds))
    table.add("task", rows.task.tolist(), task=rows.task)
    table.spread("score", ["mean", "std", "seeds"], rows.rename(columns={"seeds": "count"}), points)
    table.numbers("rank trained", "trained", rows.trained.tolist(), decimals)
    table.add("best fixed", rows.best.tolist(), best=rows.best)
    best = rows[["best_mean", "best_std", "best_seeds"]].set_axis(["mean", "std", "count"], axis="columns")
    table.spread("its score", ["best_mean", "best_std", "best_seeds"], best, points)
    table.difference("difference", "", rows)
    table.add("no worse, no dearer", ["yes" if met else "no" for met in rows.met], met=rows.met)
    if rows.chosen_difference.notna().any():
        table.add("chosen by trying", rows.chosen.fillna(EMPTY).tolist(), chosen=rows.chosen)
        table.difference("difference to it", "chosen_", rows)
    table.notes = [*unlearnt.values()]
    table.caption = (
        "Best fixed: the LoRA with the highest mean on the reported examples, which nobody could have known before. "
        "Difference: of runs of the same seed, mean ± standard error. No worse, no dearer: at most one standard error "
        "below it, at no more trained parameters. Chosen by trying: the LoRA that the runs on held-out training "
        f"examples prefer. {AVERAGE.capitalize()}: over the tasks; best fixed is the one rank with the highest "
        f"average. Rank trained: {_RANK_TRAINED}. {seeds_sentence(runs)} Scores in points (100 × metric)."
    )
    return table


def inner_table(runs: Runs) -> Table:
    """Return after how many steps the inner criterion (5) fires, by method, task and kind of matrix."""
    rows = []
    for method, task in itertools.product(runs.finished_methods("aroma"), runs.tasks):
        checked = [run for run in rows_of(runs.of(method, task)) if run.result["inner_checks"] or run.ended]
        if checked:
            predicted = {_predicted_step(run.trial["options"]) for run in checked}
            last = {"predicted": predicted.pop() if len(predicted) == 1 else np.nan}
            loops = pd.concat([inner_loops(run) for run in checked])
            for kind in ["all", *loops.kind.unique()]:
                numbers = _loop_numbers(loops if kind == "all" else loops[loops.kind == kind])
                rows.append({"method": method, "task": task, "matrices": kind, **numbers, **last})
    if not rows:
        remedy = f"no run with inner checks has finished in {runs.source}; run AROMA first"
        raise bad_value("--kind", "inner", remedy)
    frame = pd.DataFrame(rows)
    table = Table(frame.method.tolist(), len(runs.seeds))
    for key in ("task", "matrices"):
        table.add(key, frame[key].tolist(), **{key: frame[key]})
    for key in frame.columns[3:]:
        title = key.replace("first_median", "median, first loops").replace("later_median", "median, later loops")
        table.numbers(title.replace("_", " "), key, frame[key].tolist(), plain)
    table.caption = (
        "Inner step t at which the inner criterion (5) is first met, over the inner loops of all matrices and seeds. "
        "Predicted: ΔT_in (1 + 1/ε_in), where a norm that grows linearly meets it, however much is left to learn. "
        "Fired: loops in which it was met; never: loops that ended, at T_in, without. The quartiles are of the loops "
        "in which it fired."
    )
    return table


KINDS: Mapping[str, Callable[..., Table]] = {
    "main": scores_table,
    "sets": scores_table,
    "ranks": ranks_table,
    "regret": regret_table,
    "inner": inner_table,
}


def inner_loops(run: Run) -> pd.DataFrame:
    """Return the inner loops of a run: those in which the criterion fired, and those that ended without.

    A row has the `kind` of the matrix, `outer_step` p from 1, and as `fired` the inner step t at which the criterion
    was first met, NaN if it never was. A loop that the end of the run cut off before that is left out.
    """
    fired = [(outer, module, inner) for outer, inner, module in run.result["inner_checks"]]
    ended = [(outer, module, np.nan) for outer, module in run.ended]
    loops = pd.DataFrame([*fired, *ended], columns=["outer_step", "module", "fired"]).astype({"fired": float})
    loops = loops.drop_duplicates(["outer_step", "module"])
    modules = list(loops.module.unique())
    kinds = {module: position.kind for module, position in zip(modules, positions_of(modules), strict=True)}
    return loops.assign(kind=loops.module.map(kinds))


def _loop_numbers(loops: pd.DataFrame) -> dict[str, float]:
    fired = loops.fired.dropna()
    quartiles = fired.quantile([0.25, 0.5, 0.75])
    return {
        "fired": len(fired),
        "never": len(loops) - len(fired),
        **dict(zip(("lower_quartile", "median", "upper_quartile"), quartiles, strict=True)),
        "first_median": loops.fired[loops.outer_step == 1].median(),
        "later_median": loops.fired[loops.outer_step > 1].median(),
    }


def _predicted_step(options: Mapping[str, Any]) -> float:
    """Return the inner step near which a linearly growing norm meets criterion (5)."""
    from aroma.tuner.config import AromaConfig  # here alone, since it loads PyTorch

    tolerance, interval = (
        options.get(name, getattr(AromaConfig, name)) for name in ("inner_tolerance", "inner_check_interval")
    )
    # The norm grows from c(t − ΔT) to ct, by the share ΔT / (t − ΔT), which is less than ε once t > ΔT (1 + 1/ε).
    return float(round(interval * (1 + 1 / tolerance), 6)) if tolerance else np.nan


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
