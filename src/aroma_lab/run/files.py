"""Names of the files in a run's folder; nothing heavy is loaded to know them."""

from __future__ import annotations

from pathlib import Path

RUNS = "runs"
"""Folder, in the output of a grid or a search, of the trials' folders."""


REPORT = "report.html"
"""Name of the page to look at, in the folder of a run or of a grid."""


class TrialFiles:
    """Names of what a run leaves in `root`; `checkpoints` of a grid's trial only while it is not finished.

    Attributes:
        trial: The trial itself, the resolved configuration.
        recipe: The resolved recipe, of a run that has one.
        adapter: Folder of what was trained: the plain LoRA adapter, where it is one.
        checkpoints: Folder of the Trainer's checkpoints.
        events: Events of AROMA's controller, a JSON object a line.
        history: Losses, learning rates and evaluations by optimizer step.
        curve: Trainable parameters and ranks by optimizer step.
        result: Metrics, ranks and provenance; written last, so a folder that has it is a finished run's.
        progress: How far a running trial is.
        failure: What went wrong at the last attempt.
        log: What a worker printed; a process that is killed can leave nothing else.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trial = root / "trial.json"
        self.recipe = root / "recipe.yaml"
        self.adapter = root / "adapter"
        self.checkpoints = root / "checkpoints"
        self.events = root / "events.jsonl"
        self.history = root / "history.json"
        self.curve = root / "curve.json"
        self.result = root / "result.json"
        self.progress = root / "progress.json"
        self.failure = root / "failure.json"
        self.log = root / "worker.log"
