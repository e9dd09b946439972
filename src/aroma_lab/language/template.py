"""How turns are written as text, and what stands around a response there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aroma.errors import DataError, bad_value

from .examples import Turn

PLAIN_TEMPLATE = (
    "{% set headings = {'system': 'Context', 'user': 'Request', 'assistant': 'Reply'} %}"
    "{% for message in messages %}{{ headings[message['role']] }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Reply:\n{% endif %}"
)
"""For tokenizers without a chat template: each turn under its heading, a blank line after it."""

Render = Callable[[Sequence[Turn], bool, str], str]
"""Writes turns as text: the turns, whether a response is to follow, what they are called in errors."""

_QUESTION, _ANSWER, _SYSTEM = "aromaprobequestion", "aromaprobeanswer", "aromaprobesystem"

_DAY = {
    "%Y-%m-%d": "2024-07-26",
    "%F": "2024-07-26",
    "%T": "00:00:00",
    "%Y": "2024",
    "%y": "24",
    "%B": "July",
    "%b": "Jul",
    "%m": "07",
    "%-m": "7",
    "%d": "26",
    "%-d": "26",
    "%e": "26",
    "%j": "208",
    "%A": "Friday",
    "%a": "Fri",
    "%H": "00",
    "%I": "12",
    "%M": "00",
    "%S": "00",
    "%p": "AM",
}
"""What a template that asks for the time is told: midnight of the day that Llama 3's templates fall back on."""


@dataclass(frozen=True)
class Lead:
    """What a template lets every response begin with, and what is not said with it, as the empty thoughts of Qwen 3.

    Args:
        text: As a tokenizer decodes it; white space does not matter.
    """

    text: str

    def removed_from(self, written: str) -> str:
        """Return what was written without the lead, if it begins with it, and without white space in front."""
        pattern = r"\s*".join(map(re.escape, self.text.split()))
        return re.sub(rf"\A\s*{pattern}", "", written, count=1).lstrip()

    def may_go_on(self, written: str) -> bool:
        """Whether all that was written so far is white space, or the beginning of the lead."""
        return "".join(self.text.split()).startswith("".join(written.split()))


@dataclass(frozen=True)
class ResponseForm:
    """What a template writes around a response.

    Args:
        header: What it lacks at the end of a prompt: the response's heading, where it ignores that one is to follow.
        lead: What comes before the text and is predicted with it, as the space of Llama 2.
        end: What ends the response, up to a token at which generation stops; "": the template writes no such token.
        stop_token: That token; None where there is none.
        trailer: What follows until the next turn.
    """

    header: str
    lead: str
    end: str
    stop_token: str | None
    trailer: str

    def around(self, text: str) -> str:
        """Return a response as the template writes it behind its prompt."""
        return self.lead + text + self.end + self.trailer


def choose_template(tokenizer: Any, asked: Literal["auto", "chat", "plain"]) -> Literal["chat", "plain"]:
    """Return which template writes the turns.

    Raises:
        ConfigError: `asked` is chat, and the tokenizer has no template.
    """
    if asked == "auto":
        return "plain" if tokenizer.chat_template is None else "chat"
    if asked == "chat" and tokenizer.chat_template is None:
        raise bad_value("language.template", asked, "the tokenizer has no chat template; give plain or auto")
    return asked


def make_render(tokenizer: Any, template: Literal["chat", "plain"]) -> Render:
    """Return the function that writes turns as text by a template; it raises DataError where the template refuses.

    A template that writes the date writes the same one every day: a prompt is what was trained on, whenever it is
    made.
    """
    from jinja2 import TemplateError

    source = PLAIN_TEMPLATE if template == "plain" else _without_clock(tokenizer.get_chat_template())

    def render(turns: Sequence[Turn], to_follow: bool, field: str) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text: str = tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=to_follow
            )
        except TemplateError as error:
            roles = [turn.role for turn in turns]
            remedy = f"the tokenizer's chat template refuses these turns ({error}); leave them out, or set "
            raise bad_value(field, roles, f"{remedy}language.template to plain", DataError) from error
        return text

    return render


def response_form(tokenizer: Any, render: Render) -> ResponseForm:
    """Find out by a made-up answer what a template writes around a response.

    Raises:
        ConfigError: The template does not write prompt, answer, and end one after another.
    """
    question = [Turn("user", _QUESTION)]
    opened = render(question, True, "language.template")
    closed = render([*question, Turn("assistant", _ANSWER)], False, "language.template")
    if not closed.startswith(opened) or closed[len(opened) :].count(_ANSWER) != 1:
        raise bad_value(
            "language.template",
            "chat",
            "under the tokenizer's chat template a prompt is not the beginning of prompt and response; give plain",
        )
    lead, _, after = closed[len(opened) :].partition(_ANSWER)
    header = ""
    if opened == render(question, False, "language.template"):
        header = lead.rstrip(" ")
        lead = lead[len(header) :]
    stop = _first_stop(tokenizer, after)
    end = "" if stop is None else after[: after.index(stop) + len(stop)]
    return ResponseForm(header, lead, end, stop, after[len(end) :])


def writes_system(render: Render, field: str) -> bool:
    """Whether a template writes system turns, and does not leave them out.

    Raises:
        DataError: It refuses them.
    """
    return _SYSTEM in render([Turn("system", _SYSTEM), Turn("user", _QUESTION)], True, field)


def _without_clock(source: str) -> str:
    """Return a template that takes the time from `_DAY` where it would ask for today's.

    Transformers hands templates a function `strftime_now`, and nothing that can be called in its place; a macro of
    that name goes before it. The line end behind the macro is part of its tag and is not written.
    """
    if "strftime_now" not in source:
        return source
    told = "".join(f" | replace({code!r}, {text!r})" for code, text in _DAY.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{told} }}}}{{% endmacro %}}\n{source}"


def _first_stop(tokenizer: Any, text: str) -> str | None:
    """Return the first token of its own (the end of the text, of a turn) that a text has, of two the longer."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()} | {tokenizer.eos_token}
    found = [token for token in added if token.strip() and token in text]
    return min(found, key=lambda token: (text.index(token), -len(token)), default=None)
