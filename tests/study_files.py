"""Grids for the tests: their files, and commands that run them.

`python study_files.py FILE` is such a command; its trials are stand-ins.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

TESTS = Path(__file__).parent
RATE, DECAY = "training.learning_rate", "training.weight_decay"
HEAD_RATE = "training.head_learning_rate"


def grid_values(output: Path, **changes: Any) -> dict[str, Any]:
    """Return a grid of four trials that stand-ins can run, with `changes` by key; None removes a key."""
    values = {
        "output": str(output),
        "model": "minilm",
        "processes": 2,
        "tasks": {"mrpc": None},
        "methods": {"a": {"kind": "x"}, "b": {"kind": "x"}},
        "training": {"max_steps": 10, "warmup_steps": 1},
        "seeds": [0, 1],
        **changes,
    }
    return {key: value for key, value in values.items() if value is not None}


def whole_grid(**changes: Any) -> Any:
    """Return a grid of two tasks and two methods, with `changes` by key."""
    from aroma_lab.study.grid import make_grid

    methods = {"lora": {"kind": "lora", "r": 8}, "head": {"kind": "head_only"}}
    tasks = {"mrpc": None, "rte": {"max_length": 128}}
    return make_grid({**grid_values(Path("out"), tasks=tasks, methods=methods), **changes})


def real_grid(folder: Path, output: str, **changes: Any) -> Path:
    """Write the grid `output`.yaml, which really trains a tiny BERT with two methods."""
    from tiny_classifier import save_tiny_bert, sentences, write_json_lines

    if not (folder / "bert").exists():
        save_tiny_bert(folder / "bert")
        for name, count in (("train", 200), ("test", 50)):
            write_json_lines(folder / f"{name}.jsonl", sentences(count, seed=count))
    aroma = {"inner_check_interval": 5, "max_inner_steps": 20, "rewarmup_steps": 5}
    files = {"source": str(folder), "train": "train.jsonl", "reported": {"test": "test.jsonl"}, "max_length": 16}
    grid = {
        "output": str(folder / output),
        "model": str(folder / "bert"),
        "tasks": {"words": files},
        "methods": {"lora": {"kind": "lora", "r": 4}, "aroma": {"kind": "aroma", **aroma}},
        "training": {"max_steps": 60, "warmup_steps": 5, "batch_size": 8, "save_steps": 10, "early_stop": False},
        **changes,
    }
    return write_yaml(folder / f"{output}.yaml", grid)


def write_yaml(path: Path, values: dict[str, Any]) -> Path:
    """Write a grid file."""
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def start_command(file: Path, seconds: float = 0) -> subprocess.Popen[str]:
    """Run a grid file with stand-ins in a process of its own; they take so long."""
    paths = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, str(TESTS / "study_files.py"), str(file)],
        env={**os.environ, "PYTHONPATH": paths, "FAKE_SECONDS": str(seconds)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell lets what it starts in the background ignore SIGINT, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def runs_in(log: Path) -> Counter[str]:
    """Return how often each trial was begun."""
    return Counter(log.read_text().split() if log.exists() else [])


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def main(file: str) -> None:
    from aroma_lab.study.grid import load_grid
    from aroma_lab.study.run import run_grid

    outcome = run_grid(load_grid(file), runner="fake_trial")
    print(len(outcome.finished), len(outcome.skipped), len(outcome.failed))


if __name__ == "__main__":
    main(*sys.argv[1:])
