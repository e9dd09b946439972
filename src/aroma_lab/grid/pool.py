"""Trials side by side, each in its own process."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from ..run.trial import Trial
from .worker import WORKER_MODULE, Worker

_POLL_SECONDS = 0.2
_STOP_SECONDS = 10.0
"""How long a worker that is asked to stop may take."""


def run_pool(
    trials: Sequence[Trial],
    runs: Path,
    processes: int,
    *,
    module: str = WORKER_MODULE,
    inherit: Sequence[int] = (),
    on_poll: Callable[[Sequence[Worker], Sequence[Trial]], None] = lambda running, waiting: None,
) -> Generator[Worker, None, None]:
    """Run trials in order, at most `processes` at a time, and yield each worker when it has ended.

    Whatever ends the iteration early, as Ctrl-C, ends the workers first; so whoever iterates closes the generator.

    Args:
        trials: What is run.
        runs: Folder of the trials' folders.
        processes: Most workers at a time.
        module: See `Worker`.
        inherit: See `Worker`.
        on_poll: Called a few times a second with the workers, and with the trials that wait.
    """
    waiting, running = list(trials), list[Worker]()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                trial = waiting.pop(0)
                running.append(Worker(trial, runs / trial.name, module, inherit))
            on_poll(running, waiting)
            time.sleep(_POLL_SECONDS)
            for worker in [worker for worker in running if worker.has_ended()]:
                running.remove(worker)
                yield worker
    finally:
        _stop(running)


def _stop(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.ask_to_stop()
    deadline = time.monotonic() + _STOP_SECONDS
    for worker in workers:
        worker.stop(max(0.0, deadline - time.monotonic()))
