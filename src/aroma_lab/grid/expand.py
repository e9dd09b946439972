"""From a grid to its trials, each fully resolved."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Literal

from aroma.errors import AromaError, ConfigError

from ..run.trial import Trial
from .settings import Settings, section_of
from .spec import WHOLE, Grid, Part

Chosen = Mapping[str, Mapping[str, Settings]]
"""What a selection chose: settings by task and method."""


def expand(grid: Grid, chosen: Chosen | None = None, part: Part = WHOLE) -> list[Trial]:
    """Return the reported trials: all methods and tasks with the first seed, then with the second, and so on.

    So a grid that is stopped half-way has a whole table of fewer seeds.

    Args:
        grid: The grid.
        chosen: What the selection chose; pairs of task and method that it lacks have no trials. None where nothing is
            chosen.
        part: Which of the trials.

    Raises:
        ConfigError: A value that cannot work.
    """
    return [
        make_trial(
            grid,
            task,
            method,
            seed,
            name=report_name(task, method, seed),
            settings=chosen[task][method] if chosen is not None else {},
        )
        for seed in grid.seeds
        for task in grid.tasks
        for method in grid.methods
        if part.has(task, method) and (chosen is None or method in chosen.get(task, {}))
    ]


def report_name(task: str, method: str, seed: int) -> str:
    """Return the name of a reported trial, which is its folder's below the runs."""
    return f"{task}/{method}/seed-{seed}"


def make_trial(
    grid: Grid,
    task: str,
    method: str,
    seed: int,
    *,
    name: str,
    settings: Settings | None = None,
    purpose: Literal["report", "select"] = "report",
) -> Trial:
    """Return one trial of a grid.

    Args:
        grid: The grid.
        task: Name of a task of it.
        method: Label of a method of it.
        seed: Seed of the trial.
        name: Name of its folder.
        settings: Checked settings by dotted key; stronger than the grid's overrides.
        purpose: `"select"` for one that is scored on held-out examples alone.

    Raises:
        ConfigError: A value that cannot work.
    """
    resolved = {**grid.settings(task, method), **(settings or {}), "training.seed": seed}
    return Trial(
        name=name,
        model=resolved.get("model", grid.model),
        task=replace(grid.tasks[task], **section_of(resolved, "task")),
        method=method,
        kind=grid.methods[method].kind,
        options={**grid.methods[method].options, **section_of(resolved, "options")},
        training=replace(grid.training, **section_of(resolved, "training")),
        purpose=purpose,
        dtype=grid.dtype,
        quantization=grid.quantization,
    )


def check_methods(trials: Iterable[Trial]) -> None:
    """Make every method once, so that a wrong option is refused before anything runs. Loads PyTorch.

    Raises:
        ConfigError: An unknown kind or option, or a value that cannot work, under the method's label.
    """
    from ..methods.registry import make_method

    for trial in {_method_key(trial): trial for trial in trials}.values():
        try:
            make_method(trial.kind, trial.options)
        except AromaError as error:
            raise ConfigError(f"methods.{trial.method}: {error}") from error


def check_tasks(trials: Iterable[Trial]) -> None:
    """Read every task once, as its trials will, so that what cannot be used is refused before anything runs.

    The tokenizer is loaded, the model is not. What is reported is opened only for tasks of trials that report it.

    Raises:
        ConfigError: An unknown task or metric, values that contradict each other, or a tokenizer that cannot be
            loaded, under the task's name.
        DataError: Examples that cannot be used, likewise.
    """
    from ..run.work import work_of

    # Of equal tasks the last counts: a trial that reports reads all that one that selects does.
    by_task = {_task_key(trial): trial for trial in sorted(trials, key=lambda trial: trial.purpose == "report")}
    for trial in by_task.values():
        try:
            work_of(trial)
        except AromaError as error:
            if str(error).startswith(f"tasks.{trial.task.name}."):
                raise
            raise type(error)(f"tasks.{trial.task.name}: {error}") from error


def _method_key(trial: Trial) -> str:
    return json.dumps([trial.kind, trial.options], sort_keys=True)


def _task_key(trial: Trial) -> str:
    return json.dumps([trial.model, asdict(trial.task)], sort_keys=True)
