"""Text from language models: one response piece by piece, many greedily in batches, and files of prompts."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from aroma.errors import DataError, bad_value
from aroma.files import write_text

from ..specs import LanguageSpec
from .data import read_records, turns_of_messages
from .inference import LoadedModel
from .model import positions_of
from .template import Template, Turn, instruction_turns


@dataclass(frozen=True)
class Generation:
    """What a model writes after a prompt.

    Args:
        text: The response, without what the template puts before every one and without white space around it.
        ids: Its tokens, all but the one that ended it.
        finished: Whether such a token ended it, and not the limit.
    """

    text: str
    ids: list[int]
    finished: bool


@torch.no_grad()
def generate_batch(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Generation]:
    """Return the greedy responses to prompts, in their order, each as if it were alone.

    Prompts are padded on the left and masked; those of similar lengths go together. The model's own generation
    settings (sampling, penalties) are not used. The model is left in its mode.

    Args:
        loaded: The model; it runs where it is.
        prompts: Tokens of `Template.prompt`.
        max_new_tokens: Most tokens of a response.
        batch_size: Prompts of one forward pass.
        advance: Called with the number of responses just written.

    Raises:
        ConfigError: `max_new_tokens` or `batch_size` is below 1.
        DataError: A prompt without tokens, or one after which the model has no room for `max_new_tokens`.
    """
    model, template = loaded
    for field, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise bad_value(field, value, "give 1 or more")
    for number, prompt in enumerate(prompts, start=1):
        if _room_after(model, prompt, f"prompt {number}") < max_new_tokens:
            limit = positions_of(model.config)
            remedy = f"prompt {number} has {len(prompt)} tokens already, and the model takes {limit} in all; give less"
            raise bad_value("max_new_tokens", max_new_tokens, remedy, DataError)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    settings = _greedy(template, max_new_tokens)
    written: dict[int, Generation] = {}
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = _left_padded([prompts[index] for index in chosen], settings.pad_token_id, model.device)
            with _only_these_settings(model):
                rows = model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
            for index, row in zip(chosen, rows.tolist(), strict=True):
                ids = list(takewhile(lambda token: token not in template.stop_ids, row))
                written[index] = Generation(template.read(ids), ids, finished=len(ids) < len(row))
            advance(len(chosen))
    finally:
        model.train(training)
    return [written[index] for index in range(len(prompts))]


@torch.no_grad()
def stream(
    loaded: LoadedModel,
    turns: Sequence[Turn],
    write: Callable[[str], None],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> None:
    """Write a response piece by piece, as the model generates it.

    Args:
        loaded: The model, in evaluation mode; it runs where it is.
        turns: The conversation; the last turn is the user's.
        write: Called with every piece.
        max_new_tokens: Most tokens of the response; fewer where the model takes no more.
        temperature: Divides the logits; 0: greedy.
        top_p: Draw only among the likeliest tokens that together have this probability, in (0, 1].
        seed: Seed of the draw; None: another response each time.

    Raises:
        ConfigError: A value out of range.
        DataError: Turns that no prompt can be made of, or a prompt that leaves no room in the model.
    """
    require_sampling(max_new_tokens, temperature, top_p)
    model, template = loaded
    prompt = template.prompt(turns)
    settings = _greedy(template, min(max_new_tokens, _room_after(model, prompt, "prompt")))
    if temperature > 0:
        settings.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    with torch.random.fork_rng(), _only_these_settings(model):
        if temperature > 0:
            torch.manual_seed(secrets.randbits(63) if seed is None else seed)
        inputs = _left_padded([prompt], settings.pad_token_id, model.device)
        model.generate(**inputs, generation_config=settings, streamer=_Writer(template, write))


def require_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise for settings of `stream` that are out of range.

    Raises:
        ConfigError: Naming the first of them.
    """
    if max_new_tokens < 1:
        raise bad_value("max_new_tokens", max_new_tokens, "give 1 or more")
    if not 0 <= temperature < float("inf"):
        raise bad_value("temperature", temperature, "give 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise bad_value("top_p", top_p, "give a probability above 0, at most 1")


class _Writer(TextStreamer):
    """Hands on the text of a response, without the template's lead and without the token that ends it."""

    def __init__(self, template: Template, write: Callable[[str], None]) -> None:
        super().__init__(template.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._template, self._write = template, write
        self._held: str | None = ""  # what may still be the lead; None: nothing is held any more

    def put(self, value: Tensor) -> None:
        if self.next_tokens_are_prompt or int(value.flatten()[-1]) not in self._template.stop_ids:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._held is not None:
            self._held += text
            if self._template.may_be_lead(self._held) and not stream_end:
                return
            text, self._held = self._template.without_lead(self._held), None
        if text:
            self._write(text)


def _room_after(model: Any, prompt: Sequence[int], field: str) -> int:
    """Return how many tokens a model can take after a prompt; DataError for no tokens or no room."""
    if not prompt:
        raise bad_value(field, "", "it has no tokens; write something", DataError)
    positions = positions_of(model.config)
    if positions is None:
        return 2**31
    if len(prompt) >= positions:
        remedy = f"it has {len(prompt)} tokens, and the model takes {positions} in all; shorten it"
        raise bad_value(field, "…", remedy, DataError)
    return positions - len(prompt)


def _greedy(template: Template, max_new_tokens: int) -> GenerationConfig:
    padding = template.tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(template.stop_ids),
        pad_token_id=template.stop_ids[0] if padding is None else padding,
    )


@contextmanager
def _only_these_settings(model: Any) -> Iterator[None]:
    """Keep a model's own generation settings, such as penalties, from filling in what ours leave out."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def _left_padded(prompts: Sequence[list[int]], padding: int, device: Any) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, each of shape (prompts, tokens of the longest)."""
    longest = max(map(len, prompts))
    rows = [[padding] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(mask, device=device)}


# Files of prompts ----------------------------------------------------------------------------------------------------


def load_prompts(path: str, spec: LanguageSpec) -> list[tuple[dict[str, Any], tuple[Turn, ...]]]:
    """Return each row of a JSONL file (or of a JSON list) with the turns that it asks to continue.

    A row has a `prompt`, or what training data has: messages (the last one the user's), or an instruction and perhaps
    an input.

    Args:
        path: The file.
        spec: Names of the columns.

    Raises:
        DataError: No such file, a damaged row (with its number), or one that has none of these.
    """
    rows = read_records("prompts", path)
    return [(row, _prompt_of(f"prompts (row {number})", row, spec)) for number, row in enumerate(rows, start=1)]


def write_answers(
    path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], answers: Sequence[Generation]
) -> None:
    """Write each row with its `response`, and whether it was `finished` or cut at the limit, as a JSON line.

    Raises:
        DataError: The file exists.
    """
    refuse_existing("out", path)
    lines = [
        json.dumps({**row, "response": answer.text, "finished": answer.finished}, ensure_ascii=False) + "\n"
        for row, answer in zip(rows, answers, strict=True)
    ]
    write_text(path, "".join(lines))


def refuse_existing(field: str, path: str | os.PathLike[str]) -> None:
    """Raise DataError if a file is to be written that exists."""
    if Path(path).exists():
        raise bad_value(field, str(path), "it exists, and nothing is overwritten; give another", DataError)


def _prompt_of(where: str, row: Mapping[str, Any], spec: LanguageSpec) -> tuple[Turn, ...]:
    for key in ("response", "finished"):
        if key in row:
            raise bad_value(where, row[key], f"it has a {key}, which the answer would overwrite", DataError)
    if "prompt" in row:
        return (Turn("user", _required_text(where, row["prompt"])),)
    if spec.messages in row:
        return turns_of_messages(where, row[spec.messages])
    if spec.instruction in row:
        instruction, given = row[spec.instruction], row.get(spec.input) or ""
        return instruction_turns(_required_text(where, instruction), _required_text(where, given))
    remedy = f"it has no prompt, {spec.messages} or {spec.instruction}; give one of them"
    raise bad_value(where, list(row), remedy, DataError)


def _required_text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad_value(where, value, f"a {type(value).__name__}, not a text; mend the row", DataError)
    return value
