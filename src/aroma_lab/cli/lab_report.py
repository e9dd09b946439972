"""`aroma lab table`, `figure` and `collect`: what a grid's runs say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from aroma.cli.extras import require_extra
from aroma.cli.texts import add_command, add_force
from aroma.errors import bad_value

# As in report/; written out here so that help imports nothing.
TABLES = {
    "main": "scores, trainable parameters, paired difference to a baseline (the paper's Table 2)",
    "paired": "the difference to the baseline on each task: better, tied or worse",
    "sets": "each reported set and their average, with the difference of the average (Table 3)",
    "ranks": "mean rank found and trained and, where ranks were planted, how well they were found",
    "regret": "what finds its ranks against the best fixed rank, and the one that trying all of them finds",
    "reset": "AROMA's scores, ranks and effective ranks by what a merge resets (Table 4)",
    "time": "seconds of an epoch, and their ratios (Table 5)",
    "inner": "after how many steps the inner criterion fires, by kind of matrix",
}
_OF_GRID = ("selection.json", "grid.yaml")
FORMAT_NAMES = ("text", "markdown", "latex", "csv")
FIGURES = {
    "curves": "Figure 1: trainable parameters, total rank, rank of two modules, and score, by step",
    "ranks": "Figures 3 and 5: rank and effective rank of every matrix, for one seed of each method",
    "cosines": "Figure 4: cosines between the components of two runs",
    "planted": "found against planted rank of every matrix, of a task that plants them",
    "memory": "found rank, and what is recalled, against the number of pairs to remember",
    "budget": "score against trained rank: the curve of LoRA's fixed ranks, and what finds its own",
    "pareto": "score against average trainable parameters and training time, with the Pareto front",
}


def add_parser(commands: Any) -> None:
    """Add the three commands to the parser of `aroma lab`."""
    table = add_command(
        commands,
        "table",
        "print a table of a grid's runs",
        "Print a table of the runs that `aroma lab run` left: mean ± standard deviation over seeds, with the\n"
        f"protocol in its caption and every failed run below it.\n\nkinds:\n{_listed(TABLES)}",
        "aroma lab table results/lab/minilm-six",
        "aroma lab table results/lab/minilm-six --kind time --baseline lora-r1",
        "aroma lab table results/lab/smollm2-commonsense --kind sets --metric accuracy_normalised",
        "aroma lab table results/lab/minilm-six --format latex --out table.tex",
    )
    table.add_argument("folder", metavar="FOLDER", help="the grid's output folder, or its table of runs")
    table.add_argument("--kind", choices=tuple(TABLES), default="main", help="what the table is of (%(default)s)")
    table.add_argument("--format", choices=FORMAT_NAMES, help="how it is written (by the suffix of --out, else text)")
    table.add_argument(
        "--baseline",
        metavar="LABEL",
        help="method to compare with, of all kinds but ranks, regret, reset and inner (lora-r8 if it was run)",
    )
    table.add_argument("--metric", metavar="NAME", help="what --kind sets shows (the metric that is the score)")
    table.add_argument("--out", metavar="FILE", help="new file to write it to, instead of printing it")
    add_force(table)
    table.set_defaults(run=run_table)

    figure = add_command(
        commands,
        "figure",
        "draw a figure of finished runs",
        f"Draw a figure of finished runs.\n\nkinds:\n{_listed(FIGURES)}",
        "aroma lab figure curves results/lab/minilm-six --task trec --methods lora-r8 aroma-paper --out curves.svg",
        "aroma lab figure cosines RUN OTHER-RUN --out figure4.pdf",
        "aroma lab figure pareto results/lab/minilm-six",
    )
    figure.add_argument("kind", metavar="KIND", choices=tuple(FIGURES), help=", ".join(FIGURES))
    figure.add_argument(
        "folders", metavar="FOLDER", nargs="+", help="a grid's output folder or its runs.parquet, or a run's folder"
    )
    figure.add_argument("--out", metavar="FILE", help="new .png, .svg or .pdf file (KIND.png, or KIND-TASK.png)")
    figure.add_argument("--task", metavar="TASK", help="show this task (needed where there are several)")
    figure.add_argument("--methods", metavar="METHOD", nargs="+", help="show these, in this order (all)")
    figure.add_argument(
        "--modules", metavar="MODULE", nargs="+", help="names of modules, or ends of them (those of the paper)"
    )
    figure.add_argument("--seed", type=int, help="seed shown by ranks and cosines (the lowest)")
    add_force(figure)
    figure.set_defaults(run=run_figure)

    collect = add_command(
        commands,
        "collect",
        "write all runs of a grid into one small table, which tables and figures are made of as well",
        "Write all runs of a grid into one table, runs.parquet: settings, versions, metrics, ranks, curves,\n"
        "evaluations and inner checks of each run, failures included. `aroma lab table` and `aroma lab figure`\n"
        "take it in place of the run folders and give the same numbers. Adapters, events and losses are left\n"
        "out, so cosines still need the run folders.\n\n"
        "Of several parts of one grid, a later part's run replaces one of the same task, method and seed. What they\n"
        "chose and were asked, selection.json and grid.yaml, is then written beside the table.",
        "aroma lab collect results/lab/minilm-six",
        "aroma lab collect results/lab/minilm-six --out minilm.parquet",
        "aroma lab collect machine-a machine-b --out both/runs.parquet",
    )
    collect.add_argument("folders", metavar="FOLDER", nargs="+", help="the grid's output folder, or its parts")
    collect.add_argument("--out", metavar="FILE", help="new file to write it to (FOLDER/runs.parquet)")
    add_force(collect)
    collect.set_defaults(run=run_collect)


def run_table(arguments: argparse.Namespace) -> None:
    """Print the table, or write it; what CSV cannot hold goes to standard error."""
    require_extra("lab")
    out = _new_file(arguments.out, arguments) if arguments.out is not None else None
    from aroma.files import write_text

    from ..report.formats import FORMATS, SUFFIXES
    from ..report.runs import read_runs
    from ..report.tables import make_table

    form = arguments.format or (SUFFIXES.get(out.suffix.lower(), "text") if out else "text")
    table = make_table(read_runs(arguments.folder), arguments.kind, arguments.baseline, arguments.metric)
    rendered = FORMATS[form](table)
    if out is not None:
        write_text(out, rendered)
        print(f"Left: {out}.")
    else:
        sys.stdout.write(rendered)
    if form == "csv":
        print(table.caption, *table.notes, sep="\n", file=sys.stderr)


def run_figure(arguments: argparse.Namespace) -> None:
    """Draw and write the picture."""
    require_extra("lab")
    name = f"{arguments.kind}-{arguments.task}" if arguments.task else arguments.kind
    out = _new_file(arguments.out or f"{name}.png", arguments)
    from aroma.cli.quiet import quiet

    quiet()
    from aroma.pictures import require_picture_name, save_picture

    from ..report.figures import draw_figure

    require_picture_name("--out", out)
    choice = {key: getattr(arguments, key) for key in ("task", "methods", "modules", "seed")}
    save_picture(draw_figure(arguments.kind, arguments.folders, **choice), out)
    print(f"picture: {out}")


def run_collect(arguments: argparse.Namespace) -> None:
    """Write the table of runs."""
    require_extra("lab")
    is_joined = len(arguments.folders) > 1
    if is_joined and arguments.out is None:
        raise bad_value("--out", None, "name the new table of these parts, as joined/runs.parquet")
    out = _new_file(arguments.out or str(Path(arguments.folders[0]) / "runs.parquet"), arguments)
    selection, grid = (_new_file(str(out.parent / name), arguments) if is_joined else None for name in _OF_GRID)
    import yaml

    from aroma.files import write_text

    from ..report.runs import collect_runs, join_runs, read_runs
    from ..study.selection import write_selection

    runs = join_runs([read_runs(folder) for folder in arguments.folders])
    collect_runs(runs, out)
    if selection is not None and grid is not None:
        write_selection(selection, runs.selection)
        write_text(grid, yaml.safe_dump(runs.grid, sort_keys=False))
    print(f"{len(runs.rows)} runs, {out.stat().st_size / 1e3:.0f} kB: {out}")


def _listed(kinds: dict[str, str]) -> str:
    return "\n".join(f"  {kind:8} {meaning}" for kind, meaning in kinds.items())


def _new_file(name: str, arguments: argparse.Namespace) -> Path:
    from aroma.outputs import new_file

    return new_file("--out", name, force=arguments.force)
