"""`aroma chat`: a conversation with a language model."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from aroma.cli.texts import examples
from aroma.errors import DataError

from .generate_options import add_options, check_options, opened, sampling_of

if TYPE_CHECKING:
    from rich.console import Console

    from ..language.chat import Chat


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "chat",
        help="talk with a language model",
        description="Load a language model, with an adapter in plain PEFT, and talk with it. /reset forgets what was "
        "said, /exit or the end of the input leaves, Ctrl-C stops an answer.",
        epilog=examples(
            "aroma chat runs/smollm2-commonsense/adapter",
            "aroma chat smollm2 --temperature 0.7",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, max_new_tokens=512)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Talk until the user leaves."""
    from aroma.cli.quiet import quiet

    quiet()
    check_options(arguments)
    from rich.console import Console

    from ..language.chat import Chat

    model, tokenizer, builder = opened(arguments)
    chat = Chat(model, tokenizer, builder, **sampling_of(arguments))
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print("/reset forgets what was said, /exit leaves, Ctrl-C stops an answer.", style="dim")
    if find_spec("readline"):  # gives `input` its editing keys
        import readline  # noqa: F401
    while (text := _read(console)) is not None:
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
            console.print("(forgotten)", style="dim")
        elif text.startswith("/"):
            console.print(f"(no such command: {text}; there are /reset and /exit)", style="dim")
        elif text:
            _say(chat, text, console)


def _read(console: Console) -> str | None:
    """Return what the user says next; None at the end of the input."""
    while True:
        try:
            return console.input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            console.print("\n(/exit leaves)", style="dim")


def _say(chat: Chat, text: str, console: Console) -> None:
    """Print an answer as it comes; Ctrl-C ends it, and what was said so far is remembered."""
    try:
        with closing(chat.answer(text)) as pieces:
            if chat.left_out:
                console.print(f"(no room: the oldest {chat.left_out} turns are forgotten)", style="dim")
            for piece in pieces:
                console.print(piece, end="")
        console.print()
    except KeyboardInterrupt:
        console.print("\n(stopped)", style="dim")
    except DataError as error:
        console.print(str(error), style="red")
