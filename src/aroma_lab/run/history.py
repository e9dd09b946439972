"""From the Trainer's log to losses, learning rates and evaluations by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_COST = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""What the Trainer adds to the metrics of an evaluation."""


def history_of(log: Iterable[dict[str, Any]], splits: Sequence[str]) -> dict[str, Any]:
    """Return the content of `history.json`.

    Args:
        log: The Trainer's `log_history`.
        splits: Names of the sets that are evaluated on the way.
    """
    history: dict[str, list[Any]] = {"loss": [], "learning_rate": [], "evaluations": []}
    for entry in log:
        for name in ("loss", "learning_rate"):
            if name in entry:
                history[name].append([entry["step"], entry[name]])
        # The longest name first: of the splits "test" and "test_b", the second's metrics begin with the first's name.
        for split in sorted(splits, key=len, reverse=True):
            metrics = _metrics_of(entry, f"eval_{split}_")
            if metrics:
                history["evaluations"].append({"step": entry["step"], "split": split, **metrics})
                break
    return history


def _metrics_of(entry: dict[str, Any], prefix: str) -> dict[str, float]:
    named = {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}
    # Sorted, because they are in the checkpoint that a resumed run goes on from.
    return {name: named[name] for name in sorted(named) if name not in _COST}


def inner_checks_of(events: Iterable[dict[str, Any]]) -> list[list[Any]]:
    """Return outer step, inner step t and module of where (5) first held, once for each module and outer step.

    Args:
        events: AROMA's events, as `events.jsonl` has them.
    """
    found: dict[tuple[int, str], list[Any]] = {}
    for event in events:
        if event["kind"] == "checked" and event["converged"]:
            place = (event["outer_step"], event["module"])
            found.setdefault(place, [event["outer_step"], event["inner_step"], event["module"]])
    return list(found.values())
