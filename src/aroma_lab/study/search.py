"""A search: a grid of one task, method and seed, a space, and a sampler; from its file to its best values."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import PartialFixedSampler, RandomSampler, TPESampler

from aroma.errors import bad_value
from aroma.files import read_json, write_json
from aroma.outputs import open_folder

from ..run.trial import Trial, differing
from .engine import Engine, Watch
from .grid import (
    NUMBER,
    SETTINGS,
    Grid,
    attributes_of,
    check_methods,
    check_settings,
    check_tasks,
    make_trial,
    require_folder_name,
)
from .process import WORKER_MODULE
from .status import MACHINE, Scheduled
from .storage import JOURNAL_FILE, without_password

SEARCH_FILE = "search.json"

_OF_A_MACHINE = {"output", "processes", "study", "heartbeat", "select", "trials", "data"}
"""Keys in which the machines of a study may differ, and `select`, which a search does not have."""
_WRITE = (
    "write {low: 1e-4, high: 1e-2, log: true}, {low: 1, high: 8}, {low: 0.1, high: 0.5, step: 0.1} or "
    "{choices: [1, 2]}"
)
_MAX_POINTS = 10_000


@dataclass(frozen=True)
class Search(Grid):
    """A whole search: a grid of one task, one method and one seed, and what is searched.

    Args:
        space: Ranges and choices by dotted key, as the file has them. Whole numbers as both `low` and `high` mean
            whole numbers in between; write `1.0` for a range of real numbers.
        sampler: `"random"`, `"grid"` (every point once) or `"tpe"` (a tree-structured Parzen estimator).
        trials: Number of trials, over all machines; None for a grid, which has a trial a point.
        sampler_seed: Seed of the sampler. Random points depend on it alone, not on the machine that takes them.
    """

    space: dict[str, Any] = field(default_factory=dict)
    sampler: Literal["random", "grid", "tpe"] = "random"
    trials: int | None = None
    sampler_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, several in (("tasks", self.tasks), ("methods", self.methods), ("seeds", self.seeds)):
            if len(several) != 1:
                remedy = "a search has one task, one method and one seed; for more, use a grid"
                raise bad_value(key, list(several), remedy)
        if self.select is not None:
            raise bad_value("select", self.select.over, "only a grid has it; a search has `space`")
        require_folder_name("study", self.study_name)
        if self.sampler_seed < 0:
            raise bad_value("sampler_seed", self.sampler_seed, "give 0 or more")
        if self.sampler == "grid":
            if self.trials not in (None, len(self.points)):
                remedy = f"sampler: grid tries each of the {len(self.points)} points once; leave it out"
                raise bad_value("trials", self.trials, remedy)
        elif self.trials is None or self.trials < 1:
            raise bad_value("trials", self.trials, "say how many are tried in all, such as 20")
        self.extreme_trials()  # a key or a value that cannot work is refused here

    @property
    def study_name(self) -> str:
        """Name of the study in its storage."""
        return self.study or f"{next(iter(self.tasks))}-{next(iter(self.methods))}"

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """What is searched, by sorted key, so that machines agree on the order of points."""
        if not self.space:
            remedy = f"give at least one dotted key, such as training.learning_rate, and for it {_WRITE}"
            raise bad_value("space", self.space, remedy)
        return {key: _distribution(f"space.{key}", self.space[key]) for key in sorted(self.space, key=str)}

    @cached_property
    def points(self) -> list[dict[str, Any]]:
        """All points of a grid, the last key changing fastest."""
        values = {key: _values(key, one) for key, one in self.distributions.items()}
        if (count := math.prod(map(len, values.values()))) > _MAX_POINTS:
            raise bad_value("space", f"{count} points", f"a grid has at most {_MAX_POINTS}; use sampler: random")
        return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]

    def searched(self) -> dict[str, Any]:
        """Return what must be equal on all machines of a study."""
        return {key: value for key, value in self.as_dict().items() if key not in _OF_A_MACHINE}

    def scheduled(self) -> list[dict[str, Any]]:
        """Return the attributes with which the trials are enqueued."""
        searched, count = self.searched(), self.trials or len(self.points)
        return [attributes_of(self._name(number), searched, **{NUMBER: number}) for number in range(count)]

    def _name(self, number: int) -> str:
        return f"search/{self.study_name}/{number:04d}"

    def _trial(self, number: int, values: Mapping[str, Any]) -> Trial:
        task, method = next(iter(self.tasks)), next(iter(self.methods))
        settings = check_settings(values, "space.")
        return make_trial(self, task, method, self.seeds[0], self._name(number), settings, "select")

    def extreme_trials(self) -> list[Trial]:
        """Return trials that together contain every choice and both ends of every range."""
        ends: dict[str, list[Any]] = {
            key: list(one.choices) if isinstance(one, CategoricalDistribution) else [one.low, one.high]  # type: ignore[attr-defined]
            for key, one in self.distributions.items()
        }
        first = {key: several[0] for key, several in ends.items()}
        return [self._trial(0, {**first, key: end}) for key, several in ends.items() for end in several]

    def trial_of(self, study: optuna.Study, attempt: optuna.trial.FrozenTrial) -> Trial:
        """Return the trial that this machine has taken, with the values that the sampler gives it.

        The values are the same on every machine, except that TPE looks at the results so far.
        """
        if keys := differing(self.searched(), attempt.user_attrs[SETTINGS]):
            remedy = "use the same file on all machines, or give another study"
            raise bad_value("study", study.study_name, f"its trials have another {', '.join(keys)}; {remedy}")
        number = attempt.user_attrs.get(NUMBER, 0)
        seed = int(np.random.SeedSequence([self.sampler_seed, number]).generate_state(1)[0])
        # Constant liar: trials that run elsewhere count as bad, or all machines would try the same place.
        is_tpe = self.sampler == "tpe"
        study.sampler = TPESampler(seed=seed, constant_liar=True) if is_tpe else RandomSampler(seed)
        if self.sampler == "grid":
            study.sampler = PartialFixedSampler(self.points[number], study.sampler)
        trial = optuna.Trial(study, attempt._trial_id)  # keeps values that the attempt has
        return self._trial(number, {key: _suggest(trial, key, one) for key, one in self.distributions.items()})


class SearchOutcome(NamedTuple):
    """The outcome of a search, over all machines."""

    trials: list[Scheduled]
    """All trials, decided."""
    best: Scheduled | None
    """The one with the highest held-out score, of equal ones the first; None if all failed."""
    file: Path
    """Where it is written."""


def run_search(search: Search, watch: Watch | None = None, *, module: str = WORKER_MODULE) -> SearchOutcome:
    """Run the trials that a search lacks, together with other machines that run it, and write `search.json`.

    Every trial is scored on examples held out from the training data; reported examples are never read.

    Args:
        watch: Is told how it goes.
        module: What runs a trial; see `TrialProcess`. Tests pass a stand-in.

    Raises:
        ConfigError: An option that cannot work, a storage that cannot be reached or went away, a study that searches
            something else, or an output folder that holds another search's trials or result.
        DataError: Examples that cannot be used.
    """
    open_folder("output", search.folder)
    file = search.folder / SEARCH_FILE
    written, wanted = _own_record(file, search), search.scheduled()
    if module == WORKER_MODULE:  # a stand-in needs neither methods nor data
        check_methods(search.extreme_trials())
        if len(written.get("tried", [])) < len(wanted):  # once all trials are decided, data are needed no more
            check_tasks(search.extreme_trials())
    with Engine(search, watch, module) as engine:
        engine.status().require_same_settings(wanted)
        if not file.exists():  # from now on another search is refused here
            write_json(file, _record_of(search, [], None))
        trials = engine.run(wanted)
    best = max((one for one in trials if one.score is not None), key=lambda one: one.score or 0.0, default=None)
    write_json(file, _record_of(search, trials, best))
    return SearchOutcome(trials, best, file)


def _own_record(file: Path, search: Search) -> dict[str, Any]:
    """Return what `search.json` says so far; raise `ConfigError` if it is not this search's."""
    content = read_json(file) if file.exists() else {"study": search.study_name}
    study = content.get("study") if isinstance(content, dict) else None
    if study != search.study_name:
        remedy = f"{file.name} there is of study {study!r}, and would be overwritten; give another output"
        raise bad_value("output", search.output, remedy)
    record: dict[str, Any] = content
    return record


def _record_of(search: Search, trials: Sequence[Scheduled], best: Scheduled | None) -> dict[str, Any]:
    entries = {
        one.name: {
            "number": one.attributes[NUMBER],
            "values": one.attempt.params,
            "score": one.score,
            "error": one.error,
            "attempts": one.tries,
            "machine": one.attributes.get(MACHINE),
            "run": f"runs/{one.name}",
        }
        for one in trials
    }
    return {
        "study": search.study_name,
        "storage": without_password(search.storage) if search.storage else JOURNAL_FILE,
        "task": next(iter(search.tasks)),
        "method": next(iter(search.methods)),
        "scored_on": "held_out",
        "searched": search.searched(),
        "trials": len(trials),
        "best": None if best is None else entries[best.name],
        "tried": list(entries.values()),
    }


def _distribution(key: str, given: Any) -> BaseDistribution:
    """Return Optuna's distribution, which checks the range or the choices."""
    if not isinstance(given, dict):
        raise bad_value(key, given, _WRITE)
    if "choices" in given:
        kind: Any = CategoricalDistribution
    else:
        whole = all(isinstance(given.get(name, 0), int) for name in ("low", "high", "step"))
        kind = IntDistribution if whole else FloatDistribution
    try:
        with warnings.catch_warnings():
            # Optuna only warns of a step that misses `high`, and of choices that a database cannot keep.
            warnings.simplefilter("error", UserWarning)
            made: BaseDistribution = kind(**given)
    except (TypeError, ValueError, UserWarning) as error:
        raise bad_value(key, given, f"{error}; {_WRITE}") from error
    return made


def _suggest(trial: optuna.Trial, key: str, one: BaseDistribution) -> Any:
    if isinstance(one, CategoricalDistribution):
        return trial.suggest_categorical(key, one.choices)
    suggest: Any = trial.suggest_int if isinstance(one, IntDistribution) else trial.suggest_float
    return suggest(key, one.low, one.high, step=one.step, log=one.log)  # type: ignore[attr-defined]


def _values(key: str, one: BaseDistribution) -> list[Any]:
    """Return all values of a distribution that has finitely many."""
    if isinstance(one, CategoricalDistribution):
        return list(one.choices)
    if isinstance(one, IntDistribution) and not one.log:
        return list(range(one.low, one.high + 1, one.step))
    if isinstance(one, FloatDistribution) and one.step is not None:
        low, high, step = (Decimal(str(x)) for x in (one.low, one.high, one.step))
        return [float(low + n * step) for n in range(int((high - low) / step) + 1)]
    raise bad_value(f"space.{key}", one, "a grid needs choices or a step; or use sampler: random")
