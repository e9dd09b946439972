"""Cheap dropout for the component in training.

Drawing a random number for every input element costs PEFT's LoRA 0.4 of the frozen backbone's time on a CPU. Here a
mask is the AND of three stretches of random bits, each read at a random place of a bank that is drawn once. Three
banks of 2^18 places give 2^54 masks. A mask is a function of its three places alone, so the backward pass makes it
again instead of keeping it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

Places = tuple[int, int, int]
"""Where a mask starts in each of the three banks, in bytes."""

_BLOCK = 2**18
"""Bytes of one independently drawn block of a bank, and the number of places a mask can start at."""
_SEED = 20250405


def draw_places() -> Places:
    """Draw the places of a mask from PyTorch's CPU generator, which checkpoints hold and recomputation restores."""
    first, second, third = torch.randint(_BLOCK, (3,), device="cpu").tolist()
    return first, second, third


def keep_mask(places: Places, p: float, tokens: int, features: int, like: Tensor) -> Tensor:
    """Return the mask (tokens, features) at `places`: 1 where an input is kept, 0 with probability `p`.

    Unscaled: the caller divides by 1 - p. A fresh tensor, which the caller may write to, of the dtype and on the
    device of `like`.
    """
    count = tokens * features
    size = -(-count // 8)
    blocks = 2 ** math.ceil(math.log2(max(1, 1 + size / _BLOCK)))
    one, two, three = (
        bank[place : place + size] for bank, place in zip(_banks(p, blocks, like.device), places, strict=True)
    )
    bits = (one & two).bitwise_and_(three)
    decoded = F.embedding(bits.int(), _decoder(like.dtype, like.device))
    return decoded.view(-1)[:count].view(tokens, features)


@lru_cache(maxsize=8)
def _banks(p: float, blocks: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return three banks of packed bits; a longer bank starts with the bits of a shorter one."""
    first, second, third = (
        torch.cat([_block(p, bank, block) for block in range(blocks)]).to(device) for bank in range(3)
    )
    return first, second, third


@lru_cache(maxsize=256)
def _block(p: float, bank: int, block: int) -> Tensor:
    """Return `_BLOCK` bytes whose bits are 1 with a probability of (1 - p)^(1/3), and exactly so often."""
    generator = torch.Generator().manual_seed(_SEED + 3 * block + bank)
    draws = torch.rand(8 * _BLOCK, generator=generator, dtype=torch.float64, device="cpu")
    kept = round((1 - p) ** (1 / 3) * draws.numel())
    keep = draws <= draws.kthvalue(kept).values if kept else torch.zeros_like(draws, dtype=torch.bool)
    return (keep.view(-1, 8) << torch.arange(8, device="cpu")).sum(dim=1).to(torch.uint8)


@lru_cache(maxsize=16)
def _decoder(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the eight bits of every byte as numbers, (256, 8)."""
    places = torch.arange(8, device=device)
    return ((torch.arange(256, device=device)[:, None] >> places) & 1).to(dtype)
