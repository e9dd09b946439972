"""Stands in for `aroma_lab.study.attempt`: a trial that only counts steps, without PyTorch.

The trial's options say how it goes: `pause` (seconds per step; else $FAKE_SECONDS for all), `fail` ("raise", "exit",
"kill", or "kill once": at half of the steps), `until` (a file; while it is absent, the trial fails). Steps and ends
are appended to `steps.log` in the folder, and the trial's name to `log.txt` beside the output folder, so that a test
sees what was run twice.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

SAVED_EVERY = 5


def score_of(learning_rate: float) -> float:
    """Return a score that is highest, 1, at a learning rate of 1e-3."""
    return 1 / (1 + abs(learning_rate * 1e3 - 1))


def run_trial(trial: Any, folder: Path) -> None:
    """Run a trial."""
    runs = next(parent for parent in folder.parents if parent.name == "runs")
    log(runs.parents[1] / "log.txt", trial.name)
    write(folder / "pid.json", os.getpid())
    options, planned = trial.options, trial.training.max_steps
    pause = options.get("pause", float(os.environ.get("FAKE_SECONDS", "0")) / planned)
    saved = folder / "checkpoints" / "step"
    start = int(saved.read_text()) if saved.exists() else 0
    for step in range(start + 1, planned + 1):
        log(folder / "steps.log", f"step {step}")
        time.sleep(pause)
        if step == planned // 2 and not Path(options.get("until", os.devnull + "/")).exists():
            how = options.get("fail")
            if how == "raise":
                failure = {"error": "DataError", "message": "no such file", "traceback": [], "at": "now"}
                write(folder / "failure.json", failure)
                return
            fail(how, folder)
        if step % SAVED_EVERY == 0:
            saved.parent.mkdir(exist_ok=True)
            write(saved, step)
    score = score_of(trial.training.learning_rate)
    result = {"score": score, "held_out_loss": 1 - score, "planned_steps": planned}
    ready = folder / "result.part"
    ready.write_text(json.dumps({"name": trial.name, **result}))
    # Side by side: a kill between the two would look like a trial that was run twice.
    log(folder / "steps.log", "finished")
    os.replace(ready, folder / "result.json")


def fail(how: str | None, folder: Path) -> None:
    print("about to end", flush=True)
    if how == "exit":
        sys.exit(3)
    if how == "kill" or (how == "kill once" and not (folder / "killed").exists()):
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def log(path: Path, line: str) -> None:
    with path.open("a") as stream:
        stream.write(line + "\n")


def write(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)
