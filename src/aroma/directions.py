"""Directions of matrices of one shape, stacked: what every backward is asked about, and how it is followed.

An unused direction u vᵀ follows the gradients by streaming power iteration. With G = ∂L/∂W of a step, summed over
micro-batches and processes,

.. code-block:: text

    p ← β p − (1 − β) G v          u ← p off span(b of the slots, earlier u of the matrix), normalised
    q ← β q − (1 − β) Gᵀ u         v ← q off span(a of the slots, earlier v of the matrix), normalised

Where other adapters lie beneath, their b and a belong to the spans.

L is the number of matrices, S of slots, P of directions of a matrix. Everything is kept in rows, left factors
transposed, so that sums run along memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.linalg import vecdot

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
        u: Left directions, (L, P, m).
        v: Right directions, (L, P, n).
        p: Averages of −G v, (L, P, m).
        q: Averages of −uᵀ G, (L, P, n).
        sizes: Singular values σ where the directions are singular ones, (L, P); zeros elsewhere.
        gate: Zeros, (L, S).
        answers: Gradients of all u, v and gate, one after the other, (entries,): processes add them up at once.
        b: The slots at the last `note_moves`, (L, S, m).
        a: Likewise, (L, S, n).
        move_b: Δb, (L, S, m).
        move_a: Δa, (L, S, n).
        per_norm: 1 / ‖Δ_k‖_F, (L, S); NaN where there is no move, or none is known.
    """

    _FOLLOWED = ("u", "v", "p", "q", "sizes")
    _LOOKED_AT = ("b", "a", "move_b", "move_a")
    KEPT = _FOLLOWED + _LOOKED_AT
    """What a checkpoint holds; the rest follows from it."""
    _LEFT = ("u", "p", "b", "move_b")

    def __init__(self, rows: Sequence[int], m: int, n: int, slots: int, like: Tensor) -> None:
        """Begin with zeros that are like `like` (any shape)."""
        self.rows = [*rows]
        self._like = like
        count = len(self.rows)
        self.gate = self._zeros(count, slots)
        self.b, self.a = self._zeros(count, slots, m), self._zeros(count, slots, n)
        self.move_b, self.move_a = torch.zeros_like(self.b), torch.zeros_like(self.a)
        self.per_norm = self._zeros(count, slots)
        self._used = 0
        self._aside: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._beneath_b, self._beneath_a = self._zeros(count, 0, m), self._zeros(count, 0, n)
        self._settle_spans()
        self.follow(self._zeros(count, 0, m), self._zeros(count, 0, n))

    def stay_off(self, b: Tensor, a: Tensor) -> None:
        """Keep directions off components that lie beneath, b (L, m, K) and a (L, K, n), padded with zeros."""
        self._beneath_b, self._beneath_a = b.mT.to(self._like), a.to(self._like)
        self._settle_spans()

    def _zeros(self, *shape: int) -> Tensor:
        return self._like.new_zeros(shape)

    # What is asked ---------------------------------------------------------------------------------------------------

    def follow(self, u: Tensor, v: Tensor, sizes: Tensor | None = None) -> None:
        """Ask about these directions from now on.

        Args:
            u: Left directions, (L, P, m).
            v: Right directions, (L, P, n).
            sizes: Singular values, (L, P), where they are singular directions.
        """
        self.u, self.v = u.to(self._like).contiguous(), v.to(self._like).contiguous()
        self.p, self.q = torch.zeros_like(self.u), torch.zeros_like(self.v)
        self.sizes = self._zeros(*v.shape[:2]) if sizes is None else sizes.to(self._like)
        self.answers = self._zeros(sum(leaf.numel() for leaf in self._leaves))

    def set_aside(self) -> None:
        """Keep what is followed now for `take_up`."""
        self._aside = self.u, self.v, self.p, self.q

    def take_up(self) -> None:
        """Follow what was set aside, if anything, from where it was."""
        if self._aside is not None:
            (u, v, p, q), self._aside = self._aside, None
            self.follow(u, v)
            self.p, self.q = p, q

    @property
    def _leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.u, self.v, self.gate

    def leaves_of(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return u (m, P), v (P, n) and gate (S,) of one matrix as leaves that share the memory of these."""
        u, v, gate = (tensor[row].detach() for tensor in self._leaves)
        return u.mT.requires_grad_(), v.requires_grad_(), gate.requires_grad_()

    def answers_by_row(self, answers: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Return what a tensor like `answers`, (entries,), says of the leaves of every row, in their shapes; views."""
        gu, gv, gate = self._parts(answers)
        return zip(gu.mT.unbind(), gv.unbind(), gate.unbind(), strict=True)

    def _parts(self, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parts of a tensor like `answers`, (entries,): G v (L, P, m), uᵀ G (L, P, n) and slopes (L, S)."""
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
        gu, gv, gate = self._parts(answers)
        is_known = (self._are_finite(answers) & bool(self.v.shape[1]))[:, None]
        z, own = -vecdot(self.u, gu), -gate * self.per_norm
        z, own = z.where(is_known, torch.nan), own.where(is_known, torch.nan)
        if of_reached:
            is_reached = (gu.flatten(1).any(1) | gv.flatten(1).any(1))[:, None]
            z, own = z.where(is_reached, -torch.inf), own.where(is_reached, torch.nan)
        return z, own

    def _are_finite(self, answers: Tensor) -> Tensor:
        """Return which matrices have finite answers, (L,), in `answers`, shaped (entries,)."""
        # A sum is not finite where an entry is not, and takes a fortieth of the time of asking every entry.
        return torch.stack([part.flatten(1).sum(1) for part in self._parts(answers)]).isfinite().all(0)

    # How directions follow the gradient ------------------------------------------------------------------------------

    def turn(self, answers: Tensor, memory: float) -> None:
        """Let the directions follow a gradient, where it is finite; see the head of this file.

        Args:
            answers: Of the shape of `self.answers`, with any number of directions P.
            memory: β.
        """
        gu, gv, _ = self._parts(answers)
        is_known = self._are_finite(answers)[:, None, None]
        for average, part in ((self.p, gu), (self.q, gv)):
            average.mul_(memory).sub_(part.where(is_known, 0.0), alpha=1 - memory)
        orthonormalise(_off(self.p, self._span_b), self.u)
        orthonormalise(_off(self.q, self._span_a), self.v)

    def broken_rows(self) -> list[int]:
        """Return the rows of whose averages one is not finite, and would be so for good; the device is asked."""
        sums = torch.stack([self.p.flatten(1).sum(1), self.q.flatten(1).sum(1)])
        return [row for row, is_finite in enumerate(sums.isfinite().all(0).tolist()) if not is_finite]

    def forget(self, row: int, direction: int) -> None:
        """Begin anew to average gradients for one direction of one matrix."""
        self.p[row, direction], self.q[row, direction] = 0, 0

    # What the slots span, and how they move --------------------------------------------------------------------------

    def note_moves(self, b: Tensor, a: Tensor, known: Tensor, scale: float) -> None:
        """Take the slots as they are now; how they differ from the last ones is their move.

        Args:
            b: Slots of all matrices up to the last that any of them has in use, transposed, (L, K, m).
            a: Likewise, (L, K, n).
            known: Whether a slot holds the component that it held last time, (L, K).
            scale: s.
        """
        before, self._used = self._used, b.shape[1]
        for kept, move, now in ((self.b, self.move_b, b), (self.a, self.move_a, a)):
            kept, move, now = kept[:, : self._used], move[:, : self._used], now.to(self._like)
            move.copy_(torch.where(known[:, :, None], now - kept, 0.0))
            kept.copy_(now)
        for name in self._LOOKED_AT:
            getattr(self, name)[:, self._used : before] = 0
        self.settle(scale)

    def settle(self, scale: float) -> None:
        """Derive the norms of the moves and the spans from the slots and their moves.

        ‖s (Δb a + b Δa)‖² = s² (‖Δb‖² ‖a‖² + ‖b‖² ‖Δa‖² + 2 ⟨Δb, b⟩ ⟨a, Δa⟩) for one column and row.
        """
        b, a, move_b, move_a = (getattr(self, name)[:, : self._used] for name in self._LOOKED_AT)
        squares = vecdot(move_b, move_b) * vecdot(a, a) + vecdot(b, b) * vecdot(move_a, move_a)
        squares += 2 * vecdot(move_b, b) * vecdot(move_a, a)
        norms = scale * squares.clamp_min(0).sqrt()
        self.per_norm.fill_(torch.nan)
        self.per_norm[:, : self._used] = torch.where(norms > 0, 1 / norms, torch.nan)
        self._settle_spans()

    def _settle_spans(self) -> None:
        self._span_b = _orthonormal_basis(torch.cat([self.b[:, : self._used], self._beneath_b], 1))
        self._span_a = _orthonormal_basis(torch.cat([self.a[:, : self._used], self._beneath_a], 1))

    # Saved and restored ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds, copies by name, left factors upright; of slots and moves those in use."""
        kept = {name: getattr(self, name) for name in self._FOLLOWED}
        kept |= {name: getattr(self, name)[:, : self._used] for name in self._LOOKED_AT}
        return {
            name: self._turned(name, tensor).clone(memory_format=torch.contiguous_format)
            for name, tensor in kept.items()
        }

    def restore(self, tensors: dict[str, Tensor], scale: float) -> None:
        """Restore `state()`, tensors of any shapes by name; `scale` is s."""
        tensors = {name: self._turned(name, tensor) for name, tensor in tensors.items()}
        self.follow(tensors["u"], tensors["v"], tensors["sizes"])
        self.p.copy_(tensors["p"])
        self.q.copy_(tensors["q"])
        self._used = tensors["a"].shape[1]
        for name in self._LOOKED_AT:
            getattr(self, name).zero_()[:, : self._used] = tensors[name]
        self.settle(scale)

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of that name turned from upright to rows, or back: (L, m, K) or (L, K, m)."""
        return tensor.mT if name in self._LEFT else tensor


def singular_directions(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return uᵀ (L, S, m), σ (L, S) and v (L, S, n) of b a, for bᵀ (L, S, m) and a (L, S, n); the largest σ first.

    A σ that is rounding error is 0: where components lie in the span of others, there are fewer directions.
    """
    left, right = torch.linalg.qr(b.mT.double()), torch.linalg.qr(a.mT.double())
    u, sizes, vt = torch.linalg.svd(left[1] @ right[1].mT)
    least = torch.finfo(b.dtype).eps * sizes.shape[1] * sizes[:, :1]
    sizes = sizes.masked_fill(sizes <= least, 0.0)
    return (left[0] @ u).mT.to(b), sizes.to(b), (vt @ right[0].mT).to(b)


def orthonormalise(rows: Tensor, directions: Tensor) -> None:
    """Write the orthonormalised rows (L, P, n) into `directions`, in their order; leave those that have no length."""
    for row in range(rows.shape[1]):
        free = rows[:, row]
        for earlier in range(row):
            other = directions[:, earlier]
            free = torch.addcmul(free, vecdot(free, other)[:, None], other, value=-1)
        norm = torch.linalg.vector_norm(free, dim=1, keepdim=True)
        directions[:, row] = torch.where(norm > 0, free / norm, directions[:, row])


def _off(rows: Tensor, basis: Tensor) -> Tensor:
    """Return rows (L, P, n) without what lies in the span of an orthonormal basis, (L, R, n)."""
    return torch.baddbmm(rows, rows @ basis.mT, basis, alpha=-1)


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
