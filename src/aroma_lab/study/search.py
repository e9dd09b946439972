"""A search: a grid file of one task and one method, a space, and a sampler; from its file to its best values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np
import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from aroma.errors import bad_value
from aroma.files import read_json, write_json

from ..run.trial import Trial, differing
from ..settings import typed, unknown_key
from .engine import Engine, Watcher, trial_of_grid
from .grid import (
    Grid,
    check_methods,
    check_setting,
    check_tasks,
    make_grid,
    make_trial,
    read_grid_file,
    require_at_least,
    require_folder_name,
)
from .process import WORKER_MODULE
from .space import Space, extremes, flat_space, grid_points, read_space, suggest
from .status import MACHINE, NUMBER, SETTINGS, Attributes, Scheduled, attributes_of
from .storage import JOURNAL_FILE, without_password

SEARCH_FILE = "search.json"

_OWN = ("space", "sampler", "sampler_seed", "trials")
_SHARED = ("model", "dtype", "quantization", "tasks", "methods", "training", "seeds", "overrides")


@dataclass(frozen=True)
class Search:
    """A whole search.

    Args:
        grid: What it shares with a grid file: output, model, one task, one method, the loop, one seed, processes,
            study, storage.
        space: Distributions by dotted key.
        described: The space as the file has it, for comparison with another machine's.
        sampler: `"random"`, `"grid"` (every point once) or `"tpe"` (a tree-structured Parzen estimator).
        trials: Number of trials, over all machines.
        sampler_seed: Seed of the sampler. Random points depend on it alone, not on the machine that takes them.
    """

    grid: Grid
    space: Space
    described: dict[str, Any]
    sampler: Literal["random", "grid", "tpe"]
    trials: int
    sampler_seed: int = 0

    def searched(self) -> dict[str, Any]:
        """Return what must be equal on all machines of a study.

        Machines may differ in their output folder, their processes, and the number of trials they want.
        """
        shared = {key: value for key, value in self.grid.as_dict().items() if key in _SHARED}
        return {**shared, "space": self.described, "sampler": self.sampler, "sampler_seed": self.sampler_seed}

    def scheduled(self) -> list[Attributes]:
        """Return the attributes with which the trials are enqueued."""
        searched = self.searched()
        return [attributes_of(self.run_name(number), searched, **{NUMBER: number}) for number in range(self.trials)]

    def run_name(self, number: int) -> str:
        """Return the name of trial `number`, counted from 0, which is its folder below the runs."""
        return f"search/{self.grid.study_name}/{number:04d}"

    def trial(self, number: int, values: Mapping[str, Any]) -> Trial:
        """Return trial `number` with these values of the space: scored on held-out examples only."""
        task, method = next(iter(self.grid.tasks)), next(iter(self.grid.methods))
        settings = {key: check_setting(key, value, "space.") for key, value in values.items()}
        seed, name = self.grid.seeds[0], self.run_name(number)
        return make_trial(self.grid, task, method, seed, name=name, settings=settings, purpose="select")

    def extreme_trials(self) -> list[Trial]:
        """Return trials that together contain every choice and both ends of every range."""
        return [self.trial(0, values) for values in extremes(self.space)]

    def sampled_trial(self, study: optuna.Study, attempt: FrozenTrial) -> Trial:
        """Return the trial of an attempt, with the values that the sampler gives it.

        The values are the same on every machine, except that TPE looks at the results so far.

        Raises:
            ConfigError: The attempt is of another search.
        """
        number = attempt.user_attrs.get(NUMBER, 0)
        ours, theirs = self.searched(), attempt.user_attrs[SETTINGS]
        if keys := differing(ours, theirs):
            remedy = "use the same file on all machines, or give another study"
            raise bad_value("study", study.study_name, f"its trials have another {', '.join(keys)}; {remedy}")
        study.sampler = self._sampler(number)
        return self.trial(number, suggest(optuna.Trial(study, attempt._trial_id), self.space))

    def _sampler(self, number: int) -> BaseSampler:
        seed = int(np.random.SeedSequence([self.sampler_seed, number]).generate_state(1)[0])
        if self.sampler == "grid":
            return PartialFixedSampler(grid_points(self.space)[number], RandomSampler(seed))
        if self.sampler == "tpe":
            # Constant liar: trials that run elsewhere count as bad, or all machines would try the same place.
            return TPESampler(seed=seed, constant_liar=True)
        return RandomSampler(seed)


def load_search(path: str | os.PathLike[str], overrides: Iterable[str] = (), **arguments: Any) -> Search:
    """Read a search file.

    Args:
        path: A YAML file with the keys of a grid for one task, one method and one seed, and `space`, `sampler`
            (`random`), `sampler_seed` (0), and `trials`.
        overrides: Texts such as `"training.max_steps=60"`; they win over the file.
        arguments: Values by top-level key, such as `storage` or `trials`; they win over both, unless they are None.

    Raises:
        ConfigError: No such file, no YAML, an unknown key, or a value that cannot work.
    """
    return make_search(read_grid_file(path, overrides, **arguments))


def make_search(values: Mapping[str, Any]) -> Search:
    """Return the search with these nested values; see `load_search`.

    Raises:
        ConfigError: An unknown or missing key, or a value that cannot work.
    """
    if "select" in values:
        remedy = "only a grid has it; a search has space instead, such as space: {training.learning_rate: {low: 1e-4, "
        raise bad_value("select", values["select"], f"{remedy}high: 1e-2, log: true}}}}; or use `aroma lab run`")
    known = [name for name in (*get_type_hints(Grid), *_OWN) if name != "select"]
    for key, value in values.items():
        if key not in known:
            raise unknown_key(str(key), value, known, "a search")
    grid = _one_cell(make_grid({key: value for key, value in values.items() if key not in _OWN}))
    described = flat_space(values.get("space"))
    space = read_space(described)
    sampler = typed("sampler", values.get("sampler", "random"), Literal["random", "grid", "tpe"])
    seed = typed("sampler_seed", values.get("sampler_seed", 0), int)
    require_at_least(0, "sampler_seed", seed)
    trials = _number_of_trials(values.get("trials"), sampler, space)
    search = Search(grid, space, described, sampler, trials, seed)
    search.extreme_trials()  # a key or a value that cannot work is refused here
    return search


def _one_cell(grid: Grid) -> Grid:
    """Return a grid of one task, one method and one seed, whose study has a name."""
    for key, several in (("tasks", grid.tasks), ("methods", grid.methods), ("seeds", grid.seeds)):
        if len(several) != 1:
            raise bad_value(key, list(several), "a search has one task, one method and one seed; for more, use a grid")
    name = grid.study or f"{next(iter(grid.tasks))}-{next(iter(grid.methods))}"
    require_folder_name("study", name)
    return replace(grid, study=name)


def _number_of_trials(given: Any, sampler: str, space: Space) -> int:
    trials = typed("trials", given, int | None)
    if trials is not None:
        require_at_least(1, "trials", trials)
    if sampler != "grid":
        if trials is None:
            raise bad_value("trials", None, "say how many are tried in all, such as 20")
        return int(trials)
    points = len(grid_points(space))
    if trials not in (None, points):
        raise bad_value("trials", given, f"sampler: grid tries each of the {points} points once; leave it out")
    return points


@dataclass(frozen=True)
class SearchOutcome:
    """The outcome of a search, over all machines.

    Args:
        trials: All trials, decided.
        best: The one with the highest held-out score, of equal ones the first; None if all failed.
        file: Where it is written.
    """

    trials: tuple[Scheduled, ...]
    best: Scheduled | None
    file: Path

    @property
    def failed(self) -> list[Scheduled]:
        """Trials that failed."""
        return [one for one in self.trials if one.error is not None]


def run_search(search: Search, watcher: Watcher | None = None, *, module: str = WORKER_MODULE) -> SearchOutcome:
    """Run the trials that a search lacks, together with other machines that run it, and write `search.json`.

    Every trial is scored on examples held out from the training data; reported examples are never read.

    Args:
        search: The search.
        watcher: Is told how it goes.
        module: What runs a trial; see `TrialProcess`. Tests pass a stand-in.

    Raises:
        ConfigError: An option that cannot work, a storage that cannot be reached or went away, a study that searches
            something else, or an output folder that holds another search's trials or result.
        DataError: Examples that cannot be used.
    """
    file = search.grid.folder / SEARCH_FILE
    written = _own_record(file, search)
    check_methods(search.extreme_trials())
    # Before the study is made. A search whose trials are all decided needs its data no more.
    if module == WORKER_MODULE and len(written.get("tried", [])) < search.trials:
        check_tasks(search.extreme_trials())
    with Engine(search.grid, search.sampled_trial, watcher, module) as engine:
        engine.require_no_conflicts(search.scheduled())
        trials = engine.run(search.scheduled())
    best = max((one for one in trials if one.score is not None), key=lambda one: one.score or 0.0, default=None)
    write_json(file, _record_of(search, trials, best))
    return SearchOutcome(tuple(trials), best, file)


def serve(
    settings: Grid | Search, idle_seconds: float, watcher: Watcher | None = None, *, module: str = WORKER_MODULE
) -> int:
    """Run trials that another command enqueued, until nothing has waited or run for some time.

    Args:
        settings: The search, or the grid, of which only the output folder, the study, its storage and `processes`
            count: the study holds the trials.
        idle_seconds: That time.
        watcher: Is told how it goes.
        module: What runs a trial; see `TrialProcess`. Tests pass a stand-in.

    Returns:
        The number of trials that ended here.

    Raises:
        ConfigError: A storage that cannot be reached or went away, a study that searches something else, or a folder
            that holds another trial.
    """
    grid = settings if isinstance(settings, Grid) else settings.grid
    make_trial = trial_of_grid if isinstance(settings, Grid) else settings.sampled_trial
    with Engine(grid, make_trial, watcher, module) as engine:
        return engine.serve(idle_seconds)


def _own_record(file: Path, search: Search) -> dict[str, Any]:
    """Return what `search.json` says so far.

    Raises:
        ConfigError: It is another search's, or no search's at all.
    """
    content = read_json(file) if file.exists() else {"study": search.grid.study_name}
    study = content.get("study") if isinstance(content, dict) else None
    if study != search.grid.study_name:
        remedy = f"{file.name} there is of study {study!r}, and would be overwritten; give another output"
        raise bad_value("output", search.grid.output, remedy)
    record: dict[str, Any] = content
    return record


def _record_of(search: Search, trials: Sequence[Scheduled], best: Scheduled | None) -> dict[str, Any]:
    """Return the content of `search.json`; trials are in their order, failed ones included."""
    entries = {one.name: _entry(search, one) for one in trials}
    return {
        "study": search.grid.study_name,
        "storage": without_password(search.grid.storage) if search.grid.storage else JOURNAL_FILE,
        "task": next(iter(search.grid.tasks)),
        "method": next(iter(search.grid.methods)),
        "scored_on": "held_out",
        "searched": search.searched(),
        "trials": search.trials,
        "best": None if best is None else entries[best.name],
        "tried": list(entries.values()),
    }


def _entry(search: Search, one: Scheduled) -> dict[str, Any]:
    return {
        "number": one.attributes[NUMBER],
        "values": {key: one.last.params[key] for key in search.space if key in one.last.params},
        "score": one.score,
        "error": one.error,
        "attempts": one.tries,
        "machine": one.attributes.get(MACHINE),
        "run": f"runs/{one.name}",
    }
