"""Attention and dropout as a GPU's fused kernels have them, on tensors without data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from aroma.tuner import fused, layer

ATTENTION = "aroma_scale"
"""Name under which transformers finds the attention below."""


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as a fused kernel does, which keeps query, key, value, result and one number a row.

    Args:
        module: The attention layer.
        query: (batch, heads, length, size); key and value may have fewer heads.
        key: As `query`.
        value: As `query`.
        attention_mask: Nothing is padded.
        scaling: Of the products.
        is_causal: Whether a token sees only those before it.

    Returns:
        The result, (batch, length, heads, size), and no attention weights.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result = fused_attention(query, key, value, 0.0, causal, attn_mask=None, scale=scaling)[0]
    return result.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, _no_mask)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop as a GPU does, which keeps a mask of one byte a number."""
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """Let tensors without data go the way that real ones go, while the context lasts.

    A growing layer writes itself out before tensors without data, as before anybody who traces, and PyTorch knows no
    autocast of them; but it is the layer's own node whose memory is asked for.
    """
    changes: list[tuple[Any, str, Any]] = [
        (layer, "is_traced", lambda x: False),
        (layer, "autocast_dtype", lambda x: None),
        (fused, "autocast_dtype", lambda x: None),
        (fused, "_without_autocast", lambda device: nullcontext()),
        (F, "dropout", _dropout),
    ]
    kept = [(where, name, getattr(where, name)) for where, name, _ in changes]
    for where, name, value in changes:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in kept:
            setattr(where, name, value)
