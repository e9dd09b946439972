"""Tiny random causal language models with a word-level tokenizer, and questions in their few words, as files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny_classifier import write_json_lines

__all__ = [
    "CHAT_TEMPLATE",
    "FORGETFUL",
    "SPECIAL",
    "WORDS",
    "learn",
    "questions",
    "save_tiny_lm",
    "tiny_tokenizer",
    "with_bos",
    "write_json_lines",
]

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|turn|>", "<|end|>"]
_NOUNS = ["apple", "bird", "cloud", "door", "eagle", "fish", "grass", "house", "iron", "juice", "king", "lamp"]
_LETTERS = [noun[0] for noun in _NOUNS]
_SENTENCES = (
    "system user assistant Request Reply Context Please choose the correct answer to question is a word that "
    "begins with Answer format true false"
)
WORDS = [
    *_SENTENCES.split(" "),
    *(f"Answer{number}" for number in range(1, 6)),
    *(f"answer{number}" for number in range(1, 6)),
    *_NOUNS,
    *[letter for letter in _LETTERS if letter != "a"],
    *[":", "/", ".", "?", "!", ",", "\n"],
]
"""Every word that the tokenizer knows, the special tokens apart."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
"""Turns that begin and end with tokens of their own; the end is another token than the end of the text."""

FORGETFUL = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}"
    "{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
"""Takes the words out of earlier responses, as templates do with thoughts."""


def tiny_tokenizer(chat_template: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, punctuation and line ends.

    Spaces are lost, so that decoding gives the words with single spaces between them.
    """
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    chosen: dict[str, Any] = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "additional_special_tokens": ["<|turn|>", "<|end|>"],
        "model_max_length": 128,
        **options,
    }
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **chosen)
    if chat_template:
        made.chat_template = CHAT_TEMPLATE
    return made


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Make a tokenizer begin every text with its beginning-of-text token, as Llama's does."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def save_tiny_lm(folder: Path, kind: Literal["llama", "gpt2"] = "llama", chat_template: bool = True) -> Path:
    """Write a two-layer model of 128 positions and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(chat_template)
    tokenizer.save_pretrained(folder)
    ends: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.2,  # at the usual 0.02 so small a model hardly tells texts apart
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                **ends,
            )
        )
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **ends))
    model.save_pretrained(folder)
    return folder


def learn(model: Any, rows: Any, steps: int) -> None:
    """Train a model on encoded rows, all of them in every step."""
    batch, targets = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows[name]], True, padding)
        for name, padding in (("input_ids", 0), ("labels", -100))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(input_ids=batch, labels=targets).loss.backward()  # right padding, which no token looks at
        optimizer.step()
        optimizer.zero_grad()


def questions(count: int, seed: int) -> list[dict[str, object]]:
    """Return rows in LLM-Adapters' form: which of two words begins with the letter."""
    generator = random.Random(seed)
    rows: list[dict[str, object]] = []
    for _ in range(count):
        nouns = generator.sample(_NOUNS, 2)
        right = generator.randrange(2)
        answer = f"answer{right + 1}"
        rows.append(
            {
                "instruction": "Please choose the correct answer to the question: a word that begins with "
                f"{nouns[right][0]}\n\nAnswer1: {nouns[0]} Answer2: {nouns[1]}\n\nAnswer format: answer1/answer2",
                "input": "",
                "output": f"the correct answer is {answer}",
                "answer": answer,
            }
        )
    return rows
