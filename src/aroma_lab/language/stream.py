"""One response as it comes into being."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from aroma.errors import bad_value

from .decoding import greedy_settings, left_padded, room_after, settings_alone
from .examples import Turn
from .prompt import PromptBuilder
from .template import Lead


def stream(
    model: Any,
    builder: PromptBuilder,
    tokenizer: Any,
    turns: Sequence[Turn],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Generator[str, None, None]:
    """Yield a response piece by piece, as the model writes it; closing the iterator stops the model.

    Args:
        model: A causal language model in evaluation mode; it runs where it is.
        builder: Makes the prompt.
        tokenizer: The model's.
        turns: The conversation, the last turn the user's.
        max_new_tokens: Most tokens of the response; fewer where the model takes no more.
        temperature: Divides the logits; 0: greedy.
        top_p: Only the likeliest tokens that together have this probability are drawn, in (0, 1].
        seed: Seed of the draw; None: another response each time.

    Raises:
        ConfigError: A value out of range.
        DataError: Turns that no prompt can be made of, or a prompt that leaves no room in the model.
    """
    require_sampling(max_new_tokens, temperature, top_p)
    prompt = builder.prompt(turns)
    settings = greedy_settings(builder, tokenizer, min(max_new_tokens, room_after(model, prompt, "prompt")))
    if temperature > 0:
        settings.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    streamer, stopped = _Streamer(tokenizer, builder.stop_ids), _Stopped()
    failures: list[BaseException] = []

    def write() -> None:
        try:
            with torch.random.fork_rng(), torch.no_grad(), settings_alone(model):
                if temperature > 0:
                    torch.manual_seed(secrets.randbits(63) if seed is None else seed)
                inputs = left_padded([prompt], settings.pad_token_id, model.device)
                criteria = StoppingCriteriaList([stopped])
                model.generate(**inputs, generation_config=settings, streamer=streamer, stopping_criteria=criteria)
        except BaseException as error:  # handed to the thread that reads
            failures.append(error)
            streamer.end()

    return _pieces(threading.Thread(target=write, daemon=True), streamer, stopped, failures, builder.lead)


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


class _Streamer(TextIteratorStreamer):
    """Hands on the text of a response, without the token that ends it."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stop_ids = torch.tensor(stop_ids)

    def put(self, value: Tensor) -> None:
        if self.next_tokens_are_prompt or not torch.isin(value, self._stop_ids).any():
            super().put(value)


class _Stopped(StoppingCriteria):
    """Ends the generation when somebody says so."""

    def __init__(self) -> None:
        self.now = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.now.is_set(), device=input_ids.device)


def _pieces(
    thread: threading.Thread, streamer: _Streamer, stopped: _Stopped, failures: list[BaseException], lead: Lead
) -> Generator[str, None, None]:
    """Yield what a thread writes, without lead and white space in front; it has ended when this has."""
    thread.start()
    held: str | None = ""  # what may still be the lead; None: that is decided
    try:
        for piece in streamer:
            if held is None:
                if piece:
                    yield piece
            elif lead.may_go_on(held + piece):
                held += piece
            else:
                yield lead.removed_from(held + piece)
                held = None
        if held and (rest := lead.removed_from(held)):
            yield rest
    finally:
        stopped.now.set()
        thread.join()
    if failures:
        raise failures[0]
