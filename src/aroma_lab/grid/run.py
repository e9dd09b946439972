"""A whole grid: selection, then the reported trials; what is finished stays, what was interrupted goes on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from aroma.errors import bad_value
from aroma.files import read_json, write_json, write_text

from ..run.files import RUNS, TrialFiles
from ..run.trial import Trial
from .expand import check_methods, check_tasks, expand, report_name
from .lock import exclusive
from .pool import run_pool
from .select import Candidate, begun, candidates, chosen_settings, selection_of
from .spec import WHOLE, Grid, Part
from .status import Ended, GridStatus, Pace, Silent, Watcher
from .survey import due
from .trial_files import clear_if_new, require_no_conflicts, state_of, tidy
from .worker import WORKER_MODULE, Worker, failure_message

GRID_FILE, SELECTION_FILE = "grid.yaml", "selection.json"
_HEADER = "# The whole grid, defaults included. Written by `aroma lab run`, anew each time.\n"


@dataclass(frozen=True)
class Failure:
    """A trial that has no result.

    Args:
        name: Its name.
        message: What it failed of.
        path: File that tells more.
    """

    name: str
    message: str
    path: Path


@dataclass(frozen=True)
class GridOutcome:
    """What came of running a grid.

    Args:
        finished: Names of the trials finished now.
        failed: Trials without a result: failed now or earlier, or without a chosen setting.
        skipped: Names of the trials finished earlier.
    """

    finished: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def run_grid(
    grid: Grid,
    *,
    part: Part = WHOLE,
    retry_failed: bool = False,
    watcher: Watcher | None = None,
    module: str = WORKER_MODULE,
) -> GridOutcome:
    """Run all trials of a grid that have no result yet.

    Args:
        grid: The grid.
        part: Which of its trials.
        retry_failed: Run trials again that failed earlier.
        watcher: Is told how it goes.
        module: What a worker runs; see `Worker`.

    Raises:
        ConfigError: A value that cannot work, another runner on the same output, or trials there that another grid
            made. Nothing has been run then.
        DataError: Examples that cannot be used. Nothing has been run then, either.
    """
    part.check(grid)
    tried = [candidate for candidate in candidates(grid) if part.has(candidate.task, candidate.method)]
    # With any chosen values the trials differ in nothing that could be refused later.
    every = [*(candidate.trial for candidate in tried), *expand(grid, part=part)]
    check_methods(every)
    output = Path(grid.output)
    _require_own(output / GRID_FILE)
    if module == WORKER_MODULE:  # what another one makes of a task is not known
        check_tasks(due(grid, tried, part, retry_failed=retry_failed))
    with exclusive(output) as lock:
        run = _Run(grid, part, retry_failed, watcher or Silent(), module, lock, total=len(every))
        require_no_conflicts([candidate.trial for candidate in tried] or every, run.runs)
        write_text(output / GRID_FILE, _HEADER + yaml.safe_dump(grid.as_dict(), sort_keys=False, allow_unicode=True))
        return run.everything(tried)


class _Run:
    """One run of a grid, while it lasts."""

    def __init__(
        self, grid: Grid, part: Part, retry_failed: bool, watcher: Watcher, module: str, lock: int, total: int
    ) -> None:
        self.runs = Path(grid.output) / RUNS
        self._grid, self._part, self._retry_failed, self._watcher = grid, part, retry_failed, watcher
        self._module, self._lock, self._total = module, lock, total
        self._pace = Pace()
        self._outcome = GridOutcome()
        self._later: list[Trial] = []

    def everything(self, tried: list[Candidate]) -> GridOutcome:
        if not tried:
            self._run(expand(self._grid, part=self._part))
            return self._outcome
        self._later = expand(
            self._grid, part=self._part
        )  # as long as they are not known, for the estimate of the time left
        self._run([candidate.trial for candidate in tried])
        self._later = []
        selection = selection_of(tried, self.runs)
        # Of all that has been tried so far, whatever part is run now.
        write_json(Path(self._grid.output) / SELECTION_FILE, selection_of(begun(self._grid, self.runs), self.runs))
        self._refuse_unchosen(selection)
        trials = expand(self._grid, chosen_settings(selection), self._part)
        require_no_conflicts(trials, self.runs)
        self._run(trials)
        return self._outcome

    def _run(self, trials: Sequence[Trial]) -> None:
        to_run = [trial for trial in trials if self._is_to_run(trial)]
        workers = run_pool(
            to_run, self.runs, self._grid.processes, module=self._module, inherit=[self._lock], on_poll=self._report
        )
        with closing(workers):
            for worker in workers:
                self._end(worker)

    def _is_to_run(self, trial: Trial) -> bool:
        folder = self.runs / trial.name
        state = state_of(trial, folder)
        if state == "finished":
            tidy(folder)
            self._outcome.skipped.append(trial.name)
            self._learn(trial, read_json(TrialFiles(folder).result))
            return False
        if state == "failed" and not self._retry_failed:
            self._outcome.failed.append(Failure(trial.name, failure_message(folder), TrialFiles(folder).failure))
            return False
        clear_if_new(trial, folder)
        return True

    def _end(self, worker: Worker) -> None:
        name, failure, score = worker.trial.name, worker.failure(), None
        if failure is None:
            result = read_json(TrialFiles(worker.folder).result)
            score = result["score"]
            self._learn(worker.trial, result)
            self._outcome.finished.append(name)
        else:
            self._outcome.failed.append(Failure(name, failure, TrialFiles(worker.folder).failure))
        self._watcher.on_end(Ended(name, failure, score, worker.seconds))

    def _learn(self, trial: Trial, result: dict[str, Any]) -> None:
        self._pace.add(trial, result["planned_steps"], result["wall_seconds"])

    def _report(self, workers: Sequence[Worker], waiting: Sequence[Trial]) -> None:
        running = tuple(worker.progress() for worker in workers)
        self._watcher.on_status(
            GridStatus(
                total=self._total,
                done=len(self._outcome.finished) + len(self._outcome.skipped),
                failed=len(self._outcome.failed),
                running=running,
                seconds_left=self._pace.seconds_left(running, [*waiting, *self._later], self._grid.processes),
            )
        )

    def _refuse_unchosen(self, selection: dict[str, dict[str, Any]]) -> None:
        """Report the trials of a method for which every setting failed."""
        failures = {failure.name: failure for failure in self._outcome.failed}
        for task, methods in selection.items():
            for method in (label for label, entry in methods.items() if entry["chosen"] is None):
                first = next(path for name, path in failures.items() if name.startswith(f"select/{task}/{method}/"))
                message = f"not run, because no run of its selection finished ({first.message})"
                for seed in self._grid.seeds:
                    self._outcome.failed.append(Failure(report_name(task, method, seed), message, first.path))


def _require_own(path: Path) -> None:
    """Raise if a grid file of the user's is where the resolved one goes.

    Raises:
        ConfigError: It is.
    """
    if path.exists() and not path.read_text(encoding="utf-8").startswith(_HEADER):
        raise bad_value(
            "output", str(path.parent), f"{path.name} there is a file of your own, and would be overwritten; rename it"
        )
