"""How the numbers of a table came about, in sentences, from the records themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .formats import counted, listing, plain, show, span
from .records import Records, Run


def protocol(records: Records) -> str:
    """Return the protocol: model, data, length of training, which weights, how settings were chosen."""
    if not records.runs:
        return "No run has finished."
    sentences = [
        f"Model: {listing(_distinct(run.trial['model'] for run in records.runs))}.",
        *(_task_sentence(task, records.of(task=task)) for task in records.tasks if records.of(task=task)),
        _training_sentence(records.runs),
        _checkpoint_sentence(records.runs),
        selection_sentence(records),
    ]
    return " ".join(sentences)


def seeds_sentence(records: Records) -> str:
    """Return what a mean and a deviation are taken over."""
    seeds = records.seeds
    listed = f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"
    if len(seeds) == 1:
        return f"One seed ({seeds[0]}), so no deviation is known."
    return f"Mean ± sample standard deviation over {listed}."


def chosen(records: Records, task: str, method: str) -> Mapping[str, Any]:
    """Return the settings that `selection.json` says were chosen, by dotted key; empty where none were."""
    return _entry(records, task, method).get("chosen") or {}


def chosen_keys(records: Records) -> list[str]:
    """Return the dotted keys that were chosen for any task and method."""
    return _distinct(
        key for task in records.tasks for method in records.methods for key in chosen(records, task, method)
    )


def selection_sentence(records: Records) -> str:
    """Return how the learning rate, or whatever was chosen, was chosen."""
    keys = chosen_keys(records)
    if not keys:
        return "Nothing was chosen by these runs: learning rates and all else are those that were given."
    return (
        f"Chosen for each task and method: {listing(keys)}, among {_candidates(records, keys)}, by the score on "
        f"held-out training examples (of equal scores the lower loss){_selecting_runs(records.selecting)}."
    )


def _task_sentence(task: str, runs: Sequence[Run]) -> str:
    examples: list[Mapping[str, int]] = [run.result["examples"] for run in runs]

    def number(part: str) -> str:
        return span([counts[part] for counts in examples if part in counts])

    splits = [part for part in _distinct(key for counts in examples for key in counts) if part not in _NOT_REPORTED]
    reported = listing([f"{number(split)} of {split}" for split in splits])
    held_out = (
        f", {number('held_out')} held out of training" if any("held_out" in counts for counts in examples) else ""
    )
    metric = "/".join(_distinct(run.result["metric"] for run in runs))
    return f"{task}: {metric} on all {reported}; trained on {number('train')} examples{held_out}."


_NOT_REPORTED = ("train", "held_out")


def _training_sentence(runs: Sequence[Run]) -> str:
    steps = span([run.result["planned_steps"] for run in runs])
    batch = span(
        [run.training.get("batch_size", 1) * run.training.get("gradient_accumulation_steps", 1) for run in runs]
    )
    precision = {bool(run.training.get("bf16")) for run in runs}
    wording = {(True,): " in bf16 mixed precision", (False,): "", (False, True): ", some in bf16 mixed precision"}
    return f"{steps} steps of {batch} examples{wording[tuple(sorted(precision))]}."


def _checkpoint_sentence(runs: Sequence[Run]) -> str:
    rules = _distinct(run.training.get("checkpoint", "last") for run in runs)
    meaning = {"last": "those of the last step", "best": "those of the best evaluation on held-out training examples"}
    return f"Weights: {listing([meaning.get(rule, rule) for rule in rules])}."


def _entry(records: Records, task: str, method: str) -> Mapping[str, Any]:
    of_task = records.selection.get(task)
    entry = of_task.get(method) if isinstance(of_task, Mapping) else None
    return entry if isinstance(entry, Mapping) else {}


def _candidates(records: Records, keys: Sequence[str]) -> str:
    """Return the values that were tried, where they are the same everywhere; their number if not."""
    entries = [_entry(records, task, method) for task in records.tasks for method in records.methods]
    tried = [[values for values, _ in entry["tried"]] for entry in entries if entry.get("tried")]
    if not tried:
        return "values that selection.json does not tell"
    if any(_as_set(values) != _as_set(tried[0]) for values in tried):
        return f"{span([len(values) for values in tried])} candidates (selection.json lists them)"
    if len(keys) == 1 and all(isinstance(values, Mapping) and keys[0] in values for values in tried[0]):
        return listing([show(value) for value in sorted((values[keys[0]] for values in tried[0]), key=_numbers_first)])
    return f"{len(tried[0])} candidates (selection.json lists them)"


def _selecting_runs(runs: Sequence[Run]) -> str:
    """Return the length and the seeds of the runs that chose, and whether they looked at reported examples."""
    if not runs:
        return " (the runs that chose are not in the folder)"
    seeds = sorted({run.seed for run in runs})
    steps = span([run.result["planned_steps"] for run in runs])
    unseen = "" if any(run.result.get("reported") for run in runs) else "; none of them saw a reported example"
    return (
        f" in runs of {steps} steps, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(plain, seeds))}{unseen}"
    )


def _as_set(values: Sequence[Any]) -> set[str]:
    return {repr(sorted(value.items())) if isinstance(value, Mapping) else repr(value) for value in values}


def _numbers_first(value: object) -> tuple[bool, float, str]:
    is_number = isinstance(value, float | int)
    return not is_number, float(value) if isinstance(value, float | int) else 0.0, str(value)


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def differing(runs: Sequence[Run], values: Mapping[str, Any]) -> dict[str, list[Run]]:
    """Return the runs by their value, given by name and shown as text, the commonest first; one entry if all agree."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(show(values[run.name]), []).append(run)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))
