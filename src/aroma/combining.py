"""Several adapters combined into one of the rank that evidence defends."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn

from .algorithm.budget import QUESTIONS
from .algorithm.questions import directions_to_keep
from .errors import bad_value
from .integrations.held_out import Loss, loss_of, model_loss
from .saved import AdapterWeights, Update
from .slots import SlotMatrices
from .tasks import joined, read_whole
from .tuner import AromaConfig
from .tuner.live import live_adapter

if TYPE_CHECKING:
    from .slots import SlotMatrix

_NAME = "default"


def combine(
    base: nn.Module,
    adapters: Sequence[str | os.PathLike[str]],
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    significance: float = 0.05,
    loss: Loss | None = None,
) -> PeftModel:
    """Add up adapters that were grown apart, and keep the directions of the sum that save loss on unseen examples.

    A direction has to save a quarter or more of what one saves on average.

    It is what ends the trial of growth by evidence (docs/method.md): the sum of every matrix is split into its
    singular directions, and batches are asked what each of them is worth, with all of them at half strength.
    `save_adapter` saves the result as plain LoRA; it can also be grown further.

    Args:
        base: The base model of all adapters; its weights are frozen.
        adapters: Folders of adapters that AROMA saved. The head is that of the first.
        batches: Batches of examples that none of them was trained on, what the model is called with; 8 at least, and
            16 tell more. They are moved to the model's device.
        weights: What each adapter is multiplied by; 1 by default.
        significance: α, the chance that a matrix keeps a direction that it does not need.
        loss: Loss of the model and a batch; by default what the model returns.

    Returns:
        The model with the combined adapter, `default`.

    Raises:
        ConfigError: No adapters, one that AROMA did not save, other numbers of weights, adapters of other base models,
            or too few batches.
        CheckpointError: An adapter is missing, damaged or edited.
    """
    if not adapters or isinstance(adapters, str | os.PathLike):
        raise bad_value("adapters", adapters, "give a list of two or more folders")
    factors = [1.0] * len(adapters) if weights is None else [*weights]
    if len(factors) != len(adapters):
        raise bad_value("weights", factors, f"give one for each of the {len(adapters)} adapters")
    read = [_scaled(read_whole(folder), factor) for folder, factor in zip(adapters, factors, strict=True)]
    whole = joined(read[0], read)
    # An adapter whose ranks are all 0 has one of zeros in its file, which PEFT asks for.
    whole = replace(whole, updates={name: one for name, one in whole.updates.items() if one.B.any() and one.A.any()})
    if not whole.updates:
        raise bad_value("adapters", [*map(str, adapters)], "none has a component; give adapters that learnt something")
    model = _model_of(base, whole, significance)
    live = live_adapter(model, _NAME)
    live.ever_controlled = True  # what it is, evidence decides here
    matrices = SlotMatrices(model, _NAME, live, torch.optim.SGD(_pairs(model), lr=0.0))
    matrices.start()
    _require_base(base, whole, {matrix.name: matrix for matrix in matrices.all()})
    for matrix in matrices.all():
        _fill(matrix, whole.updates.get(matrix.name))
    matrices.take_apart()
    matrices.ask_at(0.5)
    for batch in batches:
        matrices.weigh_held_out(map(partial(loss_of, loss or model_loss, model), [batch]))
    credits = [one for one in matrices.take_credits() if not np.isinf(one).any()]
    if len(credits) < QUESTIONS[0]:
        remedy = f"so few decide nothing; give {QUESTIONS[0]} or more with finite losses"
        raise bad_value("batches", len(credits), remedy)
    matrices.keep(directions_to_keep(np.stack(credits), significance))
    matrices.stop_asking()
    return model


def _scaled(adapter: AdapterWeights, factor: float) -> AdapterWeights:
    updates = {name: replace(update, B=update.B * factor) for name, update in adapter.updates.items()}
    return replace(adapter, updates=updates)


def _model_of(base: nn.Module, whole: AdapterWeights, significance: float) -> Any:
    """Return a model with as many slots a matrix as the largest sum has components, and the head of the adapter."""
    config = AromaConfig(
        growth="evidence",
        slots=max(min(update.rank, *update.shape) for update in whole.updates.values()),
        lora_alpha=1,
        significance=significance,
        target_modules=[*whole.updates],
        modules_to_save=whole.config.get("modules_to_save"),
        task_type=whole.config.get("task_type"),
    )
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, whole.others)
    return model


def _require_base(base: nn.Module, whole: AdapterWeights, matrices: Mapping[str, SlotMatrix | Any]) -> None:
    """Refuse adapters of another base model.

    Raises:
        ConfigError: Naming a matrix that `base` lacks, or that has another shape there.
    """
    for name, update in whole.updates.items():
        layer = matrices[name].layer if name in matrices else None
        found = None if layer is None else (layer.out_features, layer.in_features)
        if found != update.shape:
            remedy = f"the adapters have an update of {name}, {update.shape}, and it has {found or 'no such matrix'}"
            raise bad_value("base", type(base).__name__, f"{remedy}; give the model that they were trained on")


def _pairs(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]


@torch.no_grad()
def _fill(matrix: SlotMatrix | Any, update: Update | None) -> None:
    """Put the components of a sum into the slots of a matrix."""
    if update is None:
        return
    b, a = (torch.zeros_like(one) for one in matrix.pair)
    B, A = update.B, update.A
    if update.rank > min(update.shape):  # more components than ranks: as many do the same
        u, sizes, v = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
        B, A = u * sizes, v
    count = len(A)
    b[:, :count], a[:count] = B.to(b), A.to(a)
    matrix.layer.start_pair(_NAME, a, b)
    matrix.occupy_first(count)
