"""What a search file says: a grid file for one task and one method, and what is searched how."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from aroma.errors import bad_value

from ..grid.expand import make_trial
from ..grid.reader import make_grid, read_grid_file
from ..grid.settings import check_setting
from ..grid.spec import Grid
from ..run.trial import Trial
from ..settings import typed, unknown_key
from .space import Space, extremes, grid_points, read_space, whole_keys

_OWN = ("space", "sampler", "sampler_seed", "trials", "study", "storage", "heartbeat")
_IDENTITY = ("model", "dtype", "quantization", "tasks", "methods", "training", "seeds", "overrides")


@dataclass(frozen=True)
class Search:
    """A whole search.

    Args:
        grid: What it shares with a grid file: output, model, one task, one method, the loop, one seed, processes.
        space: Distributions by dotted key.
        described: The space as the file has it, for comparison with another machine's.
        sampler: `"random"`, `"grid"` (every point once) or `"tpe"` (a tree-structured Parzen estimator).
        trials: How many trials there are, over all workers of all machines.
        study: Name of the study in its storage.
        storage: Database URL; a file in `output` by default.
        sampler_seed: Seed of the sampler. Random points depend on it alone, not on who takes them.
        heartbeat: Seconds between a worker's signs of life; after three without one its trial is another's.
    """

    grid: Grid
    space: Space
    described: dict[str, Any]
    sampler: Literal["random", "grid", "tpe"]
    trials: int
    study: str
    storage: str
    sampler_seed: int = 0
    heartbeat: int = 20

    @property
    def output(self) -> Path:
        """Folder of all that this machine leaves."""
        return Path(self.grid.output)

    @property
    def task(self) -> str:
        """Name of the task."""
        return next(iter(self.grid.tasks))

    @property
    def method(self) -> str:
        """Label of the method."""
        return next(iter(self.grid.methods))

    def run_name(self, number: int) -> str:
        """Return the name of trial `number`, which is its folder's below the runs."""
        return f"search/{self.study}/{number:04d}"

    def trial(self, number: int, values: Mapping[str, Any]) -> Trial:
        """Return trial `number`, counted from 0, with the searched values: scored on held-out examples only."""
        return make_trial(
            self.grid,
            self.task,
            self.method,
            self.grid.seeds[0],
            name=self.run_name(number),
            settings={key: check_setting(key, value, "space.") for key, value in values.items()},
            purpose="select",
        )

    def extreme_trials(self) -> list[Trial]:
        """Return trials in which every choice, and both ends of every range, occur."""
        return [self.trial(0, values) for values in extremes(self.space)]

    def identity(self) -> dict[str, Any]:
        """Return what must be equal on all machines of a study, by key, JSON-able.

        Where a machine writes, how many processes it has and how many trials it wants are its own affair.
        """
        shared = {key: value for key, value in self.grid.as_dict().items() if key in _IDENTITY}
        return {**shared, "space": self.described, "sampler": self.sampler, "sampler_seed": self.sampler_seed}


def load_search(
    path: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    *,
    storage: str | None = None,
    trials: int | None = None,
    workers: int | None = None,
) -> Search:
    """Read a search file.

    Args:
        path: A YAML file with the keys of a grid for one task, one method and one seed, and `space`, `sampler`
            (`random`), `sampler_seed` (0), `trials`, `study` (task and method), `storage`, `heartbeat` (20).
        overrides: Texts like `"training.max_steps=60"`, stronger than the file.
        storage: Database URL, stronger than both.
        trials: Number of trials, stronger than both.
        workers: Worker processes, stronger than both.

    Raises:
        ConfigError: No such file, no YAML, an unknown key, or a value that cannot work.
    """
    values = read_grid_file(path, overrides)
    given = {"storage": storage, "trials": trials, "processes": workers}
    return make_search({**values, **{key: value for key, value in given.items() if value is not None}})


def make_search(values: Mapping[str, Any]) -> Search:
    """Return the search with these nested values; see `load_search`.

    Raises:
        ConfigError: An unknown or missing key, or a value that cannot work.
    """
    if "select" in values:
        remedy = "only a grid has it; a search has space instead, as space: {training.learning_rate: {low: 1e-4, "
        raise bad_value("select", values["select"], f"{remedy}high: 1e-2, log: true}}}}; or use `aroma lab run`")
    known = [name for name in (*get_type_hints(Grid), *_OWN) if name != "select"]
    for key, value in values.items():
        if key not in known:
            raise unknown_key(str(key), value, known, "a search")
    own = {key: values[key] for key in _OWN if values.get(key) is not None}
    grid = make_grid({key: value for key, value in values.items() if key not in _OWN})
    _require_one(grid)
    described = whole_keys(own.get("space"))
    space = read_space(described)
    sampler = typed("sampler", own.get("sampler", "random"), Literal["random", "grid", "tpe"])
    search = Search(
        grid=grid,
        space=space,
        described=described,
        sampler=sampler,
        trials=_number_of_trials(own.get("trials"), sampler, space),
        study=_study(own.get("study"), grid),
        storage=_storage(own.get("storage"), grid),
        sampler_seed=_at_least(0, "sampler_seed", own.get("sampler_seed", 0)),
        heartbeat=_at_least(1, "heartbeat", own.get("heartbeat", 20)),
    )
    search.extreme_trials()  # a key or a value that cannot be is refused here
    return search


def _require_one(grid: Grid) -> None:
    for key, several in (("tasks", grid.tasks), ("methods", grid.methods), ("seeds", grid.seeds)):
        if len(several) != 1:
            raise bad_value(key, list(several), "a search has one task, one method and one seed; for more, use a grid")


def _number_of_trials(given: Any, sampler: str, space: Space) -> int:
    if sampler != "grid":
        if given is None:
            raise bad_value("trials", None, "say how many are tried in all, as 20")
        return _at_least(1, "trials", given)
    points = len(grid_points(space))
    if given is not None and _at_least(1, "trials", given) != points:
        raise bad_value("trials", given, f"sampler: grid tries each of the {points} points once; leave it out")
    return points


def _study(given: Any, grid: Grid) -> str:
    name: str = typed(
        "study", given if given is not None else f"{next(iter(grid.tasks))}-{next(iter(grid.methods))}", str
    )
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise bad_value("study", name, "it names folders; write it with letters, digits, '-', '+', '_' and '.'")
    return name


def _storage(given: Any, grid: Grid) -> str:
    if given is None:
        return f"sqlite:///{Path(grid.output).resolve() / 'search.db'}"
    url: str = typed("storage", given, str)
    return url


def _at_least(minimum: int, key: str, given: Any) -> int:
    number: int = typed(key, given, int)
    if number < minimum:
        raise bad_value(key, number, f"give {minimum} or more")
    return number
