"""TRL's SFTTrainer for language models: it pads, packs and masks, takes the loss, and resumes exactly."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from aroma.errors import DataError, bad_value

from ..training.trainer import ExactResume
from .data import NOT_LEARNED

if TYPE_CHECKING:
    from datasets import Dataset


class MethodSFTTrainer(ExactResume, SFTTrainer):
    """TRL's SFTTrainer, resumed as exactly as the Trainer; see `ExactResume`.

    Its log and its checkpoints are the Trainer's: TRL's own metrics are counted anew after a resume.

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the Trainer logs."""
        for measured in self._metrics.values():
            measured.clear()
        super().log(logs, start_time)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: the folder of a run says what it is."""

    def _send_telemetry(self) -> None:
        """Send none."""


@torch.no_grad()
def token_loss(model: Any, data: Dataset, collator: Any, batch_size: int) -> dict[str, float]:
    """Return `loss`, the mean of -ln p over all learned tokens of a set in nats, and what it comes to a token.

    `perplexity` is e to the loss, and `token_probability` 1 over it: the geometric mean of p.

    Args:
        model: A causal language model; it runs where it is, and is left in its mode.
        data: Rows of `data.encode`, or packed ones; those of similar lengths go together.
        collator: Makes the batches.
        batch_size: Rows of one forward pass; the result does not depend on it.

    Raises:
        DataError: Nothing is learned in `data`.
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
            total += float(cross_entropy(logits[learned].float(), labels[learned], reduction="none").double().sum())
            tokens += int(learned.sum())
    finally:
        model.train(training)
    if not tokens:
        raise bad_value("rows", len(data), "none of their tokens is learned; give examples with responses", DataError)
    loss = total / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "token_probability": 1 / perplexity}


def sft_arguments(**options: Any) -> SFTConfig:
    """Return TRL's arguments with the Trainer's `options`; the data are encoded and packed already."""
    return SFTConfig(**options, packing=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})


def make_collator(tokenizer: Any, packing: bool) -> DataCollatorForLanguageModeling:
    """Return TRL's collator: it pads on the right, or makes one sequence of packed rows, told apart by positions."""
    return DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=packing)


def pack(data: Dataset, max_length: int) -> Dataset:
    """Put rows of `data.encode` together into rows of at most `max_length` tokens, by TRL's best fit over all.

    Returns:
        Rows with `input_ids`, `labels` and `seq_lengths`, the lengths of their examples.
    """
    return pack_dataset(data, max_length, "bfd", {"batch_size": len(data)})


@torch.no_grad()
def require_packing_works(model: Any) -> None:
    """Try two short sequences, in one row and alone; the model is left in its mode.

    Raises:
        ConfigError: The logits of an example depend on its neighbours in the row.
    """

    def logits(tokens: Tensor, positions: Tensor) -> Tensor:
        inputs = {"input_ids": tokens[None].to(model.device), "position_ids": positions[None].to(model.device)}
        found: Tensor = model(**inputs, use_cache=False).logits[0].float()
        return found

    words = model.get_input_embeddings().num_embeddings
    places = torch.arange(5), torch.arange(7)
    first, second = (7 * places[0] + 1) % words, (5 * places[1] + 2) % words
    row = torch.cat([first, second])
    training = model.training
    model.eval()
    try:
        alone = torch.cat([logits(first, places[0]), logits(second, places[1])])
        together, mixed = logits(row, torch.cat(places)), logits(row, torch.arange(len(row)))
    finally:
        model.train(training)
    leaked, whole = ((other - alone).abs().mean().item() for other in (together, mixed))
    # Rounding may change an example in a row, but by no such share of what a neighbour would do.
    if not leaked <= 0.1 * whole:
        remedy = f"lets examples of one row see each other (their logits change by {leaked:.3g}); "
        name = type(model).__name__
        raise bad_value("language.packing", True, f"{name} {remedy}set language.packing to false")
