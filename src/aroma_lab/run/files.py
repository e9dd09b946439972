"""Names of what lies in the folder of a trial; nothing is loaded to know them."""

from __future__ import annotations

from pathlib import Path

from .run_folder import RunFiles

RUNS = "runs"
"""Folder, in the output of a grid or a search, of the trials' folders."""


class TrialFiles(RunFiles):
    """Names of what a trial leaves; its checkpoints are there while it is not finished."""

    @property
    def trial(self) -> Path:
        """The trial itself, the resolved configuration."""
        return self.root / "trial.json"

    @property
    def curve(self) -> Path:
        """Trainable parameters and ranks by optimizer step."""
        return self.root / "curve.json"

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
