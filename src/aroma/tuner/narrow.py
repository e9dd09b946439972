"""Matmuls of many tokens with few components.

On a CPU, BLAS is made for square operands: with two to a hundred components it leaves up to half of the time unused
that the same product takes as a batch of small ones, each of which fits a cache (MKL, AVX-512, one thread and two).
"""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 32
"""Tokens of a small product."""


def narrow_product(x: Tensor, factor: Tensor) -> Tensor:
    """Return `x` (T, n) times `factor` (n, K), both contiguous, as (T, K)."""
    pieces = _pieces(x, factor.shape[1])
    if not pieces:
        return x @ factor
    product = x.new_empty(x.shape[0], factor.shape[1])
    whole = pieces * _PIECE
    torch.bmm(_split(x, pieces), factor.expand(pieces, *factor.shape), out=_split(product, pieces))
    torch.mm(x[whole:], factor, out=product[whole:])
    return product


def add_narrow_product(y: Tensor, h: Tensor, factor: Tensor) -> Tensor:
    """Add `h` (T, K) times `factor` (K, m), contiguous, to `y` (T, m) in place, and return it."""
    pieces = _pieces(y, factor.shape[0])
    if not pieces:
        return y.addmm_(h, factor)
    whole = pieces * _PIECE
    _split(y, pieces).baddbmm_(_split(h, pieces), factor.expand(pieces, *factor.shape))
    if whole < y.shape[0]:
        y[whole:].addmm_(h[whole:], factor)
    return y


def _pieces(tokens: Tensor, components: int) -> int:
    """Return into how many whole pieces `tokens` (T, …) are split; 0 where one product is the better one."""
    if components < 2 or tokens.device.type != "cpu" or tokens.dtype not in (torch.float32, torch.float64):
        return 0
    # What is differentiated once more must be told from its operations, and writing into slices hides them.
    return 0 if torch.is_grad_enabled() else tokens.shape[0] // _PIECE


def _split(tokens: Tensor, pieces: int) -> Tensor:
    """Return the whole pieces of `tokens` (T, k) as a view (pieces, 32, k)."""
    return tokens[: pieces * _PIECE].view(pieces, _PIECE, tokens.shape[1])
