"""How the numbers of a table came about: sentences for its caption, and notes on what failed or was not made alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from ..study.selection import edges
from .formats import counted, listing, span
from .runs import MACHINE, Runs, rows_of

_CHECKPOINTS = {"last": "those of the last step", "best": "those of the best evaluation on held-out training examples"}


def protocol(runs: Runs) -> str:
    """Return the protocol: model, data, length of training, which weights, how settings were chosen."""
    frame = runs.reported
    if frame.empty:
        return "No run has finished."
    loops = [trial["training"] for trial in frame.trial]
    batch = span([loop.get("batch_size", 1) * loop.get("gradient_accumulation_steps", 1) for loop in loops])
    mixed = ", in bf16 mixed precision" if any(loop.get("bf16") for loop in loops) else ""
    rules = dict.fromkeys(loop.get("checkpoint", "last") for loop in loops)
    sentences = [
        f"Model: {listing(list(frame.model.unique()))}.",
        *(_task_sentence(task, of_task) for task in runs.tasks if len(of_task := runs.of(task=task))),
        f"{span(frame.planned_steps.tolist())} steps of {batch} examples{mixed}.",
        f"Weights: {listing([_CHECKPOINTS[rule] for rule in rules])}.",
        _selection_sentence(runs),
    ]
    return " ".join(sentences)


def seeds_sentence(runs: Runs) -> str:
    """Return what mean and deviation are taken over."""
    if len(runs.seeds) == 1:
        return f"One seed ({runs.seeds[0]}), so the deviation is unknown."
    seeds = f"{counted(len(runs.seeds), 'seed')} ({', '.join(map(str, runs.seeds))})"
    return f"Mean ± sample standard deviation over {seeds}."


def common_notes(runs: Runs) -> list[str]:
    """Return the notes of every table: missing runs, choices at an edge of the grid, and settings that differ."""
    begun = {(row["task"], row["method"], row["seed"]) for row in runs.rows if not row["selects"]}
    cells = [(task, method, seed) for task in runs.tasks for method in runs.methods for seed in runs.seeds]
    missing = [f"{task}/{method}/seed-{seed}" for task, method, seed in cells if (task, method, seed) not in begun]
    ahead = runs.selecting.name[[bool(result.get("reported")) for result in runs.selecting.result]]
    return [
        *(f"Failed: {one.name}: {one.message}" for one in rows_of(runs.in_state("failed"))),
        *_note("Not finished: {}.", runs.in_state("unfinished").name),
        *_note("Not begun: {}.", missing),
        *_stopped_early(runs),
        *_edges(runs),
        *_note("Runs that chose settings also evaluated reported examples: {}.", ahead),
        *_not_alike(runs),
    ]


def holds_out(result: Any) -> bool:
    """Whether the run of a result kept examples apart; of random pairs to memorise there is nothing to keep."""
    return bool(result["examples"].keys() & {"held_out", "validation"})


def _task_sentence(task: str, frame: pd.DataFrame) -> str:
    examples = pd.DataFrame(list(frame.result.map(lambda result: result["examples"])))
    number = {part: span(examples[part].dropna().tolist()) for part in examples}
    trained, held_out = number.pop("train"), number.pop("held_out", None)
    reported = listing([f"{count} of {split}" for split, count in number.items()])
    held = f", {held_out} held out of training" if held_out else ""
    return f"{task}: {'/'.join(frame.metric.unique())} on all {reported}; trained on {trained} examples{held}."


def _selection_sentence(runs: Runs) -> str:
    entries = [entry for of_task in runs.selection.values() for entry in of_task.values() if entry.get("chosen")]
    among: dict[str, dict[str, None]] = {}
    for key, value in [item for entry in entries for values, _ in entry["tried"] for item in values.items()]:
        among.setdefault(key, {})[_show(value)] = None
    if not entries:
        return "These runs chose nothing: learning rates and all other settings are as given."
    text = "; ".join(f"{key} among {listing(list(values))}" for key, values in among.items())
    data = "held-out training examples" if runs.selecting.result.map(holds_out).all() else "what is trained on"
    return f"Chosen for each task and method by the {runs.chose_by} on {data}: {text}."


def _show(value: object) -> str:
    return f"{value:.10g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _edges(runs: Runs) -> Iterator[str]:
    for task, of_task in runs.selection.items():
        for method, entry in of_task.items():
            tried = [values for values, _ in entry["tried"]]
            for key, further in edges(tried, entry["chosen"]).items() if entry.get("chosen") else ():
                added = f"add {key}={_show(further)}."
                yield f"The optimum of {method} on {task} is at the edge of what was tried: {added}"


def _stopped_early(runs: Runs) -> Iterator[str]:
    for method in runs.methods:
        of_method = runs.of(method)
        early = of_method[of_method.stopped_early.astype(bool)]
        if len(early):
            share = f"{early.steps.sum() / early.planned_steps.sum():.0%} of the planned steps"
            yield f"{method}: {len(early)} of {counted(len(of_method), 'run')} stopped early, after {share}."


def _not_alike(runs: Runs) -> Iterator[str]:
    """Yield in what versions, source and machine the runs differ."""
    frame = runs.reported
    versions = pd.DataFrame([result["versions"] for result in frame.result], index=frame.index, dtype=object)
    for key, values in frame[[*MACHINE]].join(versions).astype(str).items():
        groups = frame.name.groupby(values, sort=False).agg(list)
        if len(groups) > 1:
            commonest = sorted(groups.items(), key=lambda group: -len(group[1]))
            yield f"Different {key}: {'; '.join(f'{value} ({_who(those)})' for value, those in commonest)}."


def _note(sentence: str, names: Iterable[str]) -> list[str]:
    listed = _who(names)
    return [sentence.format(listed)] if listed else []


def _who(names: Iterable[str]) -> str:
    """Return the names, or how many runs there are if they are more than four; empty if there are none."""
    runs = list(names)
    return ", ".join(runs) if len(runs) <= 4 else counted(len(runs), "run")
