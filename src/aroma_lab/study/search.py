"""A search: a grid of one task, method and seed, and a space that Optuna's samplers draw from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial

from aroma.errors import bad_value
from aroma.files import read_json, write_json
from aroma.outputs import open_folder

from ..run.trial import Trial, differing_keys, load_trial
from .grid import Grid, Settings, check_settings, check_trials, make_trial
from .trials import RUNNER, Ended, Runs, Watch, run_all

SEARCH_FILE = "search.json"
_FREE = {"output", "processes", "trials", "data", "select"}
"""What may differ between two commands of one search."""
_WRITE = "write {low: 1e-4, high: 1e-2, log: true}, {low: 0.1, high: 0.5, step: 0.1} or {choices: [1, 2]}"

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class Search(Grid):
    """A whole search: a grid of one task, one method and one seed, and what is searched.

    Args:
        space: Ranges and choices by dotted key, as the file has them. Whole numbers as both `low` and `high` mean
            whole numbers in between; write `1.0` for a range of real numbers.
        sampler: `"random"`, or `"tpe"`: a tree-structured Parzen estimator. Both draw with the seed of the search, and
            a random point depends on nothing else but its number.
        trials: Number of trials.
    """

    space: dict[str, Any] = field(default_factory=dict)
    sampler: Literal["random", "tpe"] = "random"
    trials: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, several in (("tasks", self.tasks), ("methods", self.methods), ("seeds", self.seeds)):
            if len(several) != 1 or self.select is not None:
                remedy = "a search has one task, one method, one seed and no `select`; for more, use a grid"
                raise bad_value(key, list(several), remedy)
        if not self.space or self.trials < 1:
            raise bad_value("space", self.space, f"give 1 trial or more, and a key of the space or more: {_WRITE}")
        self.extreme_trials()  # a key or a value that cannot work is refused here

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """What is searched, by sorted key: the order of lines changes nothing."""
        return {key: _distribution(f"space.{key}", self.space[key]) for key in sorted(self.space)}

    def trial_of(self, name: str, values: Mapping[str, Any]) -> Trial:
        """Return the trial that tries these values."""
        task, method = next(iter(self.tasks)), next(iter(self.methods))
        return make_trial(self, task, method, self.seeds[0], name, check_settings(values, "space"), "select")

    def extreme_trials(self) -> list[Trial]:
        """Return trials that together contain every choice and both ends of every range."""
        ends = {key: _ends(one) for key, one in self.distributions.items()}
        first = {key: several[0] for key, several in ends.items()}
        return [self.trial_of("search", {**first, key: end}) for key, several in ends.items() for end in several]


class SearchPlan:
    """The trials of a search; Optuna says what one tries when it begins."""

    def __init__(self, search: Search) -> None:
        self.search, self.runs, self.processes = search, Runs(search.folder), search.processes

    def names(self) -> list[str]:
        """Return the names of all trials."""
        return [f"search/{number:04d}" for number in range(self.search.trials)]

    def trial(self, name: str) -> Trial:
        """Return a trial with the values with which it began, or that Optuna gives it now."""
        file, distributions = self.runs.files(name).trial, self.search.distributions
        if file.exists():
            return load_trial(file)
        names = self.names()
        seed = self.search.seeds[0] * 100_000 + names.index(name)
        study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed))
        if self.search.sampler == "tpe":
            # Constant liar: trials that run elsewhere count as bad, or all workers would try the same place.
            study.sampler = TPESampler(seed=seed, constant_liar=True)
            for other in names:
                values, ended = self.values(other), self.runs.ended(other)
                if values and not (ended and ended.failure):
                    state, score = (TrialState.COMPLETE, ended.score) if ended else (TrialState.RUNNING, None)
                    study.add_trial(create_trial(state=state, value=score, params=values, distributions=distributions))
        return self.search.trial_of(name, study.ask(distributions).params)

    def values(self, name: str) -> Settings:
        """Return the values that a trial tries; none before it has begun."""
        file = self.runs.files(name).trial
        content = asdict(load_trial(file)) if file.exists() else {}
        parts = {key: key.partition(".") for key in self.search.distributions if content}
        return {key: content[part][rest] if rest else content[part] for key, (part, _, rest) in parts.items()}


def run_search(search: Search, watch: Watch = lambda *_: None, runner: str = RUNNER) -> list[dict[str, Any]]:
    """Run the trials that a search lacks, with other commands on the same folder, and write `search.json`.

    Every trial is scored on examples held out from the training data; reported examples are never read.

    Args:
        watch: Called with every trial that ends.
        runner: Module that runs a trial; see `RUNNER`.

    Returns:
        All trials, the best first and failed ones last: `name`, `values`, `score` and `error`, as in `search.json`.

    Raises:
        ConfigError: An option that cannot work, or an output folder that holds another search's result.
        DataError: Examples that cannot be used.
    """
    open_folder("output", search.folder)
    plan, file = SearchPlan(search), search.folder / SEARCH_FILE
    record = {"searched": {key: value for key, value in search.as_dict().items() if key not in _FREE}}
    if file.exists() and (keys := differing_keys(read_json(file)["searched"], record["searched"])):
        remedy = f"{SEARCH_FILE} there is of a search with another {', '.join(keys)}; give another output"
        raise bad_value("output", search.output, remedy)
    if any(plan.runs.ended(name) is None for name in plan.names()):
        if runner == RUNNER:
            check_trials(search.extreme_trials(), search.extreme_trials())
        write_json(file, record)  # from now on another search is refused here
        run_all(plan, watch, runner)
    ends = {name: plan.runs.ended(name) or Ended(failure="its files were removed") for name in plan.names()}
    tried = [
        {"name": name, "values": plan.values(name), "score": None if end.failure else end.score, "error": end.failure}
        for name, end in sorted(ends.items(), key=lambda one: (one[1].failure is None, one[1].score), reverse=True)
    ]
    write_json(file, {**record, "scored_on": "held_out", "tried": tried})
    return tried


def _distribution(key: str, given: Any) -> BaseDistribution:
    """Return Optuna's distribution, which checks the range or the choices."""
    if not isinstance(given, dict):
        raise bad_value(key, given, _WRITE)
    whole = all(isinstance(given.get(name, 0), int) for name in ("low", "high", "step"))
    kind: Any = CategoricalDistribution if "choices" in given else IntDistribution if whole else FloatDistribution
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of a step that misses `high`
            made: BaseDistribution = kind(**given)
    except (TypeError, ValueError, UserWarning) as error:
        raise bad_value(key, given, f"{error}; {_WRITE}") from error
    return made


def _ends(one: Any) -> list[Any]:
    return list(one.choices) if isinstance(one, CategoricalDistribution) else [one.low, one.high]
