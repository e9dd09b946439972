"""One target module: the frozen base layer, its finished components, and the pair in training."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, NonFiniteError

CHUNK = 8
"""Finished components are stored in chunks of so many rows, so that a compiled graph survives many growths."""


class FinishedComponents(nn.Module):
    """The components of one module that no longer train: ΔW = B A, with the scale s already folded into B.

    The storage grows in chunks of 8 components, zero-padded, and is written in place. The state dict holds exactly
    the `rank` components there are, so its shapes tell the rank.

    Args:
        in_features (`int`): n.
        out_features (`int`): m.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.rank = 0
        self.register_buffer("storage_A", torch.empty(0, in_features))
        self.register_buffer("storage_B", torch.empty(out_features, 0))

    storage_A: Tensor
    storage_B: Tensor

    @property
    def capacity(self) -> int:
        """Components that the storage holds, zero padding included."""
        return self.storage_A.shape[0]

    @property
    def A(self) -> Tensor:
        """Right factors, (R, n)."""
        return self.storage_A[: self.rank]

    @property
    def B(self) -> Tensor:
        """Left factors with the scale folded in, (m, R)."""
        return self.storage_B[:, : self.rank]

    @torch.no_grad()
    def append(self, B: Tensor, A: Tensor) -> None:
        """Add components `B` (m, k), scale folded in, and `A` (k, n) behind the ones there are."""
        new_rank = self.rank + A.shape[0]
        self._reserve(new_rank, like=A)
        self.storage_A[self.rank : new_rank] = A
        self.storage_B[:, self.rank : new_rank] = B
        self.rank = new_rank

    @torch.no_grad()
    def pop(self, count: int) -> tuple[Tensor, Tensor]:
        """Remove the last `count` components and return copies of them: (m, count) and (count, n)."""
        kept = self.rank - count
        B, A = self.B, self.A
        # Rebuilt, not shortened: the padded shape must be that of a run which never held the popped components.
        self._clear(like_A=A, like_B=B)
        self.append(B[:, :kept], A[:kept])
        return B[:, kept:].clone(), A[kept:].clone()

    def forward(self, x: Tensor) -> Tensor:
        """Return B A x for `x` (…, n), as (…, m). The zero padding takes part and adds nothing."""
        return F.linear(F.linear(x, self.storage_A), self.storage_B)

    def _reserve(self, rank: int, like: Tensor) -> None:
        capacity = -(-rank // CHUNK) * CHUNK
        if capacity <= self.capacity:
            return
        A = like.new_zeros(capacity, self.storage_A.shape[1])
        B = like.new_zeros(self.storage_B.shape[0], capacity)
        A[: self.rank] = self.A
        B[:, : self.rank] = self.B
        self.storage_A, self.storage_B = A, B

    def _clear(self, like_A: Tensor, like_B: Tensor) -> None:
        self.rank = 0
        self.storage_A = like_A.new_empty(0, like_A.shape[1])
        self.storage_B = like_B.new_empty(like_B.shape[0], 0)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "A"] = self.A
        destination[prefix + "B"] = self.B

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing = [prefix + name for name in ("A", "B") if prefix + name not in state_dict]
        if missing:
            missing_keys.extend(missing)
            return
        A, B = state_dict[prefix + "A"], state_dict[prefix + "B"]
        in_features, out_features = self.storage_A.shape[1], self.storage_B.shape[0]
        if A.shape != (A.shape[0], in_features) or B.shape != (out_features, A.shape[0]):
            error_msgs.append(
                f"{prefix}: components B {tuple(B.shape)}, A {tuple(A.shape)} do not fit a module with "
                f"{out_features} outputs and {in_features} inputs"
            )
            return
        if not self.storage_A.is_meta:
            A, B = A.to(self.storage_A.device), B.to(self.storage_B.device)
        self._clear(like_A=A, like_B=B)
        self.append(B, A)


class AromaLinear(LoraLinear):
    """A Linear, Conv1D or bitsandbytes layer whose low-rank update grows.

    .. code-block:: text

        y = W0 x  +  B A x            finished components, frozen, scale folded into B    B (m, R), A (R, n)
                  +  s · b a drop(x)  the component in training, s = lora_alpha / r       b (m, r), a (r, n)

    (section 3.1). W0 is never written. A frozen module has b = a = 0 and costs its finished components only.
    """

    adapter_layer_names = (*LoraLinear.adapter_layer_names, "lora_finished")

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        # Adapters that are outer-converged here. Before the parent's constructor, which already calls update_layer.
        self.frozen_adapters: set[str] = set()
        super().__init__(base_layer, adapter_name, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Create the pair and the (empty) finished components of an adapter."""
        if "lora_finished" not in self._modules:
            self.lora_finished = nn.ModuleDict()
        self.lora_finished[adapter_name] = FinishedComponents(self.in_features, self.out_features)
        self.frozen_adapters.discard(adapter_name)  # left by a deleted adapter of that name
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

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
        return self.finished(adapter_name).rank + (self.r[adapter_name] if self._pair_counts(adapter_name) else 0)

    @torch.no_grad()
    def components(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return the whole update as B (m, R) with the scale folded in and A (R, n), the pair last if it has moved."""
        finished = self.finished(adapter_name)
        if not self._pair_counts(adapter_name):
            return finished.B, finished.A
        b, a = self.pair(adapter_name)
        B = torch.cat([finished.B.to(b), b * self.scaling[adapter_name]], dim=1)
        return B, torch.cat([finished.A.to(a), a], dim=0)

    def _pair_counts(self, adapter_name: str) -> bool:
        return not self.is_frozen(adapter_name) and bool(self.pair(adapter_name)[0].any())

    # The steps of Algorithm 1 that change a module ------------------------------------------------------------------

    @torch.no_grad()
    def merge_pair(self, adapter_name: str) -> None:
        """Merge: the pair becomes a finished component."""
        b, a = self.pair(adapter_name)
        self.finished(adapter_name).append(b * self.scaling[adapter_name], a)

    @torch.no_grad()
    def start_pair(self, adapter_name: str, a: Tensor, b: Tensor | None = None) -> None:
        """Reinit: put `a` (r, n) and `b` (m, r), zero by default, into the pair; a stale gradient is dropped."""
        pair_b, pair_a = self.pair(adapter_name)
        pair_a.copy_(a)
        pair_b.zero_() if b is None else pair_b.copy_(b)
        pair_a.grad = pair_b.grad = None

    @torch.no_grad()
    def freeze(self, adapter_name: str) -> None:
        """Freeze for good: the pair is dropped, and only the finished components remain."""
        self.frozen_adapters.add(adapter_name)
        for parameter in self.pair(adapter_name):
            parameter.zero_()
            parameter.grad = None
            parameter.requires_grad_(False)

    def unfreeze(self, adapter_name: str) -> None:
        """Let the pair train again (a restored checkpoint may be older than the freezing)."""
        self.frozen_adapters.discard(adapter_name)
        for parameter in self.pair(adapter_name):
            parameter.requires_grad_(True)

    # What PEFT calls ------------------------------------------------------------------------------------------------

    def weight_matrix(self) -> Tensor:
        """Return W0 as (m, n); a view where the base layer is not quantised, else one dequantised copy."""
        base = self.get_base_layer()
        weight = base.weight.detach()
        if _is_quantised(base.weight):
            # Not PEFT's dequantize_module_weight, which puts an 8-bit weight without its scales back on a CPU.
            weight = dequantize_bnb_weight(base.weight, getattr(base, "state", None)).detach()
        return weight.T if self.fan_in_fan_out else weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ΔW = B A + s b a in the layout of the base weight, computed in float32 at least."""
        B, A = self.components(adapter)
        precise = torch.promote_types(B.dtype, torch.float32)
        delta = B.to(precise) @ A.to(precise)
        return delta.T if self.fan_in_fan_out else delta

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active and trainable, as PEFT does, but for pairs that are frozen for good."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for adapter_name in self.frozen_adapters & set(self.lora_A):
            for parameter in self.pair(adapter_name):
                parameter.requires_grad_(False)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into the base weight, adding in float32 so that a weight of lower precision is rounded once.

        Raises:
            ConfigError: The base layer is quantised and cannot be merged in place.
            NonFiniteError: With `safe_merge`, the merged weight is NaN or infinite; the base weight is left as it was.
        """
        base = self.get_base_layer()
        if _is_quantised(base.weight):
            raise ConfigError(
                f"base layer {type(base).__name__} is quantised: merging in place would round the "
                "update away; load the base model in 16 or 32 bits and merge there (aroma export --merged)"
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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `x` (…, n) to (…, m); see the class for the equation."""
        self._check_forward_args(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ConfigError("adapter_names: mixed batches need the saved adapter; load it with PeftModel instead")
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for adapter_name in self.active_adapters:
            if adapter_name in self.lora_A:
                result = self._add_update(result, x, adapter_name)
        return result

    def _add_update(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        finished = self.finished(adapter_name)
        x = self._cast_input_dtype(x, self.lora_A[adapter_name].weight.dtype)
        if finished.capacity:  # not the rank: a compiled graph depends on nothing that changes at every growth
            result = result + finished(x).to(result.dtype)
        if not self.is_frozen(adapter_name):
            h = self.lora_A[adapter_name](self.lora_dropout[adapter_name](x))
            result = result + (self.lora_B[adapter_name](h) * self.scaling[adapter_name]).to(result.dtype)
        return result

    def __repr__(self) -> str:
        """Mark the layer as ours in a printed model."""
        return nn.Module.__repr__(self).replace("AromaLinear(", "aroma.AromaLinear(", 1)


def _is_quantised(weight: Tensor) -> bool:
    return not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None
