"""`aroma lab`: experiments, from a grid of runs to tables and figures."""

from __future__ import annotations

from typing import Any

from aroma.cli.texts import add_command

from . import lab_report, lab_run

_COMMANDS = (lab_run, lab_report)


def add_parser(commands: Any) -> None:
    """Add the command and its subcommands to the parser."""
    parser = add_command(
        commands,
        "lab",
        "run methods × tasks × seeds, and make the paper's tables and figures of them",
        (
            "Experiments under one protocol: every method in the same training loop, evaluated on whole sets, with\n"
            "settings chosen on held-out training data. `run` fills a folder, on one machine or several;\n"
            "`table` and `figure` read it."
        ),
        "aroma lab run examples/lab/minilm-tiny.yaml",
        "aroma lab table runs/lab-tiny",
        "aroma lab run examples/lab/minilm-tiny.yaml --list",
    )
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subcommands)
