"""The one way from turns to tokens: training, evaluation and generation all build their prompts here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from aroma.errors import DataError, bad_value

from .examples import Conversation, Turn, order_fault
from .spec import LanguageSpec
from .template import Lead, choose_template, make_render, response_form, writes_system


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
    evaluation with a response after it. White space around a response is no part of it, the indentation of its first
    line included: most chat templates trim it, and their responses must be ours.

    Args:
        tokenizer: Of the model; it must have a token that ends a text.
        spec: The template, the system turn, and what is learned.

    Attributes:
        template: `"chat"` or `"plain"`.
        stop_ids: Tokens at which generation stops: the template's end of a turn, and the end of the text.
        lead: What the template puts before every response: it is learned and generated, and not part of the text.

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
        stops = [tokenizer.eos_token_id]
        if self._form.stop_token is not None:
            stops.insert(0, tokenizer.convert_tokens_to_ids(self._form.stop_token))
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stops))
        first = tokenizer("a")["input_ids"][:1]
        self._bos: list[int] = first if first == [tokenizer.bos_token_id] else []
        self.lead = Lead(self._decode(self._encode(self._form.lead)))
        if spec.system is not None and not self._writes_system:
            remedy = (
                "the tokenizer's chat template leaves out system turns; give null, or put it into the instructions"
            )
            raise bad_value("language.system", spec.system, remedy)
        # Of some tokenizers, as SmolLM2's, it is the token that begins every turn: it does not stand for a text.
        self._bos_is_kept = self.prompt([Turn("user", "a")]).count(tokenizer.bos_token_id) == 1

    @property
    def bos_ids(self) -> list[int]:
        """What the tokenizer puts before a text of its own: the beginning-of-text token, or nothing."""
        return list(self._bos)

    def prompt(self, turns: Sequence[Turn], field: str = "prompt") -> list[int]:
        """Return the tokens up to where the response begins.

        Earlier turns are as the template writes them in this conversation, which may be otherwise than it wrote them
        when they were the last ones.

        Args:
            turns: The conversation so far, the last turn the user's.
            field: What it is called in errors.

        Raises:
            DataError: Turns in an order that no chat has, turns that the chat template refuses, or a system turn that
                it leaves out.
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

    def read(self, ids: Sequence[int]) -> str:
        """Return the text of a response without its end, as `response` takes it: no lead, no white space around."""
        return self.lead.removed_from(self._decode(ids)).strip()

    def segments(self, conversation: Conversation, field: str = "conversation") -> list[Segment]:
        """Return an example in stretches, prompt and response in turn; plain text is one response.

        Where the template writes earlier responses otherwise than it wrote them as the last ones (without their
        thoughts, say), no prompt of generation leads up to them as they stand: all of it before the last response is
        then one prompt, and the last response alone is learned.

        Args:
            conversation: Turns, the last one the assistant's, or a plain text.
            field: What it is called in errors.

        Raises:
            DataError: As in `prompt`, or the template does not write the last response as it is learned.
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
        """Return how many tokens at the front of a prompt are never cut: 1 for a beginning-of-text token, else 0.

        A token that begins every turn is none, though the tokenizer may call it so.
        """
        return int(self._bos_is_kept and bool(prompt) and prompt[0] == self._tokenizer.bos_token_id)

    @cached_property
    def _writes_system(self) -> bool:
        return writes_system(self._render, "language.system")

    def _segments(self, turns: Sequence[Turn], field: str) -> list[Segment]:
        """Return all prompts and responses; the last is a prompt where the last turn is not the assistant's."""
        turns = [Turn(turn.role, turn.text.strip()) if turn.role == "assistant" else turn for turn in turns]
        if self.spec.system is not None and turns[0].role != "system":
            turns.insert(0, Turn("system", self.spec.system))
        asked = turns[:-1] if turns[-1].role == "assistant" else turns
        opened = self._opened(asked, field)
        if turns[0].role == "system" and turns[0].text.strip() and not self._writes_system:
            remedy = "the tokenizer's chat template leaves out system turns; put it into the user's turn, or set "
            raise bad_value(field, turns[0].text[-80:], f"{remedy}language.template to plain", DataError)
        segments = self._in_turn(asked, opened, field) or [self._prompt_segment(opened, first=True)]
        if len(asked) < len(turns):
            if self._render(turns, False, field) != opened + self._form.around(turns[-1].text):
                remedy = (
                    "the chat template writes this response otherwise than it would be learned; change the row, or"
                )
                raise bad_value(field, turns[-1].text[-80:], f"{remedy} set language.template to plain", DataError)
            segments.append(self._response_segment(turns[-1].text))
        return segments

    def _in_turn(self, turns: Sequence[Turn], whole: str, field: str) -> list[Segment]:
        """Return prompts and responses up to the last prompt; nothing where the template rewrites what came before."""
        written = ""
        segments: list[Segment] = []
        for number, turn in enumerate(turns, start=1):
            if turn.role == "user":
                opened = whole if number == len(turns) else self._opened(turns[:number], field)
                if not opened.startswith(written):
                    return []
                segments.append(self._prompt_segment(opened[len(written) :], first=not segments))
            elif turn.role == "assistant":
                written = opened + self._form.around(turn.text)
                if self._render(turns[:number], False, field) != written:
                    return []
                segments.append(self._response_segment(turn.text))
                # What follows the end of a response belongs to the next prompt.
                written = written.removesuffix(self._form.trailer)
        return segments

    def _opened(self, turns: Sequence[Turn], field: str) -> str:
        return self._render(turns, True, field) + self._form.header

    def _response_segment(self, text: str) -> Segment:
        return Segment(self.response(text), True, True)

    def _prompt_segment(self, text: str, first: bool) -> Segment:
        # A chat template writes the beginning-of-text token itself where it wants one.
        front = self._bos if first and self.template == "plain" else []
        return Segment([*front, *self._encode(text)], self.spec.learn == "all", False)

    def _encode(self, text: str) -> list[int]:
        # Not verbose: what is too long is cut afterwards.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
