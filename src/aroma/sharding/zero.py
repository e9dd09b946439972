"""Parameters whose optimizer DeepSpeed's ZeRO shards: which entries this rank holds, and how to write them.

ZeRO-1 and ZeRO-2 keep every parameter whole on all ranks. ZeRO-3 keeps a range of its entries, counted row by row, on
each rank; a parameter is whole only while it is used. The base optimizer holds flat tensors: float32 copies of such
ranges of many parameters, one after the other. After a step ZeRO overwrites the parameters with them. So whatever is
written into a parameter is written into its range of the flat tensor too, and its moments are ranges of flat moments.

Nothing is imported from DeepSpeed. Its parameters and optimizers are known by their attributes; `aroma.compat` lists
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import compat
from ..errors import bad_value
from .processes import is_engine, is_zero, unwrapped, unwrapped_optimizer, world_size
from .replicas import Entries, Measure, OptimizerState, Reduction, Replicas

_STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"
_KNOWN = frozenset({"DeepSpeedZeroOptimizer", _STAGE_3})
"""Class names of the optimizers of ZeRO-1 and ZeRO-2, and of ZeRO-3."""

_LAUNCH = "see docs/distributed.md for what AROMA trains under"


@dataclass(frozen=True)
class Range:
    """Where this rank holds its entries of a parameter, counted row by row.

    Attributes:
        shape: Shape of the whole parameter.
        start: First entry.
        stop: One past the last entry.
        flat: The tensor of the base optimizer that holds them, one-dimensional.
        offset: Where they begin in `flat`.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the entries, shaped (stop - start,), in a tensor laid out as `self.flat`; they share its memory."""
        return flat.detach()[self.offset : self.offset + self.stop - self.start]

    def pick(self, whole: Tensor) -> Tensor:
        """Return the entries, (stop - start,), of a whole tensor of `shape`."""
        return whole.reshape(-1)[self.start : self.stop]


@dataclass(frozen=True)
class Partition:
    """This rank's range of the entries of a matrix under ZeRO-3.

    Attributes:
        values: The entries, one-dimensional, row by row.
        start: Index of the first entry.
        shape: Shape of the whole matrix as it is stored.
        transposed: Whether the matrix that is meant is the transpose.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]
    transposed: bool = False

    def flatten(self, start_dim: int) -> Partition:
        """Return the range as one of a tensor whose dimensions from `start_dim` are one: entries keep their places."""
        kept = self.shape[:start_dim]
        return Partition(self.values, self.start, (*kept, math.prod(self.shape[start_dim:])), self.transposed)

    @property
    def T(self) -> Partition:
        """The transpose."""
        return Partition(self.values, self.start, self.shape, not self.transposed)

    def blocks(self) -> Iterator[tuple[Tensor, slice, slice]]:
        """Yield the rectangles that make up the range, at most three: block (rows, columns), its rows, its columns."""
        width, position, left = self.shape[1], self.start, self.values
        while len(left):
            row, column = divmod(position, width)
            # First to the end of a row that has begun, then all whole rows, then what is left.
            rows = 0 if column else len(left) // width
            count = rows * width or min(width - column, len(left))
            block, left = left[:count].view(rows or 1, -1), left[count:]
            where = slice(row, row + block.shape[0]), slice(column, column + block.shape[1])
            yield (block.T, *where[::-1]) if self.transposed else (block, *where)
            position += count


class Zero(Replicas):
    """ZeRO-1, -2 and -3; parameters without DeepSpeed's attributes are replicas."""

    has_flat_optimizer = True
    steps_within_backward = True

    # Parameters ------------------------------------------------------------------------------------------------------

    def is_sharded(self, tensor: Tensor) -> bool:
        """Whether ZeRO-3 shards `tensor` (any shape).

        It may hold the whole for a while as well. That is never read, since it may have been rounded on its way.
        """
        return is_partitioned(tensor)

    def own_entries(self, tensor: Any) -> Tensor:
        """Return this rank's range of `tensor` (any shape), one-dimensional, without padding; or the whole tensor."""
        if not is_partitioned(tensor):
            whole: Tensor = tensor.detach()
            return whole
        start, stop = _bounds(tensor)
        own: Tensor = tensor.ds_tensor.detach()[: stop - start]
        return own

    @torch.no_grad()
    def gather(self, tensors: Sequence[Any]) -> list[Tensor]:
        """Return parameters (any shapes) that ZeRO-3 shards whole, bit for bit, in one collective of all ranks."""
        sizes = [parameter.ds_numel for parameter in tensors]
        widest = reduce(torch.promote_types, [parameter.dtype for parameter in tensors])
        flat = torch.zeros(sum(sizes), dtype=widest, device=tensors[0].device)
        whole = torch.split(flat, sizes)
        for piece, parameter in zip(whole, tensors, strict=True):
            start, stop = _bounds(parameter)
            piece[start:stop] = self.own_entries(parameter).to(piece)
        # As bytes, each of which comes from one rank alone: as numbers, -0.0 would become 0.0.
        dist.all_reduce(flat.view(torch.uint8))
        return [piece.view(tuple(p.ds_shape)).to(p.dtype) for piece, p in zip(whole, tensors, strict=True)]

    @torch.no_grad()
    def write(self, parameter: Any, values: Tensor) -> None:
        """Copy `values` into `parameter`, of the same whole shape, and into its flat copy."""
        if not is_partitioned(parameter):
            parameter.data.copy_(values)
        else:
            start, stop = _bounds(parameter)
            self.own_entries(parameter).copy_(values.reshape(-1)[start:stop])
            if parameter.ds_status.name == "AVAILABLE":  # ZeRO-3 leaves small parameters whole where they are used
                parameter.data.copy_(values)
        if not is_flattened(parameter):
            return
        if is_partitioned(parameter):
            own = _own_range(parameter, _z3_optimizer(parameter))
            assert own is not None, "ZeRO-3 gives every rank a range of every parameter"
            own.of(own.flat).copy_(own.pick(values))
        elif getattr(parameter, "_hp_mapping", None) is not None:
            address = parameter._hp_mapping.lp_fragment_address
            flat = values.reshape(-1)[address.start : address.start + address.numel]
            parameter._hp_mapping.get_hp_fragment().data.copy_(flat)

    def matrix(self, weight: Any) -> Any:
        """Return this rank's range of `weight` (m, n) as a `Partition`; the whole weight where it is not sharded."""
        if not is_partitioned(weight):
            return super().matrix(weight)
        return Partition(self.own_entries(weight), _bounds(weight)[0], tuple(weight.ds_shape))

    def measure(self, measure: Measure, W: Any, B: Tensor, A: Tensor) -> tuple[Tensor, Reduction | None]:
        """Measure the rectangles of W (m, n) that this rank holds with their rows of B (m, R) and columns of A (R, n).

        Returns:
            A scalar tensor on the device of B, and over which processes it is to be summed.
        """
        if not isinstance(W, Partition):
            return measure(W, B, A), None
        parts = [measure(block.to(B.device), B[rows], A[:, columns]) for block, rows, columns in W.blocks()]
        value = torch.stack(parts).sum() if parts else measure(*(tensor.new_zeros(0, 0) for tensor in (B, B, A)))
        return value, (value.device, None)

    # The model -------------------------------------------------------------------------------------------------------

    def must_gather(self, parameters: Iterable[Tensor]) -> bool:
        """Whether reading `parameters` (any shapes) takes all ranks: under ZeRO-3."""
        return any(map(is_partitioned, parameters))

    def needs_all_gradients(self, parameters: Iterable[Tensor]) -> bool:
        """Whether every backward must reach all `parameters` (any shapes): ZeRO-1 and ZeRO-2 fail without any."""
        return not self.must_gather(parameters)

    def refuse(self, model: nn.Module, optimizer: Any) -> None:
        """Refuse all of DeepSpeed but ZeRO-1, ZeRO-2 and ZeRO-3 over all processes; do nothing without DeepSpeed.

        Raises:
            ConfigError: Naming the optimizer, option or parameter.
            IncompatibleError: This DeepSpeed has none of the attributes that are read here.
        """
        inner = unwrapped_optimizer(optimizer)
        if is_zero(inner):
            _refuse_other_optimizers(inner)
            for name, parameter in unwrapped(model).named_parameters():
                _refuse_other_parameters(name, parameter)
            _require_attributes(unwrapped(model), inner)
        elif is_engine(model) or type(optimizer).__name__ == "DeepSpeedOptimizerWrapper":
            raise bad_value(
                "optimizer",
                type(inner).__name__,
                "the model is an engine of DeepSpeed, and this is no optimizer that it shards: give engine.optimizer, "
                "and set zero_optimization.stage to 1, 2 or 3",
            )

    # The optimizer ---------------------------------------------------------------------------------------------------

    def not_held(self, optimizer: Any, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return those of `parameters` (any shapes) that `optimizer` neither trains nor holds flat copies of."""
        return [parameter for parameter in super().not_held(optimizer, parameters) if not is_flattened(parameter)]

    def belongs(self, optimizer: Any, parameters: Iterable[Any]) -> None:
        """Remember that `optimizer` trains `parameters` (any shapes): ZeRO-3 says so of the last engine only."""
        inner = unwrapped_optimizer(optimizer)
        if not is_zero(inner):
            return
        for parameter in filter(is_partitioned, parameters):
            parameter.aroma_optimizer = inner

    def changed_at_rest(self, optimizer: Any, parameters: Iterable[Any]) -> list[Tensor]:
        """Return those of `parameters` (any shapes) that `optimizer` holds flat copies of: it steps them all."""
        inner = unwrapped_optimizer(optimizer)
        if not is_zero(inner):
            return []
        if hasattr(inner, "grad_position"):
            known = [one for one in parameters if is_partitioned(one)]  # others were added later
            return [one for one in known if inner.get_param_id(one) in inner.grad_position]
        held = {id(one) for group in getattr(inner, "bit16_groups", ()) for one in group}
        return [one for one in parameters if id(one) in held]

    def optimizer_state(self, optimizer: Any, parameter: Any) -> OptimizerState:
        """Return the ranges of flat moments that `optimizer` keeps for `parameter` (any shape)."""
        if not is_flattened(parameter):
            return super().optimizer_state(optimizer, parameter)
        inner = unwrapped_optimizer(optimizer)
        own = _own_range(parameter, inner)
        if own is None:
            return OptimizerState({}, tuple(parameter.shape), lambda _: None, is_flat=True, is_elsewhere=True)
        held = own

        def entries(value: Tensor) -> Entries | None:
            """Return this rank's entries in a flat tensor; None if its shape is another."""
            if type(value) is not Tensor or not value.is_floating_point() or value.shape != held.flat.shape:
                return None
            return Entries(held.of(value), held.shape, held.pick)

        return OptimizerState(
            inner.optimizer.state.get(own.flat, {}),
            own.shape,
            entries,
            is_flat=True,
            # If offloaded, it is the gradient of the last step that had one.
            gradient=None if own.flat.grad is None else own.of(own.flat.grad),
        )

    def hook_step(self, optimizer: Any, before: Callable[..., None], after: Callable[..., None]) -> StepHooks:
        """Call `before` and `after` around every step of DeepSpeed's optimizer; see `StepHooks`."""
        return StepHooks(unwrapped_optimizer(optimizer), before, after)

    def base_optimizer(self, optimizer: Any) -> Any:
        """Return the torch optimizer of the flat tensors, which DeepSpeed steps once or several times a step."""
        inner = unwrapped_optimizer(optimizer)
        return inner.optimizer if is_zero(inner) else inner


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 shards a parameter (any shape)."""
    return hasattr(tensor, "ds_tensor")


def is_flattened(tensor: Tensor) -> bool:
    """Whether the optimizer that trains a parameter (any shape) holds flat copies of it."""
    optimizer = _z3_optimizer(tensor)
    if optimizer is not None:  # ZeRO-3 marks all parameters of the model, not only those that train
        return optimizer.get_param_id(tensor) in optimizer.grad_position
    return hasattr(tensor, "_hp_mapping")


def _z3_optimizer(parameter: Any) -> Any:
    """Return the optimizer of ZeRO-3 that trains a parameter (any shape), or that marked it last; None without one.

    Every engine marks all parameters of its model, those of adapters that another engine trains, too.
    """
    return getattr(parameter, "aroma_optimizer", getattr(parameter, "_z3_optimizer", None))


def _own_range(parameter: Any, optimizer: Any) -> Range | None:
    """Return where this rank's entries of a flattened parameter (any shape) lie in `optimizer`, if it has any."""
    if is_partitioned(parameter):
        index, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start, stop = _bounds(parameter)
        return Range(tuple(parameter.ds_shape), start, stop, optimizer.fp32_partitioned_groups_flat[index], offset)
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    own, position = mapping.lp_fragment_address, mapping.hp_fragment_address
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return Range(tuple(parameter.shape), own.start, own.start + own.numel, flat, position.start)


def _bounds(parameter: Any) -> tuple[int, int]:
    """Return the first entry that this rank holds, and one past its last; the padding does not count."""
    length = parameter.ds_tensor.numel()
    start = min(dist.get_rank() * length, parameter.ds_numel)
    return start, min(start + length, parameter.ds_numel)


# Steps ---------------------------------------------------------------------------------------------------------------


class StepHooks:
    """Calls around every step of an optimizer of DeepSpeed, which has no hooks: a wrapper of its method `step`.

    An error that leaves `step` removes the hooks first. Whoever wrapped `step` later keeps that wrapper: only the
    outermost one can be taken away, and an inner one merely passes calls on once it is removed.

    Args:
        before: Called before a step as torch calls its hooks: with the optimizer, and the arguments of `step`.
        after: Called after a step, likewise.
    """

    def __init__(self, optimizer: Any, before: Callable[..., None], after: Callable[..., None]) -> None:
        self._optimizer = optimizer
        self._own = vars(optimizer).get("step")  # None: the method of the class
        self._calls: tuple[Callable[..., None], Callable[..., None]] | None = (before, after)
        wrapped = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            if self._calls is None:
                return wrapped(*args, **kwargs)
            before, after = self._calls
            try:
                before(optimizer, args, kwargs)
                result = wrapped(*args, **kwargs)
                after(optimizer, args, kwargs)
            except BaseException:
                self.remove()
                raise
            return result

        step.hooks = self  # type: ignore[attr-defined]
        optimizer.step = step

    def remove(self) -> None:
        """Call nothing any more, and take the wrapper away unless another one lies around it."""
        self._calls = None
        # The wrapper around this one may have been removed earlier, and those inside it too.
        while True:
            hooks = getattr(vars(self._optimizer).get("step"), "hooks", None)
            if not isinstance(hooks, StepHooks) or hooks._calls is not None:
                return
            if hooks._own is None:
                del self._optimizer.step
            else:
                self._optimizer.step = hooks._own


# Refusals ------------------------------------------------------------------------------------------------------------


def _refuse_other_optimizers(optimizer: Any) -> None:
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
            "DeepSpeed then reorders the flat copies but records their positions as if it did not, so components "
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
            "what is not offloaded has an optimizer of its own, and AROMA resets the moments of one; set it to 1",
        )


def _refuse_other_parameters(name: str, parameter: Any) -> None:
    if hasattr(getattr(parameter, "ds_tensor", None), "ds_quant_scale") or (
        is_partitioned(parameter) and not parameter.is_floating_point()
    ):
        raise bad_value(
            "model",
            name,
            "ZeRO-3 shards it in quantised form, of which no norm can be taken; leave zero_quantized_weights and "
            "zero_quantized_nontrainable_weights out, and use a quantised base with ZeRO-1, ZeRO-2 or DDP",
        )
    if getattr(parameter, "ds_zero_param_process_group", None) is not None:
        raise bad_value("zero_hpz_partition_size", name, f"it has a second copy of its shards; set it to 1, {_LAUNCH}")
    group = getattr(parameter, "ds_process_group", None) or getattr(parameter, "_dp_group", None)
    if group is not None and dist.get_world_size(group) != world_size():
        raise bad_value(
            "model",
            name,
            f"it is sharded over {dist.get_world_size(group)} of {world_size()} processes (MiCS, tensor or sequence "
            f"parallelism); {_LAUNCH}",
        )
    if ".lora_" in name and is_flattened(parameter) and parameter.dtype != torch.float32:
        raise bad_value(
            "dtype",
            parameter.dtype,
            f"{name} is not float32, so components would be rounded; leave bf16 and fp16 out of DeepSpeed's "
            "configuration (the Trainer's: out of TrainingArguments) and load the base model in 16 bits, or set "
            "torch_autocast there",
        )


def _require_attributes(model: nn.Module, optimizer: Any) -> None:
    """Raise IncompatibleError where DeepSpeed lacks an attribute that is read above, before training depends on it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if type(optimizer).__name__ == _STAGE_3:
        compat.require_attributes(compat.ZERO_3_OPTIMIZER, optimizer)
        for parameter in trained[:1]:
            compat.require_attributes(compat.ZERO_3_PARAMETER, parameter)
        return
    compat.require_attributes(compat.ZERO_2_OPTIMIZER, optimizer)
    # Those that the optimizer holds come first; the controller refuses the others with a better word.
    for parameter in sorted(trained, key=lambda parameter: not is_flattened(parameter))[:1]:
        compat.require_attributes(compat.ZERO_2_PARAMETER, parameter)
    mappings = (getattr(parameter, "_hp_mapping", None) for parameter in trained)
    for mapping in [mapping for mapping in mappings if mapping is not None][:1]:
        compat.require_attributes(compat.ZERO_2_MAPPING, mapping)
