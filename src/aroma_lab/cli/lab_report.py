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
    "sets": "each reported set and their average, with the difference of the average (Table 3)",
    "ranks": "mean rank found and trained, difference to the best fixed rank, and the fit to planted ranks",
}
FIGURES = {
    "ranks": "Figures 3 and 5: rank and effective rank of every matrix, for the lowest seed of each method",
    "budget": "score against the rank that is saved: the curve of LoRA's fixed ranks, and what finds its own",
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
        "aroma lab table results/lab/smollm2-commonsense --kind sets",
        "aroma lab table results/lab/minilm-six --out table.tex",
    )
    table.add_argument("folder", metavar="FOLDER", help="the grid's output folder, or its table of runs")
    table.add_argument("--kind", choices=tuple(TABLES), default="main", help="what the table is of (%(default)s)")
    baseline_help = "method that main and sets compare with (lora-r8 if it was run)"
    table.add_argument("--baseline", metavar="LABEL", help=baseline_help)
    table.add_argument(
        "--out", metavar="FILE", help="new .md, .tex or .csv file to write it to, instead of printing it"
    )
    add_force(table)
    table.set_defaults(run=run_table)

    figure = add_command(
        commands,
        "figure",
        "draw a figure of finished runs",
        f"Draw a figure of finished runs.\n\nkinds:\n{_listed(FIGURES)}",
        "aroma lab figure ranks results/lab/minilm-six --task trec --methods aroma-paper --out ranks.svg",
        "aroma lab figure budget results/lab/minilm-six",
    )
    figure.add_argument("kind", metavar="KIND", choices=tuple(FIGURES), help=", ".join(FIGURES))
    figure.add_argument(
        "folder", metavar="FOLDER", help="a grid's output folder or its runs.parquet, or a run's folder"
    )
    figure.add_argument("--out", metavar="FILE", help="new .png, .svg or .pdf file (KIND.png, or KIND-TASK.png)")
    figure.add_argument("--task", metavar="TASK", help="show this task (needed where there are several)")
    figure.add_argument("--methods", metavar="METHOD", nargs="+", help="show these, in this order (all)")
    add_force(figure)
    figure.set_defaults(run=run_figure)

    collect = add_command(
        commands,
        "collect",
        "write all runs of a grid into one small table, which tables and figures are made of as well",
        "Write all runs of a grid into one Parquet file: a row for each run, with its settings, versions, metrics,\n"
        "ranks, curves, evaluations and times. `aroma lab table` and `aroma lab figure` take it in place of the run\n"
        "folders and give the same numbers. Adapters, events and losses are left out.",
        "aroma lab collect results/lab/minilm-six",
        "aroma lab collect results/lab/minilm-six --out minilm.parquet",
    )
    collect.add_argument("folder", metavar="FOLDER", help="the grid's output folder")
    collect.add_argument("--out", metavar="FILE", help="new file to write it to (FOLDER/runs.parquet)")
    add_force(collect)
    collect.set_defaults(run=run_collect)


def run_table(arguments: argparse.Namespace) -> None:
    """Print the table as Markdown, or write it in the format of its file; only Markdown holds caption and notes."""
    require_extra("lab")
    out = None if arguments.out is None else _new_file(arguments.out, arguments)
    if out is not None and out.suffix not in (".md", ".tex", ".csv"):
        raise bad_value("--out", arguments.out, "unknown format; its name must end in .md, .tex or .csv")
    from aroma.files import write_text

    from ..report.runs import read_runs
    from ..report.tables import make_table

    table = make_table(read_runs(arguments.folder), arguments.kind, arguments.baseline)
    if out is None:
        sys.stdout.write(table.written(".md"))
        return
    write_text(out, table.written(out.suffix))
    print(*([table.caption, *table.notes] if out.suffix != ".md" else ()), f"Left: {out}.", sep="\n")


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
    save_picture(draw_figure(arguments.kind, arguments.folder, arguments.task, arguments.methods), out)
    print(f"picture: {out}")


def run_collect(arguments: argparse.Namespace) -> None:
    """Write the table of runs."""
    require_extra("lab")
    out = _new_file(arguments.out or str(Path(arguments.folder) / "runs.parquet"), arguments)
    from ..report.runs import collect_runs, read_runs

    runs = read_runs(arguments.folder)
    collect_runs(runs, out)
    print(f"{len(runs.rows)} runs, {out.stat().st_size / 1e3:.0f} kB: {out}")


def _listed(kinds: dict[str, str]) -> str:
    return "\n".join(f"  {kind:8} {meaning}" for kind, meaning in kinds.items())


def _new_file(name: str, arguments: argparse.Namespace) -> Path:
    from aroma.outputs import new_file

    return new_file("--out", name, force=arguments.force)
