"""One trial in a process of its own, so that a crash or a kill for want of memory takes nothing else down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aroma.files import read_json, write_json

from ..run.files import TrialFiles
from ..run.trial import Trial, save_trial
from .status import Running
from .trial_files import tidy

WORKER_MODULE = "aroma_lab.run.worker"
_LOG_LINES = 20
"""Last lines of a dead worker's log that go into its failure."""


class Worker:
    """A running trial.

    Args:
        trial: What is run.
        folder: Its folder; made if missing.
        module: Run as `python -m MODULE TRIAL.json FOLDER`.
        inherit: Descriptors that the process keeps open.
    """

    def __init__(self, trial: Trial, folder: Path, module: str = WORKER_MODULE, inherit: Sequence[int] = ()) -> None:
        self.trial, self.folder, self._files = trial, folder, TrialFiles(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_trial(trial, self._files.trial)
        # Of an earlier attempt: they would pass for this one's.
        for left in (self._files.failure, self._files.progress):
            left.unlink(missing_ok=True)
        self._began = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._latest: tuple[int, float] | None = None
        self._planned: int | None = None
        with self._files.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "aroma_lab.grid.leash", module, str(self._files.trial), str(folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=worker_environment(trial.training.threads),
                pass_fds=tuple(inherit),
                # Ctrl-C goes to a terminal's whole process group; workers are for their runner to stop.
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self._began

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def progress(self) -> Running:
        """Return how far the trial is, as its worker last wrote."""
        content = read_json(self._files.progress) if self._files.progress.exists() else {}
        step, self._planned = int(content.get("step", 0)), content.get("planned", self._planned)
        if content and (self._latest is None or step != self._latest[0]):
            self._latest = (step, time.monotonic())
            self._first = self._first or self._latest
        return Running(self.trial, step, self._planned, self._seconds_per_step())

    def failure(self) -> str | None:
        """Return what a worker that has ended failed of, as `failure.json` tells it; None for a finished trial.

        A process that could not say why it died has its failure written for it.
        """
        self._close()
        if self._files.result.exists():
            tidy(self.folder)
            return None
        if not self._files.failure.exists():
            write_json(self._files.failure, _death(self._process.returncode, self._files.log))
        return failure_message(self.folder)

    def ask_to_stop(self) -> None:
        """Ask the process to end."""
        self._process.terminate()

    def stop(self, seconds: float) -> None:
        """Wait so long for the process to end, then kill it."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _seconds_per_step(self) -> float | None:
        if self._first is None or self._latest is None or self._latest[0] <= self._first[0]:
            return None
        return (self._latest[1] - self._first[1]) / (self._latest[0] - self._first[0])


def worker_environment(threads: int | None) -> dict[str, str]:
    """Return the environment of a worker; libraries read their numbers of threads from it when they are loaded."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if threads is not None:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return environment


def failure_message(folder: Path) -> str:
    """Return kind and message of a failed trial."""
    content = read_json(TrialFiles(folder).failure)
    return f"{content['error']}: {content['message']}"


def _death(code: int, log: Path) -> dict[str, Any]:
    """Return the failure of a worker that left none itself."""
    if code < 0:
        name = signal.Signals(-code).name
        cause = "; the kernel does so where memory runs out" if name == "SIGKILL" else ""
        error, message = "WorkerKilled", f"the worker was ended by {name}{cause}"
    else:
        error, message = "WorkerEnded", f"the worker ended with code {code} and left no result"
    return {
        "error": error,
        "message": message,
        "traceback": log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:],
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
