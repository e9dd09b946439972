"""What a grid is: methods × tasks × seeds on one model, and how settings are chosen; `reader.py` reads one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from aroma.errors import bad_value

from ..specs import TrainSpec
from ..tasks.spec import TaskSpec
from .settings import Settings, section_of


@dataclass(frozen=True)
class MethodSpec:
    """A method of a grid.

    Args:
        kind: One of `aroma_lab.methods.registry.METHODS`.
        options: Its options; `make_method` checks them.
    """

    kind: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Override:
    """Settings of some of the trials.

    Args:
        settings: Values by dotted key.
        tasks: Tasks that they hold for; None for all.
        methods: Methods that they hold for; None for all.
    """

    settings: Settings
    tasks: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None

    def holds_for(self, task: str, method: str) -> bool:
        """Whether a trial of the task and the method has these settings."""
        return (self.tasks is None or task in self.tasks) and (self.methods is None or method in self.methods)

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as a grid file has it."""
        filters = {"task": self.tasks, "method": self.methods}
        return {name: labels for name, labels in filters.items() if labels is not None} | self.settings


@dataclass(frozen=True)
class Selection:
    """How settings are chosen, task by task and method by method, on examples held out from the training data.

    Args:
        over: The values that are tried, by dotted key; their product is tried.
        seed: Seed of all these runs.
        training: Settings of the loop that differ in them, as a smaller `training.max_steps`.
        overrides: Further settings of some of them, as inner loops shortened in proportion; later ones win.
    """

    over: dict[str, list[Any]]
    seed: int = 0
    training: Settings = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()

    def settings(self, task: str, method: str) -> Settings:
        """Return what differs in the trials of one task and method, but for what is tried."""
        return _overridden(self.training, self.overrides, task, method)

    def as_dict(self) -> dict[str, Any]:
        """Return the section as a grid file has it."""
        return {
            "over": self.over,
            "seed": self.seed,
            "training": section_of(self.training, "training"),
            "overrides": [override.as_dict() for override in self.overrides],
        }


@dataclass(frozen=True)
class Grid:
    """A whole grid.

    Args:
        output: Folder of all that comes of it; trials lie in `runs/<name>/` below it.
        model: Hub name or folder of the pretrained model, or `"minilm"`.
        tasks: Tasks by name.
        methods: Methods by label.
        training: The loop of all trials.
        seeds: Seeds of the reported trials.
        processes: Worker processes.
        overrides: Settings of some of the trials; later ones win.
        select: How settings are chosen; None: nothing is chosen.
        dtype: Type of the pretrained weights; see `ModelSpec`.
        quantization: Quantization of the pretrained weights; see `ModelSpec`.
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

    def settings(self, task: str, method: str) -> Settings:
        """Return what the overrides say of the trials of one task and method."""
        return _overridden({}, self.overrides, task, method)

    def as_dict(self) -> dict[str, Any]:
        """Return the grid as a grid file has it, defaults included, JSON-able."""
        content = {
            "output": self.output,
            "model": self.model,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "processes": self.processes,
            "tasks": {name: _without(asdict(task), "name") for name, task in self.tasks.items()},
            "methods": {label: {"kind": method.kind, **method.options} for label, method in self.methods.items()},
            "training": _without(asdict(self.training), "seed"),
            "seeds": self.seeds,
            "overrides": [override.as_dict() for override in self.overrides],
            "select": self.select.as_dict() if self.select is not None else None,
        }
        made: dict[str, Any] = json.loads(json.dumps(content))  # tuples become lists
        return made


@dataclass(frozen=True)
class Part:
    """Which trials of a grid are run now; the others stay as they are.

    Args:
        tasks: Names of tasks; None for all.
        methods: Labels of methods; None for all.
    """

    tasks: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None

    def check(self, grid: Grid) -> None:
        """Raise for a task or a method that the grid has not.

        Raises:
            ConfigError: Naming it.
        """
        for field_name, wanted, known in (("tasks", self.tasks, grid.tasks), ("methods", self.methods, grid.methods)):
            for name in wanted or ():
                if name not in known:
                    raise bad_value(
                        f"--{field_name}", name, f"the grid has none of that name; it has {', '.join(known)}"
                    )

    def has(self, task: str, method: str) -> bool:
        """Whether the trials of a task and a method are among them."""
        return (self.tasks is None or task in self.tasks) and (self.methods is None or method in self.methods)


WHOLE = Part()
"""All of a grid."""


def _overridden(settings: Settings, overrides: Iterable[Override], task: str, method: str) -> Settings:
    found = dict(settings)
    for override in overrides:
        if override.holds_for(task, method):
            found |= override.settings
    return found


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}
