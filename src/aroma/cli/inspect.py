"""`aroma inspect`: rank and effective rank of every matrix of an adapter."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .extras import require_extra
from .texts import add_command, add_force

if TYPE_CHECKING:
    from rich.table import Table

    from ..export import RankRow
    from ..saved import AdapterWeights

ORDERS = ("name", "rank", "effective", "parameters")
"""What matrices can be sorted by: by name as the model has them, else the largest first."""

_NAMES = _CORNER, _BESIDE, _MATRIX = ("rank by layer", "beside the layers", "matrix")
_NONE = "·"
"""Rank 0 in a grid."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "inspect",
        "show the rank of every matrix, as a grid, table, picture or JSON",
        (
            "Show the ranks of an adapter by layer and kind of matrix. With --sort one line a matrix: rank,\n"
            "effective rank and parameters."
        ),
        "aroma inspect runs/mrpc/adapter",
        "aroma inspect runs/mrpc/adapter --sort rank",
        "aroma inspect runs/mrpc/adapter --json",
        "aroma inspect runs/mrpc/checkpoints/checkpoint-500 --plot ranks.svg",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of any plain LoRA adapter, a checkpoint included")
    parser.add_argument("--sort", choices=ORDERS, help="one line a matrix, in this order")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="all as JSON: a new file, or printed")
    parser.add_argument("--plot", metavar="FILE", help="draw the ranks too: a .png, .svg or .pdf file")
    add_force(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print summary and grid, or the table, or JSON; draw the picture."""
    from ..files import require_adapter_folder, write_json
    from ..outputs import new_file
    from .quiet import quiet

    files = {"json": None if arguments.json == "-" else arguments.json, "plot": arguments.plot}
    if arguments.plot is not None:
        require_extra("plot")
        from ..pictures import require_picture_name

        require_picture_name("--plot", arguments.plot)
    out = {name: new_file(f"--{name}", file, force=arguments.force) for name, file in files.items() if file}
    require_adapter_folder(arguments.adapter)  # before PyTorch is loaded
    quiet()
    from ..export import rank_rows
    from ..pictures import rank_picture
    from ..saved import read_adapter

    adapter = read_adapter(arguments.adapter)
    rows = rank_rows(adapter)
    if arguments.json == "-":
        json.dump(as_json(rows), sys.stdout, indent=2)
        print()
    else:
        _show(rows, str(arguments.adapter), arguments.sort, serving_hint(adapter))
    if "json" in out:
        write_json(out["json"], as_json(rows))
    if "plot" in out:
        rank_picture(rows, out["plot"])
    for name, file in out.items() if arguments.json != "-" else ():
        print(f"{'picture' if name == 'plot' else name}: {file}")


def _show(rows: list[RankRow], title: str, order: str | None, hint: str) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(title)
    console.print(summary_line(rows))
    for table in rank_grids(rows, console.width) if order is None else [make_table(sort_rows(rows, order))]:
        console.print()
        console.print(table, soft_wrap=False)
    console.print()
    console.print(hint)
    if order is None:
        console.print("One line a matrix: --sort rank.")


def summary_line(rows: Sequence[RankRow]) -> str:
    """Return the totals of an adapter in one line."""
    ranks = [row.rank for row in rows]
    return (
        f"{len(rows)} matrices · rank {sum(ranks)} in all, {min(ranks)} to {max(ranks)} · effective "
        f"{sum(row.effective_rank for row in rows):.1f} · {sum(map(_parameters, rows)):,} parameters"
    )


def rank_grids(rows: Sequence[RankRow], width: int) -> list[Table]:
    """Return the ranks by kind and layer, as many layers in a table as `width` characters have room for."""
    from ..pictures import positions_of

    positions = positions_of([row.name for row in rows])
    ranks = {(place.kind, place.layer): row.rank for place, row in zip(positions, rows, strict=True)}
    kinds = [*dict.fromkeys(kind for kind, _ in ranks)]
    layers = sorted({layer for _, layer in ranks if layer is not None})
    cell = max(len(str(number)) for number in [*ranks.values(), *layers])
    fit = max(1, (width - max(map(len, [*kinds, _CORNER])) - 1) // (cell + 1))
    tables = []
    for first in range(0, len(layers), fit):
        block = layers[first : first + fit]
        table = _table(_CORNER, *map(str, block))
        for kind in kinds:
            cells = [ranks.get((kind, layer)) for layer in block]
            if any(rank is not None for rank in cells):
                table.add_row(kind, *("" if rank is None else str(rank or _NONE) for rank in cells))
        tables.append(table)
    if alone := [kind for kind in kinds if (kind, None) in ranks]:
        table = _table(_BESIDE if layers else _MATRIX, "rank")
        for kind in alone:
            table.add_row(kind, str(ranks[kind, None] or _NONE))
        tables.append(table)
    return tables


def _table(*heads: str) -> Table:
    """Return a table with a column of names, headed by one of `_NAMES`, and columns of numbers."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    for head in heads:
        is_name = head in _NAMES
        table.add_column(head, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    return table


def sort_rows(rows: Sequence[RankRow], order: str) -> list[RankRow]:
    """Return the rows in one of `ORDERS`; equal ones stay as they are."""
    if order == "name":
        return [*rows]
    keys = {"rank": lambda row: row.rank, "effective": lambda row: row.effective_rank, "parameters": _parameters}
    return sorted(rows, key=keys[order], reverse=True)


def make_table(rows: Sequence[RankRow]) -> Table:
    """Return the table with a line a matrix."""
    from ..pictures import positions_of

    table = _table("layer", _MATRIX, "m×n", "rank", "effective", "parameters")
    for row, place in zip(rows, positions_of([row.name for row in rows]), strict=True):
        table.add_row(
            "" if place.layer is None else str(place.layer),
            place.kind,
            "×".join(map(str, row.shape)),
            str(row.rank),
            f"{row.effective_rank:.2f}" if row.rank else "–",
            f"{_parameters(row):,}",
        )
    return table


def as_json(rows: Sequence[RankRow]) -> dict[str, Any]:
    """Return ranks, JSON-able."""
    from ..pictures import positions_of

    return {
        "total_rank": sum(row.rank for row in rows),
        "effective_rank": sum(row.effective_rank for row in rows),
        "parameters": sum(map(_parameters, rows)),
        "matrices": [
            {
                "name": row.name,
                "layer": place.layer,
                "kind": place.kind,
                "shape": [*row.shape],
                "rank": row.rank,
                "effective_rank": row.effective_rank,
                "parameters": _parameters(row),
            }
            for row, place in zip(rows, positions_of([row.name for row in rows]), strict=True)
        ],
    }


def _parameters(row: RankRow) -> int:
    return row.rank * sum(row.shape)


def serving_hint(adapter: AdapterWeights) -> str:
    """Return what a serving engine has to be told of an adapter."""
    from ..errors import ConfigError
    from ..export import uniform_rank

    try:
        return f"To serve with vLLM: `aroma export --uniform`, then --max-lora-rank {uniform_rank(adapter)}."
    except ConfigError as error:
        return f"To serve: `aroma export --merged` ({error})."
