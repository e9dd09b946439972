"""What a recipe says about text to learn: its columns, how it becomes a prompt, and what the loss is taken of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LanguageSpec:
    """Instruction data, chats or plain text, and the one way in which they become tokens."""

    format: Literal["auto", "instruction", "messages", "text"] = "auto"
    """`instruction` (columns of instruction, input and output), `messages` (a list of turns with role and content),
    `text` (plain text); `auto`: the first of them whose columns the file has."""
    instruction: str = "instruction"
    """Column of the instruction."""
    input: str = "input"
    """Column of what the instruction is about; a file may lack it, and a row may leave it empty."""
    output: str = "output"
    """Column of the response."""
    messages: str = "messages"
    """Column of the turns."""
    text: str = "text"
    """Column of the plain text."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """How turns become text: the tokenizer's own `chat` template, or AROMA's `plain` one; `auto`: chat where the
    tokenizer has a template."""
    system: str | None = None
    """System turn put before every conversation that has none; null: none."""
    learn: Literal["response", "all"] = "response"
    """What the loss is taken of: every response with its end, or prompts too; plain text is learned whole."""
    packing: bool = False
    """Several examples a row of `max_length` tokens, each attending to itself only."""
