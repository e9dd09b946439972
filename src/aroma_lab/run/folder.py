"""The folder of one run: checked before anything is overwritten, and searched for a checkpoint to resume from."""

from __future__ import annotations

import json
import re
import shutil
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aroma.checkpoint import verify_checkpoint
from aroma.errors import CheckpointError, bad_value
from aroma.files import write_json
from aroma.outputs import open_folder

from .files import TrialFiles
from .trial import Trial, differing_keys, load_trial, save_trial


class TrialFolder(TrialFiles):
    """The folder of a trial that runs."""

    def check(self, trial: Trial) -> None:
        """Refuse a folder of another trial, and one that cannot be written to; nothing is left there.

        Raises:
            ConfigError: It holds another trial, or files of something else.
            OutputError: It cannot be written to.
        """
        open_folder("folder", self.root)
        if self.trial.exists():
            differing = differing_keys(trial, load_trial(self.trial))
            if differing:
                remedy = f"it differs in {', '.join(differing)}. Give another folder, or move that one away"
                raise bad_value("folder", str(self.root), f"the trial there was made with other settings: {remedy}")
            return
        # The files that may be there before trial.json is, and those that are half written.
        own = re.compile(r"recipe\.yaml|progress\.json|failure\.json|.*\.log|\..*\.tmp")
        found = [path.name for path in self.root.iterdir()] if self.root.is_dir() else []
        if strangers := sorted(name for name in found if not own.fullmatch(name)):
            remedy = f"it holds {strangers[0]}, and nothing is overwritten; give another folder"
            raise bad_value("folder", str(self.root), remedy)

    def open(self, trial: Trial) -> None:
        """Make the folder, and put the trial there unless an earlier attempt did."""
        self.root.mkdir(parents=True, exist_ok=True)
        if not self.trial.exists():
            save_trial(trial, self.trial)

    def checkpoint(self) -> str | None:
        """Return the latest checkpoint that the run can go on from; None if it has to begin anew.

        One that a kill cut off is passed over, and so is one after which the training was over: the Trainer would
        take one more step before it stops.
        """
        names = re.compile(r"checkpoint-([0-9]{1,18})")
        found = {int(m[1]): path for path in self.checkpoints.glob("*") if (m := names.fullmatch(path.name))}
        return next((str(found[step]) for step in sorted(found, reverse=True) if _is_resumable(found[step])), None)

    def clean(self, keep_checkpoints: bool = False) -> None:
        """Remove what only an unfinished trial needs."""
        if not keep_checkpoints:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.progress.unlink(missing_ok=True)
        self.failure.unlink(missing_ok=True)

    def record_failure(self, error: BaseException) -> None:
        """Write down what went wrong."""
        record = {
            "error": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)).splitlines(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(self.failure, record)


def step_of(checkpoint: str | None) -> int:
    """Return the optimizer steps taken at a checkpoint; 0 for None."""
    return 0 if checkpoint is None else int(_trainer_state(Path(checkpoint))["global_step"])


def _is_resumable(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except CheckpointError:
        return False
    return not _trainer_state(checkpoint)["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state
