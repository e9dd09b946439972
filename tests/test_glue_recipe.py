"""The grid for RoBERTa-base on GLUE has the settings of Table 9 of the paper, cell by cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aroma_lab.run.trial import Trial
from aroma_lab.study.grid import check_trials, expand, load_grid

GRID = Path(__file__).parents[1] / "examples" / "lab" / "glue-roberta-base.yaml"
TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")

# What a method has on all tasks, and its rows of Table 9 in the order of TASKS. The table gives AdaLoRA and AROMA
# epochs too, which do not always agree with T; here T counts.
SAME: dict[str, dict[str, Any]] = {
    "lora-r8": {"max_length": 128, "batch_size": 64, "max_steps": None, "r": 8, "alpha": 16},
    "adalora-r8": {"max_length": 128, "batch_size": 32, "init_r": 12, "target_r": 8, "alpha": 32},
    "aroma": {"max_length": 256, "r": 1, "lora_alpha": 4, "inner_check_interval": 10, "inner_tolerance": 0.1},
}
ROWS: dict[str, dict[str, tuple[float, ...]]] = {
    "lora-r8": {
        "epochs": (30, 30, 30, 25, 25, 50, 60, 40),
        "learning_rate": (4e-4, 5e-4, 4e-4, 4e-4, 4e-4, 5e-4, 5e-4, 4e-4),
        "warmup_steps": (100,) * 8,
    },
    "adalora-r8": {
        "learning_rate": (5e-4, 5e-4, 1e-3, 1.2e-3, 5e-4, 1.2e-3, 8e-4, 2.2e-3),
        "orthogonality": (0.5, 0.1, 0.1, 0.1, 0.1, 0.3, 0.1, 0.1),
        "max_steps": (6500, 85000, 3000, 15000, 55000, 4000, 50000, 4500),
        "initial_steps": (800, 8000, 600, 2000, 8000, 600, 6000, 800),
        "interval": (10, 100, 1, 100, 100, 1, 100, 10),
        "final_steps": (3500, 50000, 1800, 8000, 25000, 1800, 22000, 2000),
        "warmup_steps": (100,) * 8,
    },
    "aroma": {
        "batch_size": (32, 32, 64, 32, 64, 64, 64, 32),
        "learning_rate": (2e-4, 7e-4, 1e-4, 2e-4, 4e-4, 1e-4, 5e-4, 5e-4),
        "max_steps": (35000, 85000, 3000, 30000, 55000, 2400, 40000, 10000),
        "max_inner_steps": (5000, 5000, 200, 2000, 55000, 200, 2500, 1000),
        "outer_tolerance": (2e-2, 5e-3, 5e-3, 5e-3, 1e-3, 6e-3, 5e-3, 5e-3),
        "warmup_steps": (500, *(100,) * 7),  # appendix G
        "rewarmup_steps": (100, *(50,) * 7),
    },
}


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return expand(load_grid(GRID))


def test_all_tasks_with_all_methods(trials: list[Trial]) -> None:
    check_trials(trials, [])
    assert {(trial.task.name, trial.method) for trial in trials} == {(task, name) for task in TASKS for name in ROWS}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", ROWS)
def test_a_cell_of_the_table(trials: list[Trial], task: str, method: str) -> None:
    expected = SAME[method] | {name: values[TASKS.index(task)] for name, values in ROWS[method].items()}
    for trial in trials:
        if (trial.task.name, trial.method) == (task, method):
            found = {"max_length": trial.task.max_length, **vars(trial.training), **trial.options}
            assert {name: found[name] for name in expected} == expected
            assert trial.model == "roberta-base"
