"""Tokenization: one function for training, evaluation, and prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aroma.errors import bad_value

from .data import Examples

if TYPE_CHECKING:
    from datasets import Dataset


def load_tokenizer(name: str, max_length: int) -> Any:
    """Return the tokenizer of a model, with a padding token.

    Args:
        name: Hub name or local folder.
        max_length: Tokens of the longest example, special tokens included.

    Raises:
        ConfigError: There is no such tokenizer, or the model takes fewer tokens than `max_length`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise bad_value("model.name", name, f"its tokenizer cannot be loaded ({reason}); check the name") from error
    if max_length > tokenizer.model_max_length:
        raise bad_value("data.max_length", max_length, f"{name} takes at most {tokenizer.model_max_length} tokens")
    if tokenizer.pad_token is None:
        # Padding is masked out, so any token serves.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_positions(name: str, max_length: int) -> None:
    """Refuse examples longer than the positions a model has; a tokenizer does not always know them.

    Args:
        name: Hub name or local folder of the model.
        max_length: Tokens of the longest example, special tokens included.

    Raises:
        ConfigError: The model has fewer positions.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions < 0:  # XLNet says -1: as many as you like
        return
    if "roberta" in config.model_type or config.model_type == "camembert":
        positions -= config.pad_token_id + 1  # their positions begin behind the padding's
    if max_length > positions:
        raise bad_value("data.max_length", max_length, f"{name} takes at most {positions} tokens")


def encode(examples: Examples, tokenizer: Any, max_length: int) -> Dataset:
    """Tokenize examples, cut to `max_length` tokens and not padded.

    Returns:
        A data set with the model's inputs and `labels` (int64 classes or float32 numbers).
    """
    from datasets import Dataset

    columns: dict[str, Any] = {"text": examples.texts, "labels": examples.labels}
    if examples.pairs is not None:
        columns["pair"] = examples.pairs

    def tokenize(batch: dict[str, Any]) -> Any:
        return tokenizer(batch["text"], batch.get("pair"), truncation=True, max_length=max_length)

    plain = Dataset.from_dict(columns)
    texts = [name for name in columns if name != "labels"]
    return plain.map(tokenize, batched=True, remove_columns=texts, keep_in_memory=True, load_from_cache_file=False)
