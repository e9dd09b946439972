"""`aroma train`: a recipe, from data to adapter."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import examples

if TYPE_CHECKING:
    from ..specs import Recipe

_EXAMPLES = examples(
    "aroma train examples/recipes/mrpc.yaml",
    "aroma train examples/recipes/mrpc.yaml training.seed=1 output=runs/mrpc-1",
    "aroma train examples/recipes/mrpc.yaml --resume",
    "aroma train examples/recipes/smollm2-commonsense.yaml",
    "torchrun --nproc-per-node 2 -m aroma train examples/recipes/mrpc.yaml     # on two GPUs",
)


class _HelpWithKeys(argparse.Action):
    """Prints the help with all keys of a recipe; they are collected only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.epilog = f"{_describe_keys()}\n\n{_EXAMPLES}"
        parser.print_help()
        parser.exit()


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "train",
        help="train a classifier, a regression or a language model from a recipe",
        description="Train what a recipe says, from files or the hub: a sequence classifier, a regression, or a\n"
        "causal language model on instructions, chats or plain text.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", nargs=0, action=_HelpWithKeys, help="show this help and all keys of a recipe")
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="YAML file with what differs from the defaults")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="stronger than the file, as training.seed=1")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in `output`")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train, and say what came of it."""
    require_extra("lab")
    from ..run.recipe import check_output, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_output(recipe, arguments.resume)  # here, too: before PyTorch is loaded
    if recipe.data.task == "causal_lm":
        require_extra("language")

    from aroma.cli.quiet import quiet

    quiet()
    from rich.console import Console

    from ..run.processes import join
    from ..run.recipe import run_recipe

    processes = join()
    console = Console(markup=False, soft_wrap=True)
    result = run_recipe(recipe, resume=arguments.resume, on_note=console.print)
    if processes.is_main_process:
        _draw_ranks(recipe)
        _print_result(recipe, result)
    processes.destroy_process_group()


def _draw_ranks(recipe: Recipe) -> None:
    """Put a picture of the ranks into the card of the adapter, if it is one of AROMA."""
    from aroma.export import add_picture
    from aroma.tuner.state import STATE_FILE

    from ..run.files import TrialFiles

    adapter = TrialFiles(Path(recipe.output)).adapter
    if (adapter / STATE_FILE).exists():
        add_picture(adapter)


def _print_result(recipe: Recipe, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..run.files import TrialFiles

    table = Table("split", *result["held_out"])
    for split, metrics in {"validation": result["held_out"], **result["reported"]}.items():
        table.add_row(split, *(f"{value:.4f}" for value in metrics.values()))
    ranks = result["ranks"].values()
    frozen = sum(state == "frozen" for state in result["states"].values())
    console = Console(markup=False)
    console.print(table)
    console.print(
        f"{result['steps']} steps in {result['wall_seconds']:.0f} s · ranks {min(ranks)} to {max(ranks)}, in all "
        f"{result['total_rank']} · {frozen} of {len(ranks)} matrices finished"
    )
    console.print(f"adapter: {TrialFiles(Path(recipe.output)).adapter}", soft_wrap=True)


def _describe_keys() -> str:
    from ..run.recipe import recipe_help

    lines = ["keys of a recipe, with their defaults:"]
    for key, default, meaning in recipe_help():
        lines.append(f"  {key}: {json.dumps(default)}")
        lines += textwrap.wrap(meaning, width=96, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
