"""Cheap dropout for the component in training.

Drawing a random number for every input element costs PEFT's LoRA 0.4 of the frozen backbone's time on a CPU. Here
three banks of random zeros and ones are drawn once. Each piece of a mask is the AND of three stretches, one from each
bank, and each starting at a random offset. Three banks of 2^21 offsets give 2^63 masks. A mask depends on its offsets
alone, so the backward pass makes it again instead of keeping it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

Offsets = list[int]
"""Where each piece of a mask starts in each of the three banks, in elements: three numbers per piece."""

_PIECE = 2**21
"""Elements of the longest piece, and the number of offsets that a piece can start at."""
_SEED = 20250405


def draw_offsets(elements: int) -> Offsets:
    """Draw a mask of `elements` from PyTorch's CPU generator, which checkpoints save and recomputation restores."""
    pieces = -(-elements // _PIECE)
    offsets: Offsets = torch.randint(_PIECE, (3 * pieces,), device="cpu").tolist()
    return offsets


def keep_mask(offsets: Offsets, p: float, tokens: int, features: int, like: Tensor) -> Tensor:
    """Return the mask (tokens, features) at `offsets`: 1 where an input is kept, 0 with probability `p`.

    The mask is unscaled; the caller divides by 1 - p. It is a new tensor, which the caller may write to, with the
    dtype and device of `like` (any shape).
    """
    one, two, three = _banks(p, like.device)
    mask = torch.empty(tokens * features, dtype=torch.uint8, device=like.device)
    for number, piece in enumerate(mask.split(_PIECE) if mask.numel() else ()):
        first, second, third = offsets[3 * number : 3 * number + 3]
        size = piece.shape[0]
        torch.bitwise_and(one[first : first + size], two[second : second + size], out=piece)
        piece.bitwise_and_(three[third : third + size])
    return mask.to(like.dtype).view(tokens, features)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _banks(p: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return three banks (2 · 2^21,) of zeros and ones, in each of which a share of exactly (1 - p)^(1/3) is 1."""
    banks = []
    for number in range(3):
        generator = torch.Generator().manual_seed(_SEED + number)
        draws = torch.rand(2 * _PIECE, generator=generator, dtype=torch.float64, device="cpu")
        kept = round((1 - p) ** (1 / 3) * draws.numel())
        keep = draws <= draws.kthvalue(kept).values if kept else torch.zeros_like(draws, dtype=torch.bool)
        banks.append(keep.to(torch.uint8).to(device))
    return banks[0], banks[1], banks[2]
