"""`aroma demo`: train, evaluate and reload, offline, with a real model and real articles."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command

from ..specs import TrainSpec, check_training


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "demo",
        "train LoRA, evidence and AROMA on real news articles, offline, in about two minutes",
        (
            "Train a pretrained sentence encoder to sort 1,780 BBC News articles: the head alone, LoRA r=8 and r=16,\n"
            "LoRA whose ranks evidence finds, and AROMA as published. Evaluate on the 445 others, and load both\n"
            "adapters in plain PEFT. Needs no network and no GPU."
        ),
        "aroma demo",
        "aroma demo --out runs/demo --threads 2",
    )
    parser.add_argument("--out", metavar="DIR", default="aroma-demo", help="new or empty folder (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of head, order and adapters (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the demo, and print a summary."""
    require_extra("demo")
    from aroma.outputs import new_folder

    # Before PyTorch is loaded.
    loop = {"seed": arguments.seed, "threads": arguments.threads, "max_steps": arguments.steps}
    check_training(TrainSpec(**loop))
    out = arguments.out
    new_folder("--out", out, "give another folder with --out")
    from aroma.cli.quiet import quiet

    quiet()
    from rich.console import Console
    from rich.table import Table

    from ..demo import PICTURE, ROWS, TRAINING, run_demo
    from ..tasks.articles import SOURCE

    console = Console()
    console.print(f"Five short trainings in {out}, about two minutes on two idle cores.")
    training = replace(TRAINING, **loop)
    record = run_demo(out, training, on_run=lambda title: console.print(f"· {title}", highlight=False), progress=True)
    articles = record["test_articles"]
    table = Table("method", title=f"{articles} test articles, first 16 tokens of each", title_justify="left")
    for title in ("accuracy", "total rank", "largest", "parameters", "optimizer", "training"):
        table.add_column(title, justify="right")
    for row in record["rows"]:
        sizes = [str(row["total_rank"]), str(row["largest_rank"]), f"{row['adapter_parameters']:,}"]
        cost = [f"{row['optimizer_mb']:.1f} MB", f"{row['seconds']:.0f} s"]
        table.add_row(row["method"], f"{row['accuracy']:.1%}", *sizes, *cost)
    console.print(table)
    for line in (
        "All rows train the same head and pooler. One seed: a demonstration, no comparison of methods.",
        "Plain PEFT loads both adapters and gives the same answers.",
        f"Left in {out}: {'/, '.join(ROWS)}/, {PICTURE}, result.json ({record['wall_seconds']:.0f} s).",
        f"To look at: aroma report {out}/evidence",
        f"Data: {SOURCE}.",
    ):
        console.print(line, highlight=False)
