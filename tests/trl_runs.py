"""Deterministic tiny runs of TRL's trainers for preferences and reinforcement learning."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, PrinterCallback, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)

import models
from aroma import AromaConfig

WORDS = ["<pad>", "<unk>", "<eos>", "the", "a", "cat", "dog", "bird", "sees", "likes", "big", "small", "red", "blue"]

KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
}
ONLINE = ("grpo", "rloo")
"""Trainers that sample what they train on."""

STEPS = 16

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "save_steps": 6,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "seed": 7,
}
"""Arguments that all trainers of TRL share here."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=16
    )


@cache
def _prompts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[3:], k=4)) for _ in range(count)]


def examples(kind: str, count: int = 48, seed: int = 0) -> Dataset:
    """Prompts, and answers of which those that name an animal are liked."""
    draw = random.Random(seed + 1)
    prompts = _prompts(count, seed)
    good, bad = ([" ".join(draw.choices(words, k=3)) for _ in prompts] for words in (WORDS[5:8], WORDS[10:14]))
    if kind in ONLINE:
        return Dataset.from_dict({"prompt": prompts})
    if kind == "kto":
        liked = [index % 2 == 0 for index in range(count)]
        answers = [g if is_liked else b for g, b, is_liked in zip(good, bad, liked, strict=True)]
        return Dataset.from_dict({"prompt": prompts, "completion": answers, "label": liked})
    if kind == "reward":
        return Dataset.from_dict(
            {
                "chosen": [f"{p} {g}" for p, g in zip(prompts, good, strict=True)],
                "rejected": [f"{p} {b}" for p, b in zip(prompts, bad, strict=True)],
            }
        )
    return Dataset.from_dict({"prompt": prompts, "chosen": good, "rejected": bad})


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of the tokens of each completion that are in the lower half of the vocabulary."""
    return [sum(token < models.VOCABULARY // 2 for token in tokens) / max(len(tokens), 1) for tokens in completion_ids]


def base(kind: str) -> Any:
    """The pretrained model of `models`, with an output for the reward where that is trained."""
    if kind != "reward":
        return models.base("llama")
    folder = models.saved_base("llama")  # the first call draws
    torch.manual_seed(1)  # the output is new
    options = {"num_labels": 1, "pad_token_id": tokenizer().pad_token_id}  # the trainer sets it, too
    return AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()


def trainer_for(
    kind: str,
    out: Path | str,
    *callbacks: Any,
    model: Any = None,
    config: Any = "aroma",
    reward_funcs: Callable[..., list[float]] = reward,
    ref_model: Any = None,
    **changes: Any,
) -> Trainer:
    """A silent trainer.

    Args:
        kind: Key of KINDS.
        out: Output folder.
        callbacks: Its callbacks.
        model: What to train; that of `base` by default.
        config: `peft_config`; that of AROMA by default.
        reward_funcs: What completions are worth.
        ref_model: The reference, where it is a model of its own.
        changes: Changes to the trainer's arguments.
    """
    trainer_class, args_class = KINDS[kind]
    settings: dict[str, Any] = {**SETTINGS, "output_dir": str(out), "max_steps": STEPS}
    if kind in ONLINE:
        settings |= {"num_generations": 4, "max_completion_length": 4, "beta": 0.02}
    else:
        settings["max_length"] = 16
    if config == "aroma":
        task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
        config = AromaConfig(task_type=task, **models.METHOD)
    more: dict[str, Any] = {"reward_funcs": reward_funcs} if kind in ONLINE else {}
    if ref_model is not None:
        more["ref_model"] = ref_model
    trainer = trainer_class(
        model=base(kind) if model is None else model,
        args=args_class(**{**settings, **changes}),
        # TRL's order of the prompts in a second pass is not that of a resumed run.
        train_dataset=examples(kind, 96 if kind in ONLINE else 48),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=list(callbacks),
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
