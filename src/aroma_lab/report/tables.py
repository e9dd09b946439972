"""The tables of a grid's runs: scores, differences, set by set, ranks, Reset ablation, times, inner criterion."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from aroma.errors import bad_value
from aroma.pictures import positions_of

from .formats import EMPTY, Table, amount, counted, decimals, listing, plain, points, signed_points, span, thousandths
from .learnt import not_learnt
from .protocol import (
    common_notes,
    difference_sentence,
    holds_out,
    interval_notes,
    parameters_sentence,
    protocol,
    seeds_sentence,
    stopped_early,
)
from .runs import Run, Runs, check, has_fixed_rank, option_of, rows_of
from .statistics import averages, chosen_by_trying, paired_differences, regrets, spread

DEFAULT_BASELINE = "lora-r8"
"""Method that others are compared with if it has run and no other was named."""
_WITHOUT_BASELINE = ("ranks", "regret", "reset", "inner")
_RANK_TRAINED = "trainable parameters, averaged over the planned steps, over those of rank 1 in all matrices"
"""What captions say of `trained_rank`."""
_AVERAGE = "Average"
"""The task of the row of a table that is of all tasks."""
_NOT_LEARNT = ", not learnt"
"""Ends the title of a column of scores that no method is marked in; see `not_learnt`."""
_UNPARSEABLE = "unparseable"
"""Share of the written answers that could not be read, which is among the metrics of a set but is none."""
_ANSWERS = {
    "accuracy": "the candidate whose label has the highest log-probability",
    "accuracy_normalised": "the candidate whose label has the highest mean log-probability over its tokens",
    "accuracy_per_character": "the candidate whose label has the highest log-probability a character",
    "generated": "the answer that the model writes",
}
"""What counts as the answer to a commonsense question, by metric."""
_PAPER_RATIOS = {"lora": 0.76, "adalora": 0.285}
"""Time of AROMA over that of another method, in the paper's Table 5: averages over six GLUE tasks on a V100."""
_RESETS = (
    "Reset: prune sets most entries of Adam's moments to zero (the paper's), zero forgets the whole state, and none "
    "changes nothing."
)


def make_table(runs: Runs, kind: str = "main", baseline: str | None = None, metric: str | None = None) -> Table:
    """Return a table of the runs.

    Args:
        kind: One of `KINDS`.
        baseline: Label of the method that others are compared with; None: `lora-r8` if it has run, else none. The
            kinds `ranks`, `regret`, `reset` and `inner` take none.
        metric: For `sets`, the metric that is shown; None: the one that is the score.

    Raises:
        ConfigError: An unknown kind, a baseline without finished runs, no runs that such a table is of, a metric that
            they do not have, or a baseline or a metric for a kind that takes none.
        CheckpointError: A file is damaged or edited.
    """
    if kind not in KINDS:
        raise bad_value("--kind", kind, f"give one of {', '.join(KINDS)}")
    if metric is not None and kind != "sets":
        raise bad_value("--metric", metric, f"a table of kind {kind} shows the metric that is the score; leave it out")
    if baseline is not None and kind in _WITHOUT_BASELINE:
        raise bad_value("--baseline", baseline, f"a table of kind {kind} compares with no method; leave it out")
    finished = runs.finished_methods()
    if baseline is not None and baseline not in finished:
        raise bad_value("--baseline", baseline, f"no run of it has finished; give one of {', '.join(finished)}")
    if baseline is None and DEFAULT_BASELINE in finished:
        baseline = DEFAULT_BASELINE
    options = [metric] if kind == "sets" else []
    table = KINDS[kind](runs) if kind in _WITHOUT_BASELINE else KINDS[kind](runs, baseline, *options)
    table.name = kind
    table.notes = [*table.notes, *common_notes(runs)]
    return table


def main_table(runs: Runs, baseline: str | None) -> Table:
    """Return the paper's Table 2: scores, trainable parameters, and the paired difference to a baseline."""
    table = Table(runs.methods, len(runs.seeds))
    unlearnt = not_learnt(runs.reported)
    scores = {task: _add_scores(table, runs, task, task not in unlearnt) for task in runs.tasks}
    by_task = [found for task, found in scores.items() if task not in unlearnt]
    if len(by_task) > 1:
        # A method without runs on a task has no average.
        means = sum(found["mean"] for found in by_task) / len(by_task)
        counts = pd.concat([found["count"] for found in by_task], axis="columns").min(axis="columns")
        average = pd.DataFrame({"mean": means, "std": np.nan, "count": counts})
        table.spread("average", ["average"], average, points, mark_best=True)
    table.caption = f"{seeds_sentence(runs)} Scores in points (100 × metric). {protocol(runs)}"
    _add_costs_and_difference(table, runs, runs.reported, "score", baseline, unlearnt)
    return table


def paired_table(runs: Runs, baseline: str | None) -> Table:
    """Return the difference to the baseline on each task, and how often a method is better, tied or worse."""
    others = [method for method in runs.methods if method != baseline]
    if baseline is None or not others:
        raise bad_value("--baseline", baseline, "a table of differences compares two methods; name one that has run")
    table = Table(others, len(runs.seeds))
    verdicts = pd.DataFrame(0, index=others, columns=["better", "tied", "worse"])
    unlearnt = not_learnt(runs.reported)
    table.notes = list(unlearnt.values())
    for task in [task for task in runs.tasks if task not in unlearnt]:
        found = paired_differences(runs.of(task=task), "score", baseline, others)
        table.difference(task, f"{task}_", found, len(runs.seeds))
        table.notes = [*table.notes, *interval_notes(found, baseline)]
        verdicts["better"] += found.low > 0
        verdicts["worse"] += found.high < 0
        verdicts["tied"] += (found.low <= 0) & (found.high >= 0)
    texts = ["–".join(map(str, row)) for row in verdicts.to_numpy().tolist()]
    table.add("better–tied–worse", texts, **{str(verdict): verdicts[verdict] for verdict in verdicts})
    table.caption = (
        f"{difference_sentence(runs, baseline, over_tasks=False)} Better, tied, worse: tasks whose interval lies "
        f"above zero, holds it, or lies below. {counted(len(runs.seeds), 'seed')}: {', '.join(map(str, runs.seeds))}. "
        f"{protocol(runs)}"
    )
    return table


def sets_table(runs: Runs, baseline: str | None, metric: str | None = None) -> Table:
    """Return the paper's Table 3: each reported set, their average, and the paired difference of the average."""
    sets = _set_scores(runs, metric)
    table = Table(runs.methods, len(runs.seeds))
    unlearnt = not_learnt(runs.reported)
    for (task, label, title), scored in sets.groupby(["task", "label", "title"], sort=False):
        heads = [f"{task}_{label}_{key}" for key in ("mean", "std", "seeds")]
        shown = f"{title}{_NOT_LEARNT}" if task in unlearnt else str(title)
        table.spread(shown, heads, spread(scored, "value", runs.methods), points, mark_best=task not in unlearnt)
    compared = [task for task in runs.tasks if task not in unlearnt]
    # A run that lacks a set has no average, nor a seed that lacks a task.
    averages = (
        sets[sets.task.isin(compared)]
        .groupby(["method", "task", "seed"])
        .value.agg(lambda values: values.mean(skipna=False))
    )
    over_tasks = averages.groupby(["method", "seed"]).agg(["mean", "count"])
    complete = over_tasks["mean"].where(over_tasks["count"] == len(compared)).rename("value").reset_index()
    heads = ["average_mean", "average_std", "average_seeds"]
    table.spread("average", heads, spread(complete, "value", runs.methods), points, mark_best=True)
    table.caption = f"{seeds_sentence(runs)} {_sets_sentence(runs, metric)} {protocol(runs)}"
    _add_costs_and_difference(table, runs, averages.reset_index(), "value", baseline, unlearnt)
    table.notes = [*table.notes, *_unreadable(runs, sets), *_examples(runs)]
    return table


def ranks_table(runs: Runs) -> Table:
    """Return which ranks were found and trained, and how they fit the planted ones where these are known."""
    cells = [(method, task) for task in runs.tasks for method in runs.methods if len(runs.of(method, task))]
    table = Table([method for method, _ in cells], len(runs.seeds))
    table.add("task", [task for _, task in cells], task=[task for _, task in cells])
    planted = [result.get("planted") or {} for result in runs.reported.result]
    fits: dict[str, Any] = (
        {key: [one.get(key) for one in planted] for key in ("spearman", "pearson", "grew")} if any(planted) else {}
    )
    losses = [result.get("held_out_loss") if holds_out(result) else None for result in runs.reported.result]
    frame = runs.reported.assign(held_out_loss=pd.Series(losses, dtype=float, index=runs.reported.index), **fits)
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "score": ("score", points),
        "average_rank": ("rank found", decimals),
        "trained_rank": ("rank trained", decimals),
        # What is planted is scored by its squared error already.
        **(
            {"held_out_loss": ("held-out loss", thousandths)} if not fits and frame.held_out_loss.notna().any() else {}
        ),
        **{key: (key, points if key == "grew" else decimals) for key in fits},
    }
    for key, (title, words) in columns.items():
        one_by_one = [spread(frame[frame.task == task], key, [method]) for method, task in cells]
        heads = [f"{key}_{name}" for name in ("mean", "std", "seeds")]
        # A method without ranks has runs, and no values.
        found = pd.concat(one_by_one).assign(count=[len(runs.of(*cell)) for cell in cells])
        table.spread(title, heads, found, words)
    table.caption = (
        f"Rank found: at the end, mean over the matrices; rank trained: {_RANK_TRAINED}. {seeds_sentence(runs)} "
        f"Scores in points (100 × metric). {protocol(runs)}"
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
    growing = runs.finished_methods("aroma")
    fixed = [one for one in runs.finished_methods("lora") if has_fixed_rank(runs.of(one).trial.iloc[0])]
    unlearnt = not_learnt(runs.reported)
    frame = runs.reported[~runs.reported.task.isin(unlearnt)]
    found = regrets(frame, growing, fixed, chosen_by_trying(runs.selecting, fixed, runs.chose_by))
    if found.empty:
        remedy = f"no task of {runs.source} has runs of AROMA and of LoRA with a seed in common; run both"
        raise bad_value("--kind", "regret", remedy)
    order = found.assign(place=found.task.map(runs.tasks.index)).sort_values("place", kind="stable")
    cells = list(zip(order.method, order.best, order.task, strict=True))
    scores = [[spread(runs.of(task=task), "score", [one]) for one in pair] for *pair, task in cells]
    own, best = (pd.concat(column).reset_index(drop=True) for column in zip(*scores, strict=True))
    rows = order.drop(columns=["place", "best_trained"]).reset_index(drop=True)
    rows = rows.join(own).join(best.add_prefix("best_"))
    over_tasks = [_average_row(frame, found, method, fixed) for method in growing]
    rows = pd.concat([rows, *(row for row in over_tasks if row is not None)], ignore_index=True)
    table = Table(rows.method.tolist(), len(runs.seeds))
    table.add("task", rows.task.tolist(), task=rows.task)
    table.spread("score", ["mean", "std", "seeds"], rows, points)
    table.numbers("rank trained", "trained", rows.trained.tolist(), decimals)
    table.add("best fixed", rows.best.tolist(), best=rows.best)
    others = rows[["best_mean", "best_std", "best_count"]].set_axis(["mean", "std", "count"], axis="columns")
    table.spread("its score", ["best_mean", "best_std", "best_seeds"], others, points)
    texts = [*map(_difference_text, rows.difference, rows.error)]
    table.add("difference", texts, difference=rows.difference, error=rows.error, pairs=rows.pairs)
    table.add("no worse, no dearer", ["yes" if met else "no" for met in rows.met], met=rows.met)
    if rows.chosen_difference.notna().any():
        table.add("chosen by trying", rows.chosen.fillna(EMPTY).tolist(), chosen=rows.chosen)
        texts = [*map(_difference_text, rows.chosen_difference, rows.chosen_error)]
        values = {key: rows[key] for key in ("chosen_difference", "chosen_error")}
        table.add("difference to it", texts, **values)
    table.notes = list(unlearnt.values())
    table.caption = (
        "Best fixed: the LoRA with the highest mean on the reported examples, which nobody could have known before. "
        "Difference: of runs of the same seed, mean ± standard error. No worse, no dearer: at most one standard error "
        "below it, at no more trained parameters. Chosen by trying: the LoRA that the runs on held-out training "
        f"examples prefer. {_AVERAGE}: over the tasks; best fixed is the one rank with the highest average. "
        f"Rank trained: {_RANK_TRAINED}. {seeds_sentence(runs)} Scores in points (100 × metric). {protocol(runs)}"
    )
    return table


def _average_row(frame: pd.DataFrame, found: pd.DataFrame, method: str, fixed: Sequence[str]) -> pd.DataFrame | None:
    average = averages(frame, found, method, fixed)
    if average is None:
        return None
    own = {"task": _AVERAGE.lower(), "method": method, "chosen": None}
    return pd.DataFrame([{**average, **own, "std": np.nan, "best_std": np.nan}])


def _difference_text(difference: float, error: float) -> str:
    if np.isnan(difference):
        return EMPTY
    return signed_points(difference) + ("" if np.isnan(error) else f" ± {points(error)}")


def reset_table(runs: Runs) -> Table:
    """Return the paper's Table 4: AROMA's scores, ranks and effective ranks by what a merge resets."""
    methods = runs.finished_methods("aroma")
    if not methods:
        raise bad_value("--kind", "reset", f"no run of kind aroma has finished in {runs.source}; run some first")
    table = Table(methods, len(runs.seeds))
    resets = ["/".join({option_of(trial, "reset"): None for trial in runs.of(method).trial}) for method in methods]
    table.add("reset", resets, reset=resets)
    unlearnt = not_learnt(runs.reported)
    table.notes = list(unlearnt.values())
    for task in runs.tasks:
        _add_scores(table, runs, task, task not in unlearnt)
        if task in unlearnt:
            continue
        for key, title in (("average_rank", "average rank"), ("effective_rank", "effective rank")):
            found = spread(runs.of(task=task), key, methods)
            table.spread(f"{task}, {title}", [f"{task}_{key}_mean", f"{task}_{key}_std"], found, decimals)
    table.caption = (
        f"What a merge does to the optimizer state of the next component. {_RESETS} {seeds_sentence(runs)} Scores in "
        f"points (100 × metric); ranks are means over the adapted matrices at the end. {protocol(runs)}"
    )
    return table


def time_table(runs: Runs, baseline: str | None) -> Table:
    """Return the paper's Table 5: seconds of an epoch, and their ratios to those of a baseline and of AdaLoRA."""
    table = Table(runs.methods, len(runs.seeds))
    seconds = pd.DataFrame(index=runs.methods)
    for task in runs.tasks:
        found = spread(runs.of(task=task), "epoch_seconds", runs.methods)
        heads = [f"{task}_seconds_mean", f"{task}_seconds_std", f"{task}_seeds"]
        table.spread(f"{task}, s", heads, found, decimals)
        seconds[task] = found["mean"]
    if len(runs.tasks) > 1:
        average = seconds.mean(axis="columns", skipna=False)
        table.numbers("average, s", "average_seconds", average.tolist(), decimals)
    aroma = runs.finished_methods("aroma")
    for other, paper_key in _timed_against(runs, baseline).items():
        base = seconds.loc[other].dropna()
        common = seconds[base.index]
        ratios = common.sum(axis="columns", min_count=1) / (common.notna() * base).sum(axis="columns")
        table.numbers(f"÷ {other}", f"over_{other}", ratios.tolist(), lambda ratio: f"{ratio:.3f}")
        if paper_key is not None:
            paper = [_PAPER_RATIOS[paper_key] if method in aroma else np.nan for method in runs.methods]
            table.numbers(f"paper ÷ {paper_key}", f"paper_over_{other}", paper, str)
    table.caption = (
        "Seconds of training an epoch, without evaluation: the time of all steps that were taken, scaled to the steps "
        f"of an epoch. {seeds_sentence(runs)} ÷: quotient of the averages over the tasks that both methods have; "
        "paper ÷: the same quotient of AROMA in the paper's Table 5 (RoBERTa-base, six GLUE tasks, a V100). "
        f"{protocol(runs)}"
    )
    table.notes = stopped_early(runs)
    processes = runs.grid.get("processes")
    if isinstance(processes, int) and processes > 1:
        beside = f"The grid asks for {processes} processes at a time, which disturb each other's times"
        table.notes = [f"{beside}; `aroma bench` measures steps in turns.", *table.notes]
    return table


def inner_table(runs: Runs) -> Table:
    """Return after how many steps the inner criterion (5) fires, by method, task and kind of matrix."""
    rows = []
    for method, task in itertools.product(runs.finished_methods("aroma"), runs.tasks):
        checked = [run for run in rows_of(runs.of(method, task)) if predicted_step(run.trial)]
        if checked:
            predicted = {predicted_step(run.trial) for run in checked}
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
        f"in which it fired. {protocol(runs)}"
    )
    return table


KINDS: Mapping[str, Callable[..., Table]] = {
    "main": main_table,
    "paired": paired_table,
    "sets": sets_table,
    "ranks": ranks_table,
    "regret": regret_table,
    "reset": reset_table,
    "time": time_table,
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


def predicted_step(trial: Mapping[str, Any]) -> float | None:
    """Return the inner step near which a linearly growing norm meets criterion (5); None where it is not used."""
    tolerance, interval = option_of(trial, "inner_tolerance"), option_of(trial, "inner_check_interval")
    # The norm grows from c(t − ΔT) to ct, by the share ΔT / (t − ΔT), which is less than ε once t > ΔT (1 + 1/ε).
    return round(interval * (1 + 1 / tolerance), 6) if tolerance else None


def _add_scores(table: Table, runs: Runs, task: str, learnt: bool) -> pd.DataFrame:
    frame = runs.of(task=task)
    found = spread(frame, "score", table.methods)
    title = f"{task} ({'/'.join(frame.metric.unique())})" if len(frame) else task
    title += "" if learnt else _NOT_LEARNT
    table.spread(title, [f"{task}_{key}" for key in ("mean", "std", "seeds")], found, points, mark_best=learnt)
    return found


def _add_costs_and_difference(
    table: Table,
    runs: Runs,
    frame: pd.DataFrame,
    value: str,
    baseline: str | None,
    unlearnt: Mapping[str, str],
) -> None:
    """Add seeds, trainable parameters (means over tasks of the means over seeds) and the difference over all tasks."""
    compared = [task for task in runs.tasks if task not in unlearnt]
    frame = frame[frame.task.isin(compared)]
    numbers = [span([len(runs.of(method, task)) for task in runs.tasks]) for method in runs.methods]
    table.add("seeds", numbers, planned_seeds=[len(runs.seeds)] * len(numbers))
    for title, key in (("trainable at start", "initial_parameters"), ("trainable on average", "average_parameters")):
        means = runs.reported.groupby(["method", "task"])[key].mean().groupby("method").mean()
        table.numbers(title, key, means.reindex(runs.methods).tolist(), amount)
    table.caption += f" {parameters_sentence(runs)}"
    if baseline is not None and compared:
        found = paired_differences(frame, value, baseline, runs.methods)
        table.difference(f"− {baseline}", "", found, len(compared) * len(runs.seeds))
        table.notes = interval_notes(found, baseline)
        table.caption += f" {difference_sentence(runs, baseline)}"
    failed = runs.in_state("failed").groupby("method").name.agg(" ".join)
    table.raw("failed", failed.reindex(runs.methods).fillna(""))
    table.notes = [*unlearnt.values(), *table.notes, *stopped_early(runs)]


def _set_scores(runs: Runs, metric: str | None) -> pd.DataFrame:
    """Return a row for each run and reported set of its task, with the metric as `value`; NaN if a run lacks it."""
    rows = []
    for run in [run for task in runs.tasks for run in rows_of(runs.of(task=task))]:
        check(f"{run.where}/result.json", run.result, {"reported": {...: "a mapping"}})
        of_run = run.result["reported"].items()
        rows += [(run.task, label, run.method, run.seed, run.metric, metrics) for label, metrics in of_run]
    if not rows:
        raise bad_value("--kind", "sets", f"no run with a reported set has finished in {runs.source}")
    sets = pd.DataFrame(rows, columns=["task", "label", "method", "seed", "metric", "metrics"])
    known = [name for name in dict.fromkeys(name for one in sets.metrics for name in one) if name != _UNPARSEABLE]
    if metric is not None and metric not in known:
        raise bad_value("--metric", metric, f"no run has it; give one of {', '.join(known)}")
    # A run that lacks one of its task's sets gets a row without value.
    every = sets[["task", "label"]].drop_duplicates().merge(sets[["task", "method", "seed"]].drop_duplicates())
    sets = every.merge(sets, how="left")
    found = [one if isinstance(one, dict) else {} for one in sets.metrics]
    sets["value"] = [one.get(metric or name, np.nan) for one, name in zip(found, sets.metric, strict=True)]
    sets[_UNPARSEABLE] = [one.get(_UNPARSEABLE, np.nan) for one in found]
    sets["title"] = sets.label if len(runs.tasks) == 1 else sets.task + ": " + sets.label
    return sets.astype({"value": float, _UNPARSEABLE: float})


def _sets_sentence(runs: Runs, metric: str | None) -> str:
    metrics = [metric] if metric is not None else list(runs.reported.metric.unique())
    asks = all(trial["task"].get("kind") == "commonsense" for trial in runs.reported.trial)
    shown = [f"{name} ({_ANSWERS[name]})" if asks and name in _ANSWERS else str(name) for name in metrics]
    tasks = " of a task, then over the tasks" if len(runs.tasks) > 1 else ""
    return f"Shown: {listing(shown)} of each set, in points; average: over the sets{tasks}, each of equal weight."


def _unreadable(runs: Runs, sets: pd.DataFrame) -> list[str]:
    """Return by method which share of the written answers could not be read, if answers were written."""
    shares = sets.dropna(subset=[_UNPARSEABLE]).groupby(["method", "title"], sort=False)[_UNPARSEABLE].mean()
    notes = []
    for method in runs.methods:
        if method in shares.index:
            named = [f"{points(share)} % of {title}" for title, share in shares[method].items() if share > 0]
            notes.append(f"{method}: {listing(named) or 'none'}")
    return [f"Written answers that could not be read, and count as wrong: {'; '.join(notes)}."] if notes else []


def _examples(runs: Runs) -> list[str]:
    """Return what became of examples that did not fit, as the runs of a task note it."""
    lines = []
    for task in runs.tasks:
        notes = dict.fromkeys(str(note) for result in runs.of(task=task).result for note in result.get("notes", ()))
        lines += [f"{task}: {'; '.join(notes)}."] if notes else []
    return lines


def _timed_against(runs: Runs, baseline: str | None) -> dict[str, str | None]:
    """Return the methods whose time others' are divided by, with the paper's name for them, None if it has none."""
    adalora = runs.finished_methods("adalora")[:1]
    if baseline is None:
        return dict.fromkeys(adalora, "adalora")
    return {
        baseline: "lora" if baseline in runs.finished_methods("lora") else None,
        **dict.fromkeys(adalora, "adalora"),
    }


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
