"""Who watches a call: where the layer must be written out in PyTorch's operations, or its modules be called."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

_BITSANDBYTES_LINEAR = ("Linear8bitLt", "Linear4bit", "LinearFP4", "LinearNF4")


def is_traced(x: Tensor) -> bool:
    """Whether somebody follows the operations on `x`, who could not look into an autograd function of ours.

    A compiler, a function transform, forward-mode differentiation, a dispatch mode (selective checkpointing keeps the
    results of operations, which may then not be written to), or `x` itself: a tensor subclass, one without data, a
    nested one, or one that no layer takes.
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
    """Whether somebody watches or replaces the calls of one of the modules."""
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
    """Whether calling the modules is a matmul with their weights, and nothing else."""
    return type(one) is type(other) is nn.Linear and not is_hooked(one, other)


def returns_its_own(base: nn.Module) -> bool:
    """Whether a base layer maps every token alone, and to a result that nobody keeps.

    A class derived from nn.Linear may do anything with its input and its output.
    """
    kind = type(base)
    known = kind is nn.Linear or (
        kind.__name__ in _BITSANDBYTES_LINEAR and kind.__module__.startswith("bitsandbytes.")
    )
    return known and not is_hooked(base)
