"""A worker that only counts steps: what a grid needs to see of one, without PyTorch.

It runs as `python -m grid_worker TRIAL.json FOLDER`. The trial's options say how it goes: `pause` (seconds of a step),
`fail` ("raise", "exit", "kill": at half of the steps), `until` (a file; as long as it is absent, the trial fails).
Steps and ends are appended to `steps.log` in the folder, so that a test sees what was done twice.
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


def main() -> int:
    trial, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    write(folder / "environment.json", {**os.environ, "pid": os.getpid()})
    options, planned = trial["options"], trial["training"]["max_steps"]
    saved = folder / "checkpoints" / "step"
    start = int(saved.read_text()) if saved.exists() else 0
    for step in range(start + 1, planned + 1):
        write(folder / "progress.json", {"step": step, "planned": planned, "started": 0})
        log(folder, f"step {step}")
        time.sleep(options.get("pause", 0))
        if step == planned // 2 and not Path(options.get("until", os.devnull + "/")).exists():
            fail(options.get("fail"), folder)
        if step % SAVED_EVERY == 0:
            saved.parent.mkdir(exist_ok=True)
            write(saved, step)
    log(folder, "finished")
    write(folder / "result.json", result(trial, planned))
    return 0


def fail(how: str | None, folder: Path) -> None:
    print("about to end", flush=True)
    if how == "raise":
        write(folder / "failure.json", {"error": "DataError", "message": "no such file", "traceback": [], "at": "now"})
        sys.exit(1)
    if how == "exit":
        sys.exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def result(trial: dict[str, Any], planned: int) -> dict[str, Any]:
    """Scores best at a learning rate of 1e-3."""
    score = 1 / (1 + abs(trial["training"]["learning_rate"] * 1e3 - 1))
    return {
        "name": trial["name"],
        "score": score,
        "held_out_loss": 1 - score,
        "planned_steps": planned,
        "wall_seconds": 2.0 * planned,
    }


def log(folder: Path, line: str) -> None:
    with (folder / "steps.log").open("a") as stream:
        stream.write(line + "\n")


def write(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
