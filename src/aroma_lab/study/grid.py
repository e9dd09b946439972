"""What a grid file says: methods × tasks × seeds on one model, how settings are chosen, and the trials that follow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any, Literal

from aroma.errors import AromaError, bad_value

from ..run.trial import Trial
from ..settings import flatten, load_values, section_of, typed, typed_fields, types_of
from ..specs import TaskSpec, TrainSpec

Settings = dict[str, Any]
"""Values by dotted key: `training.KEY` of the loop, `options.KEY` of the method, `task.KEY`, and `model`."""

Override = dict[str, Any]
"""Settings, and the names `task` and `method` of those that they apply to, one or a list; all, where they are missing.
Those of a selection can have `over`, whose lists replace the selection's for these tasks and methods; null: it is not
tried."""

Chosen = Mapping[tuple[str, str], Settings]
"""The settings that a selection chose, by task and method."""


@dataclass(frozen=True)
class Selection:
    """How settings are chosen, per task and method, on examples held out from the training data.

    Args:
        over: Values to try, by dotted key; every combination is tried.
        by: The measure of the best of them: the highest `"score"`, or the lowest `"loss"`, which says more where few
            examples are held out. The other decides between equal ones.
        seed: Seed of all these runs.
        training: Training settings that differ in them, such as a smaller `max_steps`.
        overrides: Further settings of some of them, and as `over` other values to try; later ones win.
        widen: How many further values of a number are tried, at most, as long as the best one lies at the edge of
            those tried; the best is compared with all values next to it then.
        again: Further seeds with which the two best are run, too; the better mean wins. Without any, one run of each
            decides, which may be lucky or collapse.
    """

    over: dict[str, list[Any]]
    by: Literal["score", "loss"] = "score"
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    overrides: list[Override] = field(default_factory=list)
    widen: int = 0
    again: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Grid:
    """A whole grid, as its file writes it.

    Args:
        output: Folder of all results; trials are in `runs/<name>/` below it.
        model: Hub name or folder of the pretrained model, or `"minilm"`.
        tasks: Fields of `TaskSpec` by the task's name.
        methods: `kind` (one of `aroma_lab.methods.METHODS`) and options of each method, by label.
        training: Fields of `TrainSpec`, for all trials.
        seeds: Seeds of the reported trials.
        processes: Trials at a time in one command.
        overrides: Settings of some of the trials; later ones win.
        select: How settings are chosen; None: nothing is chosen.
        data: Folder that `{data}` stands for in the source of a task, as in `{data}/mrpc`; None: no source names it.
        dtype: Type of the pretrained weights; see `ModelSpec`.
        quantization: Quantization of the pretrained weights; see `ModelSpec`.
    """

    output: str = ""
    model: str = ""
    tasks: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    processes: int = 1
    overrides: list[Override] = field(default_factory=list)
    select: Selection | None = None
    data: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["nf4", "int8"] | None = None

    def part(self, tasks: Sequence[str] | None = None, methods: Sequence[str] | None = None) -> Grid:
        """Return the grid with some of its tasks and methods; None for all."""
        kept: dict[str, Any] = {}
        for key, wanted in (("tasks", tasks), ("methods", methods)):
            known = getattr(self, key)
            for name in wanted or ():
                if name not in known:
                    raise bad_value(f"--{key}", name, f"it is not in the grid, which has {', '.join(known)}")
            kept[key] = {name: entry for name, entry in known.items() if wanted is None or name in wanted}
        return replace(self, **kept)


# Reading a file -----------------------------------------------------------------------------------------------------


def load_grid(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Grid:
    """Read a grid file.

    Args:
        path: A YAML file with the keys of `Grid`.
        overrides: Texts such as `"training.max_steps=60"` or `"methods.lora-r8.r=4"`; they win over the file.

    Raises:
        ConfigError: No such file, no YAML, or as `make_grid`.
    """
    return make_grid(load_values("grid", path, overrides))


def make_grid(values: Mapping[str, Any]) -> Grid:
    """Return the grid with these nested values.

    Raises:
        ConfigError: An unknown key (the nearest is named), a missing one, or a value that cannot work.
    """
    given = typed_fields({**types_of(Grid), "select": dict[str, Any] | None}, values, "a grid")
    if (select := given.get("select")) is not None:
        select = typed_fields({**types_of(Selection), "over": dict[str, Any]}, select, "a grid", "select.")
        over = flatten(select.get("over", {}), ("training", "options", "task"))
        if not over or not all(isinstance(values, list) and values for values in over.values()):
            example = "{training.learning_rate: [5.0e-4, 1.0e-3]}"
            raise bad_value("select.over", select.get("over"), f"name what to try, such as {example}")
        given["select"] = Selection(**{**select, "over": over})
    grid = Grid(**given)
    for key in ("output", "model", "tasks", "methods", "seeds", "processes"):
        if not (value := getattr(grid, key)):
            raise bad_value(key, value, "give it; a grid needs one")
    if min(grid.seeds) < 0 or len(set(grid.seeds)) < len(grid.seeds):
        raise bad_value("seeds", grid.seeds, "give at least one, 0 or more, each once, such as [0, 1, 2]")
    _check_overrides("overrides", grid.overrides, grid)
    if grid.select is not None:
        _check_overrides("select.overrides", grid.select.overrides, grid)
    for task, method in product(grid.tasks, grid.methods):
        make_trial(grid, task, method, grid.seeds[0], "checked", {})
    return grid


def _check_overrides(where: str, overrides: Iterable[Override], grid: Grid) -> None:
    for index, entry in enumerate(overrides):
        for name, known in (("task", grid.tasks), ("method", grid.methods)):
            for label in _listed(typed(f"{where}[{index}].{name}", entry.get(name, []), str | list[str])):
                if label not in known:
                    remedy = f"the grid has no such {name}; it has {', '.join(known)}"
                    raise bad_value(f"{where}[{index}].{name}", label, remedy)
        typed(f"{where}[{index}].over", entry.get("over", {}), dict[str, list[Any] | None])


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


# Its trials ---------------------------------------------------------------------------------------------------------


def expand(grid: Grid, chosen: Chosen | None = None) -> list[Trial]:
    """Return the reported trials: all methods and tasks with the first seed, then with the second, and so on.

    So a grid that is stopped half-way has a whole table of fewer seeds. With a selection, pairs of task and method
    that are not in `chosen` have no trials.
    """
    return [
        make_trial(grid, *pair, seed, f"{pair[0]}/{pair[1]}/seed-{seed}", {} if chosen is None else chosen[pair])
        for seed in grid.seeds
        for pair in product(grid.tasks, grid.methods)
        if chosen is None or pair in chosen
    ]


def overridden(overrides: Iterable[Override], task: str, method: str) -> Settings:
    """Return the settings of the overrides that apply to trials of a task and method, and `over`; later ones win."""
    found: Settings = {"over": {}}
    for entry in overrides:
        if task in _listed(entry.get("task", task)) and method in _listed(entry.get("method", method)):
            over = found["over"] | entry.get("over", {})
            found |= {key: value for key, value in entry.items() if key not in ("task", "method")} | {"over": over}
    return found


def make_trial(
    grid: Grid,
    task: str,
    method: str,
    seed: int,
    name: str,
    settings: Settings,
    purpose: Literal["report", "select"] = "report",
) -> Trial:
    """Return one trial of a grid, whose `settings` win over the grid's overrides.

    Raises:
        ConfigError: An unknown key, or a value that cannot work. Methods check their options when they are made.
    """
    # One thread per trial unless the grid says otherwise: with PyTorch's default, trials compete for the cores.
    sections = {"task": grid.tasks[task], "options": grid.methods[method], "training": {"threads": 1, **grid.training}}
    given = flatten({"model": grid.model, **sections}, sections) | overridden(grid.overrides, task, method) | settings
    del given["over"]
    if "{data}" in (source := str(given.get("task.source"))):
        if grid.data is None:
            raise bad_value("data", None, f"tasks.{task}.source={source!r} is below it; give the folder")
        given["task.source"] = source.replace("{data}", grid.data)
    options = section_of(given, "options")
    made = typed_fields(_types() | {f"options.{key}": Any for key in options}, given, "a grid")
    with _under(f"tasks.{task}"):
        spec = TaskSpec(name=task, **section_of(made, "task"))
    return Trial(
        name=name,
        model=made["model"],
        task=spec,
        method=method,
        kind=typed(f"methods.{method}.kind", options.pop("kind", None), str),
        options=options,
        training=TrainSpec(seed=seed, **section_of(made, "training")),
        purpose=purpose,
        dtype=grid.dtype,
        quantization=grid.quantization,
    )


@cache
def _types() -> dict[str, Any]:
    types = {"model": str, **types_of(TrainSpec, "training."), **types_of(TaskSpec, "task.")}
    return {key: kind for key, kind in types.items() if key not in ("training.seed", "task.name")}


def check_trials(trials: Iterable[Trial], to_run: Iterable[Trial]) -> None:
    """Make every method of `trials` and read every task of those `to_run` once, before anything runs.

    The tokenizer is loaded, the model is not. Reported files are opened only for tasks of trials that report them.

    Raises:
        AromaError: A wrong option, or a task that cannot be read, under the label of the method or the task.
    """
    from ..methods import make_method
    from ..run.run import job_of

    for trial in {json.dumps([one.kind, one.options, one.training.max_steps]): one for one in trials}.values():
        with _under(f"methods.{trial.method}"):
            method = make_method(trial.kind, trial.options)
            if trial.training.max_steps is not None:  # else the examples say how long a run is
                method.check_steps(trial.training.max_steps)
    # Of equal tasks the last counts: a trial that reports reads all that one that selects does.
    in_order = sorted(to_run, key=lambda trial: trial.purpose == "report")
    for trial in {json.dumps([one.model, asdict(one.task)]): one for one in in_order}.values():
        with _under(f"tasks.{trial.task.name}"):
            job_of(trial)


@contextmanager
def _under(label: str) -> Iterator[None]:
    """Put a label before errors, in place of the section `data` of a recipe."""
    try:
        yield
    except AromaError as error:
        text = str(error)
        raise type(error)(f"{label}{text[4:]}" if text.startswith("data.") else f"{label}: {text}") from error
