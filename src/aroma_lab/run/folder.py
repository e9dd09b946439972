"""The folder of one run: checked before anything is overwritten, and searched for a checkpoint to resume from."""

from __future__ import annotations

import json
import re
import shutil
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aroma.checkpoint import verify_adapter
from aroma.errors import CheckpointError, ConfigError, bad_value
from aroma.files import is_new_or_empty, write_json

from ..methods.base import TRAINED_FILE
from ..training.trainer import HOOKS_FILE
from .files import TrialFiles
from .trial import Trial, differing_keys, load_trial, save_trial

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class TrialFolder(TrialFiles):
    """The folder of a trial that runs."""

    def check(self, trial: Trial) -> None:
        """Refuse a folder of another trial; nothing is written.

        Raises:
            ConfigError: It holds another trial, or files of something else.
        """
        if self.trial.exists():
            differing = differing_keys(trial, load_trial(self.trial))
            if differing:
                raise ConfigError(
                    f"folder={str(self.root)!r}: the trial there was made with other settings: it differs in "
                    f"{', '.join(differing)}. Give another folder, or move that one away"
                )
        elif strangers := self._strangers():
            raise bad_value(
                "folder", str(self.root), f"it holds {strangers[0]}, and nothing is overwritten; give another folder"
            )

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
        return next((str(path) for path in self._checkpoints() if _is_resumable(path)), None)

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

    def _strangers(self) -> list[str]:
        """Return the names of what is in the folder and could be somebody's work."""
        if not self.root.exists():
            return []
        if not self.root.is_dir():
            return [self.root.name]
        # The files that may be there before trial.json is.
        own = {self.recipe.name, self.progress.name, self.failure.name}
        found = [path.name for path in self.root.iterdir() if path.name not in own and path.suffix != ".log"]
        # What is written atomically has such a name for a moment, and keeps it if the process is killed then.
        return sorted(name for name in found if not (name.startswith(".") and name.endswith(".tmp")))

    def _checkpoints(self) -> Iterator[Path]:
        """Yield the Trainer's checkpoints, whole or not, the latest first."""
        if self.checkpoints.is_dir():
            found = [
                (int(m[1]), path) for path in self.checkpoints.iterdir() if (m := _CHECKPOINT.fullmatch(path.name))
            ]
            yield from (path for _, path in sorted(found, reverse=True))


def require_empty(field: str, folder: Path, remedy: str) -> None:
    """Raise unless `folder` is absent or an empty folder.

    Raises:
        ConfigError: It is a file, or holds something.
    """
    if not is_new_or_empty(folder):
        raise bad_value(field, str(folder), f"it is not an empty folder, and nothing is overwritten; {remedy}")


def step_of(checkpoint: str | None) -> int:
    """Return the optimizer steps taken at a checkpoint; 0 for None."""
    return 0 if checkpoint is None else int(_trainer_state(Path(checkpoint))["global_step"])


def _is_resumable(checkpoint: Path) -> bool:
    trained = (checkpoint / TRAINED_FILE).exists()
    try:
        state = _trainer_state(checkpoint)  # the Trainer's last file: where it is whole, all were
        if not trained:
            verify_adapter(checkpoint)
    except (CheckpointError, FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    # Gone where the Trainer was killed while it removed an old checkpoint.
    files = ["optimizer.pt", "scheduler.pt", *([HOOKS_FILE] if trained else [])]
    if not all((checkpoint / name).exists() for name in files) or not any(checkpoint.glob("rng_state*.pth")):
        return False
    return not state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state
