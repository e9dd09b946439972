"""How the numbers of a table came about: sentences for its caption, and notes on what failed or was not made alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from ..study.selection import edges, first_of
from .formats import amount, counted, listing, show, span
from .runs import Runs, rows_of
from .statistics import CONFIDENCE, FEW_SEEDS, RESAMPLES

_MOST_NAMES = 4
"""Runs that a note names; of more it gives the number."""
_MOST_CELLS = 12
"""Runs not begun that a note names."""
_MACHINE = ["git_revision", "platform", "device", "cpu_count", "threads"]
_FREE_SETTINGS = ("seed", "save_steps", "keep_checkpoints", "logging_steps", "eval_steps")
"""Settings of the loop that leave a run's numbers alone, or are meant to differ."""
_CHECKPOINTS = {"last": "those of the last step", "best": "those of the best evaluation on held-out training examples"}


def protocol(runs: Runs) -> str:
    """Return the protocol: model, data, length of training, which weights, how settings were chosen."""
    frame = runs.reported
    if frame.empty:
        return "No run has finished."
    loops = [trial["training"] for trial in frame.trial]
    batch = span([loop.get("batch_size", 1) * loop.get("gradient_accumulation_steps", 1) for loop in loops])
    some = {loop.get("bf16", False) for loop in loops}
    precision = "" if some == {False} else f",{' some' * (len(some) > 1)} in bf16 mixed precision"
    rules = dict.fromkeys(loop.get("checkpoint", "last") for loop in loops)
    sentences = [
        f"Model: {listing(list(frame.model.unique()))}.",
        *_pooler_sentences(frame),
        *(_task_sentence(task, of_task) for task in runs.tasks if len(of_task := runs.of(task=task))),
        f"{span(frame.planned_steps.tolist())} steps of {batch} examples{precision}.",
        f"Weights: {listing([_CHECKPOINTS.get(rule, rule) for rule in rules])}.",
        *_asked_sentences(frame),
        _selection_sentence(runs),
    ]
    return " ".join(sentences)


def seeds_sentence(runs: Runs) -> str:
    """Return what mean and deviation are taken over."""
    if len(runs.seeds) == 1:
        return f"One seed ({runs.seeds[0]}), so the deviation is unknown."
    seeds = f"{counted(len(runs.seeds), 'seed')} ({', '.join(map(str, runs.seeds))})"
    return f"Mean ± sample standard deviation over {seeds}."


def parameters_sentence(runs: Runs) -> str:
    """Return what the trainable parameters are."""
    # A method that trains nothing has no head to train either.
    heads = runs.reported.head_parameters[runs.reported.steps > 0]
    sentence = "Trainable parameters on average: over the planned steps"
    return f"{sentence}, without the head's {span(heads.tolist(), amount)}." if any(heads) else f"{sentence}."


def difference_sentence(runs: Runs, baseline: str, over_tasks: bool = True) -> str:
    """Return how differences and their intervals were computed."""
    over = ", mean over the tasks" if over_tasks else ""
    text = (
        f"Difference to {baseline}: of runs of the same task and seed, in points{over}; "
        f"interval: {CONFIDENCE:.0%} bootstrap, percentiles of {RESAMPLES:,} resamples of the seeds of each task."
    )
    if 1 < len(runs.seeds) < FEW_SEEDS:
        text += f" With {len(runs.seeds)} seeds such an interval is narrower than it should be."
    return text


def interval_notes(differences: pd.DataFrame, baseline: str) -> list[str]:
    """Return which methods have no interval, and why."""
    single = differences.single.dropna()
    return [
        f"No interval for {', '.join(methods)}: a single seed shared with {baseline} on {tasks}."
        for tasks, methods in single[single != ""].groupby(single).groups.items()
    ]


def stopped_early(runs: Runs) -> list[str]:
    """Return how many runs of each method stopped before their last planned step."""
    notes = []
    for method in runs.methods:
        of_method = runs.of(method)
        early = of_method[of_method.stopped_early.astype(bool)]
        if len(early):
            share = f"{early.steps.sum() / early.planned_steps.sum():.0%} of the planned steps"
            notes.append(f"{method}: {len(early)} of {counted(len(of_method), 'run')} stopped early, after {share}.")
    return notes


def common_notes(runs: Runs) -> list[str]:
    """Return the notes that every table has: runs that are missing, choices, and what was not alike."""
    trained = runs.reported.groupby("method").steps.max() > 0
    idle = [method for method in runs.methods if not trained.get(method, True)]
    begun = {(row["task"], row["method"], row["seed"]) for row in runs.rows if not row["selects"]}
    cells = [(task, method, seed) for task in runs.tasks for method in runs.methods for seed in runs.seeds]
    missing = [f"{task}/{method}, seed {seed}" for task, method, seed in cells if (task, method, seed) not in begun]
    failed = rows_of(runs.in_state("failed"))
    edited = runs.reported.name[runs.reported.git_revision.astype(str).str.endswith("+changes")]
    return [
        *_note("{}: nothing trains; the pretrained model as it is.", listing(idle)),
        *(f"Failed: {run.name}: {run.message} ({run.folder}/failure.json)" for run in failed),
        *_note("Not finished: {}.", ", ".join(runs.in_state("unfinished").name)),
        *_note("Not begun: {}.", "; ".join(missing) if len(missing) <= _MOST_CELLS else counted(len(missing), "run")),
        *_choices(runs, idle),
        *_different_settings(runs),
        *_different_machines(runs.reported),
        *_note("Made with a source that was edited after its revision: {}.", _who(edited)),
    ]


def _note(sentence: str, names: str) -> list[str]:
    return [sentence.format(names)] if names else []


def _task_sentence(task: str, frame: pd.DataFrame) -> str:
    examples = pd.DataFrame(list(frame.result.map(lambda result: result["examples"])))
    number = {part: span(examples[part].dropna().tolist()) for part in examples}
    trained, held_out = number.pop("train"), number.pop("held_out", None)
    reported = listing([f"{count} of {split}" for split, count in number.items()])
    held = f", {held_out} held out of training" if held_out else ""
    return f"{task}: {'/'.join(frame.metric.unique())} on all {reported}; trained on {trained} examples{held}."


def _asked_sentences(frame: pd.DataFrame) -> list[str]:
    """Return how many training examples each method held out, and asked."""
    asked = frame.result.map(lambda result: result.get("asked_examples", 0))
    counts = asked[asked > 0].groupby(frame.method, sort=False).agg(list)
    return [
        f"{method}: asks {span(some)} of the training examples, which train nothing."
        for method, some in counts.items()
    ]


def _pooler_sentences(frame: pd.DataFrame) -> list[str]:
    """Return whether the encoder's pooler trained with the head, and why; nothing of runs that say nothing of it."""
    known = [result["pooler"] for result in frame.result if result.get("pooler")]
    said = {f"{'trains with the head' if one['trains'] else 'is frozen'} ({one['reason']})": None for one in known}
    return [f"The encoder's pooler {listing(list(said))}."] if said else []


def _selection_sentence(runs: Runs) -> str:
    keys = dict.fromkeys(key for entry in _entries(runs).values() for key in entry["chosen"])
    if not keys:
        return "These runs chose nothing: learning rates and all other settings are as given."
    tried = [values for entry in _entries(runs).values() for values in entry["tried"]]
    among = {key: sorted((values.get(key) for values in tried), key=_number_first) for key in keys}
    text = "; ".join(f"{key} among {listing(list(dict.fromkeys(map(show, among[key]))))}" for key in keys)
    frame, how = runs.selecting, ""
    if len(frame):
        is_first = frame.name.map(first_of) == frame.name
        seeds, further = (listing(list(map(str, sorted(set(frame.seed[which]))))) for which in (is_first, ~is_first))
        how = f", in runs of {span(frame.planned_steps.tolist())} steps with seed {seeds}"
        if further:
            how += f", and of the best with {further}, whose mean counts"
        if not all(frame.result.map(holds_out)):
            return f"Chosen for each task and method by the {runs.chose_by} on what is trained on{how}: {text}."
        if not any(frame.result.map(lambda result: result.get("reported"))):
            how += "; none of them saw a reported example"
    return f"Chosen for each task and method by the {runs.chose_by} on held-out training examples{how}: {text}."


def holds_out(result: Mapping[str, Any]) -> bool:
    """Whether the run of a result kept examples apart; where pairs are learnt by heart there is nothing to keep."""
    return bool(result["examples"].keys() & {"held_out", "validation"})


def _entries(runs: Runs) -> dict[tuple[str, str], dict[str, Any]]:
    """Return by task and method which settings were `chosen`, by dotted key, and all that were `tried`."""
    return {
        (task, method): {
            "chosen": entry.get("chosen") or {},
            "tried": [values for values, _ in entry.get("tried") or ()],
        }
        for task in runs.tasks
        for method in runs.methods
        if (entry := runs.selection.get(task, {}).get(method)) is not None
    }


def _choices(runs: Runs, idle: Iterable[str]) -> list[str]:
    """Return what was chosen for every method, task by task; and where a run did not use it, or looked ahead."""
    entries = {key: entry for key, entry in _entries(runs).items() if key[1] not in idle}
    chosen: dict[str, list[str]] = {}
    edge = []
    for (task, method), entry in entries.items():
        for key, value in entry["chosen"].items():
            chosen.setdefault(f"Chosen {key} on {task}", []).append(f"{method} {show(value)}")
        for key, further in edges(entry["tried"], entry["chosen"]).items():
            edge.append(
                f"The optimum of {method} on {task} is at the edge of what was tried: add {key}={show(further)}."
            )
    without, unlike = [], []
    for run in rows_of(runs.reported):
        picked = entries.get((run.task, run.method), {}).get("chosen")
        if not picked and chosen and run.method not in idle:
            without.append(run.name)
        settings = pd.json_normalize(run.trial).iloc[0]
        if any(settings.get(key) != value for key, value in (picked or {}).items()):
            unlike.append(run.name)
    ahead = runs.selecting.name[[bool(result.get("reported")) for result in runs.selecting.result]]
    return [
        *edge,
        *(f"{what}: {', '.join(values)}." for what, values in chosen.items()),
        *_note("Not with the chosen values: {}.", _who(unlike)),
        *_note("Without a choice on held-out examples, with the given values: {}.", _who(without)),
        *_note("Runs that chose settings also evaluated reported examples: {}.", _who(ahead)),
    ]


def _different_settings(runs: Runs) -> list[str]:
    """Return in which settings the runs of one task differ beyond seed, method and what was chosen."""
    chosen = [key for entry in _entries(runs).values() for key in entry["chosen"]]
    notes = []
    for task in runs.tasks:
        frame = runs.of(task=task).reset_index(drop=True)
        settings = pd.json_normalize(list(frame.trial)).filter(regex=r"^(model$|task\.|training\.)").astype(object)
        settings[["metric", "planned steps"]] = frame[["metric", "planned_steps"]]
        examples = pd.DataFrame(list(frame.result.map(lambda result: result["examples"]))).add_prefix("examples of ")
        free = [*(f"training.{name}" for name in _FREE_SETTINGS), *chosen]
        notes += _different(settings.join(examples).drop(columns=free, errors="ignore"), frame.method, f" on {task}")
    return notes


def _different_machines(frame: pd.DataFrame) -> list[str]:
    versions = pd.DataFrame([result["versions"] for result in frame.result], dtype=object)
    machine = frame[_MACHINE].reset_index(drop=True)
    return _different(versions.join(machine) if len(versions) else machine, frame.name.reset_index(drop=True))


def _different(values: pd.DataFrame, names: pd.Series[Any], where: str = "") -> list[str]:
    notes = []
    for key in values:
        groups = names.groupby(values[key].map(show), sort=False).agg(list)
        if len(groups) > 1:
            commonest = sorted(groups.items(), key=lambda group: -len(group[1]))
            listed = "; ".join(f"{value} ({_who(those)})" for value, those in commonest)
            notes.append(f"Different {key}{where}: {listed}.")
    return notes


def _who(names: Iterable[str]) -> str:
    """Return the names, or how many runs there are if they are many; empty if there are none."""
    runs = list(names)
    distinct = list(dict.fromkeys(runs))
    return ", ".join(distinct) if len(distinct) <= _MOST_NAMES else counted(len(runs), "run")


def _number_first(value: object) -> tuple[bool, float, str]:
    return (False, value, "") if isinstance(value, float | int) else (True, 0.0, str(value))
