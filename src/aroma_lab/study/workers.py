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
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from aroma.errors import AromaError
from aroma.files import write_json

from ..run.machine import end_with_parent
from ..run.trial import Trial, save_trial
from ..run.worker import attempt
from .folder import Ended, Runs

MOST_DEATHS = 3
"""A trial whose process died so often in one command has failed."""

_POLL_SECONDS = 0.5
_LOG_LINES = 20
"""Last lines of a dead process's log that go into its failure."""


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


def run_all(plan: Plan, watch: Watch = lambda *_: None, attempt: Attempt = attempt) -> set[str]:
    """Run the trials of a plan that have not ended, until all have, here or in other commands.

    Args:
        watch: Is told how it goes.
        attempt: What runs a trial. Tests pass a stand-in.

    Returns:
        The names of those that have ended meanwhile.

    Raises:
        AromaError: No worker can start.
    """
    told, names = plan.runs.all_ended(), plan.names()
    before = {*told}
    workers = [_start(plan, attempt) for _ in range(plan.processes if {*names} - told else 0)]
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
            while news := {name: end for name in names if name not in told and (end := plan.runs.ended(name))}:
                told.update(news)
                names = plan.names()
                for name, end in news.items():
                    watch(name, end, len(told.intersection(names)), len(names))
    finally:
        for worker in workers:
            worker.process.kill()  # nothing is lost but steps since a checkpoint
            worker.process.join()
    return told - before


class _Worker(NamedTuple):
    process: BaseProcess
    running: Any
    """Shared memory with the name of the trial that it runs."""

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
    code = worker.process.exitcode or 0
    how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
    cause = "; the kernel does so when memory runs out" if code == -signal.SIGKILL else ""
    message = f"its process was ended {MOST_DEATHS} times, the last time {how}{cause}"
    if not worker.name:
        raise AromaError(f"no worker can start: {message}")
    files = runs.files(worker.name)
    printed = files.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    with runs.claim(worker.name) as ours:
        if ours and not files.result.exists():
            write_json(files.failure, {"error": "WorkerKilled", "message": message, "traceback": printed})


# In the process ------------------------------------------------------------------------------------------------------


def _work(plan: Plan, attempt: Attempt, running: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    end_with_parent()
    while _step(plan, attempt, running):
        pass


def _step(plan: Plan, attempt: Attempt, running: Any) -> bool:
    """Run the next trial that nobody runs, or wait a moment for those that others run; False if all have ended."""
    open_names = [name for name in plan.names() if plan.runs.ended(name) is None]
    for name in open_names:
        with plan.runs.claim(name) as ours:
            if ours and plan.runs.ended(name) is None:
                running.value = name.encode()
                _run(plan, name, attempt)
                return True  # more may be due by now
    time.sleep(_POLL_SECONDS)
    return bool(open_names)


def _run(plan: Plan, name: str, attempt: Attempt) -> None:
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
