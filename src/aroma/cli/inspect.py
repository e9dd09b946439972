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

    from ..ranks import RankRow

_CORNER = "rank by layer"
_NONE = "·"
"""Rank 0 in a grid."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "inspect",
        "show the rank of every matrix, as a grid, table, picture or JSON",
        "Show the ranks of an adapter by layer and kind of matrix.",
        "aroma inspect runs/mrpc/adapter",
        "aroma inspect runs/mrpc/adapter --json",
        "aroma inspect runs/mrpc/checkpoints/checkpoint-500 --plot ranks.svg",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of any plain LoRA adapter, a checkpoint included")
    parser.add_argument("--json", action="store_true", help="print all as JSON, effective ranks too")
    parser.add_argument("--plot", metavar="FILE", help="draw the ranks too: a .png, .svg or .pdf file")
    add_force(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print summary and grid, or JSON; draw the picture."""
    from ..outputs import new_file

    if arguments.plot is not None:
        require_extra("plot")
        from ..pictures import require_picture_name

        require_picture_name("--plot", arguments.plot)
        picture = new_file("--plot", arguments.plot, force=arguments.force)
    from ..pictures import rank_picture
    from ..ranks import rank_table

    rows = rank_table(arguments.adapter)
    if arguments.json:
        print(json.dumps(as_json(rows), indent=2))
    else:
        _show(rows, str(arguments.adapter))
    if arguments.plot is not None:
        rank_picture(rows, picture, str(arguments.adapter))
        print(f"picture: {arguments.plot}", file=sys.stderr if arguments.json else None)


def _show(rows: list[RankRow], title: str) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(title)
    console.print(summary_line(rows))
    for table in rank_grids(rows, console.width):
        console.print()
        console.print(table, soft_wrap=False)


def summary_line(rows: Sequence[RankRow]) -> str:
    """Return the totals of an adapter in one line."""
    ranks, noun = [row.rank for row in rows], "matrix" if len(rows) == 1 else "matrices"
    return (
        f"{len(rows)} {noun} · ranks {min(ranks)} to {max(ranks)}, {sum(ranks)} in all · effective "
        f"{sum(row.effective_rank for row in rows):.1f} · {sum(map(_parameters, rows)):,} parameters"
    )


def rank_grids(rows: Sequence[RankRow], width: int) -> list[Table]:
    """Return the ranks by kind and layer, as many layers in a table as `width` characters have room for."""
    from rich.table import Table

    from ..report.run import MatrixFacts, grid_of

    grid = grid_of([MatrixFacts(row.name, row.rank) for row in rows])
    layers, ranks = grid["layers"], {row.name: row.rank for row in rows}
    cell = max(map(len, [*map(str, ranks.values()), *layers]))
    fit = max(1, (width - max(map(len, [*(kind for kind, _ in grid["rows"]), _CORNER])) - 1) // (cell + 1))
    tables = []
    for first in range(0, len(layers), fit):
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column(_CORNER, overflow="fold")
        for head in layers[first : first + fit]:
            table.add_column(head, justify="right", no_wrap=True)
        for kind, cells in grid["rows"]:
            table.add_row(
                kind, *(str(ranks[one["name"]] or _NONE) if one else "" for one in cells[first : first + fit])
            )
        tables.append(table)
    return tables


def as_json(rows: Sequence[RankRow]) -> dict[str, Any]:
    """Return ranks, JSON-able."""
    from ..pictures import positions_of

    places = positions_of([row.name for row in rows])
    return {
        "total_rank": sum(row.rank for row in rows),
        "effective_rank": sum(row.effective_rank for row in rows),
        "parameters": sum(map(_parameters, rows)),
        "matrices": [
            {**row._asdict(), "layer": place.layer, "kind": place.kind, "parameters": _parameters(row)}
            for row, place in zip(rows, places, strict=True)
        ],
    }


def _parameters(row: RankRow) -> int:
    return row.rank * sum(row.shape)
