"""The command `aroma`.

Importing this package is light: a command imports PyTorch only when it runs, so that help and wrong arguments answer
at once. The library's own commands are `inspect` and `export`. The laboratory's are entry points of the distribution,
in the group `aroma.commands`.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import AromaError, AromaWarning
from . import export, inspect
from .texts import examples

__all__ = ["main"]

COMMAND_GROUP = "aroma.commands"
"""Entry point group of further commands: modules with an `add_parser(commands)`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`argv`, by default that of the process) and return its exit code.

    0; 1 if the command finished but part of its work failed; 2 for a user error or an error of the operating system,
    such as a full disk; 130 when interrupted; 141 if the reader of the output is gone (`| head`).
    """
    arguments = parse(argv)
    # Before PyTorch loads its thread pool: a thread that spins while it waits keeps the core from the thread it waits
    # for, which on a shared machine makes two threads several times slower than one.
    if arguments.waits_passively:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("always", category=AromaWarning)
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            code: int | None = arguments.run(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest of the buffer goes nowhere
        return 141
    except (AromaError, OSError) as error:
        if os.environ.get("AROMA_DEBUG") == "1":
            raise
        return _report(str(error), code=2)
    except KeyboardInterrupt as interrupt:
        return _report(str(interrupt) or "interrupted; earlier saves are whole", code=130)
    return code or 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed arguments; KEY=VALUE may also stand behind options, where argparse itself gives up."""
    parser = make_parser()
    arguments, left = parser.parse_known_args(argv)
    if any(text.startswith("-") for text in left) or (left and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        arguments.overrides = [*arguments.overrides, *left]
    return arguments


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="aroma",
        description="LoRA without choosing ranks: held-out examples decide what each weight matrix keeps.",
        epilog=examples(
            "aroma demo",
            "aroma compress runs/mrpc/adapter --data held-out.jsonl --out smaller",
            "aroma train examples/recipes/mrpc.yaml training.seed=1",
            "aroma inspect runs/mrpc/adapter --plot ranks.png",
            "aroma lab run examples/lab/minilm-tiny.yaml",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(waits_passively=True)
    parser.add_argument("--version", action="version", version=f"aroma {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _commands():
        command.add_parser(commands)
    return parser


def _commands() -> list[Any]:
    """Return the modules of all commands, in alphabetical order of their names.

    Entry points are read from their file: importing `importlib.metadata` takes as long as the rest of `aroma --help`.
    """
    found: dict[str, Any] = {"inspect": inspect, "export": export}
    files = (file for path in sys.path for file in Path(path).glob("aroma_peft-*.dist-info/entry_points.txt"))
    text = next((file.read_text(encoding="utf-8") for file in files), "")
    for line in text.partition(f"[{COMMAND_GROUP}]\n")[2].partition("\n[")[0].splitlines():
        name, equals, module = line.partition(" = ")
        if equals:
            found[name] = import_module(module)
    return [found[name] for name in sorted(found)]


def _show_warning(others: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Show a warning of AROMA as one line, and any other as Python does."""
    if issubclass(category, AromaWarning):
        print(f"warning: {message}", file=sys.stderr)
    else:
        others(message, category, *where)


def _report(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
