"""Starts of LoRA that are computed from training data, by PEFT's own routines: EVA and LoRA-GA.

Both change the weights of a model that is built already, as plain LoRA builds it: its update is zero, so that what is
measured of it is measured of the pretrained model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_eva_state_dict
from peft.tuners.lora import LoraLayer, preprocess_loraga
from torch import Tensor

from aroma.errors import bad_value

from .base import Batch
from .merged import ADAPTER, layers_of, note_merged, pair_of

_MOST_PASSES = 100
"""Times that EVA may see every batch. It needs a few; where it has not settled by then, it never would."""


@torch.no_grad()
def start_from_inputs(model: Any, r: int, batches: Sequence[Batch]) -> None:
    """Set A of every layer to the r directions in which its inputs vary most: EVA (arXiv 2410.07170).

    B stays zero. The ranks are not redistributed (`rho=1`): every layer keeps rank r.

    Args:
        model: A `PeftModel` whose update is zero.
        r: Rank of every layer.
        batches: What the model is called with. They are repeated until the directions rest.

    Raises:
        ConfigError: The layers or the batches are too small for r directions.
    """
    _require_rank(model, r, r, "EVA takes r directions of a layer's inputs")
    calls = 0

    def forward(model: Any, batch: Batch) -> None:
        nonlocal calls
        calls += 1
        if calls > _MOST_PASSES * len(batches):  # PEFT would go on for ever
            remedy = (
                f"the first {r} directions of the layers' inputs do not settle; give a lower rank, or larger batches"
            )
            raise bad_value("r", r, remedy)
        model(**batch)

    directions = get_eva_state_dict(
        model,
        batches,
        # The label mask of PEFT's default is one of tokens, as language models have it.
        LoraConfig(r=r, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, use_label_mask=False)),
        forward_fn=forward,
        prepare_model_inputs_fn=lambda batch, config: batch["attention_mask"].bool(),
        prepare_layer_inputs_fn=_rows,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    for name, rows in directions.items():
        model.get_submodule(name).lora_A[ADAPTER].weight.copy_(rows)


def start_from_gradients(model: Any, r: int, batches: Sequence[Batch]) -> None:
    """Set the pair of every layer to singular directions of its weight's gradient: LoRA-GA (arXiv 2407.05000).

    A gets the first r right directions, B the next r left ones. The product is taken away from the base weight, so
    that the model computes the same function as before. PEFT weights B with the singular values, which the authors'
    code does not: where gradients are small, B starts close to zero.

    Args:
        model: A `PeftModel` whose update is zero.
        r: Rank of every layer.
        batches: What the model is called with, `labels` included; their mean gradient is taken.

    Raises:
        ConfigError: A layer is too small for 2 r directions, or its weight is not in float32.
    """
    _require_rank(model, r, 2 * r, "LoRA-GA takes 2 r directions of a gradient")
    layers = layers_of(model, LoraLayer)
    for layer in layers.values():
        if (dtype := layer.get_base_layer().weight.dtype) != torch.float32:
            remedy = f"it changes the pretrained weights, which are {dtype} and would be rounded; load them in float32"
            raise bad_value("init", "lora_ga", remedy)
    settings = LoraGAConfig()

    def backward() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    # PEFT looks for the modules before it wraps them; in a wrapped model they are one level down.
    inside = [f"{name}.base_layer" for name in layers]
    config = LoraConfig(target_modules=inside, init_lora_weights="lora_ga", lora_ga_config=settings)
    with warnings.catch_warnings():
        # PEFT counts backwards with hooks, also on the modules behind the embeddings, which nothing trains.
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
        preprocess_loraga(model.get_base_model(), config, backward)
    for layer in layers.values():
        layer.lora_ga_init(ADAPTER, settings)
        B, A = pair_of(layer)
        note_merged(layer, (-B, A))


def _require_rank(model: Any, r: int, needed: int, why: str) -> None:
    for name, layer in layers_of(model, LoraLayer).items():
        if needed > (least := min(layer.in_features, layer.out_features)):
            raise bad_value("r", r, f"{why}, and {name} has only {least}; give a lower rank")


def _rows(inputs: tuple[Tensor, ...], mask: Tensor, name: str) -> Tensor:
    """Return the inputs of a layer as rows, without those of padding; a pooler's are one an example."""
    values: Tensor = inputs[0]
    return values[mask] if values.shape[:-1] == mask.shape else values.flatten(0, -2)
