"""One target module: the frozen base layer, its finished components, and the pair in training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, NonFiniteError, bad_value
from ..sharding import Partition, gathered, is_partitioned, is_sharded, local, partition_of, write
from .finished import CHUNK, FinishedComponents
from .fused import Update, add_update, autocast_dtype, linear_with_update
from .watched import are_plain_linear, is_hooked, is_traced, returns_its_own


class AromaLinear(LoraLinear):
    """A Linear, Conv1D or bitsandbytes layer whose low-rank update grows.

    .. code-block:: text

        y = W0 x  +  B A x            finished components, frozen, scale folded into B    B (m, R), A (R, n)
                  +  s · b a drop(x)  the component in training, s = lora_alpha / r       b (m, r), a (r, n)

    (section 3.1). W0 is never written. A frozen module has b = a = 0 and costs its finished components only.

    `scaling` is the scale that PEFT's `set_scale`, `scale_layer` and `rescale_adapter_scale` change for a while; it
    scales the whole update, finished components too. `own_scaling` is s, which merging and saving fold into B.

    `stays_in_graph` is set where the graph must not change: DistributedDataParallel waits in every backward for a
    gradient of each parameter that it found at the start, and a compiled graph is made again when a parameter stops
    requiring one. A frozen pair goes on requiring a gradient then, which is zero. The layer skips it all the same, and
    the model's output gives it the gradient (`GraphKeeper`); in a compiled graph it is evaluated as any other.

    Casting the model to 16 bits (`model.to`, `half`, `bfloat16`) leaves components of 32 bits as they are: small
    updates would be rounded away.
    """

    adapter_layer_names = (*LoraLinear.adapter_layer_names, "lora_finished")
    other_param_names = (*LoraLinear.other_param_names, "own_scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        # Before the parent's constructor, which already calls update_layer.
        self.frozen_adapters: set[str] = set()  # outer-converged here
        self.own_scaling: dict[str, float] = {}
        self.stays_in_graph = False
        super().__init__(base_layer, adapter_name, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Create the pair and the (empty) finished components of an adapter."""
        if "lora_finished" not in self._modules:
            self.lora_finished = nn.ModuleDict()
        self.lora_finished[adapter_name] = FinishedComponents(self.in_features, self.out_features)
        self.frozen_adapters.discard(adapter_name)  # left by a deleted adapter of that name
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self.own_scaling[adapter_name] = self.scaling[adapter_name]

    # The pair and what is known of it -------------------------------------------------------------------------------

    def pair(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the trainable pair b (m, r) and a (r, n)."""
        return self.lora_B[adapter_name].weight, self.lora_A[adapter_name].weight

    def finished(self, adapter_name: str) -> FinishedComponents:
        """Return the finished components of an adapter."""
        finished: FinishedComponents = self.lora_finished[adapter_name]  # type: ignore[assignment]
        return finished

    def is_frozen(self, adapter_name: str) -> bool:
        """Whether the module is outer-converged: its pair is zero and skipped."""
        return adapter_name in self.frozen_adapters

    def rank(self, adapter_name: str) -> int:
        """Return the rank of the update: finished components, and the pair once it has moved."""
        counts = not self.is_frozen(adapter_name) and bool(self.whole_pair(adapter_name)[0].any())
        return self.finished(adapter_name).rank + (self.r[adapter_name] if counts else 0)

    @torch.no_grad()
    def whole_pair(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return b (m, r) and a (r, n), detached; of a sharded pair a copy, gathered by all ranks together."""
        b, a = gathered(self.pair(adapter_name))
        return b.detach(), a.detach()

    @torch.no_grad()
    def components(self, adapter_name: str, pair: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the whole update as B (m, R) with the scale folded in and A (R, n), the pair last if it has moved.

        Args:
            adapter_name: Name of the adapter.
            pair: Its whole pair where that is known; otherwise all ranks gather a sharded one together.
        """
        finished = self.finished(adapter_name)
        B = self._scaled(finished.B, adapter_name)
        if pair is None and self.is_frozen(adapter_name):
            return B, finished.A
        b, a = self.whole_pair(adapter_name) if pair is None else pair
        if not b.any():
            return B, finished.A
        B = torch.cat([B.to(b), b * self.scaling[adapter_name]], dim=1)
        return B, torch.cat([finished.A.to(a), a], dim=0)

    def _scaled(self, B: Tensor, adapter_name: str) -> Tensor:
        """Scale left factors of finished components by what PEFT scales the adapter by for a while, mostly 1."""
        scale, own = self.scaling[adapter_name], self.own_scaling[adapter_name]
        return B if scale == own else B * (scale / own)

    # The steps of Algorithm 1 that change a module ------------------------------------------------------------------

    @torch.no_grad()
    def merge_pair(self, adapter_name: str, pair: tuple[Tensor, Tensor] | None = None) -> None:
        """Merge: the pair, given whole or gathered by all ranks together, becomes a finished component."""
        b, a = self.whole_pair(adapter_name) if pair is None else pair
        # Its own scale: one that PEFT has set for a while goes on scaling the component from outside.
        self.finished(adapter_name).append(b * self.own_scaling[adapter_name], a)

    @torch.no_grad()
    def start_pair(self, adapter_name: str, a: Tensor, b: Tensor | None = None) -> None:
        """Reinit: put `a` (r, n) and `b` (m, r), zero by default, into the pair; a stale gradient is dropped."""
        pair_b, pair_a = self.pair(adapter_name)
        write(pair_a, a)
        write(pair_b, a.new_zeros(self.out_features, a.shape[0]) if b is None else b)
        pair_a.grad = pair_b.grad = None

    @torch.no_grad()
    def freeze(self, adapter_name: str) -> None:
        """Freeze for good: the pair is dropped, and only the finished components remain."""
        self.frozen_adapters.add(adapter_name)
        b, a = self.pair(adapter_name)
        r, like = self.r[adapter_name], local(a)
        write(b, like.new_zeros(self.out_features, r))
        write(a, like.new_zeros(r, self.in_features))
        for parameter in (b, a):
            parameter.grad = None
            parameter.requires_grad_(self.stays_in_graph)

    def stay_in_graph(self, adapter_name: str, stays: bool, growths: int | None = None) -> None:
        """Settle whether a frozen pair goes on requiring a gradient, for one frozen already as well.

        Args:
            adapter_name: The adapter that grows.
            stays: Whether it does.
            growths: Components of rank r that the storage of finished ones takes, from now on, before it is made anew
                and a compiled graph with it; never fewer than 8 of rank 1. None: nothing is stored in advance.
        """
        self.stays_in_graph = stays
        if growths is not None:
            rows = growths * self.r[adapter_name]
            self.finished(adapter_name).reserve(-(-rows // CHUNK) * CHUNK, like=local(self.pair(adapter_name)[1]))
        if self.is_frozen(adapter_name):
            for parameter in self.pair(adapter_name):
                parameter.requires_grad_(stays)

    def unfreeze(self, adapter_name: str) -> None:
        """Let the pair train again (a restored checkpoint may be older than the freezing)."""
        self.frozen_adapters.discard(adapter_name)
        for parameter in self.pair(adapter_name):
            parameter.requires_grad_(True)

    # What PEFT calls ------------------------------------------------------------------------------------------------

    def weight_matrix(self) -> Tensor | Partition:
        """Return W0 as (m, n); a view, or where the base layer is quantised or offloaded one copy of it.

        Under ZeRO-3 what this rank has of it.

        Raises:
            ConfigError: The weight has no data, and nothing is known to load it.
        """
        base = self.get_base_layer()
        if is_partitioned(base.weight):
            partition = partition_of(base.weight)
            return partition.T if self.fan_in_fan_out else partition
        with align_module_device(base):
            if base.weight.is_meta:
                raise bad_value(
                    "base_layer.weight", "meta", "it has no data; load the model's weights before it is adapted"
                )
            weight = base.weight.detach()
            if self.is_quantised:
                # Not PEFT's dequantize_module_weight, which puts an 8-bit weight without its scales back on a CPU.
                weight = dequantize_bnb_weight(base.weight, getattr(base, "state", None)).detach()
        return weight.T if self.fan_in_fan_out else weight

    @property
    def is_quantised(self) -> bool:
        """Whether the base layer's weight is one of bitsandbytes."""
        weight = self.get_base_layer().weight
        return not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ΔW = B A + s b a in the layout of the base weight, computed in float32 at least."""
        B, A = self.components(adapter)
        precise = torch.promote_types(B.dtype, torch.float32)
        delta = B.to(precise) @ A.to(precise)
        return delta.T if self.fan_in_fan_out else delta

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active and trainable, as PEFT does, but for pairs that are frozen for good."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if self.stays_in_graph:
            return
        for adapter_name in self.frozen_adapters & set(self.lora_A):
            for parameter in self.pair(adapter_name):
                parameter.requires_grad_(False)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into the base weight, adding in float32 so that a weight of lower precision is rounded once.

        Raises:
            ConfigError: The base layer is quantised or sharded and cannot be merged in place.
            NonFiniteError: With `safe_merge`, the merged weight is NaN or infinite; the base weight is left as it was.
        """
        base = self.get_base_layer()
        self.refuse_merge_if_quantised()
        if is_sharded(base.weight):
            raise ConfigError(
                "base layer: FSDP2 or ZeRO-3 shares its weight out, and no rank can merge into it; save the adapter "
                "and merge in one process (aroma export --merged)"
            )
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.lora_A:
                continue
            merged = (base.weight + self.get_delta_weight(adapter_name)).to(base.weight.dtype)
            if safe_merge and not merged.isfinite().all():
                raise NonFiniteError(
                    f"adapter_name={adapter_name!r}: NaN or infinity in the merged weight; nothing was merged into "
                    "this layer, use an earlier checkpoint"
                )
            base.weight.data = merged
            self.merged_adapters.append(adapter_name)

    def refuse_merge_if_quantised(self) -> None:
        """Raise where `merge` cannot merge in place.

        Raises:
            ConfigError: The base layer is quantised.
        """
        if self.is_quantised:
            raise ConfigError(
                f"base layer {type(self.get_base_layer()).__name__} is quantised: merging in place would round the "
                "update away; load the base model in 16 or 32 bits and merge there (aroma export --merged)"
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `x` (…, n) to (…, m); see the class for the equation."""
        self._check_forward_args(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ConfigError("adapter_names: mixed batches need the saved adapter; load it with PeftModel instead")
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [] if self.disable_adapters or self.merged else [*filter(self._adds, self.active_adapters)]
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        if is_traced(x) or not all(map(self._pair_is_plain, adapters)):
            return self._composed(x, adapters, *args, **kwargs)
        updates = [self._update(adapter_name) for adapter_name in adapters]
        if len(updates) == 1 and not args and not kwargs and self._can_replace_base(x, updates[0]):
            base = self.get_base_layer()
            weight = base.weight.T if self.fan_in_fan_out else base.weight
            return linear_with_update(x, weight, base.bias, updates[0])
        flat = x.reshape(-1, x.shape[-1])
        result = self._writable_result(flat, x, *args, **kwargs)
        for update in updates:
            result = add_update(result, flat, update)
        return result.view(*x.shape[:-1], result.shape[-1])

    def _adds(self, adapter_name: str) -> bool:
        """Whether an adapter adds anything to the base layer's result."""
        if adapter_name not in self.lora_A:
            return False
        return self._evaluates_pair(adapter_name) or self.finished(adapter_name).padded[1].shape[0] > 0

    def _evaluates_pair(self, adapter_name: str) -> bool:
        """Whether the pair takes part: a frozen one does in a compiled graph, which freezing then leaves as it is."""
        return (self.stays_in_graph and torch.compiler.is_compiling()) or not self.is_frozen(adapter_name)

    def _pair_is_plain(self, adapter_name: str) -> bool:
        """Whether nobody would miss a call of the modules that hold the pair."""
        return self.is_frozen(adapter_name) or are_plain_linear(self.lora_A[adapter_name], self.lora_B[adapter_name])

    def _update(self, adapter_name: str) -> Update:
        b, a = self.pair(adapter_name) if self._evaluates_pair(adapter_name) else (None, None)
        dropout = self.lora_dropout[adapter_name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        B, A = self.finished(adapter_name).padded
        return Update(A, self._scaled(B, adapter_name), a, b, self.scaling[adapter_name], p)

    def _can_replace_base(self, x: Tensor, update: Update) -> bool:
        """Whether the base layer is a plain frozen matmul that nobody listens to, in one dtype with all the rest."""
        base = self.base_layer
        if type(base) not in (nn.Linear, Conv1D) or is_hooked(base):
            return False
        for parameter in (base.weight, base.bias):
            if parameter is not None and (parameter.requires_grad or type(parameter) is not nn.Parameter):
                return False
        return autocast_dtype(x) is not None or x.dtype == base.weight.dtype == update.A.dtype == update.dtype

    def _writable_result(self, flat: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's result, (tokens, m), as a tensor that belongs to nobody else."""
        base = self.base_layer
        if args or kwargs or not returns_its_own(base):
            result = base(x, *args, **kwargs)
            return result.reshape(-1, result.shape[-1]).clone()
        # Flat: of a batch of sequences nn.Linear returns a view, and writing to views is slow.
        result = base(flat)
        return result.clone() if result._is_view() else result

    def _composed(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The same in operations of PyTorch alone, which a compiler or a function transform can take apart."""
        result = self.base_layer(x, *args, **kwargs)
        for adapter_name in adapters:
            update = self._update(adapter_name)
            inputs = self._cast_input_dtype(x, update.dtype)
            if update.A.shape[0]:
                A, B = update.A.to(update.dtype), update.B.to(update.dtype)
                result = result + F.linear(F.linear(inputs, A), B).to(result.dtype)
            if update.a is not None:
                h = self.lora_A[adapter_name](self.lora_dropout[adapter_name](inputs))
                result = result + (self.lora_B[adapter_name](h) * update.scale).to(result.dtype)
        return result

    # Devices and precisions ------------------------------------------------------------------------------------------

    def onload_pair(self, adapter_name: str) -> None:
        """Put a new pair, without data, where an offloaded base layer computes.

        PEFT has sent it after the weight, which is on the meta device.
        """
        device = self._execution_device
        if device is not None and self.pair(adapter_name)[0].is_meta:
            for modules in (self.lora_A, self.lora_B, self.lora_finished):
                modules[adapter_name].to_empty(device=device)

    @property
    def _execution_device(self) -> torch.device | None:
        """Where an offloaded base layer computes; None where it is not offloaded."""
        base = self.get_base_layer()
        return torch.device(base._hf_hook.execution_device) if has_offloaded_params(base) else None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device=device or self._execution_device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AromaLinear:
        if recurse:
            for name, child in self.named_children():
                child._apply(fn if name == "base_layer" else partial(_without_rounding, fn))
        super()._apply(fn, recurse=False)
        return self

    def __repr__(self) -> str:
        """Mark the layer as ours in a printed model."""
        return nn.Module.__repr__(self).replace("AromaLinear(", "aroma.AromaLinear(", 1)


def _without_rounding(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply what `Module.to` and its like apply to every tensor, but for a cast from 32 bits or more to fewer."""
    result = fn(tensor)
    if tensor.is_floating_point() and tensor.itemsize >= 4 > result.itemsize:
        return tensor.to(result.device)
    return result
