"""Small texts that commands share."""

from __future__ import annotations


def examples(*commands: str) -> str:
    """Return the end of a help text: commands that run as they stand."""
    return "examples:\n" + "\n".join(f"  {command}" for command in commands)
