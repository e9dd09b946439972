"""How turns become text and tokens: one chat template for training, evaluation and generation."""

from __future__ import annotations

import copy
import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from aroma.errors import DataError, bad_value

from ..specs import LanguageSpec

Role = Literal["system", "user", "assistant"]

QUESTION_FILE = Path(__file__).with_name("commonsense.yaml")
"""lm-evaluation-harness task of the commonsense sets; its `doc_to_text` also writes the prompts of training."""

PLAIN_TEMPLATE = (
    "{% set headings = {'system': 'Context', 'user': 'Request', 'assistant': 'Reply'} %}"
    "{% for message in messages %}{{ headings[message['role']] }}:\n"
    "{{ message['content'] ~ (eos_token if message['role'] == 'assistant' else '') }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Reply:\n{% endif %}"
)
"""For tokenizers without a chat template: each turn under its heading, a blank line after it."""

_QUESTION, _ANSWER, _SYSTEM = "aromaprobequestion", "aromaprobeanswer", "aromaprobesystem"

_DAY = datetime.date(2024, 7, 26)
"""The day that every template writes: the one that Llama 3's templates fall back on."""

_USE_PLAIN = "set language.template to plain"


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Role
    text: str


@dataclass(frozen=True)
class Segment:
    """The tokens of a prompt, or of a response with its end."""

    ids: list[int]
    response: bool


def instruction_turns(instruction: str, input: str = "") -> tuple[Turn, ...]:
    """Return the turn that asks for a response, as `doc_to_text` of `QUESTION_FILE` writes it."""
    return (Turn("user", _instruction_template().render(instruction=instruction, input=input)),)


@cache
def _instruction_template() -> Any:
    from jinja2 import Environment, StrictUndefined

    # The options of lm-evaluation-harness.
    environment = Environment(keep_trailing_newline=True, undefined=StrictUndefined)
    return environment.from_string(yaml.safe_load(QUESTION_FILE.read_text(encoding="utf-8"))["doc_to_text"])


def require_order(turns: Sequence[Turn], last: Role, field: str) -> None:
    """Raise unless turns are an optional system turn, then user and assistant in turn.

    Args:
        last: Whose turn must be the last.
        field: What the conversation is called in errors.

    Raises:
        DataError: Another order.
    """
    spoken = [turn.role for turn in turns if turn.role != "system"]
    fault = None
    if any(turn.role == "system" for turn in turns[1:]):
        fault = "a system turn can only be the first"
    elif not spoken or spoken[0] != "user":
        fault = "the user speaks first, after a system turn if there is one"
    elif any(one == other for one, other in pairwise(spoken)):
        fault = "user and assistant take turns, and here one of them speaks twice in a row"
    elif spoken[-1] != last:
        fault = f"the last turn must be the {last}'s"
    if fault:
        raise bad_value(field, [turn.role for turn in turns], f"{fault}; mend the row", DataError)


class Template:
    """Turns conversations into tokens, by the tokenizer's chat template or by the plain one.

    Prompts and responses are tokenized separately, so that a training example is, token for token, the prompt of
    evaluation followed by a response. White space around a response is not part of it: most chat templates strip it.

    Args:
        tokenizer: The model's; it must have an end-of-text token.
        spec: Which template, the system turn, and what is learned.

    Attributes:
        spec: As given.
        name: `"chat"` or `"plain"`.
        tokenizer: A copy of the tokenizer whose chat template is the one used here. It writes the same date every day.
        stop_ids: Tokens at which generation stops: the template's end of a turn, and the end of the text.
        lead: Tokens that the template puts before every response, such as Qwen 3's empty thoughts. They are learned
            as part of the response; generation begins after them.

    Raises:
        ConfigError: No end-of-text token, no chat template where one is asked for, or one that does not write a
            response after its prompt.
    """

    def __init__(self, tokenizer: Any, spec: LanguageSpec) -> None:
        if tokenizer.eos_token_id is None:
            raise bad_value(
                "model.name", tokenizer.name_or_path, "its tokenizer has no eos token, so no response could end"
            )
        if spec.template == "chat" and tokenizer.chat_template is None:
            raise bad_value("language.template", "chat", "the tokenizer has no chat template; give plain or auto")
        self.spec = spec
        self.name = "plain" if spec.template == "plain" or tokenizer.chat_template is None else "chat"
        self.tokenizer = copy.deepcopy(tokenizer)
        first = tokenizer("a")["input_ids"][:1]
        self.bos_ids: list[int] = first if first == [tokenizer.bos_token_id] else []
        if self.name == "plain":
            # A chat template writes the beginning-of-text token itself where it wants one.
            self.tokenizer.chat_template = ("{{ bos_token }}" if self.bos_ids else "") + PLAIN_TEMPLATE
        else:
            self.tokenizer.chat_template = _without_clock(tokenizer.get_chat_template().removesuffix("\n"))
        self._before, self._after, self._trailer, stop = self._response_form()
        stops = [self.tokenizer.convert_tokens_to_ids(stop), tokenizer.eos_token_id]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stops))
        self.lead = self._encode(self._before.rstrip(" "))  # a tokenizer may write a space as part of the next word
        if spec.system is not None and not self._writes_system:
            raise self._no_system("language.system", spec.system)
        # In some tokenizers, as SmolLM2's, it is the token that begins every turn, and does not stand for a text.
        self._bos_is_kept = self.prompt([Turn("user", "a")]).count(tokenizer.bos_token_id) == 1

    def prompt(self, turns: Sequence[Turn], field: str = "prompt") -> list[int]:
        """Return the tokens up to where the response begins.

        Args:
            turns: The conversation so far; the last turn is the user's.
            field: What it is called in errors.

        Raises:
            DataError: Turns in a wrong order, turns that the chat template refuses, or a system turn that it leaves
                out.
        """
        require_order(turns, "user", field)
        return [token for segment in self._segments(turns, field) for token in segment.ids]

    def segments(self, turns: Sequence[Turn], field: str = "conversation") -> list[Segment]:
        """Return an example as prompts and responses in turn.

        Some templates rewrite earlier responses, for example without their thoughts, once more turns follow. No
        prompt of generation then leads up to them as they stand: everything before the last response becomes one
        prompt, and the last response alone is learned.

        Args:
            turns: The conversation; the last turn is the assistant's.
            field: What it is called in errors.

        Raises:
            DataError: As in `prompt`, or the template does not write the last response as it is learned.
        """
        require_order(turns, "assistant", field)
        return self._segments(turns, field)

    def response(self, text: str) -> list[int]:
        """Return the tokens of a response and of its end."""
        return self._encode(self._before + text.strip() + self._after)

    def continuation(self, text: str) -> list[int]:
        """Return the tokens of a response without its end."""
        return self._encode(self._before + text.strip())

    def plain_text(self, text: str) -> list[int]:
        """Return the tokens of a plain text and of its end, without a beginning-of-text token."""
        return [*self._encode(text), self.tokenizer.eos_token_id]

    def kept_at_front(self, prompt: Sequence[int]) -> int:
        """Return how many tokens at the front of a prompt are never cut: 1 for a beginning-of-text token, else 0."""
        return int(self._bos_is_kept and bool(prompt) and prompt[0] == self.tokenizer.bos_token_id)

    def shorten(self, prompt: Sequence[int], most: int) -> list[int]:
        """Return a prompt of at most `most` tokens: the left is cut, but never a beginning-of-text token."""
        if len(prompt) <= most:
            return list(prompt)
        kept = self.kept_at_front(prompt)
        return [*prompt[:kept], *prompt[len(prompt) - (most - kept) :]]

    def _segments(self, turns: Sequence[Turn], field: str) -> list[Segment]:
        turns = [Turn(turn.role, turn.text.strip()) if turn.role == "assistant" else turn for turn in turns]
        if self.spec.system is not None and turns[0].role != "system":
            turns.insert(0, Turn("system", self.spec.system))
        stretches = self._in_turn(turns, field) or self._last_response_only(turns, field)
        if turns[0].role == "system" and turns[0].text.strip() and not self._writes_system:
            raise self._no_system(field, turns[0].text[-80:])
        return [Segment(self._encode(text), response) for text, response in stretches]

    def _in_turn(self, turns: Sequence[Turn], field: str) -> list[tuple[str, bool]]:
        """Return the text of each prompt and response; nothing where the template rewrites earlier turns."""
        written = ""
        stretches: list[tuple[str, bool]] = []
        for number, turn in enumerate(turns, start=1):
            if turn.role == "user":
                opened = self._render(turns[:number], True, field)
                if not opened.startswith(written):
                    return []
                stretches.append((opened[len(written) :], False))
                written = opened
            elif turn.role == "assistant":
                written += self._before + turn.text + self._after
                if self._render(turns[:number], False, field) != written + self._trailer:
                    return []
                stretches.append((self._before + turn.text + self._after, True))
        return stretches

    def _last_response_only(self, turns: Sequence[Turn], field: str) -> list[tuple[str, bool]]:
        """Return one prompt and, where the last turn is the assistant's, one response."""
        answered = turns[-1].role == "assistant"
        opened = self._render(turns[:-1] if answered else turns, True, field)
        if not answered:
            return [(opened, False)]
        response = self._before + turns[-1].text + self._after
        if self._render(turns, False, field) != opened + response + self._trailer:
            remedy = "the chat template does not write this response as it would be learned; change the row, or"
            raise bad_value(field, turns[-1].text[-80:], f"{remedy} {_USE_PLAIN}", DataError)
        return [(opened, False), (response, True)]

    def _render(self, turns: Sequence[Turn], to_follow: bool, field: str) -> str:
        """Return turns as text, with the heading of a response if one is to follow."""
        from jinja2 import TemplateError

        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_follow)
        except TemplateError as error:
            remedy = f"the tokenizer's chat template refuses these turns ({error}); leave them out, or {_USE_PLAIN}"
            raise bad_value(field, [turn.role for turn in turns], remedy, DataError) from error
        return text

    def _response_form(self) -> tuple[str, str, str, str]:
        """Find out, by a made-up answer, what the template writes around a response.

        A template that does not end a response by a token of its own is completed.

        Returns:
            What comes before a response, what ends it, what follows until the next turn, and the token at which
            generation stops.
        """
        question = [Turn("user", _QUESTION)]
        opened = self._render(question, True, "language.template")
        closed = self._render([*question, Turn("assistant", _ANSWER)], False, "language.template")
        if not closed.startswith(opened) or closed[len(opened) :].count(_ANSWER) != 1:
            remedy = "under the tokenizer's chat template a prompt is not the beginning of prompt and response; "
            raise bad_value("language.template", "chat", f"{remedy}give plain")
        before, _, after = closed[len(opened) :].partition(_ANSWER)
        stop = _first_stop(self.tokenizer, after)
        if stop is None:
            self.tokenizer.chat_template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
            stop = self.tokenizer.eos_token
            after += stop
        end = after[: after.index(stop) + len(stop)]
        return before, end, after[len(end) :], stop

    @cached_property
    def _writes_system(self) -> bool:
        """Whether the template writes system turns; DataError if it refuses them."""
        return _SYSTEM in self._render([Turn("system", _SYSTEM), Turn("user", _QUESTION)], True, "language.system")

    def _no_system(self, field: str, text: str) -> Exception:
        remedy = f"the tokenizer's chat template leaves out system turns; put it into the user's turn, or {_USE_PLAIN}"
        return bad_value(field, text, remedy, DataError)

    def _encode(self, text: str) -> list[int]:
        # Not verbose: what is too long is cut afterwards.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _without_clock(source: str) -> str:
    """Return a template that writes `_DAY` where it would ask transformers' `strftime_now` for today's date."""
    return re.sub(r"strftime_now\((['\"])(.*?)\1\)", lambda call: repr(_DAY.strftime(call[2])), source)


def _first_stop(tokenizer: Any, text: str) -> str | None:
    """Return the first added token (end of a turn or of the text) in a text; of two at one place the longer."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()} | {tokenizer.eos_token}
    found = [token for token in added if token.strip() and token in text]
    return min(found, key=lambda token: (text.index(token), -len(token)), default=None)
