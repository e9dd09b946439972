"""Readers of private names of torch, which a release may rename; a missing one is an AttributeError."""

from __future__ import annotations

import torch
from torch import Tensor, jit, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module


def compiled_module(model: nn.Module) -> nn.Module | None:
    """Return the module inside of one that `torch.compile` returned; None for any other module."""
    return model._modules.get("_orig_mod")


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` was applied to the model, a part of it, or the model inside it, in place or not."""
    return any(compiled_module(one) is not None or one._compiled_call_impl is not None for one in model.modules())


def is_hooked(*modules: nn.Module) -> bool:
    """Whether calls of one of the modules are hooked, or its `forward` is replaced."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
        or any(
            "forward" in own
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            for own in map(vars, modules)
        )
    )


def is_traced(x: Tensor) -> bool:
    """Whether `x` (any shape) is being traced, so that a custom `autograd.Function` would be opaque.

    The tracer may be a compiler, a function transform, forward-mode differentiation, or a dispatch mode (selective
    checkpointing keeps results of operations, which may then not be written to). `x` itself counts if it is a tensor
    subclass, has no data, is nested, or is a scalar, which no layer takes.
    """
    return (
        torch.compiler.is_compiling()
        or jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or x.is_nested
        or not x.dim()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def report_rates(scheduler: object, rates: list[float]) -> None:
    """Let `scheduler`, if it is one of torch's, report `rates` as the last ones it set."""
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = rates
