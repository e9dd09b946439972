"""Worker processes: each takes the next trial of a folder that has not ended, until all have.

A worker lives over many trials, since it imports for ten seconds. One that is killed, as when memory runs out, is
replaced, and its trial goes on from its last checkpoint. Several commands, on any machines, can share a folder.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from aroma.errors import AromaError
from aroma.files import write_json

from ..run.trial import Trial, save_trial
from .folder import Ended, Runs

MOST_DEATHS = 3
"""A trial whose process died so often in one command has failed."""

_POLL_SECONDS = 0.5


class Plan(Protocol):
    """What is to be run in a folder."""

    runs: Runs
    processes: int

    def names(self) -> list[str]:
        """Return the names of the trials that have ended or are due by now, in the order of their run."""

    def trial(self, name: str) -> Trial:
        """Return one of them; called by the process that runs it."""


Attempt = Callable[[Trial, Path], object]
"""Runs a trial in its folder, and leaves `result.json` or `failure.json` there."""
Watch = Callable[[str, Ended, int, int], None]
"""Is called with the name of a trial that has ended, how, how many have by now, and how many are known."""


def attempt(trial: Trial, folder: Path) -> None:
    """Run a trial in a folder, or leave `failure.json` there; a process can run several, one after another."""
    try:
        from aroma.cli.quiet import quiet

        quiet()
        from ..run.machine import free_memory, git_revision, keep_freed_memory
        from ..run.run import run_trial

        git_revision()  # of the source that was imported, whatever becomes of the files
        keep_freed_memory()
        free_memory()
        run_trial(trial, folder)
    except Exception as error:
        _record_failure(folder, type(error).__name__, str(error), traceback.format_exc().splitlines())


def _record_failure(folder: Path, error: str, message: str, lines: list[str]) -> None:
    write_json(folder / "failure.json", {"error": error, "message": message, "traceback": lines})


def run_all(plan: Plan, watch: Watch = lambda *_: None, attempt: Attempt = attempt) -> set[str]:
    """Run the trials of a plan that have not ended, until all have, here or in other commands.

    Returns:
        The names of those that have ended meanwhile.

    Raises:
        AromaError: No worker can start.
    """
    before, names = plan.runs.all_ended(), plan.names()
    seen = {*before}
    workers = [_start(plan, attempt) for _ in range(plan.processes if {*names} - seen else 0)]
    deaths: Counter[str] = Counter()
    try:
        while workers:
            wait([worker.process.sentinel for worker in workers], _POLL_SECONDS)
            for worker in [one for one in workers if one.process.exitcode is not None]:
                workers.remove(worker)
                if worker.process.exitcode != 0:
                    deaths[worker.name] += 1
                    if deaths[worker.name] >= MOST_DEATHS:
                        _give_up(plan.runs, worker)
                    workers.append(_start(plan, attempt))
            while new := {name: end for name in names if name not in seen and (end := plan.runs.ended(name))}:
                seen.update(new)
                names = plan.names()
                for name, end in new.items():
                    watch(name, end, len(seen.intersection(names)), len(names))
    finally:
        for worker in workers:
            worker.process.kill()  # nothing is lost but steps since a checkpoint
            worker.process.join()
    return seen - before


class _Worker(NamedTuple):
    process: Any
    running: Any  # shared memory with the name of the trial that it runs

    @property
    def name(self) -> str:
        return bytes(self.running.value).decode()


def _start(plan: Plan, attempt: Attempt) -> _Worker:
    context = multiprocessing.get_context("spawn")
    running = context.Array("c", 1000, lock=False)
    worker = _Worker(context.Process(target=_work, args=(plan, attempt, running)), running)
    worker.process.start()
    return worker


def _give_up(runs: Runs, worker: _Worker) -> None:
    """Write down that a trial has ended its process too often."""
    code = worker.process.exitcode
    how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
    cause = "; the kernel does so when memory runs out" if code == -signal.SIGKILL else ""
    message = f"its process was ended {MOST_DEATHS} times, the last time {how}{cause}"
    if not worker.name:
        raise AromaError(f"no worker can start: {message}")
    files = runs.files(worker.name)
    with runs.claim(worker.name) as ours:
        if ours and not files.result.exists():
            printed = files.log.read_text(encoding="utf-8", errors="replace").splitlines()
            _record_failure(files.root, "WorkerKilled", message, printed[-20:])


# In the process ------------------------------------------------------------------------------------------------------


def _work(plan: Plan, attempt: Attempt, running: Any) -> None:
    """Run trials that nobody runs, or wait for those that others run, until all have ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while open_names := [name for name in plan.names() if plan.runs.ended(name) is None]:
        # After one more may be due.
        if not any(_run(plan, name, attempt, running) for name in open_names):
            time.sleep(_POLL_SECONDS)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(plan: Plan, name: str, attempt: Attempt, running: Any) -> bool:
    """Run a trial; False if another process does, or did."""
    with plan.runs.claim(name) as ours:
        if not ours or plan.runs.ended(name) is not None:
            return False
        running.value = name.encode()
        trial, files = plan.trial(name), plan.runs.files(name)
        if plan.runs.state(trial) == "new":
            shutil.rmtree(files.root, ignore_errors=True)  # of another trial, without a result or a checkpoint
            files.root.mkdir(parents=True)
            save_trial(trial, files.trial)
        with files.log.open("w") as log:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), stream.fileno())
        attempt(trial, files.root)
        sys.stdout.flush()
        if plan.runs.ended(name) is None:
            sys.exit(1)
        if not files.log.stat().st_size:
            files.log.unlink()
        return True
