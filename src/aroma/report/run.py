"""The page of one run: of a recorded folder, or of a Trainer that has just ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..pictures import positions_of
from .page import EMPTY, Chart, Table, amount, duration, measured, render

LORA_RANK = 8
"""Rank of the LoRA whose parameters are counted for comparison."""
_MOST_POINTS = 800
"""Points of a line: more than a screen has pixels for, they would only make the page heavy."""
_MOST_ROWS = 40
"""Rows of the table behind a line."""

Steps = Sequence[Sequence[Any]]
"""Pairs of optimizer step and number."""
Grid = dict[str, Any]
"""The grid of ranks as a template reads it: a row for each kind of matrix, a column for each layer."""


class MatrixFacts(NamedTuple):
    """What became of one matrix: its name, the ranks of its update, and ‖ΔW‖_F / ‖W0‖_F; None where unknown."""

    name: str
    rank: float
    effective_rank: float | None = None
    relative_update: float | None = None


class Result(NamedTuple):
    """A line of the table of results; `kind`: of this run ("own"), of guessing ("guess"), or of an "other" run."""

    name: str
    metrics: Mapping[str, float]
    kind: str = "own"


@dataclass(frozen=True)
class RunFacts:
    """A training run, finished or not; unknown fields are empty or None.

    `metric` is the score, and the last of this run's `results` the headline; `parameters` are those of the adapter at
    the end, `lora_parameters` those of a LoRA of rank `LORA_RANK` on the same matrices; `ranks` holds for each module
    its rank from each step on; `settings` what differs from the defaults, and `recipe` all of them as a file.
    """

    title: str
    about: Sequence[str] = ()
    results: Sequence[Result] = ()
    metric: str | None = None
    steps: int = 0
    planned_steps: int | None = None
    seconds: float | None = None
    loss: Steps = ()
    eval_loss: Steps = ()
    parameters: int | None = None
    head_parameters: int | None = None
    lora_parameters: int | None = None
    matrices: Sequence[MatrixFacts] = ()
    ranks: Mapping[str, Steps] = field(default_factory=dict)
    explanation: str | None = None
    notes: Sequence[str] = ()
    measured: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: str | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None


def run_page(facts: RunFacts) -> str:
    """Return the page of a run, as HTML."""
    return render(
        "page.html",
        _charts(facts),
        facts=facts,
        grid=grid_of(facts.matrices),
        chosen=max(facts.matrices, key=lambda one: one.rank).name if facts.matrices else None,
        tiles=_tiles(facts),
        results=_results(facts),
        data={"matrices": _of_matrices(facts)},
    )


# The grid of ranks ---------------------------------------------------------------------------------------------------


def grid_of(matrices: Sequence[MatrixFacts]) -> Grid:
    """Return the grid of ranks of matrices in the order of the model."""
    places = positions_of([one.name for one in matrices])
    layers = sorted({place.layer for place in places}, key=lambda layer: (layer is None, layer or 0))
    kinds = list(dict.fromkeys(place.kind for place in places))
    most = max((one.rank for one in matrices), default=0) or 1
    cells = {}
    for one, place in zip(matrices, places, strict=True):
        cells[place.kind, place.layer] = {
            "name": one.name,
            "label": place.kind if place.layer is None else f"{place.kind}, layer {place.layer}",
            "rank": f"{one.rank:.2g}",
            "level": one.rank / most,
            "facts": _facts_of(one),
        }
    rows = [(kind, [cells.get((kind, layer)) for layer in layers]) for kind in kinds]
    heads = ["other" if layer is None else str(layer) for layer in layers]
    return {"layers": heads, "rows": rows, "cells": [cell for _, row in rows for cell in row if cell]}


def _facts_of(one: MatrixFacts) -> list[tuple[str, str]]:
    effective = EMPTY if one.effective_rank is None or not one.rank else f"{one.effective_rank:.2f}"
    relative = EMPTY if one.relative_update is None else f"{one.relative_update:.2%}"
    return [("rank", f"{one.rank:.3g}"), ("effective rank", effective), ("‖ΔW‖ / ‖W0‖", relative)]


def _of_matrices(facts: RunFacts) -> dict[str, Any]:
    """Return by module what the chart of the chosen matrix draws, up to the run's end, and says in words."""
    return {
        one.name: {
            "rank": _columns([*facts.ranks[one.name], [facts.steps, facts.ranks[one.name][-1][1]]], "rank"),
            "words": f"Rank {one.rank} at the end.",
        }
        for one in facts.matrices
        if facts.ranks.get(one.name)
    }


# Lines ---------------------------------------------------------------------------------------------------------------


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` of the rows, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return [*rows]
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def _charts(facts: RunFacts) -> dict[str, Chart]:
    """Return the chart of the loss, and that of the matrix that is chosen on the page, which fills it."""
    found = {}
    if facts.loss:
        data = {"loss": _columns(facts.loss, "loss"), "eval_loss": _columns(facts.eval_loss, "loss")}
        (first, before), (last, after) = facts.loss[0], facts.loss[-1]
        label = f"Training loss: {measured(before)} at step {first}, {measured(after)} at step {last}."
        rows = [[str(step), measured(value)] for step, value in thinned(facts.loss, _MOST_ROWS)]
        found["loss"] = Chart("loss", label, data, ("loss", "step", "loss"), Table(["step", "loss"], rows))
    if any(one.name in facts.ranks for one in facts.matrices):
        empty: dict[str, Mapping[str, Sequence[Any]]] = {"rank": {"step": [], "rank": []}}
        label = "Rank of the chosen matrix over the optimizer steps."
        found["matrix"] = Chart("rank", label, empty, ("rank", "step", "rank"))
    return found


def _columns(rows: Steps, name: str) -> dict[str, Sequence[Any]]:
    """Return pairs of step and number as columns; of very many, some."""
    kept = thinned(rows, _MOST_POINTS)
    return {"step": [step for step, _ in kept], name: [float(f"{value:.5g}") for _, value in kept]}


# Numbers -------------------------------------------------------------------------------------------------------------


def _tiles(facts: RunFacts) -> list[tuple[str, str, str]]:
    """Return title, number and remark of the headline."""
    tiles = []
    own = [one for one in facts.results if one.kind == "own"]
    if own and facts.metric is not None and facts.metric in own[-1].metrics:
        value = own[-1].metrics[facts.metric]
        guess = next((one for one in facts.results if one.kind == "guess" and facts.metric in one.metrics), None)
        remark = "" if guess is None else f"{measured(guess.metrics[facts.metric])} {guess.name.rpartition(', ')[2]}"
        tiles.append((f"{facts.metric}, {own[-1].name}", measured(value), remark))
    if facts.matrices:
        ranks = [one.rank for one in facts.matrices]
        spread = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}–{max(ranks)}"
        count = f"{len(ranks)} matrices" if len(ranks) > 1 else "1 matrix"
        tiles.append((f"ranks of {count}", spread, f"{sum(ranks)} in all"))
    if facts.parameters is not None:
        beside = {f"LoRA r={LORA_RANK}": facts.lora_parameters, "head": facts.head_parameters}
        remark = "; ".join(f"{name}: {amount(count)}" for name, count in beside.items() if count)
        tiles.append(("adapter parameters that train", amount(facts.parameters), remark))
    if facts.seconds is not None:
        tiles.append(("time", duration(facts.seconds), f"{facts.steps:,} optimizer steps"))
    elif facts.steps:
        planned = f"of {facts.planned_steps:,} planned" if facts.planned_steps else ""
        tiles.append(("optimizer steps", f"{facts.steps:,}", planned))
    return tiles


def _results(facts: RunFacts) -> Table | None:
    if not facts.results:
        return None
    names = list(dict.fromkeys(name for one in facts.results for name in one.metrics))
    rows = [[one.name, *(measured(one.metrics.get(name)) for name in names)] for one in facts.results]
    return Table(["set", *names], rows)
