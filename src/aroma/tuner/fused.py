"""A frozen linear map and its low-rank update as one node of the autograd graph.

.. code-block:: text

    forward    y  = W0 x + bias + up (down x)          down = [A; a]  (K, n),  up = [B, s b]  (m, K)
    backward   gx = W0ᵀ gy + downᵀ (upᵀ gy),   ga = (s bᵀ gy) xᵀ,   gb = s gy (a x)ᵀ

Why one node: finished components and the pair in training share one pair of narrow matmuls, and the result is added in
place. The gradient of the input is summed once, not once for each path. Of the activations only two are kept: x, which
the layer below made anyway, and the r numbers a x of every token. With many components, or many tokens, the update is
folded into a copy of W0 that lives for one matmul; then it costs nothing per token.

`linear_with_update` replaces the base layer. `add_update` adds to the result of a base layer that only it can compute.
A frozen pair has r = 0 rows. T is the number of tokens throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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


def add_update(result: Tensor, x: Tensor, update: Update) -> Tensor:
    """Add ΔW x to `result`, which a base layer made of x.

    Computed in the dtype of the pair (under autocast: in its dtype), so that a base layer of lower precision
    rounds the update once.

    Args:
        result: (…, m); written in place.
        x: Inputs, (…, n).
        update: ΔW.

    Returns:
        `result`, (…, m).
    """
    dtype = autocast_dtype(x) or update.a.dtype
    node: Callable[..., Tensor] = _AddUpdate.apply
    return node(x, update.a, update.b, result, update, dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives a matmul of `x` (any shape), or None where it leaves it alone."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if x.dtype != torch.float64 and torch.is_autocast_enabled(kind) else None


# The two nodes -------------------------------------------------------------------------------------------------------


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
        call = _Call.of(x, update, dtype)
        with without_autocast(x.device):
            W, factors, pair_is_folded = call.folded(weight, call.factors(update.A, update.B, a, b))
            flat = call.flat(x)
            h = factors.project(flat)
            y = F.linear(flat, W, None if bias is None else _cast(bias, dtype))
            if not pair_is_folded:
                factors.add(y, h)
        _save(ctx, call, x, h, a, b, update, weight)
        # .data: to a view that is made in here nobody could write in place (ReLU(inplace=True)).
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1]).data

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Map gy (…, m) to the gradients of x (…, n), a (r, n) and b (m, r)."""
        x, h, a, b, A, B, weight = ctx.saved_tensors
        call: _Call = ctx.call
        gx = None
        with without_autocast(gy.device):
            g = call.flat(gy)
            if ctx.needs_input_grad[0]:
                W, factors, pair_is_folded = call.folded(weight, call.factors(A, B, a, b))
                gh = factors.project_back(g)
                gx = factors.input_gradient_with(W, g, gh, pair_is_folded)
                gx = _cast(gx, call.input_dtype).view(call.shape)
            else:  # as in the lowest modules: only the pair matters
                factors = call.factors(A[:0], B[:, :0], a, b)
                gh = factors.project_back(g)
            ga, gb = _pair_gradients(ctx, factors, x, h, g, gh)
        return gx, ga, gb, None, None, None, None


class _AddUpdate(torch.autograd.Function):
    """Gradients go to x, a, b and the result of the base layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, result: Tensor, update: Update, dtype: torch.dtype
    ) -> Tensor:
        """Add to result (…, m) what x (…, n) gives."""
        call = _Call.of(x, update, dtype)
        with without_autocast(x.device):
            factors = call.factors(update.A, update.B, a, b)
            h = factors.project(call.flat(x))
            factors.add(result.view(-1, result.shape[-1]), h)
        ctx.mark_dirty(result)
        _save(ctx, call, x, h, a, b, update)
        return result

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Map gy (…, m) to the gradients of x (…, n), a (r, n), b (m, r) and the result (…, m)."""
        x, h, a, b, A, B = ctx.saved_tensors
        call: _Call = ctx.call
        gx = None
        needs_x, _, _, needs_result = ctx.needs_input_grad[:4]
        with without_autocast(gy.device):
            g = call.flat(gy)
            factors = call.factors(A, B, a, b) if needs_x else call.factors(A[:0], B[:, :0], a, b)
            gh = factors.project_back(g)
            if needs_x:
                gx = _cast(factors.input_gradient(gh), call.input_dtype).view(call.shape)
            ga, gb = _pair_gradients(ctx, factors, x, h, g, gh)
        return gx, ga, gb, gy if needs_result else None, None, None


def _save(ctx: Any, call: _Call, x: Tensor, h: Tensor, a: Tensor, b: Tensor, update: Update, *weight: Tensor) -> None:
    """Keep what backward needs: x (…, n) and the pair's columns of h (T, R + r) only if the pair trains."""
    ctx.call = call
    trains = any(ctx.needs_input_grad[1:3])
    kept = (x, h[:, h.shape[1] - a.shape[0] :].contiguous()) if trains else (None, None)
    ctx.save_for_backward(*kept, a, b, update.A, update.B, *weight)


def _pair_gradients(
    ctx: Any, factors: _Factors, x: Tensor, h: Tensor, g: Tensor, gh: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a (r, n) and b (m, r).

    Args:
        ctx: Context of the node.
        factors: Those of the call.
        x: Inputs, (…, n).
        h: a drop(x), (T, r).
        g: Gradient of the output, (T, m).
        gh: `factors.project_back(g)`, (T, R + r).
    """
    call: _Call = ctx.call
    _, needs_a, needs_b = ctx.needs_input_grad[:3]
    ga = gb = None
    if needs_a or needs_b:
        dropped = factors.dropped(call.flat(x))
        if needs_a:
            ga = _cast(factors.of_pair(gh).t() @ dropped, call.pair_dtype)
        if needs_b:
            if torch.is_grad_enabled():  # create_graph: the kept h belongs to no graph
                h = dropped @ factors.a.t()
            gb = (h.t() @ g).t()
            gb = _cast(gb if call.pair_scale == 1 else gb * call.pair_scale, call.pair_dtype)
    return ga, gb


# What forward and backward of a call share ---------------------------------------------------------------------------


class _Call(NamedTuple):
    """The facts of one call.

    Args:
        shape: Shape of x, (…, n).
        tokens: T.
        input_dtype: Dtype of x.
        pair_dtype: Dtype of the pair.
        dtype: Dtype that is computed in.
        pair_scale: What b is multiplied by: s, and with dropout 1 / (1 - p).
        p: Dropout probability.
        offsets: Where the dropout mask comes from; empty without dropout.
    """

    shape: torch.Size
    tokens: int
    input_dtype: torch.dtype
    pair_dtype: torch.dtype
    dtype: torch.dtype
    pair_scale: float
    p: float
    offsets: Offsets

    @classmethod
    def of(cls, x: Tensor, update: Update, dtype: torch.dtype) -> _Call:
        """Return the facts of a call with `x` (…, n); draws the dropout mask."""
        offsets = draw_offsets(x.numel()) if update.p and update.a.shape[0] else []
        scale = update.scale / (1 - update.p) if offsets else update.scale
        tokens = x.shape.numel() // max(x.shape[-1], 1)
        return cls(x.shape, tokens, x.dtype, update.a.dtype, dtype, scale, update.p, offsets)

    def flat(self, x: Tensor) -> Tensor:
        """Return `x` (…, k) as (T, k) in the dtype that is computed in."""
        return _cast(x.reshape(-1, x.shape[-1]), self.dtype)

    def factors(self, A: Tensor, B: Tensor, a: Tensor, b: Tensor) -> _Factors:
        """Return A (R, n), B (m, R), a (r, n) and b (m, r) in the dtype that is computed in, the latter scaled."""
        dtype, mask = self.dtype, None
        A, B, a, b = _cast(A, dtype), _cast(B, dtype), _cast(a, dtype), _cast(b, dtype)
        if self.pair_scale != 1 and b.shape[1]:
            b = b * self.pair_scale
        if self.offsets:
            mask = keep_mask(self.offsets, self.p, self.tokens, self.shape[-1], like=a)
        return _Factors(A, B, a, b, mask)

    def folded(self, weight: Tensor, factors: _Factors) -> tuple[Tensor, _Factors, bool]:
        """Fold factors into a copy of the weight (m, n) where that is cheaper; a pair under dropout stays outside.

        Returns:
            The weight (m, n) in the dtype that is computed in, the factors without the finished ones that were
            folded, and whether the pair was folded too.
        """
        weight = _cast(weight, self.dtype)
        A, B, a, b, mask = factors
        components = A.shape[0] + (a.shape[0] if mask is None else 0)
        if not _is_folded(self.tokens, components, weight):
            return weight, factors, False
        up, down = (_join(B, b, 1), _join(A, a)) if mask is None else (B, A)
        # Not torch.addmm, which copies the weight more slowly than clone does.
        return weight.clone().addmm_(up, down), _Factors(A[:0], B[:, :0], a, b, mask), mask is None


class _Factors(NamedTuple):
    """The factors of one call that every token passes.

    Args:
        A: Finished components, (R, n).
        B: (m, R).
        a: The pair, (r, n).
        b: (m, r), with its scale.
        mask: Dropout mask of the pair's input, (T, n); None without dropout.
    """

    A: Tensor
    B: Tensor
    a: Tensor
    b: Tensor
    mask: Tensor | None

    def project(self, x: Tensor) -> Tensor:
        """Return [A x, a drop(x)], (T, R + r), for x (T, n)."""
        if self.mask is None:
            return F.linear(x, _join(self.A, self.a))
        h = F.linear(self.dropped(x), self.a)
        return torch.cat([F.linear(x, self.A), h], 1) if self.A.shape[0] else h

    def dropped(self, x: Tensor) -> Tensor:
        """Return drop(x), (T, n), not divided by 1 - p. The last use of the mask, which is overwritten."""
        if self.mask is None:
            return x
        return self.mask * x if torch.is_grad_enabled() else self.mask.mul_(x)

    def up(self) -> Tensor:
        """Return [B, s b]ᵀ, (R + r, m), contiguous."""
        B = self.B.t().contiguous()
        return _join(B, self.b.t().contiguous()) if self.b.shape[1] else B

    def add(self, y: Tensor, h: Tensor) -> None:
        """Add up h to y (T, m), for h (T, R + r)."""
        if not h.shape[1]:
            return
        if y.dtype == h.dtype:
            y.addmm_(h, self.up())
        else:
            y.add_(h @ self.up())

    def project_back(self, g: Tensor) -> Tensor:
        """Return [Bᵀ g, s bᵀ g], (T, R + r), for g (T, m)."""
        return F.linear(g, self.up())

    def of_pair(self, gh: Tensor) -> Tensor:
        """Return the columns of gh (T, R + r) that belong to the pair, (T, r)."""
        # Not a slice of everything, which batched gradients (is_grads_batched) cannot take.
        return gh[:, self.A.shape[0] :] if self.A.shape[0] else gh

    def input_gradient(self, gh: Tensor) -> Tensor:
        """Return what the factors send down to the inputs, (T, n), for gh (T, R + r)."""
        if self.mask is None:
            return gh @ _join(self.A, self.a)
        gx = (self.of_pair(gh) @ self.a).mul_(self.mask)
        R = self.A.shape[0]
        return gx.addmm_(gh[:, :R], self.A) if R else gx

    def input_gradient_with(self, W: Tensor, g: Tensor, gh: Tensor, pair_is_folded: bool) -> Tensor:
        """Return what the factors and W (m, n) send down to the inputs, (T, n), for g (T, m) and gh (T, R + r)."""
        if self.mask is not None:
            return self.input_gradient(gh).addmm_(g, W)
        gx = g @ W
        return gx if pair_is_folded or not gh.shape[1] else gx.addmm_(gh, _join(self.A, self.a))


# What folding costs --------------------------------------------------------------------------------------------------


class _Costs(NamedTuple):
    """How many multiply-adds a device does in the time in which it moves one number to or from memory.

    Args:
        narrow: In a matmul of many tokens with few components.
        folding: In the product of up and down.
    """

    narrow: float
    folding: float


_COSTS = {"cpu": _Costs(narrow=6, folding=16)}
"""By device type. A device that is not listed is taken for a CPU: only time is lost by that.

CPU: two cores of an x86-64 server, float32, PyTorch 2.13, `aroma bench`. CUDA has not been measured. To measure it,
time `linear_with_update`, forward and backward, with folding forced on and off (`_is_folded`) for 8 to 64 components
and 64 to 65,536 tokens on a 4096×4096 weight, and fit the two numbers so that the cheaper way is chosen.
"""


def _is_folded(tokens: int, components: int, weight: Tensor) -> bool:
    """Whether adding the components to a copy of the weight (m, n) is cheaper than passing every token by them.

    Never in a precision that would round a small update away.
    """
    m, n = weight.shape
    costs = _COSTS.get(weight.device.type, _COSTS["cpu"])
    # Narrow matmuls read and write y in forward, gx in backward; a folded weight is two passes each way.
    narrow = components * tokens * (m + n) / costs.narrow + tokens * (m + n)
    folded = components * m * n / costs.folding + 4 * m * n
    return components > 0 and folded < narrow and _multiplies_exactly(weight)


def _multiplies_exactly(weight: Tensor) -> bool:
    """Whether a matmul with this weight (m, n) uses all the bits that the weight has, and these are 32 or more."""
    if weight.dtype != torch.float32:
        return weight.dtype == torch.float64
    backend: Any = torch.backends.mkldnn if weight.device.type == "cpu" else torch.backends.cuda
    settings: Any = getattr(backend, "matmul", None)
    if hasattr(settings, "fp32_precision"):
        return settings.fp32_precision in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"  # PyTorch before 2.9


# Small things --------------------------------------------------------------------------------------------------------


def _join(finished: Tensor, pair: Tensor, dim: int = 0) -> Tensor:
    """Return finished (R, k) and pair (r, k) as (R + r, k), or along columns; no copy if one of them is empty."""
    if not pair.shape[dim]:
        return finished
    return torch.cat([finished, pair], dim) if finished.shape[dim] else pair


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of any shape in `dtype`."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast, of which a meta device has none."""
    kind = device.type
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()
