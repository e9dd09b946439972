"""Grids and searches for the tests: their files, and processes that run them as other machines would.

`python study_files.py run|work FILE` is such a process; its trials are stand-ins.
"""

from __future__ import annotations

import json
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

FAKE = "fake_trial"
TESTS = Path(__file__).parent
RATES = [1e-4, 1e-3, 1e-2]
RATE, DECAY = "training.learning_rate", "training.weight_decay"


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


def search_values(output: Path, **changes: Any) -> dict[str, Any]:
    """Return a search over the learning rate, with `changes` by key; None removes a key."""
    missing = {"train": "absent.jsonl", "reported": {"test": "absent.jsonl"}}
    search = {"space": {RATE: {"low": 1e-5, "high": 1e-1, "log": True}}, "trials": 4, "heartbeat": 1}
    lora = {"lora-r8": {"kind": "lora", "r": 8}}
    return grid_values(output, **{"tasks": {"mine": missing}, "methods": lora, "seeds": [0], **search, **changes})


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


def run_undisturbed(grid_file: Path) -> Path:
    """Run every trial of a grid in this process; return the folder of the runs."""
    from aroma_lab.run.run import run_trial
    from aroma_lab.study.grid import expand, load_grid

    runs = grid_file.with_suffix("") / "runs"
    for trial in expand(load_grid(grid_file)):
        run_trial(trial, runs / trial.name)
    return runs


def comparable(folder: Path) -> dict[str, Any]:
    """Return the result of a trial without what is of the machine and the moment."""
    volatile = {"wall_seconds", "cpu_seconds", "peak_memory_mib", "peak_gpu_memory_mib", "epoch_seconds"}
    result = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in volatile | {"git_revision"}}


def write_yaml(path: Path, values: dict[str, Any]) -> Path:
    """Write a grid or search file."""
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def environment(log: Path, seconds: float = 0) -> dict[str, str]:
    """Return what makes stand-ins found, and tells them to take so long and to write to `log`."""
    paths = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": paths, "FAKE_LOG": str(log), "FAKE_SECONDS": str(seconds)}


def start_command(*arguments: str, said: Path) -> subprocess.Popen[bytes]:
    """Start `aroma lab ...`, whose output goes to the file `said`."""
    with said.open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "aroma.cli", "lab", *arguments], stdout=log, stderr=log)


def wait_for_checkpoint(trial: Path, command: subprocess.Popen[bytes], said: Path) -> int:
    """Wait until a trial of a command has a checkpoint, and return the id of its process."""

    def has_checkpoint() -> bool:
        assert command.poll() is None, said.read_text()
        return any(trial.glob("checkpoints/checkpoint-*/trainer_state.json"))

    wait_until(has_checkpoint, seconds=200)
    (nursery,) = children(command.pid)
    return children(nursery)[0]


def children(process: int) -> list[int]:
    """Return the ids of a process's children."""
    return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def start_machine(file: Path, log: Path, seconds: float = 0, role: str = "run") -> subprocess.Popen[str]:
    """Run a grid or search file, or serve it, with stand-ins in a process that stands for a machine."""
    return subprocess.Popen(
        [sys.executable, str(TESTS / "study_files.py"), role, str(file)],
        env={**os.environ, **environment(log, seconds)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell lets what it starts in the background ignore SIGINT, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def output_of(process: subprocess.Popen[str]) -> str:
    """Wait for a machine and return what it printed."""
    return process.communicate(timeout=120)[0]


def runs_in(log: Path) -> Counter[str]:
    """Return how often each trial was begun."""
    return Counter(log.read_text().split() if log.exists() else [])


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def main(role: str, file: str) -> None:
    from aroma.errors import AromaError
    from aroma_lab.study.grid import Grid, make_grid, read_grid_file
    from aroma_lab.study.run import run_grid, serve
    from aroma_lab.study.search import Search, run_search

    values = read_grid_file(file)
    try:
        settings = make_grid(values, Search if "space" in values else Grid)
        if role == "work":
            print(serve(settings, 4, module=FAKE))
        elif isinstance(settings, Search):
            run_search(settings, module=FAKE)
        else:
            outcome = run_grid(settings, module=FAKE)
            print(len(outcome.finished), len(outcome.skipped), len(outcome.failed))
    except AromaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
