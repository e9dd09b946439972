"""A trial in a process of its own, which is alone in its folder and ends with its parent.

The process is a fresh one because libraries size their thread pools from the environment when they are loaded, memory
is measured per process, and a crash or a kill for lack of memory must not end other trials.
`python -m aroma_lab.study.process PARENT MODULE ARGUMENTS` is how it is started.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aroma.files import read_json, write_json

from ..run.files import TrialFiles
from ..run.trial import Trial, save_trial

WORKER_MODULE = "aroma_lab.run.worker"

_LOG_LINES = 20
"""Last lines of a dead process's log that go into its failure."""
_STOP_SECONDS = 10.0
"""How long a process that is asked to stop may take."""


class FolderLock:
    """The exclusive right to a trial's folder.

    The kernel holds it for this process and for the trial's, and takes it back when both are gone, however they ended.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self.descriptor = path, descriptor

    @staticmethod
    def path(output: Path, name: str) -> Path:
        """Return the file that is locked for the trial `name`; it exists only meanwhile."""
        return output / ".locks" / quote(name, safe="")

    @classmethod
    def take(cls, output: Path, name: str) -> FolderLock | None:
        """Return the lock of the trial `name`; None if another process has it."""
        path = cls.path(output, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_ino == path.stat().st_ino:
                    return cls(path, descriptor)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except FileNotFoundError:
                pass
            os.close(descriptor)  # its holder has just removed the file; try the new one

    @classmethod
    def is_held(cls, output: Path, name: str) -> bool:
        """Whether a process has the lock; nothing is written."""
        try:
            with cls.path(output, name).open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def release(self) -> None:
        """Give the folder back."""
        self._path.unlink(missing_ok=True)
        os.close(self.descriptor)


@dataclass(frozen=True)
class Running:
    """A trial that runs on this machine.

    Args:
        name: Its name.
        step: Optimizer steps taken.
        planned: Optimizer steps planned; None until they are known.
    """

    name: str
    step: int
    planned: int | None


class TrialProcess:
    """A trial that runs in a process of its own.

    Args:
        trial: The trial.
        folder: Its folder; made if missing.
        lock: The lock of the folder; the process inherits it.
        module: Run as `python -m MODULE TRIAL.json FOLDER`.
    """

    def __init__(self, trial: Trial, folder: Path, lock: FolderLock, module: str = WORKER_MODULE) -> None:
        self.trial, self._files = trial, TrialFiles(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_trial(trial, self._files.trial)
        for left in (self._files.failure, self._files.progress):  # of an earlier attempt
            left.unlink(missing_ok=True)
        self._began = time.monotonic()
        command = [sys.executable, "-m", "aroma_lab.study.process", str(os.getpid()), module]
        with self._files.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, str(self._files.trial), str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock.descriptor,),
                # Ctrl-C goes to a terminal's whole process group; trials are stopped by their parent.
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._began

    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def progress(self) -> Running:
        """Return how far the trial is, as its process last wrote."""
        content = read_json(self._files.progress) if self._files.progress.exists() else {}
        return Running(self.trial.name, int(content.get("step", 0)), content.get("planned"))

    def failure(self) -> str | None:
        """Return why a trial that has ended failed, as in `failure.json`; None for a finished trial.

        The failure of a process that could not write one is written here.
        """
        if self._files.result.exists():
            tidy(self._files.root)
            return None
        if not self._files.failure.exists():
            write_json(self._files.failure, _death(self._process.returncode, self._files.log))
        return failure_message(self._files.root)

    def was_killed(self) -> bool:
        """Whether a signal ended the process, which says nothing about the trial."""
        return self._process.returncode < 0

    def ask_to_stop(self) -> None:
        """Ask the process to end."""
        if not self.has_ended():
            self._process.terminate()

    def stop(self) -> None:
        """End the process, and wait for it."""
        self.ask_to_stop()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


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


def _death(code: int, log: Path) -> dict[str, Any]:
    """Return the failure of a process that wrote none."""
    if code < 0:
        name = signal.Signals(-code).name
        cause = "; the kernel does so when memory runs out" if name == "SIGKILL" else ""
        error, message = "WorkerKilled", f"the process was ended by {name}{cause}"
    else:
        error, message = "WorkerEnded", f"the process ended with code {code} and left no result"
    return {
        "error": error,
        "message": message,
        "traceback": log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:],
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _main(parent: int, *command: str) -> None:
    """Run a module as a program that the kernel kills when the parent ends.

    Only Linux can do so. Elsewhere a trial whose parent was killed runs to its end, with the lock of its folder.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the call
            sys.exit("the parent has ended")
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]), *sys.argv[2:])
