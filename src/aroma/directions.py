"""Directions of matrices of one shape, stacked: what every backward is asked about, and how it is followed.

An unused direction u vᵀ follows the gradients by streaming power iteration. With G = ∂L/∂W of a step, summed over
micro-batches and processes,

.. code-block:: text

    p ← β p − (1 − β) G v          u ← p off span(b of the slots, earlier u of the matrix), normalised
    q ← β q − (1 − β) Gᵀ u         v ← q off span(a of the slots, earlier v of the matrix), normalised

Where other adapters lie beneath, their b and a belong to the spans.

L is the number of matrices, S of slots, P of directions of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_RANK_TOLERANCE = 1e-6
"""A direction of a span counts where its squared singular value is above this share of the largest."""


class Directions:
    """Directions and moves of L matrices, m×n, on one device.

    Args:
        rows: Place of every matrix among all, in order.
        m: Outputs.
        n: Inputs.
        slots: S.
        like: A tensor (any shape) whose dtype and device all tensors here have.

    Attributes:
        rows: As given.
        u: Left directions, (L, m, P).
        v: Right directions, (L, P, n).
        p: Averages of −G v, (L, m, P).
        q: Averages of −uᵀ G, (L, P, n).
        sizes: Singular values σ where the directions are singular ones, (L, P); zeros elsewhere.
        gate: Zeros, (L, S).
        answers: Gradients of all u, v and gate, one after the other, (entries,): processes add them up at once.
        b: The slots at the last `note_moves`, (L, m, S).
        a: Likewise, (L, S, n).
        move_b: Δb, (L, m, S).
        move_a: Δa, (L, S, n).
        per_norm: 1 / ‖Δ_k‖_F, (L, S); NaN where there is no move, or none is known.
    """

    _FOLLOWED = ("u", "v", "p", "q", "sizes")
    _LOOKED_AT = ("b", "a", "move_b", "move_a")
    KEPT = _FOLLOWED + _LOOKED_AT
    """What a checkpoint holds; the rest follows from it."""

    def __init__(self, rows: Sequence[int], m: int, n: int, slots: int, like: Tensor) -> None:
        """Begin with zeros that are like `like` (any shape)."""
        self.rows = [*rows]
        self._like = like
        count = len(self.rows)
        self.gate = self._zeros(count, slots)
        self.b, self.a = self._zeros(count, m, slots), self._zeros(count, slots, n)
        self.move_b, self.move_a = torch.zeros_like(self.b), torch.zeros_like(self.a)
        self.per_norm = self._zeros(count, slots)
        self._beneath_b, self._beneath_a = self._zeros(count, m, 0), self._zeros(count, 0, n)
        self._span_b, self._span_a = torch.zeros_like(self.b), torch.zeros_like(self.a)
        self.follow(self._zeros(count, m, 0), self._zeros(count, 0, n))

    def stay_off(self, b: Tensor, a: Tensor) -> None:
        """Keep directions off components that lie beneath, b (L, m, K) and a (L, K, n), padded with zeros."""
        self._beneath_b, self._beneath_a = b.to(self._like), a.to(self._like)
        self._span_b = self._zeros(*b.shape[:2], self.b.shape[2] + b.shape[2])
        self._span_a = self._zeros(a.shape[0], self.a.shape[1] + a.shape[1], a.shape[2])
        self._settle_spans()

    def _zeros(self, *shape: int) -> Tensor:
        return self._like.new_zeros(shape)

    # What is asked ---------------------------------------------------------------------------------------------------

    def follow(self, u: Tensor, v: Tensor, sizes: Tensor | None = None) -> None:
        """Ask about these directions from now on.

        Args:
            u: Left directions, (L, m, P).
            v: Right directions, (L, P, n).
            sizes: Singular values, (L, P), where they are singular directions.
        """
        self.u, self.v = u.to(self._like).contiguous(), v.to(self._like).contiguous()
        self.p, self.q = torch.zeros_like(self.u), torch.zeros_like(self.v)
        self.sizes = self._zeros(*v.shape[:2]) if sizes is None else sizes.to(self._like)
        self.answers = self._zeros(sum(leaf.numel() for leaf in self._leaves))

    @property
    def _leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.u, self.v, self.gate

    def leaves_of(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return u (m, P), v (P, n) and gate (S,) of one matrix as leaves that share the memory of these."""
        u, v, gate = (leaf[row].detach().requires_grad_() for leaf in self._leaves)
        return u, v, gate

    def parts(self, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parts of a tensor like `answers`, (entries,): G v (L, m, P), uᵀ G (L, P, n) and slopes (L, S)."""
        gu, gv, gate = torch.split(answers, [leaf.numel() for leaf in self._leaves])
        return gu.view(self.u.shape), gv.view(self.v.shape), gate.view(self.gate.shape)

    def steepness(self, answers: Tensor, *, of_reached: bool = False) -> tuple[Tensor, Tensor]:
        """Return −uᵀ G v of the directions, (L, P), and steepness of the moves, (L, S).

        NaN for matrices whose answers are not finite: in 16 bits a batch may overflow. Without directions, P = 0, no
        backward is asked, and the steepness of the moves is NaN.

        Args:
            answers: Of the shape of `self.answers`.
            of_reached: Whether matrices without any gradient, as an expert without a token, have none: −∞ and NaN.
        """
        gu, gv, gate = self.parts(answers)
        is_known = (self._are_finite(answers) & bool(self.v.shape[1]))[:, None]
        z, own = -(self.u * gu).sum(1), -gate * self.per_norm
        z, own = z.where(is_known, torch.nan), own.where(is_known, torch.nan)
        if of_reached:
            is_reached = (gu.flatten(1).any(1) | gv.flatten(1).any(1))[:, None]
            z, own = z.where(is_reached, -torch.inf), own.where(is_reached, torch.nan)
        return z, own

    def _are_finite(self, answers: Tensor) -> Tensor:
        """Return which matrices have finite answers, (L,), in `answers`, shaped (entries,)."""
        return torch.stack([part.flatten(1).isfinite().all(1) for part in self.parts(answers)]).all(0)

    # How directions follow the gradient ------------------------------------------------------------------------------

    def turn(self, answers: Tensor, memory: float) -> None:
        """Let the directions follow a gradient, where it is finite; see the head of this file.

        Args:
            answers: Of the shape of `self.answers`, with any number of directions P.
            memory: β.
        """
        gu, gv, _ = self.parts(answers)
        is_known = self._are_finite(answers)[:, None, None]
        gu, gv = gu.where(is_known, 0.0), gv.where(is_known, 0.0)
        self.p.mul_(memory).sub_(gu, alpha=1 - memory)
        self.q.mul_(memory).sub_(gv, alpha=1 - memory)
        free_p = self.p - self._span_b @ (self._span_b.mT @ self.p)
        free_q = self.q - (self.q @ self._span_a.mT) @ self._span_a
        orthonormalise(free_p.mT, self.u.mT)
        orthonormalise(free_q, self.v)

    def forget(self, row: int, direction: int) -> None:
        """Begin anew to average gradients for one direction of one matrix."""
        self.p[row, :, direction], self.q[row, direction] = 0, 0

    # What the slots span, and how they move --------------------------------------------------------------------------

    def note_moves(self, b: Tensor, a: Tensor, known: Tensor, scale: float) -> None:
        """Take the slots as they are now; how they differ from the last ones is their move.

        Args:
            b: Slots of all matrices, (L, m, S).
            a: Likewise, (L, S, n).
            known: Whether a slot holds the component that it held last time, (L, S).
            scale: s.
        """
        b, a = b.to(self._like), a.to(self._like)
        self.move_b.copy_(torch.where(known[:, None, :], b - self.b, 0.0))
        self.move_a.copy_(torch.where(known[:, :, None], a - self.a, 0.0))
        self.b.copy_(b)
        self.a.copy_(a)
        self.settle(scale)

    def settle(self, scale: float) -> None:
        """Derive the norms of the moves and the spans from the slots and their moves.

        ‖s (Δb a + b Δa)‖² = s² (‖Δb‖² ‖a‖² + ‖b‖² ‖Δa‖² + 2 ⟨Δb, b⟩ ⟨a, Δa⟩) for one column and row.
        """
        squares = self.move_b.square().sum(1) * self.a.square().sum(2)
        squares += self.b.square().sum(1) * self.move_a.square().sum(2)
        squares += 2 * (self.move_b * self.b).sum(1) * (self.a * self.move_a).sum(2)
        norms = scale * squares.clamp_min(0).sqrt()
        self.per_norm.copy_(torch.where(norms > 0, 1 / norms, torch.nan))
        self._settle_spans()

    def _settle_spans(self) -> None:
        self._span_b.copy_(_orthonormal_basis(torch.cat([self.b, self._beneath_b], 2).mT).mT)
        self._span_a.copy_(_orthonormal_basis(torch.cat([self.a, self._beneath_a], 1)))

    # Saved and restored ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds, copies by name; of b, a and their moves only up to the last slot in use."""
        used = self.a.any(2).any(0) | self.move_a.any(2).any(0)
        count = int(used.nonzero()[-1]) + 1 if used.any() else 0
        kept = {name: getattr(self, name).clone() for name in self._FOLLOWED}
        slots = {name: self._slots(name, count).clone() for name in self._LOOKED_AT}
        return {**kept, **slots}

    def restore(self, tensors: dict[str, Tensor], scale: float) -> None:
        """Restore `state()`, tensors of any shapes by name; `scale` is s."""
        self.follow(tensors["u"], tensors["v"], tensors["sizes"])
        for name in self._FOLLOWED:
            getattr(self, name).copy_(tensors[name])
        count = tensors["a"].shape[1]
        for name in self._LOOKED_AT:
            getattr(self, name).zero_()
            self._slots(name, count).copy_(tensors[name])
        self.settle(scale)

    def _slots(self, name: str, count: int) -> Tensor:
        """Return the first `count` slots of b (L, m, S), a (L, S, n) or their moves, by name: a view."""
        whole: Tensor = getattr(self, name)
        return whole[:, :count] if name in ("a", "move_a") else whole[:, :, :count]


def singular_directions(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u (L, m, S), σ (L, S) and v (L, S, n) of b a, for b (L, m, S) and a (L, S, n); the largest σ first."""
    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().mT)
    u, sizes, vt = torch.linalg.svd(left[1] @ right[1].mT)
    return (left[0] @ u).to(b), sizes.to(b), (vt @ right[0].mT).to(b)


def orthonormalise(rows: Tensor, directions: Tensor) -> None:
    """Write the orthonormalised rows (L, P, n) into `directions`, in their order; leave those that have no length."""
    for row in range(rows.shape[1]):
        free = rows[:, row]
        for earlier in range(row):
            other = directions[:, earlier]
            free = free - (free * other).sum(1, keepdim=True) * other
        norm = torch.linalg.vector_norm(free, dim=1, keepdim=True)
        directions[:, row] = torch.where(norm > 0, free / norm, directions[:, row])


def _orthonormal_basis(rows: Tensor) -> Tensor:
    """Return orthonormal bases, (L, S, n), of the spans of rows (L, S, n), padded with zeros.

    By the S×S matrix of inner products: a QR would invent directions for rows that are zero.
    """
    norms = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    # Rows that are not finite, which the next batches tell of, span nothing: eigh would fail without naming them.
    unit = (rows / torch.where(norms > 0, norms, 1.0)).nan_to_num(0.0, 0.0, 0.0).double()
    values, vectors = torch.linalg.eigh(unit @ unit.mT)
    counts = values > _RANK_TOLERANCE * values[:, -1:]
    weights = torch.where(counts, values.clamp_min(_RANK_TOLERANCE**2).rsqrt(), 0.0)
    basis: Tensor = ((vectors * weights[:, None, :]).mT @ unit).to(rows.dtype)
    return basis
