"""`aroma demo`: train, evaluate and reload, offline, with a real model and real articles."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command

from ..specs import TrainSpec, check_training

FOLDER = "aroma-demo"


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "demo",
        "grow adapters on real news articles, offline, in about two minutes",
        (
            "Grow adapters in a pretrained sentence encoder on 1,780 BBC News articles, evaluate on all 445 held-out\n"
            "ones, and reload the adapter in plain PEFT. Needs no network and no GPU."
        ),
        "aroma demo",
        "aroma demo --out runs/demo --threads 2",
    )
    parser.add_argument("--out", metavar="DIR", help="new or empty folder (aroma-demo, or aroma-demo-2, …)")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of head, order and components (%(default)s)")
    parser.add_argument("--steps", type=int, default=110, help="optimizer steps (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the demo, and print a summary."""
    require_extra("demo")
    from aroma.outputs import new_folder

    # Before PyTorch is loaded.
    loop = {"seed": arguments.seed, "threads": arguments.threads, "max_steps": arguments.steps}
    check_training(TrainSpec(**loop))
    out = _unused_folder() if arguments.out is None else arguments.out
    new_folder("--out", out, "give another folder with --out")
    from aroma.cli.quiet import quiet

    quiet()
    from rich.console import Console
    from rich.table import Table

    from ..demo.page import result_lines, result_table
    from ..demo.run import PICTURE, TRAINING, run_demo
    from ..progress import progress_bar
    from ..run.files import REPORT
    from ..tasks.articles import SOURCE
    from ..tasks.model import ENCODER_SOURCE

    record = run_demo(out, replace(TRAINING, **loop), progress=progress_bar, training_bar=True)

    console, lines = Console(), result_lines(record)
    table = Table("method", title=f"all {record['held_out_articles']} held-out articles", title_justify="left")
    table.add_column("accuracy", justify="right")
    table.add_column("parameters", justify="right")
    for row in result_table(record):
        table.add_row(*row)
    console.print(table)
    for line in (
        lines["lora"],
        f"Ranks: {lines['ranks']}.",
        f"Reloaded in plain PEFT, without AROMA: {lines['reloaded']}.",
        f"Left in {out}: adapter/, {PICTURE}, {REPORT}, result.json, events.jsonl ({record['wall_seconds']:.0f} s).",
        f"Model: {ENCODER_SOURCE}.",
        f"Data: {SOURCE}.",
    ):
        console.print(line, highlight=False)


def _unused_folder() -> Path:
    """Return the first of aroma-demo, aroma-demo-2, … that is new or empty."""
    names = itertools.chain([FOLDER], (f"{FOLDER}-{number}" for number in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists() or (path.is_dir() and not any(path.iterdir())))
