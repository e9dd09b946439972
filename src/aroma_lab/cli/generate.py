"""`aroma generate`: what a language model answers to a prompt, or to a file of prompts."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from aroma.cli.texts import examples
from aroma.errors import bad_value

from ..progress import progress_bar
from .generate_options import add_options, check_options, opened, sampling_of


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="let a language model answer a prompt, or a file of prompts",
        description="Load a language model, with an adapter in plain PEFT, and let it answer.",
        epilog=examples(
            "aroma generate runs/smollm2-commonsense/adapter Hello!",
            "aroma generate smollm2 - --temperature 0.7 --seed 1",
            "aroma generate runs/smollm2-commonsense/adapter prompts.jsonl --out answers.jsonl",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, max_new_tokens=256)
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        help="what the user says; -: read it from standard input; with --out: a JSONL file of prompts, each line with "
        "a prompt, an instruction, or messages",
    )
    parser.add_argument("--out", metavar="FILE", help="new JSONL file: the lines of PROMPT with their responses")
    parser.add_argument("--batch-size", type=int, metavar="N", help="with --out: prompts of one forward pass (8)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Answer, on standard output or into a file."""
    _refuse_idle_options(arguments)
    from aroma.cli.quiet import quiet

    quiet()
    check_options(arguments)
    if arguments.out is None:
        _answer_one(arguments)
    else:
        _answer_file(arguments)


def _answer_one(arguments: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not prompt.strip():
        raise bad_value("PROMPT", prompt, "it is empty; write something")
    from ..language.examples import Turn
    from ..language.generate import stream

    model, tokenizer, builder = opened(arguments)
    for piece in stream(model, builder, tokenizer, [Turn("user", prompt.strip())], **sampling_of(arguments)):
        print(piece, end="", flush=True)
    print()


def _answer_file(arguments: argparse.Namespace) -> None:
    from ..language.generate import generate_batch
    from ..language.prompts import load_prompts, refuse_existing, write_answers

    refuse_existing(arguments.out)
    model, tokenizer, builder = opened(arguments)
    rows = load_prompts(arguments.prompt, builder.spec)
    prompts = [builder.prompt(turns, f"prompts (row {number})") for number, (_, turns) in enumerate(rows, start=1)]
    with progress_bar("generate", len(prompts)) as advance:
        answers = generate_batch(
            model,
            builder,
            tokenizer,
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size or 8,
            advance=advance,
        )
    write_answers(arguments.out, [row for row, _ in rows], answers)
    cut = sum(not answer.finished for answer in answers)
    ended = f", {cut} of them cut after {arguments.max_new_tokens} tokens" if cut else ""
    print(f"{len(answers)} answers{ended}: {arguments.out}")


def _refuse_idle_options(arguments: argparse.Namespace) -> None:
    """Raise for an option that would do nothing.

    Raises:
        ConfigError: Naming the option.
    """
    if arguments.out is None and arguments.batch_size is not None:
        raise bad_value("--batch-size", arguments.batch_size, "it has a meaning only with --out; leave it out")
    if arguments.out is not None and arguments.temperature != 0:
        raise bad_value("--temperature", arguments.temperature, "files are answered greedily; leave it out")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise bad_value("--batch-size", arguments.batch_size, "give 1 or more")
