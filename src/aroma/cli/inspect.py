"""`aroma inspect`: rank and effective rank of every matrix of an adapter, and the evidence for one more."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .extras import require_extra
from .texts import add_force, examples

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
        description=(
            "Show rank and effective rank of every matrix of an adapter, as a table and, if wanted, drawn. Of a run\n"
            "with growth='evidence' also the evidence for one more component, and how steep its direction was."
        ),
        epilog=examples(
            "aroma inspect runs/mrpc/adapter",
            "aroma inspect runs/mrpc/checkpoints/checkpoint-500 --plot ranks.svg",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of any plain LoRA adapter, a checkpoint included")
    parser.add_argument("--plot", metavar="FILE", help="draw the ranks too: a .png, .svg or .pdf file")
    add_force(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table; draw the picture."""
    plot = None
    if arguments.plot is not None:
        require_extra("plot")
        from ..outputs import new_file
        from ..pictures import require_picture_name

        require_picture_name("--plot", arguments.plot)
        plot = new_file("--plot", arguments.plot, force=arguments.force)
    from .quiet import quiet

    quiet()
    from rich.console import Console

    from ..export import evidence_of, rank_rows
    from ..pictures import rank_picture
    from ..saved import read_adapter

    adapter = read_adapter(arguments.adapter)
    rows, run = rank_rows(adapter), evidence_of(adapter)
    Console(markup=False).print(make_table(rows, str(arguments.adapter), run))
    if run is not None:
        print(growth_line(run))
    print(serving_hint(max((row.rank for row in rows), default=0)))
    if plot is not None:
        rank_picture(rows, plot)
        print(f"picture: {arguments.plot}")


def make_table(rows: list[RankRow], title: str, run: Mapping[str, Any] | None = None) -> Table:
    """Return the table of ranks, with totals at its foot; `run` is of growth by evidence, see `evidence_of`."""
    from rich.table import Table

    total, effective = sum(row.rank for row in rows), sum(row.effective_rank for row in rows)
    parameters = sum(row.rank * sum(row.shape) for row in rows)
    table = Table(title=title, show_footer=True)
    table.add_column("matrix", footer=f"{len(rows)} matrices", overflow="fold")
    table.add_column("m×n", justify="right")
    table.add_column("rank", footer=str(total), justify="right")
    table.add_column("effective rank", footer=f"{effective:.1f}", justify="right")
    table.add_column("parameters", footer=f"{parameters:,}", justify="right")
    matrices = {matrix["name"]: matrix for matrix in run["modules"]} if run is not None else {}
    if run is not None:
        table.add_column(f"E of {1 / run['config']['significance']:.3g}", justify="right")
        table.add_column("steepness", justify="right")
    for row in rows:
        m, n = row.shape
        effective_text = f"{row.effective_rank:.2f}" if row.rank else "–"
        more = _evidence_cells(matrices[row.name]) if run is not None else []
        table.add_row(row.name, f"{m}×{n}", str(row.rank), effective_text, f"{row.rank * (m + n):,}", *more)
    return table


def _evidence_cells(matrix: Mapping[str, Any]) -> list[str]:
    """Return the evidence for one more component, and the steepness of the unused direction; dashes where unknown."""
    if matrix["steepness"] is None:
        return ["–", "–"]
    evidence = math.exp(matrix["log_evidence"])
    return [f"{evidence:.2f}" if evidence >= 0.01 else "<0.01", f"{matrix['steepness']:.1e}"]


def growth_line(run: Mapping[str, Any]) -> str:
    """Return where a run of growth by evidence stood when it was saved."""
    if run["phase"] not in ("growth", "rest"):
        return f"Growth by evidence: its trial was not over at optimizer step {run['global_step']}."
    last = "" if run["last_birth"] is None else f", the last at step {run['last_birth']}"
    return f"Growth by evidence, at optimizer step {run['global_step']}: births since the trial {run['births']}{last}."


def serving_hint(largest: int) -> str:
    """Return what a serving engine has to be told of an adapter whose largest rank is `largest`."""
    fitting = [rank for rank in VLLM_RANKS if rank >= largest]
    if not fitting:
        return f"Largest rank {largest}: above what vLLM serves; use `aroma export --merged`."
    return f"Largest rank {largest}. To serve with vLLM: `aroma export --uniform`, then --max-lora-rank {fitting[0]}."
