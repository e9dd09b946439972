"""`aroma bench run`: what a whole training costs, epoch by epoch, method by method."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import examples

from .bench_options import timed_phase

if TYPE_CHECKING:
    from ..bench.run_report import RunResult
    from ..bench.run_settings import RunSettings


def add_parser(commands: Any) -> None:
    """Add the command to the parser of `aroma bench`."""
    parser = commands.add_parser(
        "run",
        help="measure whole runs of LoRA r=8, AdaLoRA and AROMA, epoch by epoch",
        description=(
            "Measure the time per epoch of LoRA r=8, AdaLoRA and AROMA, as the paper's Table 5 does, and what of\n"
            "AROMA's saving comes from modules that have finished. All take the same batches, step by step, in\n"
            "turns, in one process. With --trajectory AROMA grows as a recorded run did; with a recipe alone it\n"
            "trains and decides for itself, and leaves its trajectory for later."
        ),
        epilog=examples(
            "aroma bench run --trajectory runs/mrpc --every 20",
            "aroma bench run --trajectory runs/mrpc --model roberta-base --examples 3668 --batch-size 64 --length 128",
            "aroma bench run examples/recipes/mrpc.yaml training.max_steps=300 --out mrpc-time",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", nargs="?", help="model, data and training, as `aroma train`")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="stronger than the recipe")
    _add_options(parser)
    parser.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    own = "the recipe's in the trajectory's folder"
    parser.add_argument("--trajectory", metavar="DIR", help="folder of the run whose ranks are replayed")
    parser.add_argument("--model", metavar="NAME", help=f"shape, or folder or hub name; random weights ({own})")
    parser.add_argument("--examples", type=int, help=f"random examples of an epoch ({own})")
    parser.add_argument("--batch-size", type=int, help=f"examples of an optimizer step ({own})")
    parser.add_argument("--length", type=int, help=f"tokens of an example ({own})")
    parser.add_argument("--dropout", type=float, default=0.0, help="of every adapter, without recipe (%(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps to go (all)")
    parser.add_argument(
        "--every", type=int, default=1, help="run and time one step of so many, drawn at random (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and drawn steps (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's own choice)")
    parser.add_argument("--out", metavar="DIR", default="bench-run", help="new or empty folder (%(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Measure; print the tables; write results, trajectory and picture."""
    require_extra("train", "plot")
    from aroma.cli.quiet import quiet

    quiet()
    from ..bench.run import bench_run
    from ..bench.run_picture import run_picture

    result = bench_run(_settings(arguments), arguments.out, phase=timed_phase)
    picture = Path(arguments.out) / "run.png"
    run_picture(result, picture)
    _print(result, arguments.out)


def _settings(arguments: argparse.Namespace) -> RunSettings:
    from ..bench.run_settings import RunSettings, facts_of_run
    from ..run.recipe import load_recipe

    given = {
        name: getattr(arguments, name)
        for name in ("model", "examples", "batch_size", "length")
        if getattr(arguments, name) is not None
    }
    recipe = None
    if arguments.recipe is not None:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
    elif arguments.trajectory is not None:
        given = facts_of_run(arguments.trajectory) | given
    return RunSettings(
        trajectory=arguments.trajectory,
        recipe=recipe,
        steps=arguments.steps,
        every=arguments.every,
        dropout=arguments.dropout,
        seed=arguments.seed,
        device=arguments.device,
        threads=arguments.threads,
        **given,
    )


def _print(result: RunResult, out: str) -> None:
    from rich.console import Console

    from ..bench.run_table import epoch_table, method_table, note_lines, saving_line

    console = Console(markup=False)
    console.print(method_table(result))
    console.print(epoch_table(result))
    for line in (saving_line(result), *note_lines(result), f"Left in {out}: result.json, trajectory.json, run.png."):
        console.print(line, highlight=False, soft_wrap=True)
