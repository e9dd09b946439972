"""A run of growth by evidence, made up: what reports are made of in tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from aroma.report.facts import MatrixFacts, Result, RunFacts

KINDS = ("attention.self.query", "attention.self.value", "output.dense")
MODULES = [f"encoder.layer.{layer}.{kind}" for layer in range(3) for kind in KINDS]
GROWN, MERGED = MODULES[4], MODULES[5]
"""The matrix with the most births, and one whose oldest component was merged."""
BIRTHS = {GROWN: [80, 160, 200], MERGED: [120]}


def event(kind: str, step: int, module: str, rank: int, log_evidence: float = 0.0) -> dict[str, Any]:
    """An event as `Event.as_dict()` has it."""
    return {
        **{"kind": kind, "step": step, "outer_step": 1, "inner_step": 0, "module": module, "value": None},
        **{"rank": rank, "converged": False, "log_evidence": log_evidence, "steepness": 0.1},
    }


def events() -> list[dict[str, Any]]:
    """A trial that left one component in every second matrix, then births where `BIRTHS` has them."""
    found = [event("born", 8, module, 4) for module in MODULES]
    ranks = {module: index % 2 for index, module in enumerate(MODULES)}
    found += [event("settled", 40, module, ranks[module]) for module in MODULES]
    for step in range(80, 241, 40):
        for module in MODULES:
            if step in BIRTHS.get(module, ()):
                ranks[module] += 1
                found += [event("merged", step, module, ranks[module], 3.2)] if module == MERGED else []
                found.append(event("born", step, module, ranks[module], 3.2))
            else:
                found.append(event("checked", step, module, ranks[module], -step / 100))
    return found


def made_up(**changes: Any) -> RunFacts:
    """A whole run of 240 steps, but for `changes`."""
    ranks = {one["module"]: one["rank"] for one in events()}
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
        rate=[[step, 1e-3 * (1 - step / 240)] for step in range(5, 241, 5)],
        scores=[(step, "validation", 0.5 + step / 800) for step in range(40, 241, 40)],
        parameters=[[0, 0], [8, 9216], [40, 512], [80, 768], [160, 1024]],
        head_parameters=130,
        lora_parameters=18432,
        matrices=[MatrixFacts(name, ranks[name], 0.75 * ranks[name], 0.0123) for name in MODULES],
        events=events(),
        significance=0.05,
        explanation="no evidence for another component in 9 of 9 matrices; last birth at step 200",
        settings={
            "Settings that differ from the defaults": {"training.learning_rate": 0.001, "adapter.growth": "evidence"}
        },
        recipe="training:\n  learning_rate: 0.001\n",
        versions={"python": "3.11.2", "torch": "2.9.0"},
        command="aroma train reviews.yaml output=reviews-again",
    )
    return replace(facts, **changes)
