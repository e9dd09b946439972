"""The trials in the output folder of a grid: how they ended, and processes that run them.

Each trial runs in a process of its own, forked from one that has imported PyTorch. A trial whose process is killed,
as when memory runs out, goes on from its last checkpoint. Several commands, on any machines, can share a folder.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from aroma.errors import ConfigError
from aroma.files import read_json, write_json

from ..run.trial import RUNS, Trial, TrialFiles, differing_keys, load_trial, save_trial

MOST_DEATHS = 3
"""A trial whose process died so often in one command has failed."""
RUNNER = "aroma_lab.study.attempt"
"""Module with the function that runs a trial; tests name another, which needs neither methods nor data."""
_POLL_SECONDS = 0.5

State = Literal["finished", "failed", "interrupted", "new", "conflict"]


class Ended(NamedTuple):
    """How a trial ended: its held-out score and loss, or why it failed."""

    score: float = 0.0
    loss: float = 0.0
    failure: str | None = None


class Runs:
    """The trials in an output folder. Their files say all there is to know of them."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._finished: dict[str, Ended] = {}

    def files(self, name: str) -> TrialFiles:
        """Return the names of a trial's files."""
        return TrialFiles(self.output / RUNS / name)

    def ended(self, name: str) -> Ended | None:
        """Return how a trial ended; None if it has not."""
        files = self.files(name)
        if name not in self._finished and files.result.exists():
            result = read_json(files.result)
            self._finished[name] = Ended(result["score"], result["held_out_loss"])
        if name in self._finished or not files.failure.exists():
            return self._finished.get(name)
        failure = read_json(files.failure)
        return Ended(failure=f"{failure['error']}: {failure['message']}")

    def all_ended(self) -> set[str]:
        """Return the names of all trials that have ended, of any grid."""
        root = self.output / RUNS
        found = [path for end in ("result", "failure") for path in root.rglob(f"{end}.json")]
        return {str(path.parent.relative_to(root)) for path in found}

    def state(self, trial: Trial) -> State:
        """Return the state of a trial; `"conflict"`: its folder holds a result or a checkpoint of another one."""
        files, ended = self.files(trial.name), self.ended(trial.name)
        if not files.trial.exists():
            return "new"
        if differing_keys(load_trial(files.trial), trial):
            has_checkpoint = ended is None and any(files.checkpoints.glob("*"))
            return "conflict" if has_checkpoint or files.result.exists() else "new"
        return "interrupted" if ended is None else "finished" if ended.failure is None else "failed"

    def require_own(self, trials: Iterable[Trial]) -> None:
        """Raise `ConfigError` for a trial in conflict, naming what differs."""
        for trial in trials:
            if self.state(trial) == "conflict":
                keys = differing_keys(load_trial(self.files(trial.name).trial), trial)
                raise ConfigError(
                    f"output: {self.files(trial.name).root} was made with another {', '.join(keys)}, and nothing is "
                    "overwritten; give another output, undo the change, or move that folder away"
                )

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Take the exclusive right to run a trial; False if another process has it.

        The kernel gives it back when this process ends, however it ends.
        """
        path = self.output / ".locks" / quote(name, safe="")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


Watch = Callable[[str, Ended, int, int], None]
"""Is called with the name of a trial that has ended, how, how many have by now, and how many are known."""


def run_all(
    output: Runs,
    processes: int,
    due: Callable[[], Mapping[str, Trial]],
    watch: Watch = lambda *_: None,
    runner: str = RUNNER,
) -> set[str]:
    """Run trials that have not ended, until all have, here or in other commands.

    Args:
        output: Their folder.
        processes: Trials at a time.
        due: Returns the trials that have ended or are due by now, by name, in the order of their run.

    Returns:
        The names of those that have ended meanwhile.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([runner])
    before = output.all_ended()
    seen, running, deaths = {*before}, dict[str, Any](), Counter[str]()
    trials = due()
    try:
        while True:
            for name, process in [*running.items()]:
                if process.exitcode is not None:
                    del running[name]
                    deaths[name] += process.exitcode != 0
                    if deaths[name] >= MOST_DEATHS:
                        _give_up(output, name, process.exitcode)
            ends = {name: output.ended(name) for name in trials}
            if new := {name: end for name, end in ends.items() if end is not None and name not in seen}:
                seen.update(new)
                trials = due()  # more may be due by now; it reads many files, so not at every turn
                for name, end in new.items():
                    watch(name, end, len(seen.intersection(trials)), len(trials))
                continue
            open_trials = [name for name, end in ends.items() if end is None]
            if not open_trials:
                return seen - before
            for name in open_trials:
                if len(running) < processes and name not in running and _prepare(output, trials[name]):
                    running[name] = context.Process(target=_run, args=(output, trials[name], runner))
                    running[name].start()
            wait([process.sentinel for process in running.values()], _POLL_SECONDS)
    finally:
        for process in running.values():
            process.kill()  # nothing is lost but steps since a checkpoint
            process.join()


def _prepare(output: Runs, trial: Trial) -> bool:
    """Make the folder of a trial; False if another process runs it, or did."""
    with output.claim(trial.name) as ours:
        if not ours or output.ended(trial.name) is not None:
            return False
        files = output.files(trial.name)
        if output.state(trial) == "new":
            shutil.rmtree(files.root, ignore_errors=True)  # of another trial, without a result or a checkpoint
            files.root.mkdir(parents=True)
            save_trial(trial, files.trial)
        return True


def _give_up(runs: Runs, name: str, code: int) -> None:
    """Write down that a trial has ended its process too often."""
    how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
    cause = ", as when memory runs out" if code == -signal.SIGKILL else ""
    message = f"its process was ended {MOST_DEATHS} times, the last time {how}{cause}"
    files = runs.files(name)
    with runs.claim(name) as ours:
        if ours and not files.result.exists():
            printed = files.log.read_text(encoding="utf-8", errors="replace") if files.log.exists() else ""
            _record_failure(files, "WorkerKilled", message, printed.splitlines()[-20:])


def _record_failure(files: TrialFiles, error: str, message: str, lines: list[str]) -> None:
    write_json(files.failure, {"error": error, "message": message, "traceback": lines})


# In the process ------------------------------------------------------------------------------------------------------


def _run(runs: Runs, trial: Trial, runner: str) -> None:
    """Run a trial, unless another process does or did; leave `result.json` or `failure.json`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    files = runs.files(trial.name)
    with runs.claim(trial.name) as ours:
        if not ours or runs.ended(trial.name) is not None:
            return
        with files.log.open("w") as log:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), stream.fileno())
        try:
            import_module(runner).run_trial(trial, files.root)
        except Exception as error:
            _record_failure(files, type(error).__name__, str(error), traceback.format_exc().splitlines())
        sys.stdout.flush()
        if not files.log.stat().st_size:
            files.log.unlink()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
