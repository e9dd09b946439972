"""`aroma generate`: what a language model answers to a prompt."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from aroma.cli.texts import add_command
from aroma.errors import bad_value

from ..preflight import require_saved


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "generate",
        "let a language model answer a prompt",
        "Load a language model, with an adapter in plain PEFT, and let it answer. A file of prompts: aroma predict.",
        "aroma generate runs/smollm2-commonsense/adapter Hello!",
        "aroma generate smollm2 Hello! --max-new-tokens 64",
    )
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="folder of a language model's adapter, or of the model; or smollm2")
    add("prompt", metavar="PROMPT", help="what the user says; -: read it from standard input")
    add("--base-model", metavar="NAME", help="hub name or folder, if not the one the adapter names")
    add("--system", metavar="TEXT", help="what the system says before")
    add("--max-new-tokens", type=int, metavar="N", default=256, help="most tokens written (256)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the likeliest answer."""
    said = (sys.stdin.read() if arguments.prompt == "-" else arguments.prompt).strip()
    if arguments.max_new_tokens < 1:
        raise bad_value("--max-new-tokens", arguments.max_new_tokens, "give 1 or more")
    require_saved(arguments.adapter)
    from aroma.cli.quiet import quiet

    quiet()
    from ..language.generate import generate_batch
    from ..language.model import load_for_inference

    loaded = load_for_inference(arguments.adapter, arguments.base_model)
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    chat = [*system, {"role": "user", "content": said}]
    print(generate_batch(loaded, [chat], max_new_tokens=arguments.max_new_tokens)[0].text)
