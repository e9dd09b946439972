"""What a grid file says: methods × tasks × seeds on one model, how settings are chosen, and the trials that follow."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

from aroma.errors import AromaError, ConfigError, bad_value

from ..run.trial import Trial
from ..settings import apply_overrides, flatten, read_mapping, typed, typed_fields, unknown_key
from ..specs import TrainSpec, check_training
from ..tasks.spec import TaskSpec

if TYPE_CHECKING:
    import optuna

SECTIONS = ("training", "options", "task")
"""`training.KEY` is a key of the loop, `options.KEY` an option of the method, `task.KEY` a key of the task."""

Settings = dict[str, Any]
"""Values by dotted key; `model` stands alone."""

Override = dict[str, Any]
"""Settings, and the lists `task` and `method` of those that they apply to; all, where a list is missing. Those of a
selection can have `over`, whose lists replace the selection's for these tasks and methods; null: it is not tried."""

Chosen = Mapping[str, Mapping[str, Settings]]
"""The settings that a selection chose, by task and method."""

# User attributes of a trial in its study.
NAME = "name"
"""The name of the trial, which is its folder below the runs."""
SETTINGS = "settings"
"""The whole trial as JSON, so that any machine can run it; in a search, what is searched."""
KEY = "key"
"""Digest of name and settings. Trials with equal keys are the same trial."""
NUMBER = "number"

OVER = "over"
"""In an override of a selection: what is tried in place of the selection's own lists."""
DATA = "{data}"
"""Stands, in the source of a task, for the folder `data` of the grid."""

_FOLDERS = {"select", "search"}
"""Folders, below the runs, of trials that are not reported."""


@dataclass(frozen=True)
class Selection:
    """How settings are chosen, per task and method, on examples held out from the training data.

    Args:
        over: Values to try, by dotted key; every combination is tried.
        by: What the best of them has: the highest `"score"`, or the lowest `"loss"`, which says more where few
            examples are held out. The other decides between equal ones.
        seed: Seed of all these runs.
        training: Training settings that differ in them, such as a smaller `max_steps`.
        overrides: Further settings of some of them, and as `over` other values to try; later ones win.
        widen: How many further values of a number are tried, at most, as long as the best one lies at the edge of what
            was tried; the best is compared with all values next to it then. See `selection.widened`.
        again: Further seeds with which the two best are run, too, and then what is best by the mean. Without any, one
            run of each decides, which may be lucky or collapse.
    """

    over: dict[str, list[Any]]
    by: Literal["score", "loss"] = "score"
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    widen: int = 0
    again: tuple[int, ...] = ()


@dataclass(frozen=True)
class Grid:
    """A whole grid.

    Args:
        output: Folder of all results; trials are in `runs/<name>/` below it.
        model: Hub name or folder of the pretrained model, or `"minilm"`.
        tasks: Tasks by name.
        methods: `kind` (one of `aroma_lab.methods.METHODS`) and options of each method, by label.
        training: The training loop of all trials.
        seeds: Seeds of the reported trials.
        processes: Trials at a time on this machine, each in a process of its own.
        overrides: Settings of some of the trials; later ones win.
        select: How settings are chosen; None: nothing is chosen.
        data: Folder that `{data}` stands for in the source of a task, as in `{data}/mrpc`; None: no source names it.
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
    methods: dict[str, dict[str, Any]]
    training: TrainSpec
    seeds: tuple[int, ...] = (0,)
    processes: int = 1
    overrides: tuple[Override, ...] = ()
    select: Selection | None = None
    data: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["nf4", "int8"] | None = None
    study: str | None = None
    storage: str | None = None
    heartbeat: int = 20

    def __post_init__(self) -> None:
        for key, text in (("output", self.output), ("model", self.model)):
            if not text:
                raise bad_value(key, text, "give it; a grid has no default for it")
        for key, several, example in (("tasks", self.tasks, "mrpc: {}"), ("methods", self.methods, "a: {kind: lora}")):
            if not several:
                raise bad_value(key, several, f"give at least one, such as {example}")
        for label in self.methods:
            require_folder_name("methods", label)
        for name in _FOLDERS & set(self.tasks):
            raise bad_value("tasks", name, "it would share a folder with trials of a selection or search; rename it")
        for key, number in (("processes", self.processes), ("heartbeat", self.heartbeat)):
            if number < 1:
                raise bad_value(key, number, "give 1 or more")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise bad_value("seeds", list(self.seeds), "give at least one, 0 or more, each once, such as [0, 1, 2]")
        check_training(self.training)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output)

    @property
    def study_name(self) -> str:
        """Name of the study in its storage."""
        return self.study or self.folder.resolve().name or "grid"

    def part(self, tasks: Sequence[str] | None = None, methods: Sequence[str] | None = None) -> Grid:
        """Return the grid with some of its tasks and methods; None for all."""
        for key, wanted, known in (("tasks", tasks, self.tasks), ("methods", methods, self.methods)):
            for name in wanted or ():
                if name not in known:
                    raise bad_value(f"--{key}", name, f"it is not in the grid, which has {', '.join(known)}")
        return replace(
            self,
            tasks={name: self.tasks[name] for name in self.tasks if tasks is None or name in tasks},
            methods={name: self.methods[name] for name in self.methods if methods is None or name in methods},
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the grid as its file writes it, defaults included, JSON-able.

        The storage is left out: its URL may hold a password, and results do not depend on it.
        """
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists
        del content["storage"], content["training"]["seed"]
        for task in content["tasks"].values():
            del task["name"]
        return content

    def trial_of(self, study: optuna.Study, attempt: optuna.trial.FrozenTrial) -> Trial:
        """Return the trial that this machine has taken from the study, which holds it complete."""
        if NUMBER in attempt.user_attrs:
            raise bad_value("study", study.study_name, "it is a search's; give the search file")
        return Trial.from_dict(attempt.user_attrs[SETTINGS])


G = TypeVar("G", bound=Grid)


def require_folder_name(key: str, name: str) -> None:
    """Raise `ConfigError` unless a name can be a folder's."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        raise bad_value(key, name, "it names folders; use letters, digits, '-', '+', '_' and '.' only")


def attributes_of(name: str, settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the user attributes with which a trial is enqueued."""
    normal = json.loads(json.dumps(settings))  # tuples become lists
    key = hashlib.sha256(json.dumps([name, normal], sort_keys=True).encode()).hexdigest()
    return {NAME: name, KEY: key, SETTINGS: normal, **more}


# Reading a file -----------------------------------------------------------------------------------------------------


def load_grid(path: str | os.PathLike[str], overrides: Iterable[str] = (), **arguments: Any) -> Grid:
    """Read a grid file; see `read_grid_file` and `make_grid`."""
    return make_grid(read_grid_file(path, overrides, **arguments))


def read_grid_file(path: str | os.PathLike[str], overrides: Iterable[str] = (), **arguments: Any) -> dict[str, Any]:
    """Return the nested values of a grid or search file, with overrides.

    Args:
        path: A YAML file with the keys of `Grid` or `Search`.
        overrides: Texts such as `"training.max_steps=60"` or `"methods.lora-r8.r=4"`; they win over the file.
        arguments: Values by top-level key, such as `processes`; they win over both, unless they are None.

    Raises:
        ConfigError: No such file, or no YAML.
    """
    values = read_mapping("grid", path)
    apply_overrides(values, overrides)
    return {**values, **{key: value for key, value in arguments.items() if value is not None}}


_MAPPING, _MAPPINGS = dict[str, Any] | None, dict[str, dict | None] | None  # type: ignore[type-arg]
_NESTED = {
    **{"tasks": _MAPPINGS, "methods": _MAPPINGS, "training": _MAPPING, "select": _MAPPING},
    **{"seeds": list[int], "overrides": list[dict] | None},  # type: ignore[type-arg]
}
"""Types of the sections before their keys are checked."""


def make_grid(values: Mapping[str, Any], kind: type[G] = Grid) -> G:  # type: ignore[assignment]
    """Return the grid, or the search, with these nested values.

    Raises:
        ConfigError: An unknown key (the nearest is named), a missing one, or a value that cannot work.
    """
    given = typed_fields({**get_type_hints(kind), **_NESTED}, values, whole=f"a {kind.__name__.lower()}")
    if "space" in given:  # overrides such as `space.training.learning_rate.low=1` nest it
        given["space"] = flatten(given["space"], SECTIONS)
    task_types = {name: hint for name, hint in get_type_hints(TaskSpec).items() if name != "name"}
    tasks = {
        name: TaskSpec(name=name, **typed_fields(task_types, keys or {}, f"tasks.{name}"))
        for name, keys in (given.get("tasks") or {}).items()
    }
    methods = {label: keys or {} for label, keys in (given.get("methods") or {}).items()}
    for label, options in methods.items():
        typed(f"methods.{label}.kind", options.get("kind"), str)
        for key, value in options.items():
            _require_plain(f"methods.{label}.{key}", value)
    training = section_of(check_settings({"training": given.get("training")}), "training")
    select = given.get("select")
    made = {
        "tasks": tasks,
        "methods": methods,
        # One thread per trial unless the grid says otherwise: with PyTorch's default, trials compete for the cores.
        "training": TrainSpec(**{"threads": 1, **training}),
        "seeds": tuple(given.get("seeds", [0])),
        "overrides": _overrides("overrides", given.get("overrides"), tasks, methods),
        "select": None if select is None else _selection(select, tasks, methods),
    }
    return kind(**{"output": "", "model": "", **given, **made})


def check_settings(values: Mapping[str, Any], where: str = "") -> Settings:
    """Return settings, nested or by dotted key, by dotted key, each of its field's type; errors begin with `where`."""
    return {key: _setting(key, value, where) for key, value in flatten(values, SECTIONS).items()}


def _setting(key: str, value: Any, where: str) -> Any:
    if key == "training.seed":
        raise bad_value(f"{where}{key}", value, "seeds are given by `seeds` and `select.seed`; leave it out")
    if key.startswith("options."):
        _require_plain(f"{where}{key}", value)
        return value
    types = _setting_types()
    if key not in types:
        known = [f"{where}{name}" for name in (*types, "options.r", "task", "method")]
        raise unknown_key(f"{where}{key}", value, known, "a grid")
    return typed(f"{where}{key}", value, types[key])


@cache
def _setting_types() -> dict[str, Any]:
    types = {f"training.{name}": hint for name, hint in get_type_hints(TrainSpec).items()}
    types |= {f"task.{name}": hint for name, hint in get_type_hints(TaskSpec).items() if name != "name"}
    return {**types, "model": str}


def _require_plain(key: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise bad_value(key, value, "give a finite number, a text, true, false, null, or a list of them") from error


def section_of(settings: Settings, section: str) -> dict[str, Any]:
    """Return the settings of one section, by the names of its fields."""
    prefix = f"{section}."
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}


def _overrides(
    where: str, given: Sequence[Any] | None, tasks: Iterable[str], methods: Iterable[str], selects: bool = False
) -> tuple[Override, ...]:
    made = []
    for index, entry in enumerate(given or ()):
        settings, filters = dict(entry), {}
        for name, known in (("task", tasks), ("method", methods)):
            if not isinstance(settings.get(name, {}), dict):  # a mapping is a section of settings
                labels = typed(f"{where}[{index}].{name}", settings.pop(name), str | list[str] | None)
                filters[name] = [labels] if isinstance(labels, str) else labels or list(known)
                for label in filters[name]:
                    if label not in known:
                        remedy = f"the grid has no such {name}; it has {', '.join(known)}"
                        raise bad_value(f"{where}[{index}].{name}", label, remedy)
        if selects and OVER in settings:
            over = typed(f"{where}[{index}].{OVER}", settings.pop(OVER), dict[str, Any])
            filters[OVER] = _values_to_try(over, f"{where}[{index}].{OVER}")
        made.append({**filters, **check_settings(settings, f"{where}[{index}].")})
    return tuple(made)


def _selection(values: Mapping[str, Any], tasks: Iterable[str], methods: Iterable[str]) -> Selection:
    own = {"over": _MAPPING, "training": _MAPPING, "overrides": _NESTED["overrides"], "again": list[int]}
    given = typed_fields({**get_type_hints(Selection), **own}, values, "select")
    over = _values_to_try(given.get("over") or {}, "select.over")
    if not over:
        example = "{training.learning_rate: [5.0e-4, 1.0e-3]}"
        raise bad_value("select.over", given.get("over"), f"name what to try, such as {example}")
    if None in over.values():
        key = next(key for key, several in over.items() if several is None)
        raise bad_value(f"select.over.{key}", None, "give a list of values to try, such as [5.0e-4, 1.0e-3]")
    for key in ("seed", "widen"):
        if given.get(key, 0) < 0:
            raise bad_value(f"select.{key}", given[key], "give 0 or more")
    seeds = [given.get("seed", 0), *given.get("again", ())]
    if len({*seeds}) < len(seeds) or min(seeds) < 0:
        raise bad_value("select.again", [*seeds[1:]], "give different seeds, 0 or more, other than select.seed")
    training = section_of(check_settings({"training": given.get("training")}, "select."), "training")
    overrides = _overrides("select.overrides", given.get("overrides"), tasks, methods, selects=True)
    for index, entry in enumerate(overrides):
        for key in entry.get(OVER, {}).keys() - over.keys():
            remedy = f"it replaces a list of select.over, which has {', '.join(over)}; name it there"
            raise bad_value(f"select.overrides[{index}].{OVER}.{key}", entry[OVER][key], remedy)
    made = {"over": over, "training": training, "overrides": overrides, "again": tuple(given.get("again", ()))}
    return Selection(**{**given, **made})


def _values_to_try(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return lists of values by dotted key, each value of its field's type; None for a key that is not tried."""
    over: dict[str, Any] = {}
    for key, several in flatten(given, SECTIONS).items():
        if several is not None and (not isinstance(several, list) or not several):
            raise bad_value(f"{where}.{key}", several, "give a list of values to try, such as [5.0e-4, 1.0e-3]")
        over[key] = None if several is None else [_setting(key, value, f"{where}.") for value in several]
        if several is not None and any(value in over[key][:index] for index, value in enumerate(over[key])):
            raise bad_value(f"{where}.{key}", several, "it has a value twice; give each once")
    return over


# Its trials ---------------------------------------------------------------------------------------------------------


def expand(grid: Grid, chosen: Chosen | None = None) -> list[Trial]:
    """Return the reported trials: all methods and tasks with the first seed, then with the second, and so on.

    So a grid that is stopped half-way has a whole table of fewer seeds. With a selection, pairs of task and method
    that are not in `chosen` have no trials.
    """
    return [
        make_trial(grid, task, method, seed, f"{task}/{method}/seed-{seed}", chosen[task][method] if chosen else {})
        for seed in grid.seeds
        for task in grid.tasks
        for method in grid.methods
        if chosen is None or method in chosen.get(task, {})
    ]


def overridden(overrides: Iterable[Override], task: str, method: str, part: str | None = None) -> Settings:
    """Return the settings of the overrides that apply to trials of a task and method; later ones win.

    `part`: `"over"` for what a selection tries instead of its own lists.
    """
    found: Settings = {}
    for entry in overrides:
        if task in entry.get("task", [task]) and method in entry.get("method", [method]):
            settings = entry.get(part, {}) if part else entry
            found |= {key: value for key, value in settings.items() if key not in ("task", "method", OVER)}
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
    """Return one trial of a grid, whose `settings` win over the grid's overrides."""
    resolved = {**overridden(grid.overrides, task, method), **settings, "training.seed": seed}
    options = {**grid.methods[method], **section_of(resolved, "options")}
    return Trial(
        name=name,
        model=resolved.get("model", grid.model),
        task=_with_data(replace(grid.tasks[task], **section_of(resolved, "task")), grid.data),
        method=method,
        kind=options.pop("kind"),
        options=options,
        training=replace(grid.training, **section_of(resolved, "training")),
        purpose=purpose,
        dtype=grid.dtype,
        quantization=grid.quantization,
    )


def _with_data(task: TaskSpec, data: str | None) -> TaskSpec:
    if task.source is None or DATA not in task.source:
        return task
    if data is None:
        raise bad_value("data", None, f"tasks.{task.name}.source={task.source!r} is below it; give the folder")
    return replace(task, source=task.source.replace(DATA, data))


def check_methods(trials: Iterable[Trial]) -> None:
    """Make every method once, so that a wrong option is refused before anything runs. Loads PyTorch.

    Raises:
        ConfigError: An unknown kind or option, or a value that cannot work, under the method's label.
    """
    from ..methods import make_method

    alike = {
        json.dumps([trial.kind, trial.options, trial.training.max_steps], sort_keys=True): trial for trial in trials
    }
    for trial in alike.values():
        label = f"methods.{trial.method}"
        try:
            method = make_method(trial.kind, trial.options)
            if trial.training.max_steps is not None:  # else the examples say how long a run is
                label += ", in select" if trial.purpose == "select" else ""
                method.check_steps(trial.training.max_steps)
        except AromaError as error:
            raise ConfigError(f"{label}: {error}") from error


def check_tasks(trials: Iterable[Trial]) -> None:
    """Read every task once, as its trials will, so that unusable data are refused before anything runs.

    The tokenizer is loaded, the model is not. Reported files are opened only for tasks of trials that report them.

    Raises:
        AromaError: Of the kind that `work_of` raised, under the task's name.
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
