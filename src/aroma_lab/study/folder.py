"""The output folder of a grid: how its trials ended, and which process may run one."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote

from aroma.errors import ConfigError
from aroma.files import read_json

from ..run.files import RUNS, TrialFiles
from ..run.trial import Trial, differing_keys, load_trial

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
