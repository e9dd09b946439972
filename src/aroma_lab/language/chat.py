"""A conversation with a language model, which remembers as much as the model takes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from .examples import Turn
from .model import positions_of
from .prompt import PromptBuilder
from .stream import require_sampling, stream


class Chat:
    """Turns said so far, and what they let the model answer.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: The model's.
        builder: Makes the prompts; a system turn is in its `spec`.
        max_new_tokens: Most tokens of an answer.
        temperature: See `stream`.
        top_p: See `stream`.
        seed: Seed of the first answer; every later one has another that follows from it. None: see `stream`.

    Attributes:
        turns: What is remembered.
        left_out: Turns that the last answer had no room to know of; they are forgotten.

    Raises:
        ConfigError: A value out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        builder: PromptBuilder,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        require_sampling(max_new_tokens, temperature, top_p)
        self._model, self._tokenizer, self._builder = model, tokenizer, builder
        self._max_new_tokens, self._temperature, self._top_p, self._seed = max_new_tokens, temperature, top_p, seed
        self._answers = 0
        self.turns: list[Turn] = []
        self.left_out = 0

    def reset(self) -> None:
        """Forget all turns."""
        self.turns, self.left_out = [], 0

    def answer(self, text: str) -> Generator[str, None, None]:
        """Return the pieces of an answer; what of it was read when the iterator is closed is remembered.

        Args:
            text: What the user says. It is remembered once there is an answer.

        Raises:
            DataError: The text alone leaves no room in the model, or the template cannot write these turns.
        """
        turns = [*self.turns, Turn("user", text)]
        kept = self._fitting(turns)
        self.left_out = len(turns) - len(kept)
        pieces = stream(
            self._model,
            self._builder,
            self._tokenizer,
            kept,
            max_new_tokens=self._max_new_tokens,
            temperature=self._temperature,
            top_p=self._top_p,
            seed=None if self._seed is None else self._seed + self._answers,
        )
        return self._remembered(kept, pieces)

    def _remembered(self, turns: list[Turn], pieces: Generator[str, None, None]) -> Generator[str, None, None]:
        said: list[str] = []
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            pieces.close()
            self._answers += 1
            answer = "".join(said).strip()
            if answer:
                self.turns = [*turns, Turn("assistant", answer)]

    def _fitting(self, turns: list[Turn]) -> list[Turn]:
        """Leave out the oldest questions with their answers until there is room for an answer of full length.

        Of a short memory half is room enough.
        """
        positions = positions_of(self._model.config)
        if positions is None:
            return turns
        wanted = min(self._max_new_tokens, positions // 2)
        while len(turns) > 1 and positions - len(self._builder.prompt(turns)) < wanted:
            turns = turns[2:]
        return turns
