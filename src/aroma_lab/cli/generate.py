"""`aroma generate`: what a language model answers to a prompt, or to a file of prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.cli.texts import add_command, add_force
from aroma.errors import DataError, bad_value
from aroma.outputs import new_file

from ..preflight import require_saved
from ..progress import progress_bar

if TYPE_CHECKING:
    from ..language.model import LoadedModel
    from ..language.template import Turn
    from ..specs import LanguageSpec


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "generate",
        "let a language model answer a prompt, or a file of prompts",
        "Load a language model, with an adapter in plain PEFT, and let it answer.",
        "aroma generate runs/smollm2-commonsense/adapter Hello!",
        "aroma generate smollm2 - --temperature 0.7 --seed 1",
        "aroma generate runs/smollm2-commonsense/adapter prompts.jsonl --out answers.jsonl",
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
    add_force(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Answer, on standard output or into a file."""
    _check(arguments)
    out = None if arguments.out is None else new_file("--out", arguments.out, force=arguments.force)
    prompt = _asked(arguments.prompt) if out is None else ""
    require_saved(arguments.adapter)
    from aroma.cli.quiet import quiet

    quiet()
    if out is None:
        _answer_one(arguments, prompt)
    else:
        _answer_file(arguments, out)


def _asked(prompt: str) -> str:
    said = sys.stdin.read() if prompt == "-" else prompt
    if not said.strip():
        raise bad_value("PROMPT", said, "it is empty; write something")
    return said.strip()


def _answer_one(arguments: argparse.Namespace, prompt: str) -> None:
    from ..language.generate import stream
    from ..language.template import Turn

    stream(
        _load(arguments),
        [Turn("user", prompt)],
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=1.0 if arguments.top_p is None else arguments.top_p,
        seed=arguments.seed,
    )


def _answer_file(arguments: argparse.Namespace, out: Path) -> None:
    from ..language.data import read_records, write_records
    from ..language.generate import generate_batch
    from ..language.model import load_language_task

    rows = read_records("prompts", arguments.prompt)
    spec = load_language_task(arguments.adapter).language
    places = [f"prompts (row {number})" for number in range(1, len(rows) + 1)]
    asked = [_prompt_of(place, row, spec) for place, row in zip(places, rows, strict=True)]
    loaded = _load(arguments)
    prompts = [loaded.template.prompt(turns, place) for turns, place in zip(asked, places, strict=True)]
    tokens, batch_size = arguments.max_new_tokens, arguments.batch_size or 8
    with progress_bar("generate", len(prompts)) as advance:
        answers = generate_batch(loaded, prompts, max_new_tokens=tokens, batch_size=batch_size, advance=advance)
    told = [{"response": answer.text, "finished": answer.finished} for answer in answers]
    write_records(out, [{**row, **more} for row, more in zip(rows, told, strict=True)])
    cut = sum(not answer.finished for answer in answers)
    ended = f", {cut} of them cut after {tokens} tokens" if cut else ""
    print(f"{len(answers)} answers{ended}: {arguments.out}")


def _prompt_of(where: str, row: Mapping[str, Any], spec: LanguageSpec) -> tuple[Turn, ...]:
    from ..language.generate import turns_of_row

    for key in ("response", "finished"):
        if key in row:
            raise bad_value(where, row[key], f"it has a {key}, which the answer would overwrite", DataError)
    return turns_of_row(where, row, spec)


def _load(arguments: argparse.Namespace) -> LoadedModel:
    from dataclasses import replace

    from ..language.model import load_for_inference
    from ..language.template import Template

    loaded = load_for_inference(arguments.adapter, arguments.base_model)
    if arguments.system is None:
        return loaded
    template = loaded.template
    return loaded._replace(template=Template(template.tokenizer, replace(template.spec, system=arguments.system)))


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for a value out of range, and for an option that would have no effect."""
    drawn, to_file = arguments.temperature != 0, arguments.out is not None
    checks = [
        ("--max-new-tokens", arguments.max_new_tokens >= 1, "give 1 or more"),
        ("--temperature", 0 <= arguments.temperature < float("inf"), "give 0 (greedy) or more"),
        ("--temperature", not (to_file and drawn), "files are answered greedily; leave it out"),
        ("--batch-size", arguments.batch_size is None or to_file, "it needs --out; leave it out"),
        ("--batch-size", arguments.batch_size is None or arguments.batch_size >= 1, "give 1 or more"),
        ("--top-p", arguments.top_p is None or drawn, "it needs a --temperature above 0; leave it out"),
        ("--top-p", arguments.top_p is None or 0 < arguments.top_p <= 1, "give a probability above 0, at most 1"),
        ("--seed", arguments.seed is None or drawn, "it needs a --temperature above 0; leave it out"),
    ]
    for option, fine, remedy in checks:
        if not fine:
            raise bad_value(option, getattr(arguments, option[2:].replace("-", "_")), remedy)
