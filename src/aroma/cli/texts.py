"""What commands share: how they are described, and a few options."""

from __future__ import annotations

import argparse
from typing import Any


def examples(*commands: str) -> str:
    """Return the end of a help text: commands that run as they stand."""
    return "examples:\n" + "\n".join(f"  {command}" for command in commands)


def add_command(commands: Any, name: str, words: str, description: str, *lines: str) -> argparse.ArgumentParser:
    """Return the parser of a new command, with its line in the list of commands, its description and examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=words,
        description=description,
        epilog=examples(*lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_force(parser: Any) -> None:
    """Add the option that lets a command replace files; without it none is replaced."""
    parser.add_argument("--force", action="store_true", help="replace the files to write if they exist")
