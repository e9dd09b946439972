"""What can see a call of the layer, so that it is written out in PyTorch's operations or calls its modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import compat


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
