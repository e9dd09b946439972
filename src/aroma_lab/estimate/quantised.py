"""Linear layers as bitsandbytes stores them: their bytes, and what their matmul needs for a while."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one themselves (double quantization)."""

_FLOAT = 4


class StandIn(nn.Linear):
    """A quantised layer without data: shaped as the layer that it stands for, which keeps nothing for backward."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (…, n) to (…, m)."""
        y: Tensor = _Matmul.apply(x, self.weight, self.bias)
        return y


class _Matmul(torch.autograd.Function):
    """The weight is made again in 16 bits for each matmul, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, torch.empty_like(weight), bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gy @ torch.empty_like(weight), None, None


def replace_linears(model: Any) -> None:
    """Put stand-ins where transformers would put layers of bitsandbytes: it spares the output layer."""
    spared = get_keys_to_not_convert(model)
    for name, module in [*model.named_modules()]:
        shape = _shape_of(module)
        if shape is None or not should_convert_module(name, spared):
            continue
        out_features, in_features = shape
        dtype, bias = module.weight.dtype, module.bias is not None
        stand_in = StandIn(in_features, out_features, bias=bias, device="meta", dtype=dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, stand_in)


def packed_shape(dtype: str, weight: Tensor) -> tuple[int, int]:
    """Return the shape of the bytes that hold a weight (m, n)."""
    if dtype == "int8":
        return weight.shape[0], weight.shape[1]
    return -(-weight.numel() // 2), 1


def constants_bytes(dtype: str, weight: Tensor) -> int:
    """Return the bytes of the scales and code tables of a weight (m, n)."""
    if dtype == "int8":
        return _FLOAT * weight.shape[0]
    blocks = -(-weight.numel() // _BLOCK)
    nested = -(-blocks // _NESTED_BLOCK)
    codes = 16 + 256
    offset = 1
    return blocks + _FLOAT * (nested + codes + offset)


def _shape_of(module: nn.Module) -> tuple[int, int] | None:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return out_features, in_features
    return (module.out_features, module.in_features) if type(module) is nn.Linear else None
