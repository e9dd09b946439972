"""Run folders as `aroma lab run` leaves them, with numbers made up: what the figures are drawn from in tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from aroma.files import write_json, write_tensors, write_text

KINDS = ("query", "key", "value")
LAYERS = 4
MODULES = [
    f"bert.encoder.layer.{layer}.{kind}"
    for layer in range(LAYERS)
    for kind in (*(f"attention.self.{name}" for name in KINDS), "attention.output.dense", "output.dense")
]
PROVENANCE = {"versions": {}, "git_revision": None, "platform": "p", "device": "cpu", "cpu_count": 2, "threads": 1}


def write_grid(output: Path, methods: list[str]) -> None:
    """Write a `grid.yaml` that names the methods in their order."""
    write_text(output / "grid.yaml", yaml.safe_dump({"methods": {label: {} for label in methods}}, sort_keys=False))


def write_run(output: Path, task: str, method: str, seed: int, **changes: Any) -> Path:
    """Write a finished run's folder, and return it.

    Args:
        output: Output folder of the grid.
        task: Name of the task.
        method: Label of the method.
        seed: Its seed.
        changes: What differs from a run of LoRA r=2 in 100 steps: `kind`, `options`, `purpose`, keys of the result,
            and `curve` and `evaluations` as their files have them.
    """
    kind, options, purpose = changes.pop("kind", "lora"), changes.pop("options", {}), changes.pop("purpose", "report")
    curve, evaluations = changes.pop("curve", None), changes.pop("evaluations", [])
    name = f"{task}/{method}/seed-{seed}"
    folder = output / "runs" / name
    trial = {
        "name": name,
        "model": "minilm",
        "task": {"name": task},
        "method": method,
        "kind": kind,
        "options": options,
        "training": {"seed": seed},
        "purpose": purpose,
    }
    ranks = changes.pop("ranks", dict.fromkeys(MODULES, 2))
    result = {
        **{key: value for key, value in trial.items() if key not in ("training", "model")},
        "task": task,
        "seed": seed,
        "metric": "accuracy",
        "score": 0.8,
        "held_out": {"accuracy": 0.8},
        "reported": {"test": {"accuracy": 0.8}},
        "examples": {"train": 90, "held_out": 10, "test": 20},
        "steps": 100,
        "planned_steps": 100,
        "stopped_early": False,
        "parameters": {"initial": 1000, "average": 1000.0, "final": 1000, "head": 10},
        "ranks": ranks,
        "effective_ranks": {module: 0.75 * rank for module, rank in ranks.items()},
        "epoch_seconds": [60.0, 60.0],
        "wall_seconds": 130.0,
        **PROVENANCE,
        **changes,
    }
    total = [[0, sum(ranks.values())]] if ranks else []
    by_module = {module: [[0, rank]] for module, rank in ranks.items()}
    default = {"planned_steps": 100, "parameters": [[0, 1000]], "total_rank": total, "ranks": by_module}
    write_json(folder / "trial.json", trial)
    write_json(folder / "result.json", result)
    write_json(folder / "curve.json", curve or default)
    write_json(folder / "history.json", {"loss": [], "learning_rate": [], "evaluations": evaluations})
    return folder


def write_untrained_run(output: Path, task: str, seed: int, **changes: Any) -> Path:
    """Write the folder of a run of the method `pretrained`, which trains nothing, and return it."""
    nothing: dict[str, Any] = {
        "kind": "pretrained",
        "steps": 0,
        "parameters": {"initial": 0, "average": 0.0, "final": 0, "head": 0},
        "ranks": {},
        "curve": {"planned_steps": 100, "parameters": [[0, 0]], "total_rank": [], "ranks": {}},
        "epoch_seconds": [],
    }
    return write_run(output, task, "pretrained", seed, **{**nothing, **changes})


def write_adapter(folder: Path, updates: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write a plain LoRA adapter of scale 1, module by module B and A, into a run's folder."""
    tensors, alphas = {}, {}
    for name, (B, A) in updates.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
        alphas[name] = A.shape[0]
    config = {"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": alphas, "use_rslora": False}
    write_tensors(folder / "adapter" / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter" / "adapter_config.json", config)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
