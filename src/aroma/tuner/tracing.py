"""Who looks at a call of the layer: then it is written out in PyTorch's operations, or its modules are called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import compat

_BITSANDBYTES_LINEAR = ("Linear8bitLt", "Linear4bit", "LinearFP4", "LinearNF4")


def is_traced(x: Tensor) -> bool:
    """Whether `x` (any shape) is being traced, so that a custom `autograd.Function` would be opaque.

    The tracer may be a compiler, a function transform, forward-mode differentiation, or a dispatch mode (selective
    checkpointing keeps results of operations, which may then not be written to). `x` itself counts if it is a tensor
    subclass, has no data, is nested, or is a scalar, which no layer takes.
    """
    return (
        torch.compiler.is_compiling()
        or compat.is_jit_tracing()
        or type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or x.is_nested
        or not x.dim()
        or compat.is_transformed()
    )


def is_hooked(*modules: nn.Module) -> bool:
    """Whether one of the modules has hooks or a replaced `forward`."""
    return any(map(compat.has_hooks, modules)) or compat.has_global_hooks()


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
