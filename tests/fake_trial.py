"""Stands in for `aroma_lab.run.worker`: a trial that only counts steps, without PyTorch.

It runs as `python -m fake_trial TRIAL.json FOLDER`. The trial's options say how it goes: `pause` (seconds per step;
else $FAKE_SECONDS for all), `fail` ("raise", "exit", "kill", or "kill once": at half of the steps), `until` (a file;
while it is absent, the trial fails). Steps and ends are appended to `steps.log` in the folder, and the trial's name to
$FAKE_LOG, so that a test sees what was run twice.
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


def main(trial_file: str, run_folder: str) -> None:
    trial, folder = json.loads(Path(trial_file).read_text()), Path(run_folder)
    log(Path(os.environ.get("FAKE_LOG", os.devnull)), trial["name"])
    write(folder / "environment.json", {**os.environ, "pid": os.getpid()})
    options, planned = trial["options"], trial["training"]["max_steps"]
    pause = options.get("pause", float(os.environ.get("FAKE_SECONDS", "0")) / planned)
    saved = folder / "checkpoints" / "step"
    start = int(saved.read_text()) if saved.exists() else 0
    for step in range(start + 1, planned + 1):
        write(folder / "progress.json", {"step": step, "planned": planned, "started": 0})
        log(folder / "steps.log", f"step {step}")
        time.sleep(pause)
        if step == planned // 2 and not Path(options.get("until", os.devnull + "/")).exists():
            fail(options.get("fail"), folder)
        if step % SAVED_EVERY == 0:
            saved.parent.mkdir(exist_ok=True)
            write(saved, step)
    score = score_of(trial["training"]["learning_rate"])
    result = {"score": score, "held_out_loss": 1 - score, "planned_steps": planned, "wall_seconds": 2.0 * planned}
    ready = folder / "result.part"
    ready.write_text(json.dumps({"name": trial["name"], **result}))
    # Side by side: a kill between the two would look like a trial that was run twice.
    log(folder / "steps.log", "finished")
    os.replace(ready, folder / "result.json")


def fail(how: str | None, folder: Path) -> None:
    print("about to end", flush=True)
    if how == "raise":
        write(folder / "failure.json", {"error": "DataError", "message": "no such file", "traceback": [], "at": "now"})
        sys.exit(1)
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


if __name__ == "__main__":
    main(*sys.argv[1:])
