"""A frozen linear map and its low-rank update as one node of the autograd graph.

.. code-block:: text

    forward    y  = W0 x + bias + up (down x)          down = [A; a]  (K, n),  up = [B, s b]  (m, K)
    backward   gx = W0ᵀ gy + downᵀ (upᵀ gy),   ga = (s bᵀ gy) xᵀ,   gb = s gy (a x)ᵀ
               gu = gy (v x)ᵀ = G v,   gv = (uᵀ gy) xᵀ = uᵀ G           of a probe (u, v), G = gy xᵀ = ∂L/∂W

Why one node: finished components and the pair in training share one pair of narrow matmuls, and the result is added in
place. The gradient of the input is summed once, not once for each path. Of the activations only two are kept: x, which
the layer below made anyway, and the r numbers a x of every token. With many components, or many tokens, the update is
folded into a copy of W0 that lives for one matmul; then it costs nothing per token.

A probe is p more pairs that add nothing to y or gx and get the gradients that they would have: more columns of the
narrow matmuls. G, (m, n), is never formed. v x is kept while k + p ≤ min(r, 8). Else backward computes it again, so
that no more is kept than by LoRA with r = 8, or with as many components as train.

`linear_with_update` replaces the base layer. `add_update` adds to the result of a base layer that only it can compute.
Of a pair of r slots the first k are evaluated; a frozen pair has none. T is the number of tokens throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .dropout import Offsets, draw_offsets, keep_mask
from .kinds import Kind

_MOST_KEPT = 8
"""Numbers a token that are kept of pair and probe together, unless the pair alone has more."""


class Probe(NamedTuple):
    """What is asked of a backward beside the gradients of the pair; all leaves that require a gradient, but the moves.

    Args:
        u: Left directions, (m, p). Their gradient is G vᵀ.
        v: Right directions, (p, n). Their gradient is uᵀ G.
        gate: (r,). Its gradient is ⟨G, s (Δb_k a_k + b_k Δa_k)⟩, the slope of the loss along the move of every slot.
        move_b: Δb, (m, r).
        move_a: Δa, (r, n).
        strength: What the pair is scaled by while it is asked, in [0, 1].
    """

    u: Tensor
    v: Tensor
    gate: Tensor
    move_b: Tensor
    move_a: Tensor
    strength: float


class Update(NamedTuple):
    """The low-rank update of one module by one adapter.

    Args:
        A: Right factors of the finished components, (R, n); zero padding is allowed.
        B: Left factors, (m, R), scale folded in.
        a: Right factor of the pair in training, (r, n); r = 0 once the module is frozen.
        b: Its left factor, (m, r).
        scale: s of the pair.
        p: Dropout probability on the pair's input; 0 outside of training.
        slots: k, how many leading rows of a are evaluated; the others are zero.
        probe: The probe; None where nothing is asked.
    """

    A: Tensor
    B: Tensor
    a: Tensor
    b: Tensor
    scale: float
    p: float
    slots: int
    probe: Probe | None = None

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        """What gets gradients: a (r, n), b (m, r), and u (m, p), v (p, n), gate (r,) of the probe, or None."""
        return self.a, self.b, *(self.probe[:3] if self.probe is not None else (None, None, None))


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
    return node(x, *update.leaves, weight, bias, update, dtype)


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
    return node(x, *update.leaves, result, update, dtype)


def answerable(kind: Kind, x: Tensor, h: Tensor, update: Update) -> tuple[Tensor, Tensor]:
    """Return zeros through which a backward answers the probe of `update`, in operations of PyTorch alone.

    The pair itself is not read: ZeRO-3 holds it whole only while its modules are called.

    Args:
        kind: What the layer is.
        x: What pair and probe see of the inputs, (…, n) for a linear layer.
        h: What the first factor of the pair made of it, (…, r).
        update: An update with a probe.

    Returns:
        What is to be added to h, and to the result.
    """
    probe = update.probe
    assert probe is not None, "nothing is asked"
    x, h = x.detach(), h.detach()
    u, v, gate, move_b, move_a = (_cast(tensor, x.dtype if x.is_floating_point() else h.dtype) for tensor in probe[:5])
    # Of every slot the move is s (Δb_k a_k + b_k Δa_k): one factor of it is the pair's, which the input has passed or
    # will pass.
    first, second = kind.ordered(move_b * gate, move_a * gate[:, None])
    asked = kind.product(x, u, v) + kind.second(h, second * update.scale)
    return kind.first(x, first), asked - asked.detach()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives a matmul of `x` (any shape), or None where it leaves it alone."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if x.dtype != torch.float64 and torch.is_autocast_enabled(kind) else None


# The two nodes -------------------------------------------------------------------------------------------------------


class _LinearWithUpdate(torch.autograd.Function):
    """Gradients go to x, a, b and the probe's u, v and gate."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        u: Tensor | None,
        v: Tensor | None,
        gate: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        update: Update,
        dtype: torch.dtype,
    ) -> Tensor:
        """Map x (…, n) to (…, m)."""
        call = _Call.of(x, update, dtype)
        with without_autocast(x.device):
            W, factors, pair_is_folded = call.folded(weight, call.factors(update.A, update.B, a, b, u, v))
            flat = call.flat(x)
            h = factors.project(flat)
            y = F.linear(flat, W, None if bias is None else _cast(bias, dtype))
            if not pair_is_folded:
                factors.add(y, h)
        _save(ctx, call, x, h, update, weight)
        # .data: to a view that is made in here nobody could write in place (ReLU(inplace=True)).
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1]).data

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Map gy (…, m) to the gradients of x (…, n), a (r, n), b (m, r), u (m, p), v (p, n) and gate (r,)."""
        x, h, a, b, A, B, u, v, *moves, weight = ctx.saved_tensors
        call: _Call = ctx.call
        gx = None
        with without_autocast(gy.device):
            g = call.flat(gy)
            if ctx.needs_input_grad[0]:
                W, factors, pair_is_folded = call.folded(weight, call.factors(A, B, a, b, u, v))
                gh = factors.project_back(g)
                gx = factors.input_gradient_with(W, g, gh, pair_is_folded)
                gx = _cast(gx, call.input_dtype).view(call.shape)
            else:  # as in the lowest modules: only the pair matters
                factors = call.factors(A[:0], B[:, :0], a, b, u, v)
                gh = factors.project_back(g)
            of_leaves = _leaf_gradients(ctx, factors, x, h, g, gh, moves)
        return gx, *of_leaves, None, None, None, None


class _AddUpdate(torch.autograd.Function):
    """Gradients go to x, a, b, the probe's u, v and gate, and the result of the base layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        u: Tensor | None,
        v: Tensor | None,
        gate: Tensor | None,
        result: Tensor,
        update: Update,
        dtype: torch.dtype,
    ) -> Tensor:
        """Add to result (…, m) what x (…, n) gives."""
        call = _Call.of(x, update, dtype)
        with without_autocast(x.device):
            factors = call.factors(update.A, update.B, a, b, u, v)
            h = factors.project(call.flat(x))
            factors.add(result.view(-1, result.shape[-1]), h)
        ctx.mark_dirty(result)
        _save(ctx, call, x, h, update)
        return result

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Map gy (…, m) to the gradients of x (…, n), the leaves of the update, and the result (…, m)."""
        x, h, a, b, A, B, u, v, *moves = ctx.saved_tensors
        call: _Call = ctx.call
        gx = None
        needs_x, needs_result = ctx.needs_input_grad[0], ctx.needs_input_grad[6]
        with without_autocast(gy.device):
            g = call.flat(gy)
            factors = call.factors(A, B, a, b, u, v) if needs_x else call.factors(A[:0], B[:, :0], a, b, u, v)
            gh = factors.project_back(g)
            if needs_x:
                gx = _cast(factors.input_gradient(gh), call.input_dtype).view(call.shape)
            of_leaves = _leaf_gradients(ctx, factors, x, h, g, gh, moves)
        return gx, *of_leaves, gy if needs_result else None, None, None


def _save(ctx: Any, call: _Call, x: Tensor, h: Tensor, update: Update, *weight: Tensor) -> None:
    """Keep what backward needs: x (…, n), and of h (T, R + k + p) the columns of the pair, and of a small probe."""
    ctx.call, ctx.slots = call, update.a.shape[0]
    trains = any(ctx.needs_input_grad[1:6])
    probes = update.probe.v.shape[0] if update.probe is not None else 0
    first = h.shape[1] - call.slots - probes
    end = first + call.slots if call.slots + probes > min(ctx.slots, _MOST_KEPT) else None
    kept = (x, h[:, first:end].contiguous()) if trains else (None, None)
    u, v, _, *moves, _ = update.probe or (None,) * 6
    ctx.save_for_backward(*kept, update.a, update.b, update.A, update.B, u, v, *moves, *weight)


def _leaf_gradients(
    ctx: Any, factors: _Factors, x: Tensor, h: Tensor, g: Tensor, gh: Tensor, moves: list[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a (r, n), b (m, r), u (m, p), v (p, n) and gate (r,), None where none is asked for.

    Args:
        ctx: Context of the node.
        factors: Those of the call.
        x: Inputs, (…, n).
        h: [a; v] drop(x), (T, k + p), or a drop(x), (T, k), where `_save` has kept no more.
        g: Gradient of the output, (T, m).
        gh: `factors.project_back(g)`, (T, R + k + p).
        moves: Δb (m, r) and Δa (r, n) of the probe, or None.
    """
    call: _Call = ctx.call
    needs_a, needs_b, needs_u, needs_v, needs_gate = ctx.needs_input_grad[1:6]
    if not any(ctx.needs_input_grad[1:6]):
        return (None,) * 5
    k = call.slots
    down = up = None
    dropped = factors.dropped(call.flat(x))
    if needs_a or needs_v or needs_gate:
        down = factors.of_pair(gh).t() @ dropped
    if needs_b or needs_u or needs_gate:
        if torch.is_grad_enabled():  # create_graph: the kept h belongs to no graph
            h = dropped @ _join(factors.a, factors.v).t()
        elif h.shape[1] < k + factors.v.shape[0]:
            h = torch.cat([h, F.linear(dropped, factors.v)], 1)
        up = (h.t() @ g).t()
    ga = gb = gu = gv = ggate = None
    dtype = call.pair_dtype if moves[0] is None else moves[0].dtype
    has_probe = factors.v.shape[0] > 0  # without one nothing is cut off: see `_Factors.of_pair`
    if down is not None:
        ga, gv = (down[:k], down[k:]) if has_probe else (down, None)
    if up is not None:
        gb, gu = (up[:, :k], up[:, k:]) if has_probe else (up, None)
        gb = gb if call.pair_scale == 1 else gb * call.pair_scale
    # drop(x) is not divided by 1 - p. In float32: what the scale has kept from overflowing must not now.
    probe_scale = call.probe_scale * (1 - call.p if call.offsets else 1)
    if needs_gate:
        move_b, move_a = moves
        assert move_b is not None, "a probe has moves"
        assert move_a is not None, "a probe has moves"
        assert ga is not None, "it was computed for the gate"
        assert gb is not None, "it was computed for the gate"
        # In the precision of the moves: 16 bits would round away what they differ in.
        slope = (gb * move_b[:, :k]).sum(0) + (ga * move_a[:k]).sum(1)
        ggate = F.pad(slope, (0, move_a.shape[0] - k))
    return (
        _cast(_padded(ga, ctx.slots, 0), call.pair_dtype) if needs_a and ga is not None else None,
        _cast(_padded(gb, ctx.slots, 1), call.pair_dtype) if needs_b and gb is not None else None,
        _times(_cast(gu, dtype), 1 / probe_scale) if needs_u and gu is not None else None,
        _times(_cast(gv, dtype), 1 / probe_scale) if needs_v and gv is not None else None,
        ggate,
    )


def _padded(gradient: Tensor, slots: int, dim: int) -> Tensor:
    """Return a gradient of the evaluated slots, (k, n) or (m, k), with zeros for the others: (r, n) or (m, r)."""
    missing = slots - gradient.shape[dim]
    if not missing:
        return gradient
    shape = [*gradient.shape]
    shape[dim] = missing
    return torch.cat([gradient, gradient.new_zeros(shape)], dim)


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
        slots: k, how many leading rows of a are evaluated.
        offsets: Where the dropout mask comes from; empty without dropout.
    """

    shape: torch.Size
    tokens: int
    input_dtype: torch.dtype
    pair_dtype: torch.dtype
    dtype: torch.dtype
    pair_scale: float
    p: float
    slots: int
    offsets: Offsets

    @classmethod
    def of(cls, x: Tensor, update: Update, dtype: torch.dtype) -> _Call:
        """Return the facts of a call with `x` (…, n); draws the dropout mask."""
        offsets = draw_offsets(x.numel()) if update.p and (update.slots or update.probe) else []
        scale = update.scale / (1 - update.p) if offsets else update.scale
        tokens = x.shape.numel() // max(x.shape[-1], 1)
        return cls(x.shape, tokens, x.dtype, update.a.dtype, dtype, scale, update.p, update.slots, offsets)

    @property
    def probe_scale(self) -> float:
        """What u and v are multiplied by: in float16 the probe must not overflow where the pair does not.

        A gradient scaler looks at the pair's gradients alone.
        """
        return 0.0625 if self.dtype == torch.float16 else 1.0

    def flat(self, x: Tensor) -> Tensor:
        """Return `x` (…, k) as (T, k) in the dtype that is computed in."""
        return _cast(x.reshape(-1, x.shape[-1]), self.dtype)

    def factors(self, A: Tensor, B: Tensor, a: Tensor, b: Tensor, u: Tensor | None, v: Tensor | None) -> _Factors:
        """Return the factors in the dtype that is computed in, b with its scale.

        Args:
            A: Finished components, (R, n).
            B: (m, R).
            a: The pair, (r, n), of which k rows are evaluated.
            b: (m, r).
            u: Left directions of the probe, (m, p), or None.
            v: Its right directions, (p, n), or None.
        """
        dtype, mask, k = self.dtype, None, self.slots
        A, B, a, b = _cast(A, dtype), _cast(B, dtype), _cast(a[:k], dtype), _cast(b[:, :k], dtype)
        if self.pair_scale != 1 and k:
            b = b * self.pair_scale
        if self.offsets:
            mask = keep_mask(self.offsets, self.p, self.tokens, self.shape[-1], like=a)
        u = b[:, :0] if u is None else _cast(_times(u, self.probe_scale), dtype)
        v = a[:0] if v is None else _cast(_times(v, self.probe_scale), dtype)
        return _Factors(A, B, a, b, u, v, mask)

    def folded(self, weight: Tensor, factors: _Factors) -> tuple[Tensor, _Factors, bool]:
        """Fold factors into a copy of the weight (m, n) where that is cheaper; a pair under dropout stays outside.

        Returns:
            The weight (m, n) in the dtype that is computed in, the factors without the finished ones that were
            folded, and whether the pair was folded too.
        """
        weight = _cast(weight, self.dtype)
        A, B, a, b, u, v, mask = factors
        components = A.shape[0] + (a.shape[0] if mask is None else 0)
        if not _is_folded(self.tokens, components, weight):
            return weight, factors, False
        up, down = (_join(B, b, 1), _join(A, a)) if mask is None else (B, A)
        # Not torch.addmm, which copies the weight more slowly than clone does.
        return weight.clone().addmm_(up, down), _Factors(A[:0], B[:, :0], a, b, u, v, mask), mask is None


class _Factors(NamedTuple):
    """The factors of one call that every token passes.

    Args:
        A: Finished components, (R, n).
        B: (m, R).
        a: The evaluated part of the pair, (k, n).
        b: (m, k), with its scale.
        u: Left directions of the probe, (m, p); p = 0 without one.
        v: Its right directions, (p, n).
        mask: Dropout mask of the input of pair and probe, (T, n); None without dropout.
    """

    A: Tensor
    B: Tensor
    a: Tensor
    b: Tensor
    u: Tensor
    v: Tensor
    mask: Tensor | None

    @property
    def components(self) -> int:
        """R + k: the columns that add to the result."""
        return self.A.shape[0] + self.a.shape[0]

    def project(self, x: Tensor) -> Tensor:
        """Return [A x, a drop(x), v drop(x)], (T, R + k + p), for x (T, n)."""
        trained = _join(self.a, self.v)
        if self.mask is None:
            return F.linear(x, _join(self.A, trained))
        h = F.linear(self.dropped(x), trained)
        return torch.cat([F.linear(x, self.A), h], 1) if self.A.shape[0] else h

    def dropped(self, x: Tensor) -> Tensor:
        """Return drop(x), (T, n), not divided by 1 - p. The last use of the mask, which is overwritten."""
        if self.mask is None:
            return x
        return self.mask * x if torch.is_grad_enabled() else self.mask.mul_(x)

    def up(self, *, with_probe: bool) -> Tensor:
        """Return [B, s b, u]ᵀ, (R + k + p, m), contiguous; without the probe R + k rows."""
        parts = [self.B, self.b, self.u] if with_probe else [self.B, self.b]
        rows = [part.t().contiguous() for part in parts if part.shape[1]]
        if not rows:
            return self.B.t()
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def add(self, y: Tensor, h: Tensor) -> None:
        """Add up h to y (T, m), for h (T, R + k + p), of which the probe's columns add nothing."""
        if not self.components:
            return
        h = self._of_components(h)
        if y.dtype == h.dtype:
            y.addmm_(h, self.up(with_probe=False))
        else:
            y.add_(h @ self.up(with_probe=False))

    def project_back(self, g: Tensor) -> Tensor:
        """Return [Bᵀ g, s bᵀ g, uᵀ g], (T, R + k + p), for g (T, m)."""
        return F.linear(g, self.up(with_probe=True))

    def of_pair(self, gh: Tensor) -> Tensor:
        """Return the columns of gh (T, R + k + p) that belong to pair and probe, (T, k + p)."""
        # Not a slice of everything, which batched gradients (is_grads_batched) cannot take.
        return gh[:, self.A.shape[0] :] if self.A.shape[0] else gh

    def input_gradient(self, gh: Tensor) -> Tensor:
        """Return what the factors send down to the inputs, (T, n), for gh (T, R + k + p)."""
        gh = self._of_components(gh)
        if self.mask is None:
            return gh @ _join(self.A, self.a)
        gx = (self.of_pair(gh) @ self.a).mul_(self.mask)
        R = self.A.shape[0]
        return gx.addmm_(gh[:, :R], self.A) if R else gx

    def input_gradient_with(self, W: Tensor, g: Tensor, gh: Tensor, pair_is_folded: bool) -> Tensor:
        """Return what factors and W (m, n) send down to the inputs, (T, n), for g (T, m) and gh (T, R + k + p)."""
        if self.mask is not None:
            return self.input_gradient(gh).addmm_(g, W)
        gx = g @ W
        if pair_is_folded or not self.components:
            return gx
        return gx.addmm_(self._of_components(gh), _join(self.A, self.a))

    def _of_components(self, h: Tensor) -> Tensor:
        """Return h (T, R + k + p) without the probe's columns."""
        return h[:, : self.components] if self.v.shape[0] else h


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


def _times(tensor: Tensor, factor: float) -> Tensor:
    """Return a tensor of any shape times `factor`; itself where that is 1."""
    return tensor if factor == 1 else tensor * factor


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast, of which a meta device has none."""
    kind = device.type
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()
