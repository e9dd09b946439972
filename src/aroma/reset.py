"""Reinit & Reset (Algorithm 1): the fresh component, and what becomes of the old one's optimizer state.

Which entries of an optimizer's state are moments is decided by name, not by shape alone: a tensor shaped like its
parameter may as well be the iterate of a schedule-free method, and zeroing that would wreck a run in silence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from .errors import ResetError, bad_value
from .sharding import Range, is_flattened, is_sharded, is_zero, layout, local, own_range, own_rows, unwrapped_optimizer

RESET_KINDS = ("prune", "zero", "none")

_MOMENTS = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),  # torch Adam, AdamW
        *("momentum_buffer", "square_avg", "grad_avg", "sum"),  # torch SGD, RMSprop, Adagrad
        *("row_var", "col_var", "variance"),  # torch Adafactor
        *("exp_avg_sq_row", "exp_avg_sq_col"),  # transformers Adafactor
        *("state1", "state2"),  # bitsandbytes
    }
)

_CODEBOOKS = {"state1": ("qmap1", "absmax1"), "state2": ("qmap2", "absmax2")}
"""bitsandbytes: a uint8 moment is qmap[code] · absmax[block]. The qmap is shared by all parameters: never written."""

_SCRATCH = frozenset({"RMS", "unorm_vec"})
"""Recomputed by the optimizer at every step, so there is nothing to reset."""


@dataclass(frozen=True)
class _Moment:
    """One moment tensor, the value in it that stands for zero, and the block scales of a quantized one.

    Of a sharded moment, `values` are what this rank holds: the entries `own` of the first dimension of `shape`; with
    ZeRO the entries `range` of `shape`, row by row.
    """

    values: Tensor
    zero: float
    absmax: Tensor | None = None
    own: slice | EllipsisType = ...
    shape: tuple[int, ...] = ()
    range: Range | None = None

    def pick(self, chosen: Tensor) -> Tensor:
        """Return what of a mask of `shape` is about `values`."""
        return chosen[self.own] if self.range is None else self.range.pick(chosen)


def component_generator(seed: int, outer_step: int, module_index: int, purpose: str) -> torch.Generator:
    """Return a CPU generator of its own for one purpose of one module in one outer step.

    It depends on the four arguments alone, so every rank and every resumed run draws the same numbers, whatever else
    has used the global generator.

    Args:
        seed: The run's `component_seed`.
        outer_step: Number p ≥ 1 of the outer step.
        module_index: Place of the module in module order.
        purpose: Keeps streams apart, e.g. `"fresh"` and `"reset"`.
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
    """Return the new a of a module, r×n and Kaiming-uniform (a = √5): uniform in ±1/√n.

    Drawn in float32 on the CPU, so that the values do not depend on the device.

    Args:
        seed: The run's `component_seed`.
        outer_step: Number p ≥ 1 of the outer step that this component starts.
        module_index: Place of the module in module order.
        shape: (r, n).
        dtype: Of the result.
        device: Of the result.
    """
    bound = 1 / math.sqrt(shape[1])
    generator = component_generator(seed, outer_step, module_index, "fresh")
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator).to(device=device, dtype=dtype)


@torch.no_grad()
def reset_state(optimizer: Any, param: Tensor, kind: str, prune_ratio: float, generator: torch.Generator) -> None:
    """Reset the optimizer state of one parameter after its component was merged, in place.

    `"prune"` (section 3.2 of the paper) zeroes a random share of the entries of the moments, the same entries in each,
    and keeps the step count. `"zero"` zeroes the moments and the step count, as if the parameter were new.
    `"none"` leaves everything as it is. A parameter without state yet has nothing to reset.

    Args:
        optimizer: torch's Adam, AdamW, SGD, RMSprop (not centered), Adagrad or Adafactor, transformers' Adafactor, or
            a bitsandbytes optimizer of 32 or 8 bits; wrapped by accelerate or not. Under DeepSpeed's ZeRO those that
            keep moments shaped as their parameters.
        param: The parameter, as the optimizer holds it.
        kind: `"prune"`, `"zero"` or `"none"`.
        prune_ratio: Share of entries that `"prune"` zeroes, in [0, 1].
        generator: CPU generator that chooses the entries.

    Raises:
        ResetError: State that is not understood, before anything is modified.
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
    """Zero what a flat optimizer keeps of a flattened parameter: its moments, and the gradient.

    Raises:
        ResetError: State that is not understood, before anything is modified.
    """
    for moment in _resettable_moments(optimizer, param, "prune"):
        _clear(moment)
    own = own_range(param, unwrapped_optimizer(optimizer))
    if own is not None and own.flat.grad is not None:  # offloaded, it is that of the last step that had one
        own.of(own.flat.grad).zero_()


def check_resettable(optimizer: Any, param: Tensor, kind: str) -> None:
    """Raise what `reset_state` would raise, and change nothing.

    For several parameters, call this for all of them first, so that a refusal leaves every one untouched.

    Raises:
        ResetError: State that is not understood, or a parameter that `optimizer` does not hold.
        ConfigError: An unknown `kind`.
    """
    _resettable_moments(optimizer, param, kind)


def _resettable_moments(optimizer: Any, param: Tensor, kind: str) -> list[_Moment]:
    if kind not in RESET_KINDS:
        raise bad_value("reset", kind, "choose 'prune', 'zero' or 'none'")
    inner = unwrapped_optimizer(optimizer)
    if is_zero(inner) and is_flattened(param):
        return _flat_moments(inner, param, kind)
    if kind == "none":
        return []
    state = optimizer.state.get(param, {})
    if not state:
        _require_held(optimizer, param)
        return []
    _require_known(optimizer, state)
    if kind == "zero":
        _require_own_step(optimizer, state)
    # In the order of names: the order in which a loaded state lists its keys must not change the random draws.
    keys = sorted(key for key in state if key in _MOMENTS and state[key] is not None)
    return [_read_moment(optimizer, param, state, key) for key in keys]


def _flat_moments(optimizer: Any, param: Tensor, kind: str) -> list[_Moment]:
    """Return the moments that this rank holds of a parameter which ZeRO trains as a range of a flat tensor."""
    if kind == "zero":
        raise bad_value(
            "reset",
            kind,
            f"{_name(optimizer)} counts the steps of many parameters at once, so one component's count cannot be "
            "zeroed; set reset='prune' or 'none', or train under DistributedDataParallel or FSDP2",
            ResetError,
        )
    own = own_range(param, optimizer)
    if own is None:
        # Nothing to reset, but the mask is drawn as on every other rank: what is drawn next depends on it.
        nothing = Range(tuple(param.shape), 0, 0, param.new_zeros(0), 0)
        return [_Moment(nothing.flat, 0.0, shape=nothing.shape, range=nothing)]
    state = optimizer.optimizer.state.get(own.flat, {})
    if not state:
        return []
    _require_known(optimizer, state)
    keys = sorted(key for key in state if key in _MOMENTS and state[key] is not None)
    for key in keys:
        if type(state[key]) is not Tensor or not state[key].is_floating_point() or state[key].shape != own.flat.shape:
            raise _refusal(optimizer, key, state[key], "which is not laid out as its flat parameters are")
    # Whatever `kind` is: once the component is frozen, they are zeroed.
    return [_Moment(own.of(state[key]), 0.0, shape=own.shape, range=own) for key in keys]


def _require_known(optimizer: Any, state: Mapping[str, Any]) -> None:
    codebooks = {name for key, names in _CODEBOOKS.items() if key in state for name in names}
    known = {"step"} | _MOMENTS | _SCRATCH | codebooks
    for key in sorted(state):
        if key not in known:
            raise _refusal(optimizer, key, state[key], "which AROMA does not know how to reset")
    step = state.get("step", 0)
    if not isinstance(step, int | float) and not (isinstance(step, Tensor) and step.numel() == 1):
        raise _refusal(optimizer, "step", step, "which is not a step count")


def _read_moment(optimizer: Any, param: Tensor, state: Mapping[str, Any], key: str) -> _Moment:
    values = state[key]
    sharded = is_sharded(values) and is_sharded(param) and layout(values) == layout(param)
    if not sharded and type(values) not in (Tensor, torch.nn.Parameter):  # a subclass may be packed
        raise _refusal(optimizer, key, values, "which is neither a plain tensor nor sharded as its parameter is")
    shape = tuple(values.shape)
    if shape not in _moment_shapes(tuple(param.shape)):
        raise _refusal(optimizer, key, values, f"which does not fit its parameter of shape {tuple(param.shape)}")
    if values.is_floating_point():
        return _Moment(local(values), 0.0, shape=shape, own=own_rows(values) if sharded else ...)
    if not sharded and values.dtype == torch.uint8 and key in _CODEBOOKS:
        return _read_quantized(optimizer, state, key)
    raise _refusal(optimizer, key, values, f"whose dtype {values.dtype} AROMA cannot read")


def _moment_shapes(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Return the shapes of a full moment, and of row and column factors with and without the reduced dimension."""
    rows, columns = shape[:-1], shape[:-2] + shape[-1:]
    return {shape, rows, (*rows, 1), columns, (*shape[:-2], 1, *shape[-1:])}


def _read_quantized(optimizer: Any, state: Mapping[str, Any], key: str) -> _Moment:
    qmap, absmax = (state.get(name) for name in _CODEBOOKS[key])
    if not isinstance(qmap, Tensor) or not isinstance(absmax, Tensor):
        raise _refusal(optimizer, key, state[key], "which is quantized without block scales (blockwise=False)")
    codes = torch.nonzero(qmap == 0)
    if len(codes) == 0:
        raise _refusal(optimizer, key, state[key], "whose quantization map has no zero")
    return _Moment(state[key], int(codes[0]), absmax, shape=tuple(state[key].shape))


def _prune(moments: list[_Moment], ratio: float, generator: torch.Generator) -> None:
    # One draw for all moments of a shape. Drawn apart, a first moment would outlive its second one, and Adam, whose
    # gradient of a is 0 while b is 0, would move that entry by a million times the learning rate.
    # Of the whole shape, also where the rank holds a part: all ranks and all numbers of them draw alike.
    chosen: dict[tuple[int, ...], Tensor] = {}
    for moment in moments:
        if moment.shape not in chosen:
            chosen[moment.shape] = torch.rand(moment.shape, generator=generator) < ratio
        moment.values.masked_fill_(moment.pick(chosen[moment.shape]).to(moment.values.device), moment.zero)


def _clear(moment: _Moment) -> None:
    moment.values.fill_(moment.zero)
    if moment.absmax is not None:
        moment.absmax.zero_()


def _clear_step(state: dict[str, Any]) -> None:
    step = state.get("step")
    if isinstance(step, Tensor):
        step.zero_()
    elif step is not None:
        state["step"] = 0


def _require_held(optimizer: Any, param: Tensor) -> None:
    """Raise when `param` has no state because `optimizer` trains something else, e.g. flat shards of it."""
    if not any(held is param for group in optimizer.param_groups for held in group["params"]):
        raise bad_value(
            "param",
            tuple(param.shape),
            f"this component is not held by {_name(optimizer)}, so its state cannot be reset; make the optimizer from "
            "the parameters of the model as it trains, or set reset='none'",
            ResetError,
        )


def _require_own_step(optimizer: Any, state: Mapping[str, Any]) -> None:
    # A step count per group (apex) also corrects the bias of parameters that go on: it must not be zeroed, and zeroed
    # moments under an old count would be corrected wrongly.
    if "step" not in state and any("step" in group for group in optimizer.param_groups):
        raise bad_value(
            "reset",
            "zero",
            f"{_name(optimizer)} counts steps per parameter group, so one component's count cannot be zeroed; set "
            "reset='prune' or 'none', or use another optimizer",
            ResetError,
        )


def _refusal(optimizer: Any, key: str, value: object, why: str) -> ResetError:
    shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
    # A flat one keeps moments of what is frozen, too, which are zeroed whatever `reset` is.
    without = "" if is_zero(unwrapped_optimizer(optimizer)) else "set reset='none', or "
    return ResetError(
        f"optimizer={_name(optimizer)}: it keeps state {key!r} of {shape}, {why}; {without}use another optimizer, "
        "e.g. torch.optim.AdamW"
    )


def _name(optimizer: Any) -> str:
    return type(unwrapped_optimizer(optimizer)).__name__
