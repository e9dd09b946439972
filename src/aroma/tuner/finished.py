"""The components of a module that no longer train."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

CHUNK = 8
"""Finished components are stored in chunks of this many rows, so that a compiled graph survives many growths."""

Factors: TypeAlias = tuple[Tensor, Tensor]
"""Left and right factor of a low-rank matrix, (m, R) and (R, n)."""


class FinishedComponents(nn.Module):
    """The components of one module that no longer train: ΔW = B A, with the scale s already folded into B.

    The storage is zero-padded, written in place, and grows in chunks. It is never an inference tensor, which could not
    be trained with later. The state dict holds the `rank` components without padding, so its shapes tell the rank.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.rank = 0
        self._reserved = 0
        # Named as in the state dict: torch's distributed checkpoints match the names of buffers and entries.
        self._buffers["A"], self._buffers["B"] = torch.empty(0, in_features), torch.empty(out_features, 0)

    @property
    def storage_A(self) -> Tensor:
        """A with its padding, (capacity, n)."""
        return self._buffers["A"]  # type: ignore[return-value]

    @property
    def storage_B(self) -> Tensor:
        """B with its padding, (m, capacity)."""
        return self._buffers["B"]  # type: ignore[return-value]

    @property
    def A(self) -> Tensor:
        """Right factors, (R, n)."""
        return self.storage_A[: self.rank]

    @property
    def B(self) -> Tensor:
        """Left factors with the scale folded in, (m, R)."""
        return self.storage_B[:, : self.rank]

    @property
    def padded(self) -> Factors:
        """B (m, K) and A (K, n) as the layer multiplies with them, zero-padded to a multiple of 8 components.

        A compiler gets the whole storage: its shape does not depend on the rank, so growing makes no new graph.
        """
        if torch.compiler.is_compiling():  # asked first: a graph that read the rank would hold for one rank only
            return self.storage_B, self.storage_A
        count = -(-self.rank // CHUNK) * CHUNK
        return self.storage_B[:, :count], self.storage_A[:count]

    def reserve(self, components: int, like: Tensor) -> None:
        """Make room for `components` at once, and later as many again, with dtype and device of `like` (any shape)."""
        self._reserved = -(-components // CHUNK) * CHUNK
        self._grow(self.rank, like)

    @torch.inference_mode(False)
    @torch.no_grad()
    def append(self, B: Tensor, A: Tensor) -> None:
        """Append components `B` (m, k), scale folded in, and `A` (k, n)."""
        new_rank = self.rank + A.shape[0]
        self._grow(new_rank, like=A)
        self.storage_A[self.rank : new_rank] = A
        self.storage_B[:, self.rank : new_rank] = B
        self.rank = new_rank

    @torch.inference_mode(False)
    @torch.no_grad()
    def pop(self, count: int) -> Factors:
        """Remove the last `count` components and return copies of them: (m, count) and (count, n)."""
        kept, B, A = self.rank - count, self.B, self.A
        # Rebuilt, not shortened: the padded shape must be that of a run that never held the popped components.
        self._replace(B[:, :kept], A[:kept])
        return B[:, kept:].clone(), A[kept:].clone()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _grow(self, rank: int, like: Tensor) -> None:
        """Make room for `rank` components, with the dtype and device of `like` (any shape)."""
        chunk = self._reserved or CHUNK
        capacity = max(self._reserved, -(-rank // chunk) * chunk)
        if capacity > len(self.storage_A):
            A, B = like.new_zeros(capacity, self.storage_A.shape[1]), like.new_zeros(len(self.storage_B), capacity)
            A[: self.rank], B[:, : self.rank] = self.A, self.B
            self._buffers["A"], self._buffers["B"] = A, B

    @torch.inference_mode(False)
    def _replace(self, B: Tensor, A: Tensor) -> None:
        """Hold B (m, k) and A (k, n), and nothing else; the storage gets their dtypes and devices."""
        self.rank = 0
        self._buffers["A"], self._buffers["B"] = A.new_empty(0, A.shape[1]), B.new_empty(len(B), 0)
        self.append(B, A)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "A"] = self.A
        # Contiguous: a collective over a view of the padded storage would send the wrong numbers.
        destination[prefix + "B"] = self.B.contiguous()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, _metadata: Any, _strict: bool, missing: list[str], *_: Any
    ) -> None:
        if absent := [prefix + name for name in "AB" if prefix + name not in state_dict]:
            # accelerate takes empty tensors for shared ones, and leaves them out.
            missing.extend(absent if self.rank else ())
            return
        A, B = state_dict[prefix + "A"], state_dict[prefix + "B"]
        if not self.storage_A.is_meta:
            A, B = A.to(self.storage_A.device), B.to(self.storage_B.device)
        self._replace(B, A)


def with_pair(finished: Factors, pair: Factors, scale: float) -> Factors:
    """Return the factors B (m, R) and A (R, n) of a whole update, the scaled pair b (m, r), a (r, n) last if moved."""
    (B, A), (b, a) = finished, pair
    if not b.any():
        return B, A
    return torch.cat([B.to(b), b * scale], dim=1), torch.cat([A.to(a), a], dim=0)
