"""Stands in for `aroma_lab.run.worker` where a test is about who runs what: a score in no time, without PyTorch.

It appends the trial's name to `$FAKE_LOG`, takes `$FAKE_SECONDS`, and does as the trial's weight decay says: at FAILS
it leaves a failure, at DIES it is killed, at DIES_ONCE only the first time.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FAILS, DIES, DIES_ONCE = 0.25, 0.5, 0.75


def score_of(learning_rate: float) -> float:
    """Return a score that is highest, 1, at a learning rate of 1e-3."""
    return 1 - abs(math.log10(learning_rate) + 3) / 4


def main(trial_file: str, folder: str) -> int:
    trial = json.loads(Path(trial_file).read_text())
    log = Path(os.environ["FAKE_LOG"])
    before = log.read_text().split() if log.exists() else []
    with log.open("a") as stream:
        stream.write(f"{trial['name']}\n")
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    decay = trial["training"]["weight_decay"]
    if decay == DIES or (decay == DIES_ONCE and trial["name"] not in before):
        os.kill(os.getpid(), signal.SIGKILL)
    if decay == FAILS:
        _write(folder, "failure.json", {"error": "DataError", "message": "no such column"})
        return 1
    rate = trial["training"]["learning_rate"]
    _write(folder, "result.json", {"score": score_of(rate), "held_out_loss": rate})
    return 0


def _write(folder: str, name: str, content: dict[str, Any]) -> None:
    temporary = Path(folder) / f".{name}"
    temporary.write_text(json.dumps(content))
    temporary.rename(Path(folder) / name)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
