"""What a grid file says: methods × tasks × seeds on one model, how settings are chosen, and the trials that follow."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_type_hints

from aroma.errors import AromaError, bad_value

from ..run.trial import Trial
from ..settings import flatten, load_values, section_of, typed, typed_fields
from ..specs import TaskSpec, TrainSpec, check_training

SECTIONS = ("training", "options", "task")
"""`training.KEY` is a key of the loop, `options.KEY` an option of the method, `task.KEY` a key of the task."""

Settings = dict[str, Any]
"""Values by dotted key; `model` stands alone."""

Override = dict[str, Any]
"""Settings, and the lists `task` and `method` of those that they apply to; all, where a list is missing. Those of a
selection can have `over`, whose lists replace the selection's for these tasks and methods; null: it is not tried."""

Chosen = Mapping[tuple[str, str], Settings]
"""The settings that a selection chose, by task and method."""


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
            was tried; the best is compared with all values next to it then.
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
        processes: Trials at a time in one command.
        overrides: Settings of some of the trials; later ones win.
        select: How settings are chosen; None: nothing is chosen.
        data: Folder that `{data}` stands for in the source of a task, as in `{data}/mrpc`; None: no source names it.
        dtype: Type of the pretrained weights; see `ModelSpec`.
        quantization: Quantization of the pretrained weights; see `ModelSpec`.
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

    def __post_init__(self) -> None:
        for key in ("output", "model", "tasks", "methods", "seeds", "processes"):
            if not (value := getattr(self, key)):
                raise bad_value(key, value, "give it; a grid needs one")
        if min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise bad_value("seeds", list(self.seeds), "give at least one, 0 or more, each once, such as [0, 1, 2]")
        check_training(self.training)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output)

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
        """Return the grid as its file writes it, defaults included, JSON-able."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists
        del content["training"]["seed"]
        for task in content["tasks"].values():
            del task["name"]
        return content


# Reading a file -----------------------------------------------------------------------------------------------------


def load_grid(path: str | os.PathLike[str], overrides: Iterable[str] = (), **arguments: Any) -> Grid:
    """Read a grid file.

    Args:
        path: A YAML file with the keys of `Grid`.
        overrides: Texts such as `"training.max_steps=60"` or `"methods.lora-r8.r=4"`; they win over the file.
        arguments: Values by top-level key, such as `processes`; they win over both, unless they are None.

    Raises:
        ConfigError: No such file, no YAML, or as `make_grid`.
    """
    values = load_values("grid", path, overrides)
    return make_grid({**values, **{key: value for key, value in arguments.items() if value is not None}})


_MAPPING, _MAPPINGS = dict[str, Any] | None, dict[str, dict | None] | None  # type: ignore[type-arg]
_LISTED = list[dict] | None  # type: ignore[type-arg]
_OF_GRID = {"tasks": _MAPPINGS, "methods": _MAPPINGS, "training": _MAPPING, "select": _MAPPING, "seeds": list[int]}
_OF_SELECTION = {"over": _MAPPING, "training": _MAPPING, "again": list[int]}
"""Types of sections before their keys are checked."""


def make_grid(values: Mapping[str, Any]) -> Grid:
    """Return the grid with these nested values.

    Raises:
        ConfigError: An unknown key (the nearest is named), a missing one, or a value that cannot work.
    """
    types = {**get_type_hints(Grid), **_OF_GRID, "overrides": _LISTED}
    given = typed_fields(types, values)
    tasks = {}
    for name, keys in (given.get("tasks") or {}).items():
        values = typed_fields(_types(TaskSpec), keys or {}, f"tasks.{name}")
        with _under(f"tasks.{name}"):
            tasks[name] = TaskSpec(name=name, **values)
    methods = {label: keys or {} for label, keys in (given.get("methods") or {}).items()}
    for label, options in methods.items():
        typed(f"methods.{label}.kind", options.get("kind"), str)
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
    return Grid(**{"output": "", "model": "", **given, **made})


def _types(kind: type[Any], prefix: str = "") -> dict[str, Any]:
    own = {"name", "seed"} if kind is TrainSpec else {"name"}
    return {f"{prefix}{name}": hint for name, hint in get_type_hints(kind).items() if name not in own}


def check_settings(values: Mapping[str, Any], where: str = "", lists: bool = False) -> Settings:
    """Return settings, nested or by dotted key, by dotted key, each of its field's type; methods check their options.

    Args:
        where: Stands before every key in errors.
        lists: Whether each is a list of values to try; or None, to try nothing.
    """
    flat, prefix = flatten(values, SECTIONS), f"{where}." if where else ""
    if "training.seed" in flat:
        remedy = "seeds are given by `seeds` and `select.seed`; leave it out"
        raise bad_value(f"{prefix}training.seed", flat["training.seed"], remedy)
    types = {"model": str, **_types(TrainSpec, "training."), **_types(TaskSpec, "task.")}
    if lists:
        types = {key: list[hint] | None for key, hint in types.items()}  # type: ignore[valid-type]
    types |= {key: list | None if lists else Any for key in flat if key.startswith("options.")}
    return typed_fields(types, flat, where)


def _overrides(
    where: str, given: Sequence[Any] | None, tasks: Iterable[str], methods: Iterable[str], selects: bool = False
) -> tuple[Override, ...]:
    made = []
    for index, entry in enumerate(given or ()):
        settings, special, here = dict(entry), {}, f"{where}[{index}]"
        for name, known in (("task", tasks), ("method", methods)):
            if not isinstance(settings.get(name, {}), dict):  # a mapping is a section of settings
                labels = typed(f"{here}.{name}", settings.pop(name), str | list[str])
                special[name] = [labels] if isinstance(labels, str) else labels
                for label in set(special[name]).difference(known):
                    remedy = f"the grid has no such {name}; it has {', '.join(known)}"
                    raise bad_value(f"{here}.{name}", label, remedy)
        if selects and "over" in settings:
            special["over"] = check_settings(settings.pop("over"), f"{here}.over", lists=True)
        made.append({**special, **check_settings(settings, here)})
    return tuple(made)


def _selection(values: Mapping[str, Any], tasks: Iterable[str], methods: Iterable[str]) -> Selection:
    types = {**get_type_hints(Selection), **_OF_SELECTION, "overrides": _LISTED}
    given = typed_fields(types, values, "select")
    over = check_settings(given.get("over") or {}, "select.over", lists=True)
    if not all(over.values()) or not over:
        example = "{training.learning_rate: [5.0e-4, 1.0e-3]}"
        raise bad_value("select.over", given.get("over"), f"name what to try, such as {example}")
    overrides = _overrides("select.overrides", given.get("overrides"), tasks, methods, selects=True)
    training = section_of(check_settings({"training": given.get("training")}, "select"), "training")
    made = {"over": over, "training": training, "overrides": overrides, "again": tuple(given.get("again", ()))}
    return Selection(**{**given, **made})


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


def overridden(overrides: Iterable[Override], task: str, method: str, part: str | None = None) -> Settings:
    """Return the settings of the overrides that apply to trials of a task and method; later ones win.

    `part`: `"over"` for what a selection tries instead of its own lists.
    """
    found: Settings = {}
    for entry in overrides:
        if task in entry.get("task", [task]) and method in entry.get("method", [method]):
            settings = entry.get(part, {}) if part else entry
            found |= {key: value for key, value in settings.items() if key not in ("task", "method", "over")}
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
    made = replace(grid.tasks[task], **section_of(resolved, "task"))
    if "{data}" in (made.source or ""):
        if grid.data is None:
            raise bad_value("data", None, f"tasks.{task}.source={made.source!r} is below it; give the folder")
        made = replace(made, source=str(made.source).replace("{data}", grid.data))
    return Trial(
        name=name,
        model=resolved.get("model", grid.model),
        task=made,
        method=method,
        kind=options.pop("kind"),
        options=options,
        training=replace(grid.training, **section_of(resolved, "training")),
        purpose=purpose,
        dtype=grid.dtype,
        quantization=grid.quantization,
    )


def check_trials(trials: Iterable[Trial], to_run: Iterable[Trial]) -> None:
    """Make every method of `trials` and read every task of those `to_run` once, before anything runs.

    The tokenizer is loaded, the model is not. Reported files are opened only for tasks of trials that report them.

    Raises:
        AromaError: A wrong option, or a task that cannot be read, under the label of the method or the task.
    """
    from ..methods import make_method
    from ..run.work import job_of

    for trial in _distinct(trials, lambda trial: [trial.kind, trial.options, trial.training.max_steps]):
        with _under(f"methods.{trial.method}"):
            method = make_method(trial.kind, trial.options)
            if trial.training.max_steps is not None:  # else the examples say how long a run is
                method.check_steps(trial.training.max_steps)
    # Of equal tasks the last counts: a trial that reports reads all that one that selects does.
    in_order = sorted(to_run, key=lambda trial: trial.purpose == "report")
    for trial in _distinct(in_order, lambda trial: [trial.model, asdict(trial.task)]):
        with _under(f"tasks.{trial.task.name}"):
            job_of(trial)


def _distinct(trials: Iterable[Trial], what: Callable[[Trial], Any]) -> Iterable[Trial]:
    return {json.dumps(what(trial), sort_keys=True): trial for trial in trials}.values()


@contextmanager
def _under(label: str) -> Iterator[None]:
    """Put a label before errors, in place of the section `data` of a recipe."""
    try:
        yield
    except AromaError as error:
        text = str(error)
        raise type(error)(f"{label}{text[4:]}" if text.startswith("data.") else f"{label}: {text}") from error
