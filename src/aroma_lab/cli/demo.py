"""`aroma demo`: train, evaluate and reload, offline, with a real model and real articles."""

from __future__ import annotations

import argparse
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import examples


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="grow adapters on real news articles, offline, in about three minutes",
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
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the demo, and print a summary."""
    require_extra("demo")
    from aroma.outputs import new_folder

    new_folder("--out", arguments.out, "give another folder with --out")  # before PyTorch is loaded
    from aroma.cli.quiet import quiet

    quiet()
    from dataclasses import replace

    from rich.console import Console
    from rich.table import Table

    from ..demo.run import TRAINING, result_lines, result_table, run_demo
    from ..progress import progress_bar
    from ..tasks.articles import SOURCE
    from ..tasks.model import ENCODER_SOURCE

    training = replace(TRAINING, seed=arguments.seed, threads=arguments.threads, max_steps=arguments.steps)
    record = run_demo(arguments.out, training, progress=progress_bar, training_bar=True)

    console, lines = Console(), result_lines(record)
    table = Table("method", title=f"all {record['held_out_articles']} held-out articles", title_justify="left")
    table.add_column("accuracy", justify="right")
    table.add_column("trainable", justify="right")
    for row in result_table(record):
        table.add_row(*row)
    console.print(table)
    for line in (
        lines["lora"],
        f"Ranks: {lines['ranks']}.",
        f"Reloaded in plain PEFT, without AROMA: {lines['reloaded']}.",
        f"Left in {arguments.out}: adapter/, {', '.join(record['pictures'])}, report.md, result.json, events.jsonl "
        f"({record['wall_seconds']:.0f} s).",
        f"Model: {ENCODER_SOURCE}.",
        f"Data: {SOURCE}.",
    ):
        console.print(line, highlight=False)
