"""Reinit & Reset (Algorithm 1): the fresh component, and the optimizer's state of the one that was merged.

Names decide which entries of an optimizer's state are moments, not shapes alone: a tensor shaped like its parameter
may be the iterate of a schedule-free method, and zeroing that would silently wreck a run. How the state is spread over
processes is not known here: see `aroma.sharding.Sharding.optimizer_state`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import ResetError, bad_value
from .sharding import Entries, OptimizerState, sharding_of, unwrapped_optimizer

RESET_KINDS = ("prune", "zero", "none")

_MOMENTS = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"),  # torch Adam, AdamW, NAdam, RAdam, Adamax
        *("momentum_buffer", "square_avg", "grad_avg", "sum", "acc_delta"),  # torch SGD, RMSprop, Adagrad, Adadelta
        *("row_var", "col_var", "variance"),  # torch Adafactor
        *("exp_avg_sq_row", "exp_avg_sq_col"),  # transformers Adafactor
        *("state1", "state2"),  # bitsandbytes
    }
)

_CODEBOOKS = {"state1": ("qmap1", "absmax1"), "state2": ("qmap2", "absmax2")}
"""bitsandbytes: a uint8 moment is qmap[code] · absmax[block]. All parameters share qmap, so it is never written."""

_COUNTS = {"step": 0, "mu_product": 1}
"""Counts of steps, by what they begin with; NAdam's is the product of the momenta so far."""

_SCRATCH = frozenset({"RMS", "unorm_vec"})
"""The optimizer recomputes these at every step, so there is nothing to reset."""


@dataclass(frozen=True)
class _Moment:
    """This rank's entries of one moment.

    Attributes:
        entries: The entries.
        zero: The value among them that stands for zero: a code where the moment is quantised.
        absmax: The scales of the blocks, (blocks,), where the moment is quantised.
    """

    entries: Entries
    zero: float = 0.0
    absmax: Tensor | None = None


def component_generator(seed: int, outer_step: int, module_index: int, purpose: str) -> torch.Generator:
    """Return the CPU generator for one purpose of one module in one outer step.

    It depends on the four arguments only. So every rank and every resumed run draws the same numbers, whatever else
    has used the global generator.

    Args:
        seed: The run's `component_seed`.
        outer_step: Number p ≥ 1 of the outer step.
        module_index: Index of the module in module order.
        purpose: Separates streams, e.g. `"fresh"` and `"reset"`.
    """
    text = f"{seed}/{outer_step}/{module_index}/{purpose}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def fresh_component(
    seed: int,
    outer_step: int,
    module_index: int,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the new a of a module, (r, n), Kaiming-uniform with a = √5: uniform in ±1/√n.

    It is drawn in float32 on the CPU, so its values do not depend on the device.

    Args:
        seed: The run's `component_seed`.
        outer_step: Number p ≥ 1 of the outer step that this component starts.
        module_index: Index of the module in module order.
        shape: (r, n).
        dtype: Dtype of the result.
        device: Device of the result.
    """
    bound = 1 / math.sqrt(shape[1])
    generator = component_generator(seed, outer_step, module_index, "fresh")
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator).to(device=device, dtype=dtype)


@torch.no_grad()
def reset_state(optimizer: Any, param: Tensor, kind: str, prune_ratio: float, generator: torch.Generator) -> None:
    """Reset the optimizer's state of one parameter in place, after its component was merged.

    `"prune"` (section 3.2 of the paper) zeroes a random share of the entries of the moments, the same entries in each,
    and keeps the step count. `"zero"` zeroes the moments and the step count, as if the parameter were new.
    `"none"` changes nothing. A parameter without state has nothing to reset yet.

    Args:
        optimizer: torch's Adam, AdamW, NAdam, RAdam, Adamax, SGD, RMSprop, Adagrad, Adadelta or Adafactor,
            transformers' Adafactor, or a bitsandbytes optimizer of 32 or 8 bits; wrapped by accelerate or not. Under
            DeepSpeed's ZeRO those that keep moments shaped as their parameters.
        param: The parameter (any shape), as the optimizer holds it.
        kind: `"prune"`, `"zero"` or `"none"`.
        prune_ratio: Share of entries that `"prune"` zeroes, in [0, 1].
        generator: CPU generator that chooses the entries.

    Raises:
        ResetError: AROMA cannot reset some of the state; nothing has been changed.
        ConfigError: An unknown `kind`.
    """
    moments = _resettable_moments(optimizer, param, kind)
    if kind == "prune":
        _prune(moments, prune_ratio, generator)
    elif kind == "zero":
        for moment in moments:
            _clear(moment)
        _clear_step(optimizer.state.get(param, {}))


@torch.no_grad()
def forget_moments(optimizer: Any, param: Tensor) -> None:
    """Zero the moments of a frozen parameter (any shape), and its gradient, where `optimizer` goes on stepping it.

    A flat optimizer does: without moments the parameter stays zero. Any other leaves it alone, and so does this.

    Raises:
        ResetError: AROMA cannot reset some of the state; nothing has been changed.
    """
    state = sharding_of(param, optimizer).optimizer_state(optimizer, param)
    if not state.is_flat:
        return
    for moment in _resettable_moments(optimizer, param, "prune"):
        _clear(moment)
    if state.gradient is not None:
        state.gradient.zero_()


def check_resettable(optimizer: Any, param: Tensor, kind: str) -> None:
    """Raise what `reset_state` would raise, and change nothing.

    Check all parameters (any shapes) before the first is reset, so that an error leaves every one unchanged.

    Raises:
        ResetError: AROMA cannot reset some of the state, or `optimizer` does not hold `param`.
        ConfigError: An unknown `kind`.
    """
    _resettable_moments(optimizer, param, kind)


def makes_state_only(optimizer: Any, keywords: Mapping[str, Any]) -> bool:
    """Whether torch takes a step for the sake of the state, as `get_optimizer_state_dict` does where there is none.

    Args:
        optimizer: The optimizer, about to step.
        keywords: What `step` was called with. No loop gives a closure of None by name, and the ranks of a job agree on
            it, as they might not on gradients that are zero.
    """
    return (
        dict(keywords) == {"closure": None}
        and not optimizer.state
        and not any(float(group["lr"]) for group in optimizer.param_groups)
    )


# What can be reset ---------------------------------------------------------------------------------------------------


def _resettable_moments(optimizer: Any, param: Tensor, kind: str) -> list[_Moment]:
    """Return the moments of `param` (any shape) that `kind` resets, or raise what `reset_state` raises."""
    if kind not in RESET_KINDS:
        raise bad_value("reset", kind, "choose 'prune', 'zero' or 'none'")
    sharding = sharding_of(param, optimizer)
    state = sharding.optimizer_state(optimizer, param)
    if state.is_flat and kind == "zero":
        raise _no_own_step(
            optimizer, "the steps of many parameters at once", "train under DistributedDataParallel or FSDP2"
        )
    # The moments of a flat optimizer are needed whatever `kind` is: once the component is frozen, they are zeroed.
    if kind == "none" and not state.is_flat:
        return []
    if state.is_elsewhere:
        # Nothing to reset, but the mask is drawn as on every other rank: later draws depend on it.
        return [_Moment(Entries(param.new_zeros(0), state.shape, lambda whole: whole.reshape(-1)[:0]))]
    if not state.values:
        if sharding.not_held(optimizer, [param]):
            raise _not_held(optimizer, param)
        return []
    _require_known(optimizer, state)
    # A step count per group (apex) also corrects the bias of parameters that go on, so it must not be zeroed. And
    # zeroed moments under an old count would be corrected wrongly.
    if kind == "zero" and "step" not in state.values and any("step" in group for group in optimizer.param_groups):
        raise _no_own_step(optimizer, "steps per parameter group", "use another optimizer")
    # In the order of names: the order in which a loaded state lists its keys must not change the random draws.
    keys = sorted(key for key in state.values if key in _MOMENTS and state.values[key] is not None)
    return [_read_moment(optimizer, state, key) for key in keys]


def _require_known(optimizer: Any, state: OptimizerState) -> None:
    codebooks = {name for key, names in _CODEBOOKS.items() if key in state.values for name in names}
    known = {*_COUNTS} | _MOMENTS | _SCRATCH | codebooks
    for key in sorted(state.values):
        if key not in known:
            raise _refusal(optimizer, state, key, "which AROMA does not know how to reset")
    for name, first in _COUNTS.items():
        count = state.values.get(name, first)
        if not isinstance(count, int | float) and not (isinstance(count, Tensor) and count.numel() == 1):
            raise _refusal(optimizer, state, name, "which is not a step count")


def _read_moment(optimizer: Any, state: OptimizerState, key: str) -> _Moment:
    values = state.values[key]
    entries = state.entries(values)
    if entries is None:
        raise _refusal(optimizer, state, key, "which is neither a plain tensor nor sharded as its parameter is")
    if entries.shape not in _moment_shapes(state.shape):
        raise _refusal(optimizer, state, key, f"which does not fit its parameter of shape {state.shape}")
    if values.is_floating_point():
        return _Moment(entries)
    if type(values) in (Tensor, torch.nn.Parameter) and values.dtype == torch.uint8 and key in _CODEBOOKS:
        return _read_quantised(optimizer, state, key, entries)
    raise _refusal(optimizer, state, key, f"whose dtype {values.dtype} AROMA cannot read")


def _moment_shapes(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Return the shapes of a full moment, and of row and column factors with and without the reduced dimension."""
    rows, columns = shape[:-1], shape[:-2] + shape[-1:]
    return {shape, rows, (*rows, 1), columns, (*shape[:-2], 1, *shape[-1:])}


def _read_quantised(optimizer: Any, state: OptimizerState, key: str, entries: Entries) -> _Moment:
    qmap, absmax = (state.values.get(name) for name in _CODEBOOKS[key])
    if not isinstance(qmap, Tensor) or not isinstance(absmax, Tensor):
        raise _refusal(optimizer, state, key, "which is quantized without block scales (blockwise=False)")
    codes = torch.nonzero(qmap == 0)
    if len(codes) == 0:
        raise _refusal(optimizer, state, key, "whose quantization map has no zero")
    return _Moment(entries, int(codes[0]), absmax)


# Resets --------------------------------------------------------------------------------------------------------------


def _prune(moments: list[_Moment], ratio: float, generator: torch.Generator) -> None:
    # One draw for all moments of a shape. With separate draws a first moment would outlive its second one, and Adam,
    # whose gradient of a is 0 while b is 0, would move that entry by a million times the learning rate.
    # The draw is of the whole shape even where this rank holds a part, so every number of ranks draws alike.
    chosen: dict[tuple[int, ...], Tensor] = {}
    for moment in moments:
        entries = moment.entries
        if entries.shape not in chosen:
            chosen[entries.shape] = torch.rand(entries.shape, generator=generator) < ratio
        mask = entries.pick(chosen[entries.shape]).to(entries.values.device)
        entries.values.masked_fill_(mask, moment.zero)


def _clear(moment: _Moment) -> None:
    moment.entries.values.fill_(moment.zero)
    if moment.absmax is not None:
        moment.absmax.zero_()


def _clear_step(state: dict[str, Any]) -> None:
    for name, first in _COUNTS.items():
        if isinstance(state.get(name), Tensor):
            state[name].fill_(first)
        elif name in state:
            state[name] = first


# Errors --------------------------------------------------------------------------------------------------------------


def _not_held(optimizer: Any, param: Tensor) -> Exception:
    """Return the error of a parameter (any shape) that the optimizer lacks because it trains, e.g., flat shards."""
    return bad_value(
        "param",
        tuple(param.shape),
        f"this component is not held by {_name(optimizer)}, so its state cannot be reset; make the optimizer from "
        "the parameters of the model as it trains, or set reset='none'",
        ResetError,
    )


def _no_own_step(optimizer: Any, how: str, remedy: str) -> Exception:
    return bad_value(
        "reset",
        "zero",
        f"{_name(optimizer)} counts {how}, so the count of one component cannot be zeroed; set reset='prune' or "
        f"'none', or {remedy}",
        ResetError,
    )


def _refusal(optimizer: Any, state: OptimizerState, key: str, why: str) -> ResetError:
    value = state.values.get(key)
    kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
    # Of a flat optimizer the moments of frozen components are zeroed whatever `reset` is.
    without = "" if state.is_flat else ", or reset='none', which leaves it alone"
    return ResetError(
        f"optimizer={_name(optimizer)}: it keeps state {key!r} of {kind}, {why}; use another optimizer, e.g. "
        f"torch.optim.AdamW{without}"
    )


def _name(optimizer: Any) -> str:
    return type(unwrapped_optimizer(optimizer)).__name__
