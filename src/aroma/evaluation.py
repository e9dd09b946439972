"""Evaluation with gradients during a training, which leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate `model` and go backward: no dropout, no cache of keys and values, and no random number is drawn.

    Modules that checkpoint their activations in training do so here too, without reentrant backwards, which
    `torch.autograd.grad` cannot enter. The backward belongs into the context: it computes activations again.
    """
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([*{p.device for p in model.parameters() if p.is_cuda}]))
        # A cache would be written again when activations are computed again.
        for config in _caching_configs(model):
            stack.enter_context(_changed(config, "use_cache", False))
        for module in _checkpointing_modules(model):
            stack.enter_context(_changed(module, "forward", partial(checkpoint, module.forward, use_reentrant=False)))
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _checkpointing_modules(model: nn.Module) -> list[nn.Module]:
    """Return the innermost modules of transformers that checkpoint in training; outer ones only carry the switch."""
    switched = [module for module in model.modules() if _checkpoints(module)]
    return [module for module in switched if sum(map(_checkpoints, module.modules())) == 1]


def _checkpoints(module: nn.Module) -> bool:
    # Not getattr: wrappers of PEFT pass it on to what they wrap.
    own = {**vars(type(module)), **vars(module)}
    return module.training and bool(own.get("gradient_checkpointing", False))


def _caching_configs(model: nn.Module) -> list[Any]:
    configs = {id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None}
    return [config for config in configs.values() if getattr(config, "use_cache", False)]


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object for a while; one that its class had is its own no longer afterwards."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
