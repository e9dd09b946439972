"""`aroma demo`: the whole way, offline, on a real model and real articles."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import examples

from .phases import shown_phase

if TYPE_CHECKING:
    from rich.console import Console

    from ..demo.report import DemoResult


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="grow adapters on real news articles, offline, in about two minutes",
        description=(
            "Grow adapters in a pretrained sentence encoder on 1,780 BBC News articles, evaluate on all 445 held-out\n"
            "ones, and reload the adapter in plain PEFT. Needs no network and no GPU."
        ),
        epilog=examples("aroma demo", "aroma demo --out runs/demo --threads 2"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", metavar="DIR", default="aroma-demo", help="new or empty folder (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of head, order and components (%(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps, for a shorter or longer run")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the demo, and sum it up."""
    require_extra("train", "plot")
    from aroma.cli.quiet import quiet

    quiet()
    from rich.console import Console

    from ..demo.run import demo_training, run_demo

    training = demo_training(seed=arguments.seed, threads=arguments.threads, steps=arguments.steps)
    result = run_demo(arguments.out, training, phase=shown_phase, progress=True)
    _print_summary(result, arguments.out, Console())


def _print_summary(result: DemoResult, out: str, console: Console) -> None:
    from rich.table import Table

    from ..demo.bbc import DATA_ORIGIN, MODEL_ORIGIN
    from ..demo.report import agreement_line, rank_line, result_rows

    table = Table("method", title=f"all {result.held_out_articles} held-out articles", title_justify="left")
    table.add_column("accuracy", justify="right")
    table.add_column("trainable", justify="right")
    for row in result_rows(result):
        table.add_row(*row)
    console.print(table)
    lines = [
        f"LoRA r=8 on the same matrices would train {result.parameters.lora:,} adapter parameters.",
        f"Ranks: {rank_line(result)}.",
        f"Reloaded in plain PEFT, without AROMA: {agreement_line(result.agreement)}.",
        f"Left in {out}: adapter/, ranks.png, report.md, result.json, events.jsonl ({result.wall_seconds:.0f} s).",
        f"Model: {MODEL_ORIGIN}.",
        f"Data: {DATA_ORIGIN}.",
    ]
    for line in lines:
        console.print(line, highlight=False)
