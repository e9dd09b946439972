"""Names of the files in a run's folder; nothing heavy is loaded to know them."""

from __future__ import annotations

from pathlib import Path

RUNS = "runs"
"""Folder, in the output of a grid, of the trials' folders."""

REPORT = "report.html"
"""Name of the page to look at, in the folder of a run or of a grid."""


class TrialFiles:
    """Names of what a run leaves in `root`; `checkpoints` of a grid's trial only while it is not finished."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trial = root / "trial.json"  # the resolved configuration
        self.recipe = root / "recipe.yaml"  # of a run that has one
        self.adapter = root / "adapter"  # what was trained: the plain LoRA adapter, where it is one
        self.checkpoints = root / "checkpoints"
        self.events = root / "events.jsonl"  # of AROMA's controller, a JSON object a line
        self.history = root / "history.json"  # losses, learning rates and evaluations by optimizer step
        self.curve = root / "curve.json"  # trainable parameters and ranks by optimizer step
        self.result = root / "result.json"  # written last, so a folder that has it is a finished run's
        self.failure = root / "failure.json"  # what went wrong at the last attempt
        self.log = root / "worker.log"  # what a worker printed
