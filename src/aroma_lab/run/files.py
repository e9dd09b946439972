"""Names of the files in a run's folder; nothing heavy is loaded to know them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RUNS = "runs"
"""Folder, in the output of a grid or a search, of the trials' folders."""


@dataclass(frozen=True)
class TrialFiles:
    """Names of what a run leaves in `root`; `checkpoints` of a grid's trial only while it is not finished."""

    root: Path

    @property
    def trial(self) -> Path:
        """The trial itself, the resolved configuration."""
        return self.root / "trial.json"

    @property
    def recipe(self) -> Path:
        """The resolved recipe, of a run that has one."""
        return self.root / "recipe.yaml"

    @property
    def adapter(self) -> Path:
        """Folder of what was trained: the plain LoRA adapter, where it is one."""
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Folder of the Trainer's checkpoints."""
        return self.root / "checkpoints"

    @property
    def events(self) -> Path:
        """Events of AROMA's controller, a JSON object a line."""
        return self.root / "events.jsonl"

    @property
    def history(self) -> Path:
        """Losses, learning rates and evaluations by optimizer step."""
        return self.root / "history.json"

    @property
    def curve(self) -> Path:
        """Trainable parameters and ranks by optimizer step."""
        return self.root / "curve.json"

    @property
    def result(self) -> Path:
        """Metrics, ranks and provenance; written last, so a folder that has it is a finished run's."""
        return self.root / "result.json"

    @property
    def progress(self) -> Path:
        """How far a running trial is."""
        return self.root / "progress.json"

    @property
    def failure(self) -> Path:
        """What went wrong at the last attempt."""
        return self.root / "failure.json"

    @property
    def log(self) -> Path:
        """What a worker printed; a process that is killed can leave nothing else."""
        return self.root / "worker.log"
