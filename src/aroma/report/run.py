"""The page of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ..pictures import positions_of
from .facts import LORA_RANK, MatrixFacts, RunFacts, Steps
from .page import EMPTY, Chart, Table, amount, duration, measured, render

_MOST_POINTS = 800
"""Points of a line: more than a screen has pixels for, they would only make the page heavy."""
_MOST_ROWS = 40
"""Rows of the table behind a line."""


class Cell(NamedTuple):
    """A matrix in the grid of ranks.

    Args:
        name: Name of its module.
        label: Where it stands, as a person says it.
        rank: Rank of its update.
        level: The rank as a share of the largest one.
        facts: Title and text of what else is known.
    """

    name: str
    label: str
    rank: str
    level: float
    facts: Sequence[tuple[str, str]]


class Grid(NamedTuple):
    """The grid of ranks: a row for each kind of matrix, a column for each layer."""

    layers: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]

    @property
    def cells(self) -> list[Cell]:
        """The matrices, row by row."""
        return [cell for _, row in self.rows for cell in row if cell is not None]


def run_page(facts: RunFacts) -> str:
    """Return the page of a run, as HTML."""
    return render(
        "page.html",
        _charts(facts),
        facts=facts,
        grid=grid_of(facts.matrices),
        grid_table=_matrix_table(facts),
        chosen=max(facts.matrices, key=lambda one: one.rank).name if facts.matrices else None,
        tiles=_tiles(facts),
        results=_results(facts),
        data={"matrices": _of_matrices(facts)},
    )


# The grid of ranks ---------------------------------------------------------------------------------------------------


def grid_of(matrices: Sequence[MatrixFacts], more: Mapping[str, tuple[str, str]] = MappingProxyType({})) -> Grid:
    """Return the grid of ranks.

    Args:
        matrices: The matrices, in the order of the model.
        more: One more thing that is known, its title and text, by module.
    """
    places = positions_of([one.name for one in matrices])
    layers = sorted({place.layer for place in places}, key=lambda layer: (layer is None, layer or 0))
    kinds = list(dict.fromkeys(place.kind for place in places))
    most = max((one.rank for one in matrices), default=0) or 1
    cells: dict[tuple[str, int | None], Cell] = {}
    for one, (layer, kind) in zip(matrices, places, strict=True):
        label = kind if layer is None else f"{kind}, layer {layer}"
        known = _facts_of(one)
        known += [more[one.name]] if one.name in more else []
        cells[kind, layer] = Cell(one.name, label, f"{one.rank:.2g}", one.rank / most, known)
    heads = ["other" if layer is None else str(layer) for layer in layers]
    return Grid(heads, [(kind, [cells.get((kind, layer)) for layer in layers]) for kind in kinds])


def _facts_of(one: MatrixFacts) -> list[tuple[str, str]]:
    found = [("rank", f"{one.rank:.3g}")]
    if one.effective_rank is not None:
        found.append(("effective rank", f"{one.effective_rank:.2f}" if one.rank else EMPTY))
    if one.relative_update is not None:
        found.append(("‖ΔW‖ / ‖W0‖", f"{one.relative_update:.2%}"))
    return found


def _matrix_table(facts: RunFacts) -> Table:
    known = [dict(_facts_of(one)) for one in facts.matrices]
    heads = list(dict.fromkeys(head for one in known for head in one))
    names = [one.name for one in facts.matrices]
    rows = [[name, *(one.get(head, EMPTY) for head in heads)] for name, one in zip(names, known, strict=True)]
    return Table(["matrix", *heads], rows)


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


# What is said in numbers ---------------------------------------------------------------------------------------------


def _tiles(facts: RunFacts) -> list[tuple[str, str, str]]:
    """Return title, number and remark of what is said largest."""
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
        remark = f"head: {amount(facts.head_parameters)}" if facts.head_parameters else ""
        if facts.lora_parameters:
            lora = f"LoRA r={LORA_RANK}: {amount(facts.lora_parameters)}"
            remark = f"{lora}; {remark}" if remark else lora
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
