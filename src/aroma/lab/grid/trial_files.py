"""What lies in a trial's folder, and what that says of the trial."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ...errors import ConfigError
from ..trials.spec import Trial, differing_keys, load_trial

TRIAL, RESULT, FAILURE, PROGRESS = "trial.json", "result.json", "failure.json", "progress.json"
CHECKPOINTS = "checkpoints"
RUNS = "runs"
"""Folder, in a grid's output, of the trials' folders."""
WORKER_LOG = "worker.log"
"""What a worker printed; a process that is killed can leave nothing else."""

State = Literal["finished", "failed", "interrupted", "new", "conflict"]


def state_of(trial: Trial, folder: Path) -> State:
    """Return what is known of a trial.

    `"conflict"`: another trial, with a result or checkpoints that would be lost, is in the folder. Another one without
    them is worth nothing, and the trial counts as new.

    Raises:
        CheckpointError: `trial.json` is damaged.
    """
    if not (folder / TRIAL).exists():
        return "new"
    finished, failed = (folder / RESULT).exists(), (folder / FAILURE).exists()
    if differing_keys(load_trial(folder / TRIAL), trial):
        return "conflict" if finished or (_has_checkpoint(folder) and not failed) else "new"
    return "finished" if finished else "failed" if failed else "interrupted"


def require_no_conflicts(trials: Iterable[Trial], runs: Path) -> None:
    """Raise if the folder of a trial holds another one's result or checkpoints.

    Raises:
        ConfigError: Naming every such folder, and the keys in which the trials differ.
    """
    conflicts = [
        f"{runs / trial.name} ({', '.join(differing_keys(load_trial(runs / trial.name / TRIAL), trial))})"
        for trial in trials
        if state_of(trial, runs / trial.name) == "conflict"
    ]
    if conflicts:
        raise ConfigError(
            f"output: {len(conflicts)} of its runs were made by another grid, and nothing is overwritten. Give "
            f"another output, undo the change, or move these away (differing keys in brackets): {'; '.join(conflicts)}"
        )


def clear_if_new(trial: Trial, folder: Path) -> None:
    """Remove what another trial without a result or a checkpoint left in the folder."""
    if (folder / TRIAL).exists() and state_of(trial, folder) == "new":
        shutil.rmtree(folder)


def tidy(folder: Path) -> None:
    """Remove from a finished trial's folder what its worker had no time to remove, and a log of nothing."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    (folder / PROGRESS).unlink(missing_ok=True)
    log = folder / WORKER_LOG
    if log.exists() and not log.stat().st_size:
        log.unlink()


def _has_checkpoint(folder: Path) -> bool:
    checkpoints = folder / CHECKPOINTS
    return checkpoints.is_dir() and any(checkpoints.iterdir())
