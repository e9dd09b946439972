"""Small texts that commands share."""

from __future__ import annotations

from typing import Any


def examples(*commands: str) -> str:
    """Return the end of a help text: commands that run as they stand."""
    return "examples:\n" + "\n".join(f"  {command}" for command in commands)


def add_force(parser: Any) -> None:
    """Add the option that lets a command replace files; without it none is replaced."""
    parser.add_argument("--force", action="store_true", help="replace the files to write if they exist")
