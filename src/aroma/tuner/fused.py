"""A frozen linear map and its low-rank update as one node of the autograd graph.

.. code-block:: text

    forward    y  = W0 x + bias + up (down x)          down = [A; a]  (K, n),  up = [B, s b]  (m, K)
    backward   gx = W0ᵀ gy + downᵀ (upᵀ gy),   ga = (s bᵀ gy) xᵀ,   gb = s gy (a x)ᵀ

Why one node: finished components and the pair in training share one pair of narrow matmuls, and the result is added in
place. The gradient of the input is summed once, not once for each path. Of the activations only two are kept: x, which
the layer below made anyway, and the r numbers a x of every token. With many components, or many tokens, the update is
folded into a copy of W0 that lives for one matmul; then it costs nothing per token.

A frozen pair has r = 0 rows. T is the number of tokens throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import compat
from .dropout import Offsets, draw_offsets, keep_mask


class Update(NamedTuple):
    """The low-rank update of one module by one adapter.

    Args:
        A: Right factors of the finished components, (R, n); zero padding is allowed.
        B: Left factors, (m, R), scale folded in.
        a: Right factor of the pair in training, (r, n); r = 0 once the module is frozen.
        b: Its left factor, (m, r).
        scale: s of the pair, lora_alpha / r.
        p: Dropout probability on the pair's input; 0 outside of training.
    """

    A: Tensor
    B: Tensor
    a: Tensor
    b: Tensor
    scale: float
    p: float


def linear_with_update(x: Tensor, weight: Tensor, bias: Tensor | None, update: Update) -> Tensor:
    """Return W0 x + bias + ΔW x.

    Under autocast everything is cast to its dtype, as `F.linear` casts; otherwise all dtypes must be equal.

    Args:
        x: Inputs, (…, n).
        weight: W0, (m, n); gets no gradient.
        bias: (m,); gets no gradient.
        update: ΔW.

    Returns:
        (…, m).
    """
    dtype = autocast_dtype(x) or x.dtype
    node: Callable[..., Tensor] = _LinearWithUpdate.apply
    return node(x, update.a, update.b, weight, bias, update, dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives a matmul of `x` (any shape), or None where it leaves it alone."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if x.dtype != torch.float64 and torch.is_autocast_enabled(kind) else None


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


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast, of which a meta device has none."""
    kind = device.type
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


class _LinearWithUpdate(torch.autograd.Function):
    """Gradients go to x, a and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        update: Update,
        dtype: torch.dtype,
    ) -> Tensor:
        """Map x (…, n) to (…, m)."""
        call = ctx.call = _Call.of(x, update, dtype)
        with without_autocast(x.device):
            parts, flat = call.parts(weight, update.A, update.B, a, b), call.flat(x)
            y = F.linear(flat, parts.W, None if bias is None else bias.to(dtype))
            h = parts.project(flat)
            if h.shape[1] and not parts.pair_is_folded:
                y.addmm_(h, parts.up)
        trains = any(ctx.needs_input_grad[1:3])
        kept = (x, h[:, h.shape[1] - a.shape[0] :].contiguous()) if trains else (None, None)
        ctx.save_for_backward(*kept, a, b, update.A, update.B, weight)
        # .data: to a view that is made in here nobody could write in place (ReLU(inplace=True)).
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1]).data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Map gy (…, m) to the gradients of x (…, n), a (r, n) and b (m, r)."""
        x, h, a, b, A, B, weight = ctx.saved_tensors
        call: _Call = ctx.call
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        gx = ga = gb = None
        with without_autocast(gy.device):
            g = call.flat(gy)
            if not needs_x:  # as in the lowest modules: only the pair matters
                A, B = A[:0], B[:, :0]
            parts = call.parts(weight, A, B, a, b, needs_x)
            gh = F.linear(g, parts.up)
            gh_of_pair = gh[:, gh.shape[1] - a.shape[0] :]
            if needs_x:
                gx = parts.input_gradient(g, gh, gh_of_pair).to(call.input_dtype).view(call.shape)
            if needs_a or needs_b:
                dropped = parts.dropped(call.flat(x))
                ga = (gh_of_pair.t() @ dropped).to(a.dtype)
                gb = ((h.t() @ g).t() * call.pair_scale).to(b.dtype)
        return gx, ga, gb, None, None, None, None


# What forward and backward of a call share ---------------------------------------------------------------------------


class _Call(NamedTuple):
    """The facts of one call with x (…, n)."""

    shape: torch.Size
    input_dtype: torch.dtype
    dtype: torch.dtype  # that is computed in
    pair_scale: float  # what b is multiplied by: s, and with dropout 1 / (1 - p)
    p: float
    offsets: Offsets  # where the dropout mask comes from; empty without dropout

    @classmethod
    def of(cls, x: Tensor, update: Update, dtype: torch.dtype) -> _Call:
        """Return the facts of a call with `x` (…, n); draws the dropout mask."""
        offsets = draw_offsets(x.numel()) if update.p and update.a.shape[0] else []
        scale = update.scale / (1 - update.p) if offsets else update.scale
        return cls(x.shape, x.dtype, dtype, scale, update.p, offsets)

    def flat(self, x: Tensor) -> Tensor:
        """Return `x` (…, k) as (T, k) in the dtype that is computed in."""
        return x.reshape(-1, x.shape[-1]).to(self.dtype)

    def parts(self, weight: Tensor, A: Tensor, B: Tensor, a: Tensor, b: Tensor, with_weight: bool = True) -> _Parts:
        """Return W0 (m, n), A (R, n), B (m, R), a (r, n) and b (m, r) as the matmuls take them."""
        tokens = self.shape.numel() // max(self.shape[-1], 1)
        A, B, a, b = (tensor.to(self.dtype) for tensor in (A, B, a, b))
        W = weight.to(self.dtype) if with_weight else weight
        pair_up = (b if self.pair_scale == 1 else b * self.pair_scale).t().contiguous()
        up, down = _joined(B.t().contiguous(), pair_up), _joined(A, a)
        mask = keep_mask(self.offsets, self.p, tokens, self.shape[-1], like=a) if self.offsets else None
        left, right = (up, down) if mask is None else (B.t(), A)  # a pair under dropout stays outside
        if with_weight and _is_folded(tokens, right.shape[0], W):
            # Not torch.addmm, which copies the weight more slowly than clone does.
            return _Parts(W.clone().addmm_(left.t(), right), A[:0], a, pair_up, a, mask, mask is None)
        return _Parts(W, A, a, up, down, mask, pair_is_folded=False)


class _Parts(NamedTuple):
    """The operands of one call."""

    W: Tensor  # W0 (m, n), plus what is folded: then the others have the pair alone, R = 0
    A: Tensor  # finished components, (R, n)
    a: Tensor  # the pair, (r, n)
    up: Tensor  # [B, s b]ᵀ, (R + r, m), contiguous
    down: Tensor  # [A; a], (R + r, n)
    mask: Tensor | None  # of the pair's dropout, (T, n); None without dropout
    pair_is_folded: bool  # whether W contains the pair, too

    def project(self, x: Tensor) -> Tensor:
        """Return [A x, a drop(x)], (T, R + r), for x (T, n)."""
        if self.mask is None:
            return F.linear(x, self.down)
        return _joined(F.linear(x, self.A), F.linear(self.dropped(x), self.a), 1)

    def dropped(self, x: Tensor) -> Tensor:
        """Return drop(x), (T, n), not divided by 1 - p. The last use of the mask, which is overwritten."""
        return x if self.mask is None else self.mask.mul_(x)

    def input_gradient(self, g: Tensor, gh: Tensor, gh_of_pair: Tensor) -> Tensor:
        """Return the gradient of the inputs, (T, n), for g (T, m), gh (T, R + r) and the pair's columns of it."""
        if self.mask is not None:
            gx = (gh_of_pair @ self.a).mul_(self.mask)
            return gx.addmm_(gh[:, : self.A.shape[0]], self.A).addmm_(g, self.W)
        gx = g @ self.W
        return gx if self.pair_is_folded or not gh.shape[1] else gx.addmm_(gh, self.down)


def _is_folded(tokens: int, components: int, weight: Tensor) -> bool:
    """Whether adding the components to a copy of the weight (m, n) is cheaper than passing every token by them.

    Measured on two cores of an x86-64 server, float32, PyTorch 2.13, with `aroma bench`. Never elsewhere, nor in a
    precision that would round a small update away.
    """
    is_exact = weight.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64) or not is_exact:
        return False
    m, n = weight.shape
    # In the time in which it moves one number, a core does 6 multiply-adds of a narrow matmul and 16 of a wide one.
    narrow = components * tokens * (m + n) / 6 + tokens * (m + n)
    return components > 0 and components * m * n / 16 + 4 * m * n < narrow


def _joined(finished: Tensor, pair: Tensor, dim: int = 0) -> Tensor:
    """Return finished (R, k) and pair (r, k) as (R + r, k), or along columns; no copy if one of them is empty."""
    if not pair.shape[dim]:
        return finished
    return torch.cat([finished, pair], dim) if finished.shape[dim] else pair
