"""Searches for the tests: their files, and processes that run them as other machines would."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tiny_classifier import save_tiny_bert, sentences, write_json_lines

FAKE = "fake_trial_worker"
TESTS = Path(__file__).parent
RATES = [1e-4, 1e-3, 1e-2]


def search_values(output: Path, **changes: Any) -> dict[str, Any]:
    """Return a search over the learning rate, with `changes` by key; None removes a key."""
    values = {
        "output": str(output),
        "model": "nowhere",
        "tasks": {"mine": {"train": "absent.jsonl", "reported": {"test": "absent.jsonl"}}},
        "methods": {"lora-r8": {"kind": "lora", "r": 8}},
        "training": {"max_steps": 20},
        "space": {"training.learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}},
        "trials": 4,
        "processes": 2,
        "heartbeat": 1,
        **changes,
    }
    return {key: value for key, value in values.items() if value is not None}


def trainable(folder: Path, rates: list[float]) -> dict[str, Any]:
    """Return changes with which `search_values` is a grid that really trains a tiny BERT.

    Whoever opened what is to be reported would fail: it is no JSON.
    """
    (folder / "test.jsonl").write_text("not to be read\n")
    task = {
        "train": str(write_json_lines(folder / "train.jsonl", sentences(80, seed=0))),
        "reported": {"test": str(folder / "test.jsonl")},
        "held_out": 0.25,
        "max_length": 16,
    }
    return {
        "model": str(save_tiny_bert(folder / "bert")),
        "tasks": {"mine": task},
        "methods": {"lora": {"kind": "lora", "r": 2}},
        "training": {"max_steps": 12, "batch_size": 8, "warmup_steps": 1},
        "space": {"training.learning_rate": {"choices": rates}},
        "sampler": "grid",
        "trials": None,
        "heartbeat": 20,
    }


def write_search(path: Path, values: dict[str, Any]) -> Path:
    """Write a search file."""
    path.write_text(yaml.safe_dump(values))
    return path


def use_fake_worker(environment: dict[str, str], log: Path, seconds: float = 0) -> dict[str, str]:
    """Return an environment in which the stand-in is found, and writes to `log`."""
    return {**environment, "PYTHONPATH": str(TESTS), "FAKE_LOG": str(log), "FAKE_SECONDS": str(seconds)}


def start_machine(search_file: Path, log: Path, seconds: float = 0) -> subprocess.Popen[str]:
    """Run a search file with the stand-in, in a process that stands for a machine."""
    program = (
        "import sys\n"
        "from unittest import mock\n"
        "from aroma.errors import AromaError\n"
        "from aroma_lab.search.run import run_search\n"
        "from aroma_lab.search.spec import load_search\n"
        # Checking the method's options loads PyTorch, for which these trials have no use.
        "with mock.patch('aroma_lab.search.run.check_methods'):\n"
        f"    try:\n        run_search(load_search(sys.argv[1]), module={FAKE!r})\n"
        "    except AromaError as error:\n        sys.exit(f'error: {error}')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(search_file)],
        env=use_fake_worker(dict(os.environ), log, seconds),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
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
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)
