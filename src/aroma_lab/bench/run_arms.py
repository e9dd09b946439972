"""The methods of a whole run are made here, on one backbone that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from transformers import get_scheduler

from aroma.tuner import aroma_layers

from ..methods import AdaLora, Aroma, GrowthHooks, Hooks, Lora, Method
from ..specs import Recipe, TrainSpec
from .accounting import ADALORA, AROMA, LORA, UNFROZEN
from .recorder import TrajectoryRecorder
from .replay import Plan, Replayer
from .run_arm import Arm, Follow, is_adapter
from .shapes import copy_model

LORA_RANK = 8
"""Rank of LoRA, and AdaLoRA's target, as in the paper's Table 5."""

TIMED_TRAINING = TrainSpec(learning_rate=1e-4, scheduler="constant", warmup_steps=0, max_grad_norm=0.0)
"""The loop where only time matters."""


def reference_arms(base: Any, targets: Sequence[str], dropout: float, training: TrainSpec, steps: int) -> list[Arm]:
    """Return LoRA and AdaLoRA on the modules that AROMA grows.

    Args:
        base: The pretrained model; its backbone is shared, and never written.
        targets: Full names of the modules.
        dropout: Dropout of the adapters.
        training: The loop.
        steps: Optimizer steps that they will take.
    """
    lora = Lora(r=LORA_RANK, dropout=dropout, target_modules=list(targets))
    adalora = AdaLora(target_r=LORA_RANK, dropout=dropout, target_modules=list(targets))
    arms = []
    for name, method in ((LORA, lora), (ADALORA, adalora)):
        arm = _arm(name, method, _build(method, base, steps, training.seed), training, steps)
        arm.total_rank = partial(_total_rank, method, arm.model)
        arms.append(arm)
    return arms


def replaying_arm(base: Any, method: Aroma, plan: Plan, training: TrainSpec, steps: int, *, freezes: bool) -> Arm:
    """Return AROMA on a plan; its modules finish if `freezes`."""
    model = _build(method, base, steps, training.seed)
    name = AROMA if freezes else UNFROZEN
    return _arm(name, method, model, training, steps, lambda opt: Follow(Replayer(model, opt, plan, freezes=freezes)))


def deciding_arm(base: Any, method: Aroma, training: TrainSpec, steps: int) -> tuple[Arm, TrajectoryRecorder]:
    """Return AROMA with its controller, and what records the ranks that it decides on."""
    arm = _arm(AROMA, method, _build(method, base, steps, training.seed), training, steps)
    assert isinstance(arm.hooks, GrowthHooks), "Aroma makes them"
    recorder = TrajectoryRecorder([module.name for module in arm.hooks.controller.modules])
    arm.hooks.controller.subscribe(recorder)
    return arm, recorder


def aroma_of(recipe: Recipe) -> Aroma:
    """Return AROMA as a recipe describes it."""
    options = asdict(recipe.adapter)
    if options["component_seed"] is None:
        options["component_seed"] = recipe.training.seed
    return Aroma(r=options["r"], dropout=options["lora_dropout"], options=options)


def _arm(
    name: str,
    method: Method,
    model: Any,
    training: TrainSpec,
    steps: int,
    hooks: Callable[[Any], Hooks] | None = None,
) -> Arm:
    model.train()
    optimizer = _optimizer(model, training)
    return Arm(
        name=name,
        label=method.name if name != UNFROZEN else f"{method.name}, never finished",
        model=model,
        optimizer=optimizer,
        scheduler=_scheduler(optimizer, training, steps),
        hooks=hooks(optimizer) if hooks else method.hooks(model, optimizer, steps),
        training=training,
        replays=hooks is not None,
        total_rank=lambda: sum(layer.finished("default").rank for layer in aroma_layers(model).values()),
    )


def _build(method: Method, base: Any, steps: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return method.build(copy_model(base, own_backbone=False), steps)


def _optimizer(model: Any, training: TrainSpec) -> torch.optim.AdamW:
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trainable if is_adapter(name)], "lr": training.learning_rate},
        {
            "params": [p for name, p in trainable if not is_adapter(name)],
            "lr": training.head_learning_rate or training.learning_rate,
        },
    ]
    return torch.optim.AdamW(groups, weight_decay=training.weight_decay)


def _scheduler(optimizer: Any, training: TrainSpec, steps: int) -> Any:
    options = {"min_lr_rate": training.min_lr_ratio} if training.scheduler == "cosine_with_min_lr" else None
    return get_scheduler(training.scheduler, optimizer, training.warmup_steps, steps, options)


def _total_rank(method: Method, model: Any) -> int:
    return sum(method.ranks(model).values())
