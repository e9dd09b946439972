"""A whole run, timed: LoRA, AdaLoRA and AROMA over the same batches, step by step in turn, in one process."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from aroma.files import write_json

from ..progress import Progress, no_progress
from ..run.run_folder import require_empty
from .accounting import UNFROZEN, ArmLedger, Epoch
from .machine import require_device
from .recorder import TRAJECTORY_FILE
from .run_arm import Arm
from .run_data import Batch
from .run_lineup import Lineup, line_up
from .run_report import RESULT_FILE, RunResult, result_record
from .run_settings import RunSettings
from .sampling import turn_order
from .timing import no_collection, stopwatch_for

_COLLECT_EVERY = 50
"""Steps between two collections of Python's garbage, which is not to happen in somebody's turn."""


def bench_run(settings: RunSettings, out: str | os.PathLike[str], phase: Progress = no_progress) -> RunResult:
    """Measure a whole run, and leave result and trajectory in a folder, after every epoch what there is so far.

    Args:
        settings: The run.
        out: The folder; must be new or empty.
        phase: Announces phases.

    Raises:
        ConfigError: `out` is not empty, or settings that cannot work.
        DataError: A trajectory or data that cannot be used.
    """
    folder = Path(out)
    require_empty("--out", folder, "give another folder with --out")
    require_device(settings.device)
    threads = settings.threads or (settings.recipe.training.threads if settings.recipe else None)
    if threads is not None:
        torch.set_num_threads(threads)
    lineup = line_up(settings)
    epochs: list[Epoch] = []
    with phase("steps", lineup.steps) as advance:
        for epoch in WholeRun(lineup, settings.device).epochs(advance):
            epochs.append(epoch)
            result = RunResult.of(settings, lineup, epochs)
            write_json(folder / TRAJECTORY_FILE, lineup.trajectory(result.steps).as_dict())
            write_json(folder / RESULT_FILE, result_record(result, complete=False))
    write_json(folder / RESULT_FILE, result_record(result, complete=True))
    return result


class WholeRun:
    """Drives a lineup from its first step to its last.

    Args:
        lineup: What takes part.
        device: `"cpu"` or `"cuda"`.
    """

    def __init__(self, lineup: Lineup, device: str) -> None:
        self._lineup = lineup
        self._stopwatch = stopwatch_for(device)
        self._splits_steps = len(lineup.drawn) < lineup.steps
        self._trainable = {arm.name: arm.trainable for arm in lineup.arms}
        self._turn = 0

    def epochs(self, on_step: Callable[[int], None] = lambda done: None) -> Iterator[Epoch]:
        """Yield every epoch once it is over; the last may be cut short.

        Args:
            on_step: Called with 1 after each optimizer step.
        """
        for arm in self._lineup.arms:
            arm.warm_up(self._lineup.batches.at(1))
        per_epoch = self._lineup.batches.steps_per_epoch
        for number, first in enumerate(range(1, self._lineup.steps + 1, per_epoch), start=1):
            last = min(first + per_epoch - 1, self._lineup.steps)
            with no_collection():
                epoch = self._epoch(number, range(first, last + 1), on_step)
            yield epoch
            if self._is_over():
                return

    def _epoch(self, number: int, steps: range, on_step: Callable[[int], None]) -> Epoch:
        ledgers = {arm.name: ArmLedger() for arm in self._lineup.arms}
        for step in steps:
            self._step(step, ledgers)
            on_step(1)
            if self._is_over():
                break
        taken = range(steps.start, step + 1)
        return Epoch(
            number=number,
            steps=len(taken),
            measured_steps=sum(step in self._lineup.drawn for step in taken),
            arms={arm.name: ledgers[arm.name].close(arm.total_rank(), arm.finished) for arm in self._lineup.arms},
        )

    def _step(self, step: int, ledgers: dict[str, ArmLedger]) -> None:
        """Let every arm take a step: a whole one where it is measured, else only what replayed ranks do in it."""
        if step % _COLLECT_EVERY == 0:
            gc.collect()
        for name, trainable in self._trainable.items():
            ledgers[name].had(trainable)
        stands_for = self._lineup.drawn.get(step)
        if stands_for is None:
            for arm in self._lineup.arms:
                if arm.replays:
                    ledgers[arm.name].extra(*self._stopwatch(partial(arm.grow, step)))
        else:
            batches = self._lineup.batches.at(step)
            for arm in self._order():
                self._measure(arm, step, batches, stands_for, ledgers[arm.name])
        if self._lineup.plan.changes_at(step):
            self._trainable = {arm.name: arm.trainable for arm in self._lineup.arms}

    def _measure(self, arm: Arm, step: int, batches: Sequence[Batch], stands_for: int, ledger: ArmLedger) -> None:
        with arm.own_randomness():
            train, grow, clear = self._stopwatch(partial(arm.train, batches), partial(arm.grow, step), arm.clear)
        if arm.replays and self._splits_steps:
            # Growth is timed at every step, drawn or not: merges are too rare to be left to a draw.
            ledger.measured(train + clear, stands_for)
            ledger.extra(grow)
        else:
            ledger.measured(train + grow + clear, stands_for)

    def _order(self) -> list[Arm]:
        order = turn_order(self._lineup.arms, self._turn)
        self._turn += 1
        if order[0].name == UNFROZEN and not self._lineup.is_replay:
            # It cannot know what AROMA is about to decide.
            order = [*order[1:], order[0]]
        return order

    def _is_over(self) -> bool:
        """Whether AROMA has nothing left to train, and the run is one that ends then."""
        return self._lineup.early_stop and any(arm.is_over for arm in self._lineup.arms)
