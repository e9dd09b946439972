"""How the numbers of a table came about: sentences for its caption, and notes on what failed or was not made alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from .formats import amount, counted, listing, plain, show, span
from .runs import Run, Runs, rows_of

_MOST_NAMES = 4
"""Runs that a note names; of more it gives the number."""
_MOST_CELLS = 12
"""Runs not begun that a note names."""
_MACHINE = ("git_revision", "platform", "device", "cpu_count", "threads")
_FREE_SETTINGS = ("seed", "save_steps", "keep_checkpoints", "logging_steps", "eval_steps")
"""Settings of the loop that leave a run's numbers alone, or are meant to differ."""
_NOT_REPORTED = ("train", "held_out")


def protocol(runs: Runs) -> str:
    """Return the protocol: model, data, length of training, which weights, how settings were chosen."""
    if runs.reported.empty:
        return "No run has finished."
    sentences = [
        f"Model: {listing(_distinct(runs.reported.model))}.",
        *(_task_sentence(task, runs.of(task=task)) for task in runs.tasks if len(runs.of(task=task))),
        _training_sentence(runs.reported),
        _checkpoint_sentence(runs.reported),
        _selection_sentence(runs),
    ]
    return " ".join(sentences)


def seeds_sentence(runs: Runs) -> str:
    """Return what mean and deviation are taken over."""
    seeds = runs.seeds
    if len(seeds) == 1:
        return f"One seed ({seeds[0]}), so the deviation is unknown."
    return f"Mean ± sample standard deviation over {counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})."


def parameters_sentence(runs: Runs) -> str:
    """Return what the trainable parameters are; empty if no run has finished."""
    # A method that trains nothing has no head to train either.
    heads = runs.reported.head_parameters[runs.reported.steps > 0]
    over = "over the planned steps."
    if runs.reported.empty:
        return ""
    if any(heads):
        return (
            f"Trainable parameters leave out the head's {span(heads.tolist(), amount)}, which every method trains; "
            f"their average is {over}"
        )
    return f"Trainable parameters on average: {over}"


def common_notes(runs: Runs) -> list[str]:
    """Return the notes that every table has, an item for each matter."""
    return [
        *_untrained(runs),
        *_missing(runs),
        *_choices(runs),
        *_different_settings(runs),
        *_different_machines(runs.reported),
    ]


def stopped_early(runs: Runs) -> list[str]:
    """Return how many runs of each method stopped before their last planned step."""
    notes = []
    for method in runs.methods:
        of_method = runs.of(method)
        early = of_method[of_method.stopped_early.astype(bool)]
        if len(early):
            share = f"{early.steps.sum() / early.planned_steps.sum():.0%} of the planned steps"
            number = f"{plain(len(early))} of {counted(len(of_method), 'run')}"
            notes.append(f"{method}: {number} stopped early, after {share}.")
    return notes


def _task_sentence(task: str, frame: pd.DataFrame) -> str:
    examples: list[Mapping[str, int]] = [result["examples"] for result in frame.result]

    def number(part: str) -> str:
        return span([counts[part] for counts in examples if part in counts])

    splits = [part for part in _distinct(key for counts in examples for key in counts) if part not in _NOT_REPORTED]
    reported = listing([f"{number(split)} of {split}" for split in splits])
    is_held_out = any("held_out" in counts for counts in examples)
    held_out = f", {number('held_out')} held out of training" if is_held_out else ""
    metric = "/".join(_distinct(frame.metric))
    return f"{task}: {metric} on all {reported}; trained on {number('train')} examples{held_out}."


def _training_sentence(frame: pd.DataFrame) -> str:
    loops = [trial["training"] for trial in frame.trial]
    batch = span([loop.get("batch_size", 1) * loop.get("gradient_accumulation_steps", 1) for loop in loops])
    precision = tuple(sorted({bool(loop.get("bf16")) for loop in loops}))
    wording = {(True,): " in bf16 mixed precision", (False,): "", (False, True): ", some in bf16 mixed precision"}
    return f"{span(frame.planned_steps.tolist())} steps of {batch} examples{wording[precision]}."


def _checkpoint_sentence(frame: pd.DataFrame) -> str:
    rules = _distinct(trial["training"].get("checkpoint", "last") for trial in frame.trial)
    meaning = {"last": "those of the last step", "best": "those of the best evaluation on held-out training examples"}
    return f"Weights: {listing([meaning.get(rule, rule) for rule in rules])}."


def _selection_sentence(runs: Runs) -> str:
    """Return how the learning rate, or whatever was chosen, was chosen."""
    keys = _chosen_keys(runs)
    if not keys:
        return "These runs chose nothing: learning rates and all other settings are as given."
    return (
        f"Chosen for each task and method: {listing(keys)}, among {_candidates(runs, keys)}, by the score on "
        f"held-out training examples (the lower loss decides between equal scores){_selecting(runs.selecting)}."
    )


def _candidates(runs: Runs, keys: Sequence[str]) -> str:
    """Return the values that were tried if they are the same everywhere; their number if not."""
    entries = [_choice(runs, task, method) for task in runs.tasks for method in runs.methods]
    tried = [[values for values, _ in entry["tried"]] for entry in entries if entry.get("tried")]
    if not tried:
        return "values that selection.json does not list"
    if any(_as_set(values) != _as_set(tried[0]) for values in tried):
        return f"{span([len(values) for values in tried])} candidates (selection.json lists them)"
    if len(keys) == 1 and all(keys[0] in values for values in tried[0]):
        return listing([show(value) for value in sorted((values[keys[0]] for values in tried[0]), key=_numbers_first)])
    return f"{len(tried[0])} candidates (selection.json lists them)"


def _selecting(frame: pd.DataFrame) -> str:
    """Return the length and the seeds of the runs that chose, and whether they looked at reported examples."""
    if frame.empty:
        return " (the runs that chose are not in the folder)"
    seeds = sorted(set(frame.seed.tolist()))
    unseen = "" if any(_saw_reported(run) for run in rows_of(frame)) else "; none of them saw a reported example"
    noun = "seed" if len(seeds) == 1 else "seeds"
    return f" in runs of {span(frame.planned_steps.tolist())} steps, {noun} {', '.join(map(plain, seeds))}{unseen}"


def _saw_reported(run: Run) -> bool:
    return bool(run.result.get("reported"))


def _choice(runs: Runs, task: str, method: str) -> Mapping[str, Any]:
    entry = runs.selection.get(task, {}).get(method, {})
    return entry if isinstance(entry, Mapping) else {}


def _chosen(runs: Runs, task: str, method: str) -> Mapping[str, Any]:
    """Return the settings that were chosen, by dotted key; empty if none were."""
    return _choice(runs, task, method).get("chosen") or {}


def _chosen_keys(runs: Runs) -> list[str]:
    return _distinct(key for task in runs.tasks for method in runs.methods for key in _chosen(runs, task, method))


def _untrained(runs: Runs) -> list[str]:
    methods = [method for method in runs.methods if not _trains(runs, method)]
    return [f"{listing(methods)}: nothing trains; the pretrained model as it is."] if methods else []


def _trains(runs: Runs, method: str) -> bool:
    """Whether a method trains anything, as far as finished runs tell."""
    steps = runs.of(method).steps
    return steps.empty or bool((steps > 0).any())


def _missing(runs: Runs) -> list[str]:
    """Return the runs that failed, with what they said, and those that have not finished or begun."""
    notes = [f"Failed: {run.name}: {run.message} ({run.folder}/failure.json)" for run in rows_of(runs.failed)]
    if len(runs.unfinished):
        notes.append(f"Not finished: {', '.join(runs.unfinished.name)}.")
    names = runs.not_begun
    if names:
        notes.append(f"Not begun: {'; '.join(names) if len(names) <= _MOST_CELLS else counted(len(names), 'run')}.")
    return notes


def _choices(runs: Runs) -> list[str]:
    """Return what was chosen for every method, task by task; and where a run did not use it, or looked ahead."""
    notes = []
    keys = _chosen_keys(runs)
    methods = [method for method in runs.methods if _trains(runs, method)]
    for key in keys:
        for task in runs.tasks:
            picked = {method: _chosen(runs, task, method).get(key) for method in methods}
            listed = [f"{method} {show(value)}" for method, value in picked.items() if value is not None]
            if listed:
                notes.append(f"Chosen {key} on {task}: {', '.join(listed)}.")
    asked = [(task, method) for task, those in runs.selection.items() for method in those]
    nothing = [f"{task}/{method}" for task, method in asked if not _chosen(runs, task, method)]
    if nothing:
        notes.append(f"Nothing could be chosen, no candidate has a score: {', '.join(nothing)}.")
    edge = [f"{task}/{method}" for task in runs.tasks for method in methods if _is_at_edge(runs, task, method)]
    if edge:
        notes.append(f"Chosen at the edge of what was tried, so a value beyond it might do better: {', '.join(edge)}.")
    reported = rows_of(runs.reported)
    unlike = [run for run in reported if _differs(_chosen(runs, run.task, run.method), run.trial)]
    if unlike:
        notes.append(f"Not with the chosen values: {_who(unlike)}.")
    without = [run for run in reported if keys and run.steps > 0 and not _chosen(runs, run.task, run.method)]
    if without:
        notes.append(f"Without a choice on held-out examples, with the given values: {_who(without)}.")
    ahead = [run for run in rows_of(runs.selecting) if _saw_reported(run)]
    if ahead:
        notes.append(f"The choice looked at reported examples: {_who(ahead)}.")
    return notes


def _is_at_edge(runs: Runs, task: str, method: str) -> bool:
    """Whether a chosen number is the least or the greatest of three or more that were tried."""
    tried = [values for values, _ in _choice(runs, task, method).get("tried", [])]
    for key, value in _chosen(runs, task, method).items():
        numbers = {values[key] for values in tried if isinstance(values[key], int | float)}
        if len(numbers) > 2 and value in (min(numbers), max(numbers)):
            return True
    return False


def _differs(chosen: Mapping[str, Any], trial: Mapping[str, Any]) -> bool:
    """Whether a trial was made with other values than the chosen ones, which are by dotted key."""
    for key, value in chosen.items():
        found: Any = trial
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found != value:
            return True
    return False


def _different_settings(runs: Runs) -> list[str]:
    """Return in which settings the runs of one task differ beyond seed, method and what was chosen."""
    free = {f"training.{name}" for name in _FREE_SETTINGS} | set(_chosen_keys(runs))
    notes = []
    for task in runs.tasks:
        frame = runs.of(task=task)
        settings = pd.DataFrame([_settings(run) for run in rows_of(frame)], dtype=object)
        for key in settings.columns:
            if key not in free:
                notes += _difference(f"{key} on {task}", frame, settings[key], _by_method)
    return notes


def _settings(run: Run) -> dict[str, Any]:
    """Return by dotted key what all runs of a task should have in common."""
    return {
        "model": run.model,
        **{f"task.{key}": value for key, value in run.trial["task"].items()},
        **{f"training.{key}": value for key, value in run.trial["training"].items()},
        "metric": run.metric,
        "planned steps": run.planned_steps,
        **{f"examples of {split}": count for split, count in run.result["examples"].items()},
    }


def _different_machines(frame: pd.DataFrame) -> list[str]:
    """Return which versions, revisions, machines and threads made the runs if they differ; and edited sources."""
    notes = []
    versions = pd.DataFrame(list(frame.result.map(lambda result: result["versions"])), dtype=object)
    for package in versions.columns:
        notes += _difference(package, frame, versions[package], _who)
    for key in _MACHINE:
        notes += _difference(key, frame, frame[key], _who)
    edited = [run for run in rows_of(frame) if str(run.git_revision).endswith("+changes")]
    if edited:
        notes.append(f"Made with a source that was edited after its revision: {_who(edited)}.")
    return notes


def _difference(
    what: str, frame: pd.DataFrame, values: Iterable[object], who: Callable[[Sequence[Run]], str]
) -> list[str]:
    """Return a note that lists the runs by value, the commonest first; nothing if all runs have the same."""
    groups: dict[str, list[Run]] = {}
    for run, value in zip(rows_of(frame), values, strict=True):
        groups.setdefault(show(value), []).append(run)
    if len(groups) < 2:
        return []
    commonest = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [f"Different {what}: " + "; ".join(f"{value} ({who(runs)})" for value, runs in commonest) + "."]


def _by_method(runs: Sequence[Run]) -> str:
    return listing(_distinct(run.method for run in runs))


def _who(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs) if len(runs) <= _MOST_NAMES else counted(len(runs), "run")


def _as_set(values: Sequence[Mapping[str, Any]]) -> set[str]:
    return {repr(sorted(value.items())) for value in values}


def _numbers_first(value: object) -> tuple[bool, float, str]:
    is_number = isinstance(value, float | int)
    return not is_number, float(value) if isinstance(value, float | int) else 0.0, str(value)


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
