"""The tables of a grid's runs: scores, differences, set by set, Reset ablation, times, inner criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from aroma.errors import bad_value
from aroma.pictures import positions_of

from .formats import (
    EMPTY,
    Columns,
    Table,
    amount,
    counted,
    decimals,
    listing,
    plain,
    points,
    span,
)
from .protocol import common_notes, parameters_sentence, protocol, seeds_sentence, stopped_early
from .runs import Run, Runs, ended_loops, require_reported_sets, rows_of
from .statistics import CONFIDENCE, FEW_SEEDS, RESAMPLES, mean_of_means, paired_differences, spread

DEFAULT_BASELINE = "lora-r8"
"""Method that others are compared with if it has run and no other was named."""
_WITHOUT_BASELINE = ("reset", "inner")
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
_LOOP = ("kind", "outer_step", "fired")
"""Columns of a frame of inner loops."""
_RESETS = {
    "prune": "prune: most entries of Adam's moments are set to zero (the paper's)",
    "zero": "zero: the whole state is forgotten",
    "none": "none: nothing is reset",
}


def make_table(runs: Runs, kind: str = "main", baseline: str | None = None, metric: str | None = None) -> Table:
    """Return a table of the runs.

    Args:
        runs: The runs.
        kind: One of `KINDS`.
        baseline: Label of the method that others are compared with; None: `lora-r8` if it has run, else none. The
            kinds `reset` and `inner` take none.
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
    finished = runs.finished_methods
    if baseline is not None and baseline not in finished:
        raise bad_value("--baseline", baseline, f"no run of it has finished; give one of {', '.join(finished)}")
    if baseline is None and DEFAULT_BASELINE in finished:
        baseline = DEFAULT_BASELINE
    if kind == "sets":
        return sets_table(runs, baseline, metric)
    return KINDS[kind](runs) if kind in _WITHOUT_BASELINE else KINDS[kind](runs, baseline)


def main_table(runs: Runs, baseline: str | None) -> Table:
    """Return the paper's Table 2: scores, trainable parameters, and the paired difference to a baseline."""
    columns = Columns(runs.methods, len(runs.seeds))
    by_task = [_add_scores(columns, runs, task) for task in runs.tasks]
    if len(runs.tasks) > 1:
        counts = pd.concat([found["count"] for found in by_task], axis="columns").min(axis="columns")
        # A method without runs on a task has no average.
        means = pd.concat([found["mean"] for found in by_task], axis="columns").mean(axis="columns", skipna=False)
        average = pd.DataFrame({"mean": means, "std": np.nan, "count": counts})
        columns.spread("average", "average", average, points, keys=("",), mark_best=True)
    _add_parameters(columns, runs)
    notes: list[str] = []
    sentence = ""
    if baseline is not None:
        notes, sentence = _add_difference(columns, runs, runs.reported, "score", baseline)
    _add_failed(columns, runs)
    parts = [f"{seeds_sentence(runs)} Scores in points (100 × metric).", protocol(runs), parameters_sentence(runs)]
    caption = " ".join(filter(None, [*parts, sentence]))
    return columns.table("main", caption, [*notes, *stopped_early(runs), *common_notes(runs)])


def paired_table(runs: Runs, baseline: str | None) -> Table:
    """Return the difference to the baseline on each task, and how often a method is better, tied or worse.

    Raises:
        ConfigError: No baseline, or no other method.
    """
    others = [method for method in runs.methods if method != baseline]
    if baseline is None or not others:
        raise bad_value("--baseline", baseline, "a table of differences compares two methods; name one that has run")
    columns = Columns(others, len(runs.seeds))
    notes: list[str] = []
    verdicts = pd.DataFrame(0, index=others, columns=["better", "tied", "worse"])
    for task in runs.tasks:
        found, single = paired_differences(runs.of(task=task), "score", baseline, others)
        columns.difference(task, f"{task}_", found, len(runs.seeds))
        notes += _without_interval(single, baseline)
        verdicts["better"] += found.low > 0
        verdicts["worse"] += found.high < 0
        verdicts["tied"] += (found.low <= 0) & (found.high >= 0)
    texts = ["–".join(map(str, row)) if any(row) else EMPTY for row in verdicts.to_numpy().tolist()]
    columns.add("better–tied–worse", texts, **{str(verdict): verdicts[verdict] for verdict in verdicts})
    seeds = f"{counted(len(runs.seeds), 'seed')}: {', '.join(map(str, runs.seeds))}."
    caption = (
        f"{_difference_sentence(runs, baseline, over_tasks=False)} Better, tied, worse: tasks whose interval lies "
        f"above zero, holds it, or lies below. {seeds} {protocol(runs)}"
    )
    return columns.table("paired", caption, [*notes, *common_notes(runs)])


def sets_table(runs: Runs, baseline: str | None, metric: str | None = None) -> Table:
    """Return the paper's Table 3: each reported set, their average, and the paired difference of the average.

    Args:
        runs: The runs.
        baseline: Method that the others are compared with; None: no comparison.
        metric: What is shown of every set, as `accuracy_normalised`; None: the metric that is the score.

    Raises:
        ConfigError: No run has the metric, or none has finished.
        CheckpointError: A result without its reported sets.
    """
    sets = _set_scores(runs, metric)
    columns = Columns(runs.methods, len(runs.seeds))
    labels = sets.groupby("task", sort=False)["label"].unique().reindex(runs.tasks).dropna()
    for task, of_task in labels.items():
        for label in of_task:
            scored = sets[(sets.task == task) & (sets.label == label)]
            title = _set_title(runs, str(task), label)
            columns.spread(title, f"{task}_{label}", spread(scored, "value", runs.methods), points, mark_best=True)
    averages = sets.groupby(["method", "task", "seed"], sort=False)["value"].agg(
        lambda values: values.mean(skipna=False)
    )
    # A seed that lacks a task has no average over all.
    over_tasks = averages.groupby(["method", "seed"]).agg(["mean", "count"])
    complete = over_tasks["mean"].where(over_tasks["count"] == len(runs.tasks)).rename("value").reset_index()
    average = spread(complete.dropna(), "value", runs.methods)
    columns.spread("average", "average", average, points, mark_best=True)
    _add_parameters(columns, runs)
    notes: list[str] = []
    sentence = ""
    if baseline is not None:
        frame = averages.rename("value").reset_index()
        notes, sentence = _add_difference(columns, runs, frame, "value", baseline, "Difference of the average")
    _add_failed(columns, runs)
    parts = [seeds_sentence(runs), _sets_sentence(runs, metric), protocol(runs), parameters_sentence(runs), sentence]
    notes += [*_unreadable(runs, sets), *stopped_early(runs), *_examples(runs), *common_notes(runs)]
    return columns.table("sets", " ".join(filter(None, parts)), notes)


def reset_table(runs: Runs) -> Table:
    """Return the paper's Table 4: AROMA's scores, ranks and effective ranks by what a merge resets.

    Raises:
        ConfigError: No run of AROMA has finished.
    """
    methods = runs.methods_of_kind("aroma")
    if not methods:
        raise bad_value("--kind", "reset", f"no run of kind aroma has finished in {runs.source}; run some first")
    columns = Columns(methods, len(runs.seeds))
    resets = {method: dict.fromkeys(_reset_of(run) for run in rows_of(runs.of(method))) for method in methods}
    columns.words("reset", ["/".join(resets[method]) for method in methods])
    for task in runs.tasks:
        _add_scores(columns, runs, task)
        for key, title in (("average_rank", "average rank"), ("effective_rank", "effective rank")):
            found = spread(runs.of(task=task), key, methods)
            columns.spread(f"{task}, {title}", f"{task}_{key}", found, decimals, keys=("mean", "std"))
    meaning = "; ".join(_RESETS[kind] for kind in _RESETS if any(kind in found for found in resets.values()))
    caption = (
        f"What a merge does to the optimizer state of the next component. {meaning}. {seeds_sentence(runs)} Scores in "
        f"points (100 × metric); ranks are means over the adapted matrices at the end. {protocol(runs)}"
    )
    return columns.table("reset", caption, common_notes(runs))


def time_table(runs: Runs, baseline: str | None) -> Table:
    """Return the paper's Table 5: seconds of an epoch, and their ratios to those of a baseline and of AdaLoRA."""
    columns = Columns(runs.methods, len(runs.seeds))
    by_task = {}
    for task in runs.tasks:
        found = spread(runs.of(task=task), "epoch_seconds", runs.methods)
        columns.spread(f"{task}, s", task, found, decimals, keys=("seconds_mean", "seconds_std", "seeds"))
        by_task[task] = found["mean"]
    seconds = pd.DataFrame(by_task, index=runs.methods)
    if len(runs.tasks) > 1:
        average = seconds.mean(axis="columns", skipna=False)
        columns.numbers("average, s", "average_seconds", average.tolist(), decimals)
    aroma = runs.methods_of_kind("aroma")
    for other, paper_key in _timed_against(runs, baseline).items():
        common = seconds.notna() & seconds.loc[other].notna()
        ratios = seconds.where(common).sum(axis="columns", min_count=1) / common.mul(seconds.loc[other]).sum(
            axis="columns"
        )
        columns.numbers(f"÷ {other}", f"over_{other}", ratios.tolist(), lambda ratio: f"{ratio:.3f}")
        if paper_key is not None:
            paper = [_PAPER_RATIOS[paper_key] if method in aroma else np.nan for method in runs.methods]
            columns.numbers(f"paper ÷ {paper_key}", f"paper_over_{other}", paper, lambda ratio: f"{ratio:g}")
    caption = (
        "Seconds of training an epoch, without evaluation: the time of all steps that were taken, scaled to the steps "
        f"of an epoch. {seeds_sentence(runs)} ÷: quotient of the averages over the tasks that both methods have; "
        "paper ÷: the same quotient of AROMA in the paper's Table 5 (RoBERTa-base, six GLUE tasks, a V100). "
        f"{protocol(runs)}"
    )
    return columns.table("time", caption, [*_side_by_side(runs), *stopped_early(runs), *common_notes(runs)])


def inner_table(runs: Runs) -> Table:
    """Return after how many steps the inner criterion (5) fires, by method, task and kind of matrix.

    Raises:
        ConfigError: No finished run has inner checks.
        CheckpointError: An `events.jsonl` is damaged.
    """
    rows = []
    for method in runs.methods:
        for task in runs.tasks:
            checked = [
                run
                for run in rows_of(runs.of(method, task))
                if run.kind == "aroma" and predicted_step(run.trial["options"])
            ]
            if checked:
                predicted = {predicted_step(run.trial["options"]) for run in checked}
                last = {"predicted": predicted.pop() if len(predicted) == 1 else np.nan}
                loops = pd.DataFrame([loop for run in checked for loop in inner_loops(run)], columns=_LOOP)
                for kind in dict.fromkeys(["all", *loops.kind]):
                    numbers = _loop_numbers(loops if kind == "all" else loops[loops.kind == kind])
                    rows.append({"method": method, "task": task, "matrices": kind, **numbers, **last})
    if not rows:
        remedy = f"no run with inner checks has finished in {runs.source}; run AROMA first"
        raise bad_value("--kind", "inner", remedy)
    frame = pd.DataFrame(rows)
    columns = Columns(frame.method.tolist(), len(runs.seeds))
    columns.words("task", frame.task.tolist())
    columns.words("matrices", frame.matrices.tolist())
    for key in frame.columns[3:]:
        title = key.replace("first_median", "median, first loops").replace("later_median", "median, later loops")
        columns.numbers(title.replace("_", " "), key, frame[key].tolist(), plain)
    caption = (
        "Inner step t at which the inner criterion (5) is first met, over the inner loops of all matrices and seeds. "
        "Predicted: ΔT_in (1 + 1/ε_in), where a norm that grows linearly meets it, however much is left to learn. "
        "Fired: loops in which it was met; never: loops that ended, at T_in, without. The quartiles are of the loops "
        f"in which it fired. {protocol(runs)}"
    )
    return columns.table("inner", caption, common_notes(runs))


KINDS: Mapping[str, Callable[..., Table]] = {
    "main": main_table,
    "paired": paired_table,
    "sets": sets_table,
    "reset": reset_table,
    "time": time_table,
    "inner": inner_table,
}
"""The tables by name."""


def inner_loops(run: Run) -> list[dict[str, Any]]:
    """Return the inner loops of a run: those in which the criterion fired, and those that ended without.

    A loop that the end of the run cut off before the criterion fired tells nothing and is left out.

    Returns:
        For each loop `kind` of the matrix, `outer_step` p from 1, and the inner step t at which the
        criterion was first met as `fired`, NaN if it never was.

    Raises:
        CheckpointError: `events.jsonl` is damaged.
    """
    fired = {(outer, module): inner for outer, inner, module in run.result["inner_checks"]}
    keys = dict.fromkeys([*fired, *ended_loops(run)])
    modules = list(dict.fromkeys(module for _, module in keys))
    kinds = {module: position.kind for module, position in zip(modules, positions_of(modules), strict=True)}
    return [
        {"kind": kinds[module], "outer_step": outer, "fired": fired.get((outer, module), np.nan)}
        for outer, module in keys
    ]


def predicted_step(options: Mapping[str, Any]) -> float | None:
    """Return the inner step near which a linearly growing norm meets criterion (5); None without a tolerance."""
    tolerance, interval = _option(options, "inner_tolerance"), _option(options, "inner_check_interval")
    # The norm grows from c(t − ΔT) to ct, by the share ΔT / (t − ΔT), which is less than ε once t > ΔT (1 + 1/ε).
    return round(interval * (1 + 1 / tolerance), 6) if tolerance else None


def _add_scores(columns: Columns, runs: Runs, task: str) -> pd.DataFrame:
    frame = runs.of(task=task)
    found = spread(frame, "score", columns.methods)
    metrics = "/".join(dict.fromkeys(frame.metric))
    columns.spread(f"{task} ({metrics})" if metrics else task, task, found, points, mark_best=True)
    return found


def _add_parameters(columns: Columns, runs: Runs) -> None:
    """Add the number of seeds, and the trainable parameters: the mean over tasks of the mean over seeds."""
    counts = [[len(runs.of(method, task)) for task in runs.tasks] for method in columns.methods]
    columns.add("seeds", [span(numbers) for numbers in counts], planned_seeds=[len(runs.seeds)] * len(counts))
    for title, key in (("trainable at start", "initial_parameters"), ("trainable on average", "average_parameters")):
        columns.numbers(title, key, mean_of_means(runs.reported, key, columns.methods).tolist(), amount)


def _add_difference(
    columns: Columns, runs: Runs, frame: pd.DataFrame, value: str, baseline: str, what: str = "Difference"
) -> tuple[list[str], str]:
    """Add the mean difference over all tasks, and return its notes and its sentence."""
    found, single = paired_differences(frame, value, baseline, columns.methods)
    columns.difference(f"− {baseline}", "", found, len(runs.tasks) * len(runs.seeds))
    return _without_interval(single, baseline), _difference_sentence(runs, baseline, over_tasks=True, what=what)


def _add_failed(columns: Columns, runs: Runs) -> None:
    """Add, for CSV alone, the names of each method's failed runs."""
    names = [" ".join(runs.failed.name[runs.failed.method == method]) for method in columns.methods]
    columns.raw("failed", names)


def _difference_sentence(runs: Runs, baseline: str, over_tasks: bool, what: str = "Difference") -> str:
    """Return how differences, of `what`, and their intervals were computed."""
    text = (
        f"{what} to {baseline}: of runs of the same task and seed, in points{', mean over the tasks' * over_tasks}; "
        f"interval: {CONFIDENCE:.0%} bootstrap, percentiles of {RESAMPLES:,} resamples of the seeds of each task."
    )
    if 1 < len(runs.seeds) < FEW_SEEDS:
        text += f" With {len(runs.seeds)} seeds such an interval is narrower than it should be."
    return text


def _without_interval(single: Mapping[str, Sequence[str]], baseline: str) -> list[str]:
    """Return which methods have no interval, and why."""
    reasons: dict[str, list[str]] = {}
    for method, tasks in single.items():
        if tasks:
            reasons.setdefault(", ".join(tasks), []).append(method)
    return [
        f"No interval for {', '.join(methods)}: a single seed shared with {baseline} on {tasks} tells nothing of the "
        "spread."
        for tasks, methods in reasons.items()
    ]


def _set_scores(runs: Runs, metric: str | None) -> pd.DataFrame:
    """Return a row for each run and reported set of its task, with the metric as `value`; NaN if a run lacks it."""
    reported = [(run, require_reported_sets(run)) for task in runs.tasks for run in rows_of(runs.of(task=task))]
    labels: dict[str, dict[str, None]] = {}
    for run, sets in reported:
        labels.setdefault(run.task, {}).update(dict.fromkeys(sets))
    if not any(labels.values()):
        raise bad_value("--kind", "sets", f"no run with a reported set has finished in {runs.source}")
    known = dict.fromkeys(name for _, sets in reported for metrics in sets.values() for name in metrics)
    known.pop(_UNPARSEABLE, None)
    if metric is not None and metric not in known:
        raise bad_value("--metric", metric, f"no run has it; give one of {', '.join(known)}")
    rows = []
    for run, sets in reported:
        for label in labels[run.task]:
            metrics = sets.get(label, {})
            values = {"value": metrics.get(metric or run.metric), _UNPARSEABLE: metrics.get(_UNPARSEABLE)}
            rows.append({"task": run.task, "method": run.method, "seed": run.seed, "label": label, **values})
    return pd.DataFrame(rows).astype({"value": float, _UNPARSEABLE: float})


def _set_title(runs: Runs, task: str, label: str) -> str:
    return label if len(runs.tasks) == 1 else f"{task}: {label}"


def _sets_sentence(runs: Runs, metric: str | None) -> str:
    metrics = dict.fromkeys([metric] if metric is not None else runs.reported.metric)
    asks = all(trial["task"].get("kind") == "commonsense" for trial in runs.reported.trial)
    shown = [f"{name} ({_ANSWERS[name]})" if asks and name in _ANSWERS else str(name) for name in metrics]
    tasks = " of a task, then over the tasks" if len(runs.tasks) > 1 else ""
    return f"Shown: {listing(shown)} of each set, in points; average: over the sets{tasks}, each of equal weight."


def _unreadable(runs: Runs, sets: pd.DataFrame) -> list[str]:
    """Return by method which share of the written answers could not be read, if answers were written."""
    notes = []
    written = sets.dropna(subset=[_UNPARSEABLE])
    for method in runs.methods:
        shares = written[written.method == method].groupby(["task", "label"], sort=False)[_UNPARSEABLE].mean()
        titles = [_set_title(runs, task, label) for task, label in shares.index]
        named = [f"{points(share)} % of {title}" for title, share in zip(titles, shares, strict=True) if share > 0]
        if len(shares):
            notes.append(f"{method}: {listing(named) or 'none'}")
    return [f"Written answers that could not be read, and count as wrong: {'; '.join(notes)}."] if notes else []


def _examples(runs: Runs) -> list[str]:
    """Return what became of examples that did not fit, as the runs of a task note it."""
    found = {
        task: dict.fromkeys(str(note) for result in runs.of(task=task).result for note in result.get("notes", ()))
        for task in runs.tasks
    }
    return [f"{task}: {'; '.join(notes)}." for task, notes in found.items() if notes]


def _reset_of(run: Run) -> str:
    return str(_option(run.trial["options"], "reset"))


def _option(options: Mapping[str, Any], name: str) -> Any:
    """Return an option of AROMA, its default if it was not given."""
    from aroma.tuner.config import AromaConfig  # here alone, since it loads PyTorch

    return options.get(name, getattr(AromaConfig, name))


def _timed_against(runs: Runs, baseline: str | None) -> dict[str, str | None]:
    """Return the methods whose time others' are divided by, with the paper's name for them, None if it has none."""
    found: dict[str, str | None] = {}
    if baseline is not None:
        found[baseline] = "lora" if baseline in runs.methods_of_kind("lora") else None
    # The AdaLoRA that ends with the baseline's rank, else the first one.
    ranks = {
        method: runs.of(method).trial.iloc[0]["options"].get("target_r") for method in runs.methods_of_kind("adalora")
    }
    wanted = {trial["options"].get("r") for trial in runs.of(baseline).trial} if baseline is not None else set()
    fitting = [method for method, rank in ranks.items() if rank in wanted] or list(ranks)
    return found | dict.fromkeys(fitting[:1], "adalora")


def _side_by_side(runs: Runs) -> list[str]:
    processes = runs.grid.get("processes")
    if not isinstance(processes, int) or processes < 2:
        return []
    return [
        f"The grid asks for {processes} processes at a time, which disturb each other's times; `aroma bench` measures "
        "steps in turns."
    ]


def _loop_numbers(loops: pd.DataFrame) -> dict[str, float]:
    loops = loops.astype({"fired": float})
    fired = loops.fired.dropna()
    lower, median, upper = fired.quantile([0.25, 0.5, 0.75])
    return {
        "fired": len(fired),
        "never": len(loops) - len(fired),
        "lower_quartile": lower,
        "median": median,
        "upper_quartile": upper,
        "first_median": loops.fired[loops.outer_step == 1].median(),
        "later_median": loops.fired[loops.outer_step > 1].median(),
    }
