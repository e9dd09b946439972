"""`aroma lab figure`: the paper's figures, and one it lacks, from finished runs."""

from __future__ import annotations

import argparse
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import examples

from .lab_table import new_file

_KINDS = {
    "curves": "Figure 1: trainable parameters, total rank, rank of two modules, and score, by step",
    "ranks": "Figures 3 and 5: rank and effective rank of every matrix, for one seed of each method",
    "cosines": "Figure 4: cosines between the components of two runs",
    "pareto": "score against average trainable parameters and training time, with the Pareto front",
}


def add_parser(commands: Any) -> None:
    """Add the command to the parser of `aroma lab`."""
    kinds = "\n".join(f"  {kind:8} {meaning}" for kind, meaning in _KINDS.items())
    parser = commands.add_parser(
        "figure",
        help="draw a figure of finished runs",
        description=f"Draw a figure of finished runs.\n\nkinds:\n{kinds}",
        epilog=examples(
            "aroma lab figure curves results/lab/minilm --task mrpc --methods lora-r8 aroma --out figure1.svg",
            "aroma lab figure cosines results/lab/minilm --task mrpc --methods aroma-no-reset aroma --out figure4.pdf",
            "aroma lab figure pareto results/lab/minilm",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", metavar="KIND", choices=tuple(_KINDS), help=", ".join(_KINDS))
    parser.add_argument(
        "folders", metavar="FOLDER", nargs="+", help="a grid's output folder or its runs.parquet, or a run's folder"
    )
    parser.add_argument("--out", metavar="FILE", help="new .png, .svg or .pdf file (KIND.png, or KIND-TASK.png)")
    parser.add_argument("--task", metavar="TASK", help="show this task (needed where there are several)")
    parser.add_argument("--methods", metavar="METHOD", nargs="+", help="show these, in this order (all)")
    parser.add_argument(
        "--modules", metavar="MODULE", nargs="+", help="names of modules, or ends of them (those of the paper)"
    )
    parser.add_argument("--seed", type=int, help="seed shown by ranks and cosines (the lowest)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Draw and write the picture."""
    require_extra("lab")
    name = f"{arguments.kind}-{arguments.task}" if arguments.task else arguments.kind
    out = new_file(arguments.out or f"{name}.png")
    from aroma.cli.quiet import quiet

    quiet()
    from rich.console import Console

    from aroma.pictures import require_picture_name, save_picture

    from ..report.figures import Choice, draw_figure

    require_picture_name("--out", out)
    choice = Choice(
        folders=tuple(arguments.folders),
        task=arguments.task,
        methods=tuple(arguments.methods) if arguments.methods else None,
        modules=tuple(arguments.modules) if arguments.modules else None,
        seed=arguments.seed,
    )
    save_picture(draw_figure(arguments.kind, choice), out)
    Console(markup=False).print(f"picture: {out}", soft_wrap=True)
