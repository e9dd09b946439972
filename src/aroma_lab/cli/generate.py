"""`aroma generate`: what a language model answers to a prompt, or to a file of prompts."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aroma.cli.texts import examples
from aroma.errors import bad_value

from ..progress import progress_bar

if TYPE_CHECKING:
    from ..language.inference import LoadedModel


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
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="folder of a language model's adapter, or of the model; or smollm2"
    )
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        help="what the user says; -: read it from standard input; with --out: a JSONL file of prompts, each line with "
        "a prompt, an instruction, or messages",
    )
    parser.add_argument("--base-model", metavar="NAME", help="hub name or folder, if not the one the adapter names")
    parser.add_argument("--system", metavar="TEXT", help="system turn, if not the one of the training")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", default=256, help="most tokens written (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (0)")
    parser.add_argument("--top-p", type=float, help="draw among the likeliest tokens of this total probability (1)")
    parser.add_argument("--seed", type=int, help="seed of the draw; without it every answer differs")
    parser.add_argument("--out", metavar="FILE", help="new JSONL file: the lines of PROMPT with their responses")
    parser.add_argument("--batch-size", type=int, metavar="N", help="with --out: prompts of one forward pass (8)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Answer, on standard output or into a file."""
    _check(arguments)
    from aroma.cli.quiet import quiet

    quiet()
    from ..language.generate import require_sampling

    top_p = 1.0 if arguments.top_p is None else arguments.top_p
    require_sampling(arguments.max_new_tokens, arguments.temperature, top_p)
    if arguments.out is None:
        _answer_one(arguments, top_p)
    else:
        _answer_file(arguments)


def _answer_one(arguments: argparse.Namespace, top_p: float) -> None:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not prompt.strip():
        raise bad_value("PROMPT", prompt, "it is empty; write something")
    from ..language.generate import stream
    from ..language.template import Turn

    stream(
        _load(arguments),
        [Turn("user", prompt.strip())],
        lambda piece: print(piece, end="", flush=True),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=top_p,
        seed=arguments.seed,
    )
    print()


def _answer_file(arguments: argparse.Namespace) -> None:
    from ..language.generate import generate_batch, load_prompts, refuse_existing, write_answers
    from ..language.inference import load_language_task

    refuse_existing("out", arguments.out)
    rows = load_prompts(arguments.prompt, load_language_task(arguments.adapter).language)
    loaded = _load(arguments)
    prompts = [
        loaded.template.prompt(turns, f"prompts (row {number})") for number, (_, turns) in enumerate(rows, start=1)
    ]
    with progress_bar("generate", len(prompts)) as advance:
        answers = generate_batch(
            loaded,
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size or 8,
            advance=advance,
        )
    write_answers(arguments.out, [row for row, _ in rows], answers)
    cut = sum(not answer.finished for answer in answers)
    ended = f", {cut} of them cut after {arguments.max_new_tokens} tokens" if cut else ""
    print(f"{len(answers)} answers{ended}: {arguments.out}")


def _load(arguments: argparse.Namespace) -> LoadedModel:
    """Load what the arguments name, with their system turn."""
    from ..language.inference import load_for_inference
    from ..language.template import Template

    loaded = load_for_inference(arguments.adapter, arguments.base_model)
    if arguments.system is None:
        return loaded
    template = loaded.template
    return loaded._replace(template=Template(template.tokenizer, replace(template.spec, system=arguments.system)))


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for an option that would have no effect."""
    if arguments.batch_size is not None and arguments.out is None:
        raise bad_value("--batch-size", arguments.batch_size, "it needs --out; leave it out")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise bad_value("--batch-size", arguments.batch_size, "give 1 or more")
    if arguments.out is not None and arguments.temperature != 0:
        raise bad_value("--temperature", arguments.temperature, "files are answered greedily; leave it out")
    for option, value in (("--top-p", arguments.top_p), ("--seed", arguments.seed)):
        if value is not None and arguments.temperature == 0:
            raise bad_value(option, value, "it needs a --temperature above 0; leave it out")
