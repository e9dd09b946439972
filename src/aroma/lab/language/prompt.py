"""The one way from turns to tokens: training, evaluation and generation all build their prompts here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ...errors import DataError, bad_value
from .examples import Conversation, Turn, order_fault
from .spec import LanguageSpec
from .template import choose_template, make_render, require_system, response_form


@dataclass(frozen=True)
class Segment:
    """A stretch of an example.

    Args:
        ids: Its tokens.
        learned: Whether the loss is taken of them.
        response: Whether it is a response (or plain text) and not what leads up to one.
    """

    ids: list[int]
    learned: bool
    response: bool


class PromptBuilder:
    """Turns conversations into tokens, by the tokenizer's chat template or by a plain one.

    Prompts and responses are tokenized apart, so that an example of training is, token for token, the prompt of
    evaluation with a response after it. White space around a response is no part of it.

    Args:
        tokenizer: Of the model; it must have a token that ends a text.
        spec: The template, the system turn, and what is learned.

    Attributes:
        template: `"chat"` or `"plain"`.
        stop_ids: Tokens at which generation stops: the template's end of a turn, and the end of the text.

    Raises:
        ConfigError: No such token, no chat template where one is asked for, or one that does not write a response
            after its prompt.
    """

    def __init__(self, tokenizer: Any, spec: LanguageSpec) -> None:
        if tokenizer.eos_token_id is None:
            raise bad_value(
                "model.name", tokenizer.name_or_path, "its tokenizer has no eos token, and no response could end"
            )
        self.spec = spec
        self.template = choose_template(tokenizer, spec.template)
        self._tokenizer = tokenizer
        self._render = make_render(tokenizer, self.template)
        self._form = response_form(tokenizer, self._render)
        if spec.system is not None:
            require_system(self._render, spec.system)
        stops = [tokenizer.eos_token_id]
        if self._form.stop_token is not None:
            stops.insert(0, tokenizer.convert_tokens_to_ids(self._form.stop_token))
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stops))
        first = tokenizer("a")["input_ids"][:1]
        self._bos: list[int] = first if first == [tokenizer.bos_token_id] else []

    @property
    def bos_ids(self) -> list[int]:
        """What the tokenizer puts before a text of its own: the beginning-of-text token, or nothing."""
        return list(self._bos)

    def prompt(self, turns: Sequence[Turn], field: str = "prompt") -> list[int]:
        """Return the tokens up to where the response begins.

        Args:
            turns: The conversation so far, the last turn the user's.
            field: What it is called in errors.

        Raises:
            DataError: Turns in an order that no chat has, or that the chat template refuses or rewrites later.
        """
        fault = order_fault(turns, "user")
        if fault is not None:
            raise bad_value(field, [turn.role for turn in turns], fault, DataError)
        return list(chain.from_iterable(segment.ids for segment in self._segments(turns, field)))

    def response(self, text: str) -> list[int]:
        """Return the tokens of a response, and what ends it."""
        ids = self._encode(self._form.lead + text.strip() + self._form.end)
        return ids if self._form.end else [*ids, self._tokenizer.eos_token_id]

    def continuation(self, text: str) -> list[int]:
        """Return the tokens of a response without its end."""
        return self._encode(self._form.lead + text.strip())

    def segments(self, conversation: Conversation, field: str = "conversation") -> list[Segment]:
        """Return an example in stretches, prompt and response in turn; plain text is one response.

        Args:
            conversation: Turns, the last one the assistant's, or a plain text.
            field: What it is called in errors.

        Raises:
            DataError: As in `prompt`.
        """
        if conversation.text is not None:
            text = [*self._encode(conversation.text), self._tokenizer.eos_token_id]
            return [Segment(self.bos_ids, False, False), Segment(text, True, True)]
        fault = order_fault(conversation.turns, "assistant")
        if fault is not None:
            raise bad_value(field, [turn.role for turn in conversation.turns], fault, DataError)
        return self._segments(conversation.turns, field)

    def shorten(self, prompt: Sequence[int], most: int) -> list[int]:
        """Return a prompt of at most `most` tokens: the first ones are left out, but not a beginning-of-text token."""
        if len(prompt) <= most:
            return list(prompt)
        kept = self.kept_at_front(prompt)
        return [*prompt[:kept], *prompt[len(prompt) - (most - kept) :]]

    def kept_at_front(self, prompt: Sequence[int]) -> int:
        """Return how many tokens at the front of a prompt are never cut: 1 for a beginning-of-text token, else 0."""
        return int(bool(prompt) and prompt[0] == self._tokenizer.bos_token_id)

    def _segments(self, turns: Sequence[Turn], field: str) -> list[Segment]:
        """Return all prompts and responses; the last is a prompt where the last turn is not the assistant's."""
        turns = [Turn(turn.role, turn.text.strip()) if turn.role == "assistant" else turn for turn in turns]
        if self.spec.system is not None and turns[0].role != "system":
            turns.insert(0, Turn("system", self.spec.system))
        form, written = self._form, ""
        segments: list[Segment] = []
        for number, turn in enumerate(turns):
            if turn.role == "user":
                opened = self._render(turns[: number + 1], True, field) + form.header
                prompt = self._continued(written, opened, field)
                segments.append(self._prompt_segment(prompt, first=not segments))
            elif turn.role == "assistant":
                closed = self._render(turns[: number + 1], False, field)
                if self._continued(opened, closed, field) != form.lead + turn.text + form.end + form.trailer:
                    raise _rewritten(field, turn.text)
                segments.append(Segment(self.response(turn.text), True, True))
                # What follows the end of a response belongs to the next prompt.
                written = closed.removesuffix(form.trailer)
        return segments

    def _prompt_segment(self, text: str, first: bool) -> Segment:
        # A chat template writes the beginning-of-text token itself where it wants one.
        front = self._bos if first and self.template == "plain" else []
        return Segment([*front, *self._encode(text)], self.spec.learn == "all", False)

    def _continued(self, before: str, after: str, field: str) -> str:
        """Return what a longer rendering adds to a shorter one."""
        if not after.startswith(before):
            raise _rewritten(field, before)
        return after[len(before) :]

    def _encode(self, text: str) -> list[int]:
        # Not verbose: what is too long is cut afterwards.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _rewritten(field: str, text: str) -> Exception:
    return bad_value(
        field,
        text[-80:],
        "the chat template writes this differently when more turns follow, so that no prompt would be what was "
        "trained on; give one response a row, or set language.template to plain",
        DataError,
    )
