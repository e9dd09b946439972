"""TRL's SFTTrainer for language models: it pads, packs and masks, takes the loss, and resumes exactly."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from aroma.errors import bad_value

from ..training.trainer import MethodTrainer
from .encode import NOT_LEARNED

if TYPE_CHECKING:
    from datasets import Dataset


class MethodSFTTrainer(MethodTrainer, SFTTrainer):
    """TRL's SFTTrainer, resumed as exactly as the Trainer; see `MethodTrainer`.

    Raises:
        ConfigError: The method adapts the output embeddings, which TRL reads without their adapter.
    """

    def __init__(self, *, model: Any, **options: Any) -> None:
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            remedy = "TRL computes the loss without an adapter of the output embeddings; leave them out"
            raise bad_value("target_modules", "lm_head", remedy)
        trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(model=model, **options)
        for parameter, data in trained:
            if parameter.dtype != data.dtype:
                # On a quantized base TRL rounds adapters to bfloat16, in which small updates are lost.
                parameter.data = data.to(parameter.device)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: the folder of a run says what it is."""

    def _send_telemetry(self) -> None:
        """Send none."""


@torch.no_grad()
def token_loss(model: Any, data: Dataset, collator: Any, batch_size: int) -> dict[str, float]:
    """Return `loss`, the mean of -ln p over all learned tokens of a set in nats, and what it comes to a token.

    `perplexity` is e to the loss, and `token_probability` 1 over it: the geometric mean of p. The Trainer's own
    evaluation is a mean of the means of batches, which depends on the batches.

    Args:
        model: A causal language model; it runs where it is, and is left in its mode.
        data: Rows of `encode_rows`, or packed ones; those of similar lengths go together.
        collator: Makes the batches.
        batch_size: Rows of one forward pass; the result does not depend on it.
    """
    lengths = [len(ids) for ids in data["input_ids"]]
    order = sorted(range(len(data)), key=lambda index: -lengths[index])
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for batch in DataLoader(data, batch_size, sampler=order, collate_fn=collator):
            placed = {
                name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()
            }
            labels = placed.pop("labels")[:, 1:]
            # Without a cache transformers keeps the examples of packed rows apart.
            logits = model(**placed, use_cache=False).logits[:, :-1]
            learned = labels != NOT_LEARNED
            total += float(
                cross_entropy(logits[learned].float(), labels[learned], reduction="none").cpu().double().sum()
            )
            tokens += int(learned.sum())
    finally:
        model.train(training)
    loss = total / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "token_probability": 1 / perplexity}


def make_collator(tokenizer: Any, packing: bool) -> DataCollatorForLanguageModeling:
    """Return TRL's collator: it pads on the right, or makes one sequence of packed rows, told apart by positions."""
    return DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=packing)
