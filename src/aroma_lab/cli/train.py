"""`aroma train`: a recipe, from data to adapter."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command

from ..run.trial import REPORT, TrialFiles

if TYPE_CHECKING:
    from ..run.recipe import Recipe


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "train",
        "train a classifier, a regression or a language model from a recipe",
        "Train what a recipe says, from files or the hub: a sequence classifier, a regression, or a\n"
        "causal language model on instructions, chats or plain text.",
        "aroma train examples/recipes/mrpc.yaml",
        "aroma train examples/recipes/mrpc.yaml training.seed=1 output=runs/mrpc-1",
        "aroma train examples/recipes/mrpc.yaml --resume",
        "aroma train examples/recipes/smollm2-commonsense.yaml",
        "torchrun --nproc-per-node 2 -m aroma train examples/recipes/mrpc.yaml     # on two GPUs",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="YAML file with what differs from the defaults")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="stronger than the file, as training.seed=1")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in `output`")
    parser.add_argument("--no-report", action="store_true", help="write no report.html to look at")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train, and say what came of it."""
    require_extra("lab")
    from ..run.recipe import check_output, check_sources, load_recipe, save_recipe
    from ..specs import LANGUAGE_KINDS

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_output(recipe, arguments.resume)
    check_sources(recipe.trial)
    if recipe.trial.task.kind in LANGUAGE_KINDS:
        require_extra("language")

    from aroma.cli.quiet import quiet

    quiet()
    from rich.console import Console

    from ..run.run import join, run_trial

    processes, files = join(), TrialFiles(Path(recipe.output))

    def start(job: Any) -> None:
        save_recipe(recipe, files.recipe)
        for note in job.notes:
            Console(markup=False, soft_wrap=True).print(note)

    try:
        result = run_trial(recipe.trial, files.root, progress=True, keep_checkpoints=True, on_start=start)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(_how_to_go_on(arguments, recipe)) from interrupt
    if processes.is_main_process:
        _print_result(recipe, result)
    processes.destroy_process_group()
    if processes.is_main_process and not arguments.no_report:
        from ..report.run_page import write_run_page

        page = files.root / REPORT
        write_run_page(files.root, page)
        print(f"report: {page}")


def _how_to_go_on(arguments: argparse.Namespace, recipe: Recipe) -> str:
    """Return what an interrupted run left, and the command that goes on with it."""
    from aroma.checkpoint import last_complete_checkpoint

    files = TrialFiles(Path(recipe.output))
    if not files.trial.exists():
        return f"interrupted before the training began; {recipe.output} holds nothing"
    checkpoint = last_complete_checkpoint(files.checkpoints) if files.checkpoints.is_dir() else None
    left = "no checkpoint yet" if checkpoint is None else f"{Path(checkpoint).name} is saved"
    command = shlex.join(["aroma", "train", arguments.recipe, *arguments.overrides, "--resume"])
    return f"interrupted; {left}. Go on with: {command}"


def _print_result(recipe: Recipe, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("split", *result["held_out"])
    for split, metrics in {"held out": result["held_out"], **result["reported"]}.items():
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
