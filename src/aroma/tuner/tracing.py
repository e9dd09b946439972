"""Who looks at a call of the layer: then it is written out in PyTorch's operations, or its modules are called."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

_BITSANDBYTES_LINEAR = ("Linear8bitLt", "Linear4bit", "LinearFP4", "LinearNF4")


def is_traced(x: Tensor) -> bool:
    """Whether `x` (any shape) is being traced, so that a custom `autograd.Function` would be opaque.

    The tracer may be a compiler, a function transform, forward-mode differentiation, or a dispatch mode (selective
    checkpointing keeps results of operations, which may then not be written to). `x` itself counts if it is a tensor
    subclass, has no data, is nested, or is a scalar, which no layer takes.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or x.is_nested
        or not x.dim()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_hooked(*modules: nn.Module) -> bool:
    """Whether one of the modules has hooks or a replaced `forward`."""
    for module in modules:
        own = module.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return bool(_has_any_global_hook())


def are_plain_linear(one: nn.Module, other: nn.Module) -> bool:
    """Whether calling both modules does a matmul with their weights and nothing else."""
    return type(one) is type(other) is nn.Linear and not is_hooked(one, other)


def returns_fresh_result(base: nn.Module) -> bool:
    """Whether a base layer maps every token by itself, and returns a tensor that nobody else holds.

    A subclass of nn.Linear may do anything with its input and its output.
    """
    kind = type(base)
    known = kind is nn.Linear or (
        kind.__name__ in _BITSANDBYTES_LINEAR and kind.__module__.startswith("bitsandbytes.")
    )
    return known and not is_hooked(base)
