"""Parameters whose optimizer DeepSpeed's ZeRO has shared out: where this rank holds what of them, and how to write it.

ZeRO-1 and ZeRO-2 keep every parameter whole on all ranks; ZeRO-3 keeps a range of its entries, row by row, on each,
and whole ones only while they are used. The base optimizer holds flat tensors, float32 copies of such ranges of many
parameters one after the other, and after a step ZeRO overwrites the parameters with them. So whatever is written into
a parameter is written into its range of the flat tensor too, and its moments are a range of theirs.

Nothing is imported from DeepSpeed: what it shares out bears its marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import bad_value

_KNOWN = frozenset({"DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"})
"""The optimizers of ZeRO-1 and ZeRO-2, and of ZeRO-3, by name."""

_LAUNCH = "see docs/distributed.md for what AROMA trains under"


@dataclass(frozen=True)
class Range:
    """The entries of a parameter that this rank holds, counted row by row.

    Attributes:
        shape: Shape of the whole parameter.
        start: First entry.
        stop: Entry behind the last one; `start` where the rank holds none.
        flat: The tensor of the base optimizer that holds them.
        offset: Their place in it.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the entries in a tensor laid out as `self.flat`, sharing its memory."""
        return flat.detach()[self.offset : self.offset + self.stop - self.start]

    def pick(self, values: Tensor) -> Tensor:
        """Return the entries of a whole tensor."""
        return values.reshape(-1)[self.start : self.stop]


@dataclass(frozen=True)
class Partition:
    """A range of the entries of a matrix, which is all that this rank has of it under ZeRO-3.

    Attributes:
        values: The entries from `start` on, row by row, one after the other.
        start: Number of the first.
        shape: Shape of the whole matrix as it is stored.
        transposed: Whether what is meant is the transpose.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def T(self) -> Partition:
        """The transpose."""
        return Partition(self.values, self.start, self.shape, not self.transposed)

    def blocks(self) -> Iterator[tuple[Tensor, slice, slice]]:
        """Return the rectangles that the range consists of, at most three, each with its rows and columns."""
        width, place, left = self.shape[1], self.start, self.values
        while len(left):
            row, column = divmod(place, width)
            # To the end of a row that was begun; then as many whole rows as there are; then what is left.
            rows = 0 if column else len(left) // width
            count = rows * width or min(width - column, len(left))
            block, left = left[:count].view(rows or 1, -1), left[count:]
            where = slice(row, row + block.shape[0]), slice(column, column + block.shape[1])
            yield (block.T, *where[::-1]) if self.transposed else (block, *where)
            place += count


# What is shared out --------------------------------------------------------------------------------------------------


def is_zero(optimizer: Any) -> bool:
    """Whether `optimizer` is one that DeepSpeed made."""
    return any(kind.__name__ in ("ZeROOptimizer", "DeepSpeedOptimizer") for kind in type(optimizer).__mro__)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has shared a parameter out."""
    return hasattr(tensor, "ds_tensor")


def is_flattened(tensor: Tensor) -> bool:
    """Whether the optimizer that trains a parameter holds flat copies of it."""
    optimizer = getattr(tensor, "_z3_optimizer", None)
    if optimizer is not None:  # of all parameters of the model
        return optimizer.get_param_id(tensor) in optimizer.grad_position
    return hasattr(tensor, "_hp_mapping")


def own_entries(parameter: Any) -> Tensor:
    """Return what this rank holds of a parameter for good: of one that ZeRO-3 shares out a range, without padding."""
    if not is_partitioned(parameter):
        return parameter.detach()
    start, stop = _bounds(parameter)
    return parameter.ds_tensor.detach()[: stop - start]


def partition_of(parameter: Any) -> Partition:
    """Return what this rank holds of a matrix under ZeRO-3."""
    return Partition(own_entries(parameter), _bounds(parameter)[0], tuple(parameter.ds_shape))


def own_range(parameter: Any, optimizer: Any) -> Range | None:
    """Return where this rank's entries of a flattened parameter lie in `optimizer`; None where it has none.

    Args:
        parameter: The parameter.
        optimizer: The optimizer that trains it, as DeepSpeed made it.
    """
    if hasattr(parameter, "_z3_optimizer"):
        index, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start, stop = _bounds(parameter)
        return Range(tuple(parameter.ds_shape), start, stop, optimizer.fp32_partitioned_groups_flat[index], offset)
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    own, place = mapping.lp_fragment_address, mapping.hp_fragment_address
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return Range(tuple(parameter.shape), own.start, own.start + own.numel, flat, place.start)


@torch.no_grad()
def write(parameter: Any, values: Tensor) -> None:
    """Put `values`, the same whole tensor on all ranks, into a parameter and its flat copy; no collective."""
    if not is_partitioned(parameter):
        parameter.data.copy_(values)
    else:
        start, stop = _bounds(parameter)
        own_entries(parameter).copy_(values.reshape(-1)[start:stop])
        if parameter.ds_status.name == "AVAILABLE":  # ZeRO-3 leaves small ones whole where they are used
            parameter.data.copy_(values)
    if not is_flattened(parameter):
        return
    if hasattr(parameter, "_z3_optimizer"):
        own = own_range(parameter, parameter._z3_optimizer)
        assert own is not None, "ZeRO-3 gives every rank a range of every parameter"
        own.of(own.flat).copy_(own.pick(values))
    elif getattr(parameter, "_hp_mapping", None) is not None:
        address = parameter._hp_mapping.lp_fragment_address
        flat = values.reshape(-1)[address.start : address.start + address.numel]
        parameter._hp_mapping.get_hp_fragment().data.copy_(flat)


@torch.no_grad()
def gathered(parameters: Sequence[Any]) -> list[Tensor]:
    """Return partitioned parameters whole, bit for bit, in one collective of all ranks."""
    sizes = [parameter.ds_numel for parameter in parameters]
    widest = reduce(torch.promote_types, [parameter.dtype for parameter in parameters])
    flat = torch.zeros(sum(sizes), dtype=widest, device=parameters[0].device)
    whole = flat.split(sizes)
    for piece, parameter in zip(whole, parameters, strict=True):
        start, stop = _bounds(parameter)
        piece[start:stop] = own_entries(parameter).to(piece)
    dist.all_reduce(flat.view(torch.uint8))  # every byte is of one rank alone; as numbers, -0.0 would become 0.0
    return [piece.view(tuple(p.ds_shape)).to(p.dtype) for piece, p in zip(whole, parameters, strict=True)]


def _bounds(parameter: Any) -> tuple[int, int]:
    """Return the first entry that this rank holds, and the one behind its last; what pads the rest is no entry."""
    length = parameter.ds_tensor.numel()
    start = min(dist.get_rank() * length, parameter.ds_numel)
    return start, min(start + length, parameter.ds_numel)


# Steps ---------------------------------------------------------------------------------------------------------------


class StepHooks:
    """Calls before and after every step of an optimizer of DeepSpeed's, which has no hooks.

    Args:
        optimizer: The optimizer.
        before: Called before a step as torch calls its hooks: with the optimizer, and the arguments of `step`.
        after: Called after a step, likewise.
    """

    def __init__(self, optimizer: Any, before: Callable[..., None], after: Callable[..., None]) -> None:
        self._optimizer = optimizer
        self._step = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            before(optimizer, args, kwargs)
            result = self._step(*args, **kwargs)
            after(optimizer, args, kwargs)
            return result

        optimizer.step = step

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        self._optimizer.step = self._step


# Refusals ------------------------------------------------------------------------------------------------------------


def refuse_other_zero(model: Any, optimizer: Any, processes: int) -> None:
    """Refuse every way of DeepSpeed's to share a model out but ZeRO-1, ZeRO-2 and ZeRO-3 over all processes.

    Args:
        model: The model, unwrapped.
        optimizer: The optimizer that DeepSpeed made.
        processes: Number of processes that train together.

    Raises:
        ConfigError: Naming the optimizer, option or parameter.
    """
    kind = type(optimizer).__name__
    if kind not in _KNOWN:
        raise bad_value(
            "optimizer",
            kind,
            "of DeepSpeed's optimizers AROMA knows those of ZeRO-1, ZeRO-2 and ZeRO-3 for float32 parameters (in bf16 "
            f"ZeRO-1 has another: use stage 2); {_LAUNCH}",
        )
    if getattr(optimizer, "params_in_nvme_and_cpu", False) or getattr(optimizer, "swap_optimizer", False):
        raise bad_value("offload", "nvme", f"AROMA writes to what trains in place, which files cannot take; {_LAUNCH}")
    if getattr(optimizer, "round_robin_gradients", False):
        raise bad_value(
            "round_robin_gradients",
            True,
            "DeepSpeed lays the flat copies out in turns then and notes their places as if it did not, so components "
            "would be written over other parameters; set it to false",
        )
    if getattr(optimizer, "zenflow", False):
        raise bad_value(
            "zenflow",
            True,
            "it stores weights transposed, and keeps moments in an optimizer of its own, which would not be reset; "
            "leave it out",
        )
    if hasattr(optimizer, "backup_optimizer"):
        raise bad_value(
            "offload_optimizer.ratio",
            "below 1",
            "an optimizer of its own steps what is not offloaded, and AROMA resets the moments of one; set it to 1",
        )
    for name, parameter in model.named_parameters():
        if hasattr(getattr(parameter, "ds_tensor", None), "ds_quant_scale") or (
            is_partitioned(parameter) and not parameter.is_floating_point()
        ):
            raise bad_value(
                "model",
                name,
                "ZeRO-3 shares it out in codes, of which no norm can be taken; leave zero_quantized_weights and "
                "zero_quantized_nontrainable_weights out, and use a quantised base with ZeRO-1, ZeRO-2 or DDP",
            )
        if getattr(parameter, "ds_zero_param_process_group", None) is not None:
            raise bad_value("zero_hpz_partition_size", name, f"it has a second copy of shares; set it to 1, {_LAUNCH}")
        group = getattr(parameter, "ds_process_group", None) or getattr(parameter, "_dp_group", None)
        if group is not None and dist.get_world_size(group) != processes:
            raise bad_value(
                "model",
                name,
                f"it is shared out over {dist.get_world_size(group)} of {processes} processes (MiCS, tensor or "
                f"sequence parallelism); {_LAUNCH}",
            )
        if ".lora_" in name and is_flattened(parameter) and parameter.dtype != torch.float32:
            raise bad_value(
                "dtype",
                parameter.dtype,
                f"{name} is not float32, so components would be rounded; leave bf16 and fp16 out of DeepSpeed's "
                "configuration (the Trainer's: out of TrainingArguments) and load the base model in 16 bits, or set "
                "torch_autocast there",
            )
