"""`aroma demo`: train, evaluate and reload, offline, with a real model and real articles."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command

from ..specs import TrainSpec


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "demo",
        "train LoRA and AROMA on real news articles, and compress, offline, in about two minutes",
        (
            "Train a pretrained sentence encoder to sort 1,780 BBC News articles: the head alone, LoRA r=4 and r=16,\n"
            "and AROMA as published. Compress LoRA r=16 by its effect, and to the same size by that alone. Evaluate\n"
            "on the 445 others, and load the adapters in plain PEFT. Needs no network and no GPU."
        ),
        "aroma demo",
        "aroma demo --out runs/demo --threads 2",
    )
    parser.add_argument("--out", metavar="DIR", default="aroma-demo", help="new or empty folder (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of head, order and adapters (%(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the demo, and print a summary."""
    require_extra("demo")
    from aroma.outputs import new_folder

    # Before PyTorch is loaded.
    loop = {"seed": arguments.seed, "threads": arguments.threads, "max_steps": arguments.steps}
    TrainSpec(**loop)  # refuses a value out of range
    new_folder("--out", arguments.out, "give another folder with --out")
    from aroma.cli.quiet import quiet

    quiet()
    from ..demo import TRAINING, run_demo

    run_demo(arguments.out, replace(TRAINING, **loop))
