"""What stands below a table: runs that failed or lack, and runs that were not made alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .formats import counted, listing, plain, show
from .protocol import chosen, chosen_keys, differing
from .records import Attempt, Records, Run

_MOST_NAMES = 4
"""Runs that a note names; of more it gives the number."""
_MOST_CELLS = 12
"""Runs without a folder that it names."""
_MACHINE = ("git_revision", "platform", "device", "cpu_count", "threads")
# What does not touch a run's numbers, or is meant to differ.
_FREE_SETTINGS = ("seed", "save_steps", "keep_checkpoints", "logging_steps", "eval_steps")


def common_notes(records: Records) -> list[str]:
    """Return the notes that every table bears, an entry a matter."""
    return [
        *untrained(records),
        *lacking(records),
        *chosen_notes(records),
        *protocol_mismatches(records),
        *provenance_notes(records.runs),
    ]


def untrained(records: Records) -> list[str]:
    """Return which methods train nothing."""
    methods = [method for method in records.methods if not trains(records, method)]
    return [f"{listing(methods)}: nothing trains; the pretrained model as it is."] if methods else []


def trains(records: Records, method: str) -> bool:
    """Whether a method trains anything, as far as finished runs tell."""
    runs = records.of(method)
    return not runs or any(run.trains for run in runs)


def lacking(records: Records) -> list[str]:
    """Return the runs that failed, with what they said and where, and those that have not finished or begun."""
    notes = []
    for failure in records.failures:
        where = (failure.folder / "failure.json").relative_to(records.folder)
        notes.append(f"Failed: {failure.name}: {failure.message} ({where.as_posix()})")
    if records.unfinished:
        notes.append(f"Not finished: {', '.join(_names(records.unfinished))}.")
    if records.not_begun:
        names = records.not_begun
        listed = "; ".join(names) if len(names) <= _MOST_CELLS else counted(len(names), "run")
        notes.append(f"Not begun: {listed}.")
    return notes


def chosen_notes(records: Records) -> list[str]:
    """Return what was chosen for every method, task by task; and where a run did not use it, or looked ahead."""
    notes = []
    # Whatever is tried of a method that trains nothing is one and the same.
    methods = [method for method in records.methods if trains(records, method)]
    for key in chosen_keys(records):
        for task in records.tasks:
            picked = {method: chosen(records, task, method).get(key) for method in methods}
            listed = [f"{method} {show(value)}" for method, value in picked.items() if value is not None]
            if listed:
                notes.append(f"Chosen {key} on {task}: {', '.join(listed)}.")
    nothing = [
        f"{task}/{method}"
        for task, of_task in records.selection.items()
        for method in of_task
        if not chosen(records, task, method)
    ]
    if nothing:
        notes.append(f"Nothing could be chosen, no candidate has a score: {', '.join(nothing)}.")
    edge = [f"{task}/{method}" for task in records.tasks for method in methods if _at_edge(records, task, method)]
    if edge:
        notes.append(f"Chosen at the edge of what was tried, so that more might be had beyond: {', '.join(edge)}.")
    unlike = [run for run in records.runs if _differs_from_choice(records, run)]
    if unlike:
        notes.append(f"Not with the chosen values: {_who(unlike)}.")
    keys = chosen_keys(records)
    without = [run for run in records.runs if keys and run.trains and not chosen(records, run.task, run.method)]
    if without:
        notes.append(f"Without a choice on held-out examples, with the given values: {_who(without)}.")
    ahead = [run for run in records.selecting if run.result.get("reported")]
    if ahead:
        notes.append(f"The choice looked at reported examples: {_who(ahead)}.")
    return notes


def _at_edge(records: Records, task: str, method: str) -> bool:
    """Whether a chosen number is the least or the greatest of three tried ones or more."""
    tried = [values for values, _ in records.selection.get(task, {}).get(method, {}).get("tried", [])]
    for key, value in chosen(records, task, method).items():
        numbers = {values[key] for values in tried if isinstance(values[key], int | float)}
        if len(numbers) > 2 and value in (min(numbers), max(numbers)):
            return True
    return False


def protocol_mismatches(records: Records) -> list[str]:
    """Return in which settings the runs of one task differ beyond seed, method and what was chosen."""
    free = {f"training.{name}" for name in _FREE_SETTINGS} | set(chosen_keys(records))
    notes = []
    for task in records.tasks:
        runs = records.of(task=task)
        settings = {run.name: _settings(run) for run in runs}
        for key in dict.fromkeys(key for found in settings.values() for key in found):
            if key not in free:
                groups = differing(runs, {name: found.get(key) for name, found in settings.items()})
                notes += _difference_note(f"{key} on {task}", groups, _by_method)
    return notes


def provenance_notes(runs: Sequence[Run]) -> list[str]:
    """Return which versions, revisions, machines and threads made the runs, where they differ; and edited sources."""
    notes = []
    packages = dict.fromkeys(name for run in runs for name in run.result["versions"])
    for name in packages:
        of_run = {run.name: run.result["versions"].get(name) for run in runs}
        notes += _difference_note(name, differing(runs, of_run), _who)
    for key in _MACHINE:
        notes += _difference_note(key, differing(runs, {run.name: run.result[key] for run in runs}), _who)
    edited = [run for run in runs if str(run.result["git_revision"]).endswith("+changes")]
    if edited:
        notes.append(f"Made with a source that was edited after its revision: {_who(edited)}.")
    return notes


def _settings(run: Run) -> dict[str, Any]:
    """Return by dotted key what all runs of a task are to have in common."""
    result = run.result
    return {
        "model": run.trial["model"],
        **{f"task.{key}": value for key, value in run.trial["task"].items()},
        **{f"training.{key}": value for key, value in run.training.items()},
        "metric": result["metric"],
        "planned steps": result["planned_steps"],
        **{f"examples of {split}": count for split, count in result["examples"].items()},
    }


def _differs_from_choice(records: Records, run: Run) -> bool:
    for key, value in chosen(records, run.task, run.method).items():
        found: Any = run.trial
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found != value:
            return True
    return False


def _difference_note(what: str, groups: Mapping[str, Sequence[Run]], who: Callable[[Sequence[Run]], str]) -> list[str]:
    if len(groups) < 2:
        return []
    return [f"Different {what}: " + "; ".join(f"{value} ({who(runs)})" for value, runs in groups.items()) + "."]


def _by_method(runs: Sequence[Run]) -> str:
    return listing(list(dict.fromkeys(run.method for run in runs)))


def _who(runs: Sequence[Run]) -> str:
    return ", ".join(_names(runs)) if len(runs) <= _MOST_NAMES else counted(len(runs), "run")


def _names(attempts: Sequence[Attempt]) -> list[str]:
    return [attempt.name for attempt in attempts]


def stopped_early(records: Records) -> list[str]:
    """Return how many runs of each method stopped before their last planned step."""
    notes = []
    for method in records.methods:
        runs = records.of(method)
        early = [run for run in runs if run.result["stopped_early"]]
        if early:
            steps = sum(run.result["steps"] for run in early) / sum(run.result["planned_steps"] for run in early)
            share = f"{plain(len(early))} of {counted(len(runs), 'run')}"
            notes.append(f"{method}: {share} stopped early, after {steps:.0%} of the planned steps.")
    return notes
