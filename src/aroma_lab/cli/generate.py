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
        "aroma generate smollm2 - --temperature 0.7 --seed 1",
    )
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="folder of a language model's adapter, or of the model; or smollm2"
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what the user says; -: read it from standard input")
    parser.add_argument("--base-model", metavar="NAME", help="hub name or folder, if not the one the adapter names")
    parser.add_argument("--system", metavar="TEXT", help="what the system says before")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", default=256, help="most tokens written (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (0)")
    parser.add_argument("--top-p", type=float, help="draw among the likeliest tokens of this total probability (1)")
    parser.add_argument("--seed", type=int, help="seed of the draw; without it every answer differs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Answer on standard output."""
    said = (sys.stdin.read() if arguments.prompt == "-" else arguments.prompt).strip()
    drawn, top_p = arguments.temperature != 0, arguments.top_p
    for option, fine, remedy in (
        ("prompt", said, "it is empty; write something"),
        ("max_new_tokens", arguments.max_new_tokens >= 1, "give 1 or more"),
        ("temperature", 0 <= arguments.temperature < float("inf"), "give 0 (greedy) or more"),
        ("top_p", top_p is None or (drawn and 0 < top_p <= 1), "give a share, and a --temperature above 0"),
        ("seed", arguments.seed is None or drawn, "it needs a --temperature above 0; leave it out"),
    ):
        if not fine:
            raise bad_value(f"--{option}".replace("_", "-"), getattr(arguments, option), remedy)
    require_saved(arguments.adapter)
    from aroma.cli.quiet import quiet

    quiet()
    import torch

    from ..language.generate import stream
    from ..language.model import load_for_inference

    loaded = load_for_inference(arguments.adapter, arguments.base_model)
    if arguments.seed is None:
        torch.seed()
    else:
        torch.manual_seed(arguments.seed)
    chat = [{"role": "user", "content": said}]
    if arguments.system is not None:
        chat = [{"role": "system", "content": arguments.system}, *chat]
    sampling = {"temperature": arguments.temperature, "top_p": top_p or 1.0, "top_k": 0} if drawn else {}
    stream(loaded, chat, arguments.max_new_tokens, **sampling)
