"""What the files in a trial's folder say of the trial."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from aroma.errors import ConfigError

from ..run.files import TrialFiles
from ..run.trial import Trial, differing_keys, load_trial

State = Literal["finished", "failed", "interrupted", "new", "conflict"]


def state_of(trial: Trial, folder: Path) -> State:
    """Return what is known of a trial.

    `"conflict"`: another trial, with a result or checkpoints that would be lost, is in the folder. Another one without
    them is worth nothing, and the trial counts as new.

    Raises:
        CheckpointError: `trial.json` is damaged.
    """
    files = TrialFiles(folder)
    if not files.trial.exists():
        return "new"
    finished, failed = files.result.exists(), files.failure.exists()
    if differing_keys(load_trial(files.trial), trial):
        return "conflict" if finished or (_has_checkpoint(folder) and not failed) else "new"
    return "finished" if finished else "failed" if failed else "interrupted"


def require_no_conflicts(trials: Iterable[Trial], runs: Path) -> None:
    """Raise if the folder of a trial holds another one's result or checkpoints.

    Raises:
        ConfigError: Naming every such folder, and the keys in which the trials differ.
    """
    conflicts = [
        f"{files.root} ({', '.join(differing_keys(load_trial(files.trial), trial))})"
        for trial, files in ((trial, TrialFiles(runs / trial.name)) for trial in trials)
        if state_of(trial, files.root) == "conflict"
    ]
    if conflicts:
        raise ConfigError(
            f"output: {len(conflicts)} of its runs were made by another grid, and nothing is overwritten. Give "
            f"another output, undo the change, or move these away (differing keys in brackets): {'; '.join(conflicts)}"
        )


def clear_if_new(trial: Trial, folder: Path) -> None:
    """Remove what another trial without a result or a checkpoint left in the folder."""
    if TrialFiles(folder).trial.exists() and state_of(trial, folder) == "new":
        shutil.rmtree(folder)


def tidy(folder: Path) -> None:
    """Remove from a finished trial's folder what its worker had no time to remove, and a log of nothing."""
    files = TrialFiles(folder)
    shutil.rmtree(files.checkpoints, ignore_errors=True)
    files.progress.unlink(missing_ok=True)
    if files.log.exists() and not files.log.stat().st_size:
        files.log.unlink()


def _has_checkpoint(folder: Path) -> bool:
    checkpoints = TrialFiles(folder).checkpoints
    return checkpoints.is_dir() and any(checkpoints.iterdir())
