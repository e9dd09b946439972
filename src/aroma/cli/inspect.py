"""`aroma inspect`: rank and effective rank of every matrix of an adapter."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .extras import require_extra
from .texts import examples

if TYPE_CHECKING:
    from rich.table import Table

    from ..export import RankRow

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's `--max-lora-rank` takes."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "inspect",
        help="show rank and effective rank of every matrix, as table and picture",
        description="Show rank and effective rank of every matrix of an adapter, as a table and, if wanted, drawn.",
        epilog=examples(
            "aroma inspect runs/mrpc/adapter",
            "aroma inspect runs/mrpc/checkpoints/checkpoint-500 --plot ranks.svg",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of any plain LoRA adapter, a checkpoint included")
    parser.add_argument("--plot", metavar="FILE", help="draw the ranks too: a .png, .svg or .pdf file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table; draw the picture."""
    if arguments.plot:
        require_extra("plot")
    from .quiet import quiet

    quiet()
    from rich.console import Console

    from ..export import rank_table
    from ..pictures import rank_picture

    rows = rank_table(arguments.adapter)
    Console(markup=False).print(make_table(rows, title=str(arguments.adapter)))
    print(serving_hint(max((row.rank for row in rows), default=0)))
    if arguments.plot:
        rank_picture(rows, arguments.plot)
        print(f"picture: {arguments.plot}")


def make_table(rows: list[RankRow], title: str) -> Table:
    """Return the table of ranks, with totals at its foot."""
    from rich.table import Table

    total, effective = sum(row.rank for row in rows), sum(row.effective_rank for row in rows)
    parameters = sum(row.rank * sum(row.shape) for row in rows)
    table = Table(title=title, show_footer=True)
    table.add_column("matrix", footer=f"{len(rows)} matrices", overflow="fold")
    table.add_column("m×n", justify="right")
    table.add_column("rank", footer=str(total), justify="right")
    table.add_column("effective rank", footer=f"{effective:.1f}", justify="right")
    table.add_column("parameters", footer=f"{parameters:,}", justify="right")
    for row in rows:
        m, n = row.shape
        effective_text = f"{row.effective_rank:.2f}" if row.rank else "–"
        table.add_row(row.name, f"{m}×{n}", str(row.rank), effective_text, f"{row.rank * (m + n):,}")
    return table


def serving_hint(largest: int) -> str:
    """Return what a serving engine has to be told of an adapter whose largest rank is `largest`."""
    fitting = [rank for rank in VLLM_RANKS if rank >= largest]
    if not fitting:
        return f"Largest rank {largest}: above what vLLM serves; use `aroma export --merged`."
    return f"Largest rank {largest}. To serve with vLLM: `aroma export --uniform`, then --max-lora-rank {fitting[0]}."
