"""What a grid file says: methods × tasks × seeds on one model, how settings are chosen, and the trials that follow."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from aroma.errors import AromaError, ConfigError, bad_value

from ..run.trial import Trial
from ..settings import apply_overrides, flatten, read_mapping, typed, typed_fields, unknown_key
from ..specs import TrainSpec, check_training
from ..tasks.spec import TaskSpec

SECTIONS = ("training", "options", "task")
"""`training.KEY` is a key of the loop, `options.KEY` an option of the method, `task.KEY` a key of the task."""

Settings = dict[str, Any]
"""Values by dotted key; `model` stands alone."""

Chosen = Mapping[str, Mapping[str, Settings]]
"""The settings that a selection chose, by task and method."""

_FOLDERS = {"select", "search"}
"""Folders, below the runs, of trials that are not reported."""


@dataclass(frozen=True)
class MethodSpec:
    """A method of a grid.

    Args:
        kind: One of `aroma_lab.methods.METHODS`.
        options: Its options; `make_method` checks them.
    """

    kind: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Override:
    """Settings of some of the trials.

    Args:
        settings: Values by dotted key.
        tasks: The tasks it applies to; None for all.
        methods: The methods it applies to; None for all.
    """

    settings: Settings
    tasks: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None

    def applies_to(self, task: str, method: str) -> bool:
        """Whether trials of this task and method have these settings."""
        return (self.tasks is None or task in self.tasks) and (self.methods is None or method in self.methods)

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as a grid file writes it."""
        filters = {"task": self.tasks, "method": self.methods}
        return {name: labels for name, labels in filters.items() if labels is not None} | self.settings


@dataclass(frozen=True)
class Selection:
    """How settings are chosen, per task and method, on examples held out from the training data.

    Args:
        over: Values to try, by dotted key; every combination is tried.
        seed: Seed of all these runs.
        training: Training settings that differ in them, such as a smaller `training.max_steps`.
        overrides: Further settings of some of them; later ones win.
    """

    over: dict[str, list[Any]]
    seed: int = 0
    training: Settings = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the section as a grid file writes it."""
        training = section_of(self.training, "training")
        overrides = [override.as_dict() for override in self.overrides]
        return {"over": self.over, "seed": self.seed, "training": training, "overrides": overrides}


@dataclass(frozen=True)
class Grid:
    """A whole grid.

    Args:
        output: Folder of all results; trials are in `runs/<name>/` below it.
        model: Hub name or folder of the pretrained model, or `"minilm"`.
        tasks: Tasks by name.
        methods: Methods by label.
        training: The training loop of all trials.
        seeds: Seeds of the reported trials.
        processes: Trials at a time on this machine, each in a process of its own.
        overrides: Settings of some of the trials; later ones win.
        select: How settings are chosen; None: nothing is chosen.
        dtype: Type of the pretrained weights; see `ModelSpec`.
        quantization: Quantization of the pretrained weights; see `ModelSpec`.
        study: Name of the Optuna study; None: the name of the output folder.
        storage: URL of the database of the study; None: a journal file in `output`.
        heartbeat: Seconds between a machine's signs of life in a database. After three without one, its trials are
            given to others.
    """

    output: str
    model: str
    tasks: dict[str, TaskSpec]
    methods: dict[str, MethodSpec]
    training: TrainSpec
    seeds: tuple[int, ...] = (0,)
    processes: int = 1
    overrides: tuple[Override, ...] = ()
    select: Selection | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["nf4", "int8"] | None = None
    study: str | None = None
    storage: str | None = None
    heartbeat: int = 20

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output)

    @property
    def study_name(self) -> str:
        """Name of the study in its storage."""
        return self.study or self.folder.resolve().name or "grid"

    def part(self, tasks: Sequence[str] | None = None, methods: Sequence[str] | None = None) -> Grid:
        """Return the grid with some of its tasks and methods; None for all.

        Raises:
            ConfigError: One that is not in the grid.
        """
        for key, wanted, known in (("tasks", tasks, self.tasks), ("methods", methods, self.methods)):
            for name in wanted or ():
                if name not in known:
                    raise bad_value(f"--{key}", name, f"it is not in the grid, which has {', '.join(known)}")
        return replace(
            self,
            tasks={name: task for name, task in self.tasks.items() if tasks is None or name in tasks},
            methods={name: method for name, method in self.methods.items() if methods is None or name in methods},
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the grid as a grid file writes it, defaults included, JSON-able.

        The storage is left out: its URL may hold a password, and results do not depend on it.
        """
        content = {
            **{key: getattr(self, key) for key in ("output", "model", "dtype", "quantization", "processes")},
            "study": self.study,
            "heartbeat": self.heartbeat,
            "tasks": {name: _without(asdict(task), "name") for name, task in self.tasks.items()},
            "methods": {label: {"kind": method.kind, **method.options} for label, method in self.methods.items()},
            "training": _without(asdict(self.training), "seed"),
            "seeds": self.seeds,
            "overrides": [override.as_dict() for override in self.overrides],
            "select": self.select.as_dict() if self.select is not None else None,
        }
        made: dict[str, Any] = json.loads(json.dumps(content))  # tuples become lists
        return made


def overridden(settings: Settings, overrides: Iterable[Override], task: str, method: str) -> Settings:
    """Return `settings` updated by the overrides that apply to trials of a task and method, in order."""
    found = dict(settings)
    for override in overrides:
        if override.applies_to(task, method):
            found |= override.settings
    return found


def section_of(settings: Settings, section: str) -> dict[str, Any]:
    """Return the settings of one section, by the names of its fields."""
    prefix = f"{section}."
    return {key[len(prefix) :]: value for key, value in settings.items() if key.startswith(prefix)}


# Reading a file -----------------------------------------------------------------------------------------------------


def load_grid(path: str | os.PathLike[str], overrides: Iterable[str] = (), **arguments: Any) -> Grid:
    """Read a grid file and apply overrides.

    Args:
        path: A YAML file with the keys of `Grid`.
        overrides: Texts such as `"training.max_steps=60"` or `"methods.lora-r8.r=4"`; they win over the file.
        arguments: Values by top-level key, such as `processes`; they win over both, unless they are None.

    Raises:
        ConfigError: No such file, no YAML, an unknown key (the nearest is named), or a value that cannot work.
    """
    return make_grid(read_grid_file(path, overrides, **arguments))


def read_grid_file(path: str | os.PathLike[str], overrides: Iterable[str] = (), **arguments: Any) -> dict[str, Any]:
    """Return the nested values of a grid or search file; see `load_grid`."""
    values = read_mapping("grid", path)
    apply_overrides(values, overrides)
    return {**values, **{key: value for key, value in arguments.items() if value is not None}}


def make_grid(values: Mapping[str, Any]) -> Grid:
    """Return the grid with these nested values.

    Raises:
        ConfigError: An unknown or missing key, or a value that cannot work.
    """
    given = typed_fields({**get_type_hints(Grid), **_NESTED}, values)
    for key in ("output", "model"):
        if not given.get(key):
            raise bad_value(key, given.get(key), "give it; a grid has no default for it")
    for key in ("processes", "heartbeat"):
        require_at_least(1, key, given.get(key, 1))
    tasks, methods = _tasks(given.get("tasks")), _methods(given.get("methods"))
    made = {
        "tasks": tasks,
        "methods": methods,
        "training": _training(given.get("training")),
        "seeds": _seeds(given.get("seeds", [0])),
        "overrides": _overrides("overrides", given.get("overrides"), tasks, methods),
        "select": _selection(given.get("select"), tasks, methods),
    }
    return Grid(**{**given, **made})


_NESTED: dict[str, Any] = {
    "tasks": dict[str, dict | None] | None,  # type: ignore[type-arg]
    "methods": dict[str, dict | None] | None,  # type: ignore[type-arg]
    "training": dict[str, Any] | None,
    "seeds": list[int],
    "overrides": list[dict] | None,  # type: ignore[type-arg]
    "select": dict[str, Any] | None,
}
"""Types of the sections before their keys are checked."""


def check_setting(key: str, value: Any, where: str = "", known: Iterable[str] = ()) -> Any:
    """Return the value of a dotted key as the type of its field.

    Args:
        key: Such as `training.learning_rate`, `options.r`, `task.max_length` or `model`.
        value: What was given.
        where: Prefix of the key in errors, such as `"select.over."`.
        known: Further keys that may have been meant.

    Raises:
        ConfigError: An unknown key, a seed, or a value of a wrong type.
    """
    if key == "training.seed":
        raise bad_value(f"{where}{key}", value, "seeds are given by `seeds` and `select.seed`; leave it out")
    if key.startswith("options.") and key != "options.":
        return _check_option(f"{where}{key}", value)
    types = _setting_types()
    if key not in types:
        raise unknown_key(f"{where}{key}", value, [*types, "options.r", *known], "a grid")
    return typed(f"{where}{key}", value, types[key])


@cache
def _setting_types() -> dict[str, Any]:
    types = {f"training.{name}": hint for name, hint in get_type_hints(TrainSpec).items()}
    types |= {f"task.{name}": hint for name, hint in get_type_hints(TaskSpec).items() if name != "name"}
    return {**types, "model": str}


def _check_settings(values: Mapping[str, Any], where: str, known: Iterable[str] = ()) -> Settings:
    return {key: check_setting(key, value, where, known) for key, value in flatten(values, SECTIONS).items()}


def _check_option(key: str, value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise bad_value(key, value, "give a finite number, a text, true, false, null, or a list of them") from error
    return value


def require_folder_name(key: str, name: str) -> None:
    """Raise unless a name can be a folder's.

    Raises:
        ConfigError: It cannot.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        raise bad_value(key, name, "it names folders; use letters, digits, '-', '+', '_' and '.' only")


def require_at_least(minimum: int, key: str, number: int) -> None:
    """Raise if a number is too small.

    Raises:
        ConfigError: It is.
    """
    if number < minimum:
        raise bad_value(key, number, f"give {minimum} or more")


def _labelled(key: str, given: Mapping[str, Any] | None, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the labels, which name folders, and the keys of tasks or methods."""
    if not given:
        raise bad_value(key, given, f"give at least one, such as {example}")
    for name, keys in given.items():
        require_folder_name(key, name)
        yield name, keys or {}


def _tasks(given: Mapping[str, Any] | None) -> dict[str, TaskSpec]:
    hints = _without(get_type_hints(TaskSpec), "name")
    tasks = {}
    for name, keys in _labelled("tasks", given, "mrpc: {}"):
        if name in _FOLDERS:
            raise bad_value("tasks", name, "it would share a folder with trials of a selection or search; rename it")
        tasks[name] = TaskSpec(name=name, **typed_fields(hints, keys, f"tasks.{name}"))
    return tasks


def _methods(given: Mapping[str, Any] | None) -> dict[str, MethodSpec]:
    methods = {}
    for label, keys in _labelled("methods", given, "lora-r8: {kind: lora, r: 8}"):
        kind = typed(f"methods.{label}.kind", keys.get("kind"), str)
        options = {key: _check_option(f"methods.{label}.{key}", value) for key, value in keys.items() if key != "kind"}
        methods[label] = MethodSpec(kind, options)
    return methods


def _training(given: Mapping[str, Any] | None) -> TrainSpec:
    if given and "seed" in given:
        raise bad_value("training.seed", given["seed"], "a grid has `seeds`; leave it out")
    # One thread per trial unless the grid says otherwise: with PyTorch's default, trials compete for the cores.
    training = TrainSpec(**{"threads": 1, **typed_fields(TrainSpec, given or {}, "training")})
    check_training(training)
    return training


def _seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise bad_value("seeds", seeds, "give at least one, 0 or more, each once, such as [0, 1, 2]")
    return tuple(seeds)


def _overrides(
    key: str, given: Sequence[Any] | None, tasks: Mapping[str, TaskSpec], methods: Mapping[str, MethodSpec]
) -> tuple[Override, ...]:
    made = []
    for index, entry in enumerate(given or ()):
        where, keys = f"{key}[{index}]", dict(entry)
        filters = {
            "tasks": _take_filter(f"{where}.task", keys, "task", tasks),
            "methods": _take_filter(f"{where}.method", keys, "method", methods),
        }
        made.append(Override(_check_settings(keys, f"{where}.", known=("task", "method")), **filters))
    return tuple(made)


def _take_filter(where: str, keys: dict[str, Any], name: str, known: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Take the filter `name` out of an override: a label, or a list of them. A mapping is a section of settings."""
    if isinstance(keys.get(name), dict):
        return None
    given = typed(where, keys.pop(name, None), str | list[str] | None)
    labels = (given,) if isinstance(given, str) else given
    for label in labels or ():
        if label not in known:
            raise bad_value(where, label, f"the grid has no such {name}; it has {', '.join(known)}")
    return None if labels is None else tuple(labels)


def _selection(
    values: Mapping[str, Any] | None, tasks: Mapping[str, TaskSpec], methods: Mapping[str, MethodSpec]
) -> Selection | None:
    if values is None:
        return None
    mapping = dict[str, Any] | None
    types = {"over": mapping, "seed": int, "training": mapping, "overrides": list[dict] | None}  # type: ignore[type-arg]
    given = typed_fields(types, values, "select")
    require_at_least(0, "select.seed", given.get("seed", 0))
    return Selection(
        over=_over(given.get("over")),
        seed=given.get("seed", 0),
        training=_check_settings({"training": given.get("training")}, "select."),
        overrides=_overrides("select.overrides", given.get("overrides"), tasks, methods),
    )


def _over(given: Mapping[str, Any] | None) -> dict[str, list[Any]]:
    over = {}
    for key, candidates in flatten(given or {}, SECTIONS).items():
        if not isinstance(candidates, list) or not candidates:
            raise bad_value(f"select.over.{key}", candidates, "give a list of values to try, such as [5.0e-4, 1.0e-3]")
        over[key] = [check_setting(key, value, "select.over.") for value in candidates]
        if any(value in over[key][:index] for index, value in enumerate(over[key])):
            raise bad_value(f"select.over.{key}", candidates, "it has a value twice; give each once")
    if not over:
        raise bad_value("select.over", given, "name what to try, such as {training.learning_rate: [5.0e-4, 1.0e-3]}")
    return over


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


# Its trials ---------------------------------------------------------------------------------------------------------


def expand(grid: Grid, chosen: Chosen | None = None) -> list[Trial]:
    """Return the reported trials: all methods and tasks with the first seed, then with the second, and so on.

    So a grid that is stopped half-way has a whole table of fewer seeds.

    Args:
        grid: The grid.
        chosen: The settings that the selection chose. Pairs of task and method that it lacks have no trials. None for
            a grid without a selection.

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
        if chosen is None or method in chosen.get(task, {})
    ]


def report_name(task: str, method: str, seed: int) -> str:
    """Return the name of a reported trial, which is its folder below the runs."""
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
        task: Name of one of its tasks.
        method: Label of one of its methods.
        seed: Seed of the trial.
        name: Name of its folder.
        settings: Checked settings by dotted key; they win over the grid's overrides.
        purpose: `"select"` for a trial that is scored on held-out examples only.

    Raises:
        ConfigError: A value that cannot work.
    """
    resolved = {**overridden({}, grid.overrides, task, method), **(settings or {}), "training.seed": seed}
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
    from ..methods import make_method

    for trial in {json.dumps([trial.kind, trial.options], sort_keys=True): trial for trial in trials}.values():
        try:
            make_method(trial.kind, trial.options)
        except AromaError as error:
            raise ConfigError(f"methods.{trial.method}: {error}") from error


def check_tasks(trials: Iterable[Trial]) -> None:
    """Read every task once, as its trials will, so that unusable data are refused before anything runs.

    The tokenizer is loaded, the model is not. Reported files are opened only for tasks of trials that report them.

    Raises:
        ConfigError: An unknown task or metric, values that contradict each other, or a tokenizer that cannot be
            loaded, under the task's name.
        DataError: Examples that cannot be used, likewise.
    """
    from ..run.work import work_of

    # Of equal tasks the last counts: a trial that reports reads all that one that selects does.
    by_task = {
        json.dumps([trial.model, asdict(trial.task)], sort_keys=True): trial
        for trial in sorted(trials, key=lambda trial: trial.purpose == "report")
    }
    for trial in by_task.values():
        try:
            work_of(trial)
        except AromaError as error:
            if str(error).startswith(f"tasks.{trial.task.name}."):
                raise
            raise type(error)(f"tasks.{trial.task.name}: {error}") from error
