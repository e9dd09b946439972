"""Run folders as `aroma lab run` leaves them, with numbers made up: what figures and tables are made of in tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from aroma.files import write_json, write_text

PARTS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "output.dense",
)
MODULES = [f"bert.encoder.layer.{layer}.{part}" for layer in range(4) for part in PARTS]
PROVENANCE = {"versions": {}, "git_revision": None, "platform": "p", "device": "cpu", "cpu_count": 2, "threads": 1}
NO_RANKS: dict[str, Any] = {
    "curve": {"planned_steps": 100, "parameters": [[0, 30]], "ranks": {}},
    "ranks": {},
}


def write_grid(output: Path, methods: list[str]) -> None:
    """Write a `grid.yaml` that names the methods in their order."""
    write_text(output / "grid.yaml", yaml.safe_dump({"methods": {label: {} for label in methods}}, sort_keys=False))


def write_run(output: Path, task: str, method: str, seed: int, **changes: Any) -> Path:
    """Write a finished run's folder into the output folder of a grid, and return it.

    `changes` are what differs from a run of LoRA r=2 in 100 steps: `kind`, `options`, `purpose`, keys of the result,
    `curve` and `evaluations` as their files have them, and as `of_task` further keys of the task.
    """
    of_trial = {"kind": "lora", "options": {}, "purpose": "report"}
    of_trial = {key: changes.pop(key, value) for key, value in of_trial.items()}
    curve, evaluations = changes.pop("curve", None), changes.pop("evaluations", [])
    of_task = {"name": task, **changes.pop("of_task", {})}
    trial = {"name": f"{task}/{method}/seed-{seed}", "model": "minilm", "method": method, **of_trial}
    ranks = changes.pop("ranks", dict.fromkeys(MODULES, 2))
    result = {
        **trial,
        "task": task,
        "seed": seed,
        "metric": "accuracy",
        "score": 0.8,
        "reported": {"test": {"accuracy": 0.8}},
        "examples": {"train": 90, "held_out": 10, "test": 20},
        "steps": 100,
        "planned_steps": 100,
        "stopped_early": False,
        "parameters": {"initial": 1000, "average": 1000.0, "final": 1000, "head": 10},
        "ranks": ranks,
        "effective_ranks": {module: 0.75 * rank for module, rank in ranks.items()},
        **PROVENANCE,
        **changes,
    }
    by_module = {module: [[0, rank]] for module, rank in ranks.items()}
    default = {"parameters": [[0, 1000]], "ranks": by_module}
    folder = output / "runs" / str(trial["name"])
    write_json(folder / "trial.json", {**trial, "task": of_task, "training": {"seed": seed}})
    write_json(folder / "result.json", result)
    write_json(folder / "curve.json", curve or default)
    write_json(folder / "history.json", {"evaluations": evaluations})
    return folder


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
