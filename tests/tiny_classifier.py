"""A tiny random BERT with a vocabulary of its own, and sentences it can learn, as files and as examples."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = [f"w{number}" for number in range(40)]


def save_tiny_bert(folder: Path) -> Path:
    """Write a two-layer BERT and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,  # at the usual 0.02 so small a model hardly tells texts apart
    )
    BertModel(config).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, **options: Any) -> None:
    """Write a tokenizer of `WORDS`; `options` are those of `BertTokenizerFast`."""
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(vocabulary), model_max_length=32, **options).save_pretrained(folder)


def sentences(count: int, seed: int) -> list[dict[str, object]]:
    """Return rows `text`, `label` ("low" or "high" words), `score` (mean word number)."""
    generator = random.Random(seed)
    rows: list[dict[str, object]] = []
    for _ in range(count):
        label = generator.choice(["low", "high"])
        numbers = [generator.randrange(6) + (4 if label == "high" else 0) for _ in range(6)]
        rows.append({"text": " ".join(WORDS[n] for n in numbers), "label": label, "score": sum(numbers) / 20})
    return rows


def write_json_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write an object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
