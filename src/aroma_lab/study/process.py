"""A trial in a process of its own, which is alone in its folder and ends with its parent.

A crash or a kill for lack of memory must not end other trials, and memory is measured per process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from aroma.errors import CheckpointError
from aroma.files import read_json, write_json

from ..run.files import RUNS, TrialFiles
from ..run.trial import Trial, save_trial
from .nursery import Nursery

WORKER_MODULE = "aroma_lab.run.worker"

_LOG_LINES = 20
"""Last lines of a dead process's log that go into its failure."""
_STOP_SECONDS = 10.0
"""How long a process that is asked to stop may take."""


def take_lock(output: Path, name: str) -> int | None:
    """Take the exclusive right to the folder of the trial `name`.

    Returns:
        A file descriptor; whoever closes it last gives the folder back. The kernel does so for a process that ends,
        however it ends. None if another process has the lock.
    """
    path = _lock_file(output, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def is_locked(output: Path, name: str) -> bool:
    """Whether a process has the lock of a trial's folder; nothing is written."""
    lock = take_lock(output, name) if _lock_file(output, name).exists() else -1
    if lock is not None and lock >= 0:
        os.close(lock)
    return lock is None


def _lock_file(output: Path, name: str) -> Path:
    return output / ".locks" / quote(name, safe="")


class Running(NamedTuple):
    """A trial that runs on this machine."""

    name: str
    step: int
    planned: int | None
    """Optimizer steps planned; None until they are known."""


def _fresh(module: str, arguments: list[str], log: Path, lock: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "aroma_lab.study.child", str(os.getpid()), module, *arguments]
    with log.open("wb") as stream:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            # Ctrl-C goes to a terminal's whole process group; trials are stopped by their parent.
            start_new_session=True,
        )


class TrialProcess:
    """A trial that runs in a process of its own.

    Args:
        attempt: Optuna's id of the trial.
        lock: The lock of the trial's folder; the process inherits it.
        module: Run as `python -m MODULE TRIAL.json FOLDER`.
        nursery: Forks the process; without one it is a fresh one.
    """

    def __init__(
        self,
        trial: Trial,
        attempt: int,
        output: Path,
        lock: int,
        module: str = WORKER_MODULE,
        nursery: Nursery | None = None,
    ) -> None:
        self.trial, self.attempt, self.lock = trial, attempt, lock
        self._files = TrialFiles(output / RUNS / trial.name)
        self._files.root.mkdir(parents=True, exist_ok=True)
        save_trial(trial, self._files.trial)
        for left in (self._files.failure, self._files.progress):  # of an earlier attempt
            left.unlink(missing_ok=True)
        self._began = time.monotonic()
        arguments = [str(self._files.trial), str(self._files.root)]
        self._process = (
            _fresh(module, arguments, self._files.log, lock)
            if nursery is None
            else nursery.start(module, arguments, self._files.log, lock)
        )

    @property
    def seconds(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._began

    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def was_killed(self) -> bool:
        """Whether a signal ended the process, which says nothing about the trial."""
        return (self._process.returncode or 0) < 0

    def progress(self) -> Running:
        """Return how far the trial is, as its process last wrote."""
        try:
            content = read_json(self._files.progress)
        except CheckpointError:  # not written yet, or removed by a trial that ends at this moment
            content = {}
        return Running(self.trial.name, int(content.get("step", 0)), content.get("planned"))

    def failure(self) -> str | None:
        """Return why a trial that has ended failed; None for a finished one. `failure.json` is there afterwards."""
        if self._files.result.exists():
            tidy(self._files.root)
            return None
        if not self._files.failure.exists():
            self._write_failure()
        return failure_message(self._files.root)

    def ask_to_stop(self) -> None:
        """Ask the process to end."""
        self._process.terminate()  # nothing happens if it has ended

    def stop(self) -> None:
        """End the process, and wait for it."""
        self.ask_to_stop()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write_failure(self) -> None:
        code = self._process.returncode or 0
        error, message = "WorkerEnded", f"the process ended with code {code} and left no result"
        if code < 0:
            name = signal.Signals(-code).name
            cause = "; the kernel does so when memory runs out" if name == "SIGKILL" else ""
            error, message = "WorkerKilled", f"the process was ended by {name}{cause}"
        printed = self._files.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self._files.failure, {"error": error, "message": message, "traceback": printed, "at": now})


def failure_message(folder: Path) -> str:
    """Return kind and message of a failed trial's error."""
    content = read_json(TrialFiles(folder).failure)
    return f"{content['error']}: {content['message']}"


def tidy(folder: Path) -> None:
    """Remove from a finished trial's folder what its process had no time to remove, and an empty log."""
    files = TrialFiles(folder)
    shutil.rmtree(files.checkpoints, ignore_errors=True)
    files.progress.unlink(missing_ok=True)
    if files.log.exists() and not files.log.stat().st_size:
        files.log.unlink()
