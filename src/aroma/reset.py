"""Reinit & Reset (Algorithm 1): the fresh component, and the optimizer's state of the one that was merged.

A floating-point state with the shape of its parameter, or of a row or column factor of it, is a moment. How the state
is spread over processes is not known here: see `aroma.sharding.optimizer_state`.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .distributed import unwrapped_optimizer
from .errors import ResetError, bad_value
from .sharding import Entries, OptimizerState, optimizer_state

_CODEBOOKS = {"state1": ("qmap1", "absmax1"), "state2": ("qmap2", "absmax2")}
"""bitsandbytes: a uint8 moment is qmap[code] · absmax[block]. All parameters share qmap, so it is never written."""

_FIRST_COUNTS = {"step": 0, "mu_product": 1}
"""Counts of steps, by what they begin with; NAdam's is the product of the momenta so far."""

_ITERATES = {"z", "ax", "slow_buffer"}
"""Schedule-free, averaging and lookahead methods keep iterates: other weights, those of the merged component."""


class _Moment(NamedTuple):
    """This rank's entries of one moment; what among them stands for zero; the blocks' scales if it is quantised."""

    entries: Entries
    zero: float = 0.0
    absmax: Tensor | None = None

    def clear(self) -> None:
        self.entries.values.fill_(self.zero)
        if self.absmax is not None:
            self.absmax.zero_()


def component_generator(seed: int, outer_step: int, module_index: int, purpose: str) -> torch.Generator:
    """Return the CPU generator for one purpose (`"fresh"`, `"reset"`) of one module in outer step p ≥ 1.

    It depends on the four arguments only, so every rank and every resumed run draws the same numbers.
    """
    text = f"{seed}/{outer_step}/{module_index}/{purpose}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def fresh_component(seed: int, outer_step: int, module_index: int, shape: tuple[int, int]) -> Tensor:
    """Return the new a of a module, of `shape` (r, n), for outer step p ≥ 1; float32, on the CPU.

    It is Kaiming-uniform with a = √5: uniform in ±1/√n.
    """
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(
        -bound, bound, generator=component_generator(seed, outer_step, module_index, "fresh")
    )


@torch.no_grad()
def reset_state(optimizer: Any, param: Tensor, kind: str, prune_ratio: float, generator: torch.Generator) -> None:
    """Reset the optimizer's state of one parameter in place, after its component was merged.

    `"prune"` (section 3.2 of the paper) zeroes a random share of the entries of the moments, the same entries in each,
    and keeps the step count. `"zero"` zeroes the moments and the step count, as if the parameter were new.
    `"none"` changes nothing. A parameter without state has nothing to reset yet.

    Args:
        optimizer: Any that keeps moments as those of torch, transformers or bitsandbytes (32 or 8 bits) do; wrapped by
            accelerate or not, or DeepSpeed's.
        param: The parameter (any shape), as the optimizer holds it.
        kind: `"prune"`, `"zero"` or `"none"`.
        prune_ratio: Share of entries that `"prune"` zeroes, in [0, 1].
        generator: CPU generator that chooses the entries.

    Raises:
        ResetError: Some of the state is no moment; nothing has been changed.
    """
    moments = check_resettable(optimizer, param, kind)
    if kind == "prune":
        _prune(moments, prune_ratio, generator)
    elif kind == "zero":
        for moment in moments:
            moment.clear()
        state = optimizer.state.get(param, {})
        for name in _FIRST_COUNTS.keys() & state.keys():
            first = _FIRST_COUNTS[name]
            state[name] = state[name].fill_(first) if isinstance(state[name], Tensor) else first


def _prune(moments: list[_Moment], ratio: float, generator: torch.Generator) -> None:
    # One draw for all moments of a shape. With separate draws a first moment would outlive its second one, and Adam,
    # whose gradient of a is 0 while b is 0, would move that entry by a million times the learning rate.
    # The draw is of the whole shape even where this rank holds a part, so every number of ranks draws alike.
    chosen: dict[tuple[int, ...], Tensor] = {}
    for entries, zero, _ in moments:
        if entries.shape not in chosen:
            chosen[entries.shape] = torch.rand(entries.shape, generator=generator) < ratio
        entries.values.masked_fill_(entries.pick(chosen[entries.shape]).to(entries.values.device), zero)


@torch.no_grad()
def forget_moments(optimizer: Any, param: Tensor) -> None:
    """Zero the moments of a frozen parameter (any shape), and its gradient, where `optimizer` goes on stepping it.

    A flat optimizer does: without moments the parameter stays zero. Any other leaves it alone, and so does this.

    Raises:
        ResetError: Some of the state is no moment; nothing has been changed.
    """
    state = optimizer_state(optimizer, param)
    if state.is_flat:
        for moment in check_resettable(optimizer, param, "prune"):
            moment.clear()
        if state.gradient is not None:
            state.gradient.zero_()


# Resettable state ----------------------------------------------------------------------------------------------------


def check_resettable(optimizer: Any, param: Tensor, kind: str) -> list[_Moment]:
    """Return the moments of `param` (any shape) that a reset of this `kind` changes, and change nothing.

    Check all parameters before the first is reset, so that an error leaves every one unchanged.

    Raises:
        ResetError: Some of the state is no moment.
    """
    state = optimizer_state(optimizer, param)
    if iterates := sorted(_ITERATES & {*state.values}):
        raise ResetError(
            f"optimizer={type(unwrapped_optimizer(optimizer)).__name__}: it keeps other weights of a parameter, "
            f"{iterates}, which would draw a new component back to the merged one; use e.g. torch.optim.AdamW"
        )
    counts_together = "step" not in state.values and any("step" in group for group in optimizer.param_groups)
    if kind == "zero" and (state.is_flat or (state.values and counts_together)):
        remedy = "it counts the steps of many parameters at once, so one count cannot be zeroed; set reset='prune'"
        raise bad_value("reset", "zero", f"{type(unwrapped_optimizer(optimizer)).__name__}: {remedy}", ResetError)
    # The moments of a flat optimizer are needed whatever `kind` is: once the component is frozen, they are zeroed.
    if kind == "none" and not state.is_flat:
        return []
    # In the order of names: the order in which a loaded state lists its keys must not change the random draws.
    moments = [_read_moment(optimizer, state, key) for key in sorted(state.values)]
    return [moment for moment in moments if moment is not None]


def _read_moment(optimizer: Any, state: OptimizerState, key: str) -> _Moment | None:
    """Return the state `key` as a moment; None if it is a number or a scale, which stays."""
    value = state.values[key]
    is_number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
    if is_number or value is None or key in _FIRST_COUNTS or key.startswith(("qmap", "absmax", "unorm")):
        return None
    entries = state.entries(value) if isinstance(value, Tensor) else None
    if entries is not None and entries.shape in _moment_shapes(state.shape):
        if value.is_floating_point():
            return _Moment(entries)
        qmap, absmax = (state.values.get(name) for name in _CODEBOOKS.get(key, ("", "")))
        if value.dtype == torch.uint8 and isinstance(qmap, Tensor) and isinstance(absmax, Tensor):
            return _Moment(entries, int((qmap == 0).nonzero()[0]), absmax)
    kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
    # Of a flat optimizer the moments of frozen components are zeroed whatever `reset` is.
    without = "" if state.is_flat else ", or reset='none', which leaves it alone"
    raise ResetError(
        f"optimizer={type(unwrapped_optimizer(optimizer)).__name__}: its state {key!r} of {kind} is no moment of a "
        f"parameter of shape {state.shape}; use another optimizer, e.g. torch.optim.AdamW{without}"
    )


def _moment_shapes(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Return the shapes of a full moment, and of row and column factors with and without the reduced dimension."""
    rows, columns = shape[:-1], shape[:-2] + shape[-1:]
    return {shape, rows, (*rows, 1), columns, (*shape[:-2], 1, *shape[-1:])}
