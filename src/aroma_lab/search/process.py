"""One ticket's trial in a process of its own, in a folder that no other process writes to meanwhile."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from aroma.errors import ConfigError
from aroma.files import read_json

from ..grid.lock import exclusive
from ..grid.status import Running
from ..grid.trial_files import clear_if_new, require_no_conflicts, state_of
from ..grid.worker import WORKER_MODULE, Worker
from ..run.files import RUNS, TrialFiles
from ..run.trial import Trial

_STOP_SECONDS = 10.0


class Busy(Exception):
    """Another process is at work in the folder."""


class TicketRun:
    """A trial that runs, or that has a result already.

    Args:
        trial: The trial.
        output: Folder of the search; the trial lies in `runs/<name>` below it.
        module: What runs it; see `aroma_lab.grid.worker.Worker`.

    Raises:
        Busy: Another process is at work in the folder: that of a worker that was held up and counts as dead.
        ConfigError: The folder holds another trial.
    """

    def __init__(self, trial: Trial, output: Path, module: str = WORKER_MODULE) -> None:
        runs = output / RUNS
        self.trial = trial
        self.folder = runs / trial.name
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(exclusive(output / "locks" / trial.name))
            except ConfigError as error:
                raise Busy(trial.name) from error
            require_no_conflicts([trial], runs)
            clear_if_new(trial, self.folder)
            # A worker may have been killed between its trial's end and its message to the study.
            finished = state_of(trial, self.folder) == "finished"
            self._worker = None if finished else Worker(trial, self.folder, module, inherit=(lock,))
            self._held = stack.pop_all()

    @property
    def has_ended(self) -> bool:
        """Whether the trial ran to its end, good or bad."""
        return self._worker is None or self._worker.has_ended()

    @property
    def seconds(self) -> float:
        """Seconds since it was started here."""
        return 0.0 if self._worker is None else self._worker.seconds

    def progress(self) -> Running:
        """Return how far the trial is."""
        return Running(self.trial, 0, None, None) if self._worker is None else self._worker.progress()

    def failure(self) -> str | None:
        """Return what a trial that has ended failed of, and where more stands; None if it has a score."""
        message = None if self._worker is None else self._worker.failure()
        return None if message is None else f"{message} ({TrialFiles(self.folder).failure})"

    def was_killed(self) -> bool:
        """Whether a signal ended the process of a failed trial, which says nothing about the trial."""
        return bool(read_json(TrialFiles(self.folder).failure)["error"] == "WorkerKilled")

    def score(self) -> float:
        """Return the held-out score of a trial that has ended well."""
        return float(read_json(TrialFiles(self.folder).result)["score"])

    def ask_to_stop(self) -> None:
        """Ask the trial's process to end, if there is one."""
        if self._worker is not None and not self._worker.has_ended():
            self._worker.ask_to_stop()

    def close(self) -> None:
        """End the trial if it runs, and let others have the folder."""
        self.ask_to_stop()
        if self._worker is not None:
            self._worker.stop(_STOP_SECONDS)
        self._held.close()
