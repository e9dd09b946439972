"""A run, made up: what reports are made of in tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from aroma.report.run import MatrixFacts, Result, RunFacts

KINDS = ("attention.self.query", "attention.self.value", "output.dense")
MODULES = [f"encoder.layer.{layer}.{kind}" for layer in range(3) for kind in KINDS]
GROWN = MODULES[4]
"""The matrix with the largest rank."""
MERGES = {module: [40] if index % 2 else [] for index, module in enumerate(MODULES)}
"""Optimizer steps at which a component was merged, by matrix."""
MERGES |= {GROWN: [80, 160, 200], MODULES[5]: [40, 120]}
RANKS = {
    module: [[0, 0], *([step, place + 1] for place, step in enumerate(steps))] for module, steps in MERGES.items()
}
"""Rank of every matrix, from each step on."""


def made_up(**changes: Any) -> RunFacts:
    """A whole run of 240 steps, but for `changes`."""
    facts = RunFacts(
        title="reviews",
        about=["model tiny-bert", "method aroma", "seed 0"],
        results=[
            Result("validation", {"accuracy": 0.8125, "f1": 0.7}),
            Result("test", {"accuracy": 0.79, "f1": 0.68}),
            Result("test, for guessing", {"accuracy": 0.55, "f1": 0.0}, "guess"),
        ],
        metric="accuracy",
        steps=240,
        planned_steps=240,
        seconds=200.0,
        loss=[[step, 2.0 - step / 200] for step in range(5, 241, 5)],
        eval_loss=[[step, 2.1 - step / 200] for step in range(40, 241, 40)],
        parameters=1024,
        head_parameters=130,
        lora_parameters=18432,
        matrices=[MatrixFacts(name, ranks[-1][1], 0.75 * ranks[-1][1], 0.0123) for name, ranks in RANKS.items()],
        ranks=RANKS,
        explanation="6 of 9 matrices have finished; 3 still train",
        settings={"Settings that differ from the defaults": {"training.learning_rate": 0.001}},
        recipe="training:\n  learning_rate: 0.001\n",
        versions={"python": "3.11.2", "torch": "2.9.0"},
        command="aroma train reviews.yaml output=reviews-again",
    )
    return replace(facts, **changes)
