"""A frozen linear map and its low-rank update as one node of the graph.

.. code-block:: text

    forward    y  = W0 x + bias + up (down x)          down = [A; a]  (K, n),  up = [B, s b]  (m, K)
    backward   gx = W0ᵀ gy + downᵀ (upᵀ gy),   ga = (s bᵀ gy) xᵀ,   gb = s gy (a x)ᵀ

Why one node: finished components and the pair in training share one pair of narrow matmuls, added in place; the
input's gradient is summed once instead of once a path; and of the activations only x, which the layer below made
anyway, and the r numbers a x of every token are kept. Many components, or many tokens, are folded into a copy of W0
that lives for one matmul: then the update costs nothing a token.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .dropout import Places, draw_places, keep_mask

_NARROW_MULTIPLIES_A_MOVE = 6
"""Multiply-adds of a matmul of many tokens with few components that take as long as moving one number."""

_FOLDING_MULTIPLIES_A_MOVE = 16
"""The same of the product of up and down."""


class Update(NamedTuple):
    """The low-rank update of one module by one adapter.

    Args:
        A: Right factors of the finished components, (R, n); zero padding is allowed.
        B: Left factors, (m, R), scale folded in.
        a: Right factor of the pair in training, (r, n); None once the module is frozen.
        b: Its left factor, (m, r); None once the module is frozen.
        scale: s of the pair, lora_alpha / r.
        p: Dropout probability on the pair's input; 0 outside of training.
    """

    A: Tensor
    B: Tensor
    a: Tensor | None
    b: Tensor | None
    scale: float
    p: float

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the pair, which finished components follow."""
        return self.A.dtype if self.a is None else self.a.dtype


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
    y: Tensor = _LinearWithUpdate.apply(x, update.a, update.b, None, weight, bias, update, dtype)
    return y


def add_update(result: Tensor, x: Tensor, update: Update) -> Tensor:
    """Add ΔW x to what a base layer made of x, for base layers that only they themselves can evaluate.

    Computed in the dtype of the pair (under autocast: in its dtype), so that a base layer of lower precision
    rounds the update once.

    Args:
        result: (…, m); written in place.
        x: Inputs, (…, n).
        update: ΔW.

    Returns:
        `result`.
    """
    dtype = autocast_dtype(x) or update.dtype
    y: Tensor = _LinearWithUpdate.apply(x, update.a, update.b, result, None, None, update, dtype)
    return y


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives a matmul of `x`, or None where it leaves it alone."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if x.dtype != torch.float64 and torch.is_autocast_enabled(kind) else None


class _LinearWithUpdate(torch.autograd.Function):
    """Gradients go to x, a, b and, where a base layer gave it, its result."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        result: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        update: Update,
        dtype: torch.dtype,
    ) -> Tensor:
        places = draw_places(x.numel()) if update.p and a is not None else None
        call = _Call(x.shape, x.dtype, dtype, update.scale, update.p, places)
        with _without_autocast(x.device):
            parts = call.parts(a, b, weight, update.A, update.B)
            flat = call.flat(x)
            h = parts.project(flat)
            if weight is not None:
                assert parts.weight is not None
                y = F.linear(flat, parts.weight, None if bias is None else _cast(bias, dtype))
            else:
                assert result is not None
                y = result.view(-1, result.shape[-1])
                ctx.mark_dirty(result)
            parts.add(y, h)
        ctx.call, ctx.pair_dtype = call, None if a is None else a.dtype
        # Without a pair that trains there is no gradient that needs x.
        trains = a is not None and any(ctx.needs_input_grad[1:3])
        kept = (x, h[:, h.shape[1] - a.shape[0] :].contiguous()) if a is not None and trains else (None, None)
        ctx.save_for_backward(*kept, a, b, weight, update.A, update.B)
        if result is not None:
            return result
        # .data: to a view that is made in here nobody could write in place (ReLU(inplace=True)).
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1]).data

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b, weight, A, B = ctx.saved_tensors
        call: _Call = ctx.call
        gx = ga = gb = None
        needs_x, needs_a, needs_b, needs_result = ctx.needs_input_grad[:4]
        with _without_autocast(gy.device):
            # Without a gradient of x, as in the lowest modules, the pair alone is in the way of any.
            parts = call.parts(a, b, weight, A, B) if needs_x else call.parts(a, b, None, A[:0], B[:, :0])
            g = call.flat(gy)
            gh = parts.project_back(g)
            if needs_x:
                gx = _cast(parts.input_gradient(g, gh), call.input_dtype).view(call.shape)
            if parts.a is not None and (needs_a or needs_b):
                dropped = parts.dropped(call.flat(x))
                if needs_a:
                    ga = _cast(parts.of_pair(gh).t() @ dropped, ctx.pair_dtype)
                if needs_b:
                    if torch.is_grad_enabled():  # create_graph: the kept h hangs on no graph
                        h = dropped @ parts.a.t()
                    gb = (h.t() @ g).t()
                    gb = _cast(gb if call.pair_scale == 1 else gb * call.pair_scale, ctx.pair_dtype)
        return gx, ga, gb, gy if needs_result else None, *(None,) * 4


class _Call(NamedTuple):
    """What forward and backward of one call have in common.

    Args:
        shape: Shape of x, (…, n).
        input_dtype: Dtype of x.
        dtype: Dtype that is computed in.
        scale: s of the pair.
        p: Dropout probability.
        places: Where the dropout mask comes from; None without dropout.
    """

    shape: torch.Size
    input_dtype: torch.dtype
    dtype: torch.dtype
    scale: float
    p: float
    places: Places | None

    @property
    def pair_scale(self) -> float:
        """What b is multiplied by: s, and with dropout 1 / (1 - p)."""
        return self.scale / (1 - self.p) if self.places else self.scale

    def flat(self, x: Tensor) -> Tensor:
        """Return `x` (…, k) as (tokens, k) in the dtype that is computed in."""
        return _cast(x.reshape(-1, x.shape[-1]), self.dtype)

    def parts(self, a: Tensor | None, b: Tensor | None, weight: Tensor | None, A: Tensor, B: Tensor) -> _Parts:
        """Return the factors in the dtype that is computed in, folded into the weight where that is cheaper."""
        tokens = self.shape.numel() // max(self.shape[-1], 1)
        A, B = _cast(A, self.dtype), _cast(B, self.dtype)
        mask = None
        if a is not None and b is not None:
            a, b = _cast(a, self.dtype), _cast(b, self.dtype)
            b = b if self.pair_scale == 1 else b * self.pair_scale
            if self.places:
                mask = keep_mask(self.places, self.p, tokens, self.shape[-1], like=a)
        if weight is None:
            return _Parts(None, A, B, a, b, mask)
        weight = _cast(weight, self.dtype)
        components = A.shape[0] + (0 if a is None or mask is not None else a.shape[0])
        if not _is_folded(tokens, components, weight):
            return _Parts(weight, A, B, a, b, mask)
        pair_too = a is not None and mask is None
        up, down = (_join(B, b, 1), _join(A, a)) if pair_too else (B, A)
        # Not torch.addmm, which copies the weight more slowly than clone does.
        return _Parts(weight.clone().addmm_(up, down), A[:0], B[:, :0], a, b, mask, pair_is_folded=pair_too)


class _Parts(NamedTuple):
    """The factors of one call; T tokens.

    Args:
        weight: (m, n), components folded in if that is cheaper; None where a base layer made the result.
        A: Finished components that are not folded, (R, n).
        B: (m, R).
        a: The pair, (r, n), or None.
        b: (m, r), scale folded in, and with dropout the 1 / (1 - p) too.
        mask: Dropout mask of the pair's input, (T, n), or None.
        pair_is_folded: Whether the weight holds the pair as well.
    """

    weight: Tensor | None
    A: Tensor
    B: Tensor
    a: Tensor | None
    b: Tensor | None
    mask: Tensor | None
    pair_is_folded: bool = False

    def project(self, x: Tensor) -> Tensor:
        """Return [A x, a drop(x)], (T, R + r)."""
        if self.mask is None or self.a is None:
            return F.linear(x, _join(self.A, self.a))
        h = F.linear(self.dropped(x), self.a)
        return torch.cat([F.linear(x, self.A), h], 1) if self.A.shape[0] else h

    def dropped(self, x: Tensor) -> Tensor:
        """Return drop(x), (T, n), not divided by 1 - p. The last use of the mask, which is overwritten."""
        if self.mask is None:
            return x
        return self.mask * x if torch.is_grad_enabled() else self.mask.mul_(x)

    def add(self, y: Tensor, h: Tensor) -> None:
        """Add what is not folded to y (T, m)."""
        if self.pair_is_folded or not h.shape[1]:
            return
        if y.dtype == h.dtype:
            y.addmm_(h, self.up())
        else:
            y.add_(h @ self.up())

    def up(self) -> Tensor:
        """Return [B, s b]ᵀ, (R + r, m), contiguous."""
        return _join(self.B.t().contiguous(), None if self.b is None else self.b.t().contiguous())

    def project_back(self, g: Tensor) -> Tensor:
        """Return [Bᵀ g, s bᵀ g] for g (T, m), as (T, R + r)."""
        return F.linear(g, self.up())

    def of_pair(self, gh: Tensor) -> Tensor:
        """Return the columns of gh (T, R + r) that belong to the pair, (T, r)."""
        # Not a slice of everything, which batched gradients (is_grads_batched) cannot take.
        return gh[:, self.A.shape[0] :] if self.A.shape[0] else gh

    def input_gradient(self, g: Tensor, gh: Tensor) -> Tensor:
        """Return the gradient of x, (T, n)."""
        if self.mask is not None and self.a is not None:
            R = self.A.shape[0]
            gx = (self.of_pair(gh) @ self.a).mul_(self.mask)
            if R:
                gx.addmm_(gh[:, :R], self.A)
            return gx if self.weight is None else gx.addmm_(g, self.weight)
        down = _join(self.A, self.a)
        if self.weight is None:
            return gh @ down
        gx = g @ self.weight
        return gx if self.pair_is_folded or not gh.shape[1] else gx.addmm_(gh, down)


def _is_folded(tokens: int, components: int, weight: Tensor) -> bool:
    """Whether adding the components to a copy of the weight is cheaper than passing every token by them.

    Never in a precision that would round a small update away.
    """
    m, n = weight.shape
    # Of narrow matmuls forward writes and reads y, or backward gx; of a folded weight it is two passes each way.
    narrow = components * tokens * (m + n) / _NARROW_MULTIPLIES_A_MOVE + tokens * (m + n)
    folded = components * m * n / _FOLDING_MULTIPLIES_A_MOVE + 4 * m * n
    return components > 0 and folded < narrow and _multiplies_exactly(weight)


def _multiplies_exactly(weight: Tensor) -> bool:
    """Whether a matmul with this weight uses all the bits that the weight has, and these are 32 or more."""
    if weight.dtype != torch.float32:
        return weight.dtype == torch.float64
    backend: Any = torch.backends.mkldnn if weight.device.type == "cpu" else torch.backends.cuda
    settings: Any = getattr(backend, "matmul", None)
    if hasattr(settings, "fp32_precision"):
        return settings.fp32_precision in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"  # PyTorch before 2.9


def _join(finished: Tensor, pair: Tensor | None, dim: int = 0) -> Tensor:
    if pair is None:
        return finished
    return torch.cat([finished, pair], dim) if finished.shape[dim] else pair


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Everything is in one dtype here already."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
