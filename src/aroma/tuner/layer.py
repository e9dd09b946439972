"""One target module: the frozen base layer, its finished components, and the pair in training."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .. import compat
from ..errors import ConfigError, bad_value
from ..sharding import gathered, write
from .finished import Factors, FinishedComponents, with_pair
from .fused import Update, autocast_dtype, linear_with_update

if TYPE_CHECKING:
    from .config import AromaConfig


class LiveAdapter:
    """The state of one adapter while its model lives; its growing layers share it. A configuration is data only.

    A copied or unpickled model starts without a controller: that of the original does not drive it.

    Attributes:
        config: Configuration of the adapter; never written to.
        chose_seed: Whether the configuration has a `component_seed`.
        seed: Seed of new components: `component_seed`, or else `torch.initial_seed()` when the adapter was made.
        ever_controlled: Whether a controller has ever taken a step.
        dtype_is_chosen: Whether PEFT has chosen the dtype of the pairs.
    """

    def __init__(self, config: AromaConfig) -> None:
        self.config = config
        self.chose_seed = config.component_seed is not None
        self.seed: int = torch.initial_seed() % 2**31 if config.component_seed is None else config.component_seed
        self.ever_controlled = False
        self.dtype_is_chosen = False
        self._controller: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_controller": None}

    @property
    def controller(self) -> Any | None:
        """The controller that drives this adapter; None if none was attached or it is gone."""
        return self._controller() if self._controller is not None else None

    def attach_controller(self, controller: Any) -> None:
        """Remember `controller`, by a weak reference, so that saving the adapter writes its state."""
        self._controller = weakref.ref(controller)

    def method(self) -> dict[str, Any]:
        """Return the fields that decide a run, with the seed in use; JSON-able."""
        return {**self.config.method(), "component_seed": self.seed}

    def check_resumable(self, saved: dict[str, Any]) -> None:
        """Raise if `saved`, the `method()` of a checkpoint, differs; take over its seed if none was chosen.

        Raises:
            ConfigError: Naming every differing field with both values.
        """
        now = self.method() if self.chose_seed else {**self.method(), "component_seed": saved.get("component_seed")}
        differing = [name for name in now if now[name] != saved.get(name)]
        if differing:
            values = ", ".join(f"{name}={now[name]!r} (checkpoint: {saved.get(name)!r})" for name in differing)
            raise ConfigError(
                f"cannot resume with another configuration: {values}; give the checkpoint's values, or start a new run"
            )
        self.seed = now["component_seed"]


class AromaLinear(LoraLinear):
    """A linear layer whose low-rank update grows: nn.Linear, Conv1D of transformers, bitsandbytes in 4 or 8 bits.

    .. code-block:: text

        y = W0 x  +  B A x            finished components, frozen, scale folded into B    B (m, R), A (R, n)
                  +  s · b a drop(x)  the component in training, s = lora_alpha / r       b (m, r), a (r, n)

    (section 3.1). W0 is never written. A frozen module has b = a = 0 and costs its finished components only.

    Attributes:
        in_features: n.
        out_features: m.
        live: The live state of every adapter, by name; shared with the other layers of the adapter.
        frozen_adapters: Adapters that are outer-converged in this module.
        stays_in_graph: Whether a frozen pair still requires a gradient, because DistributedDataParallel waits for it,
            or because the model is compiled: `GraphKeeper` gives it one of zero, a compiled graph evaluates the pair.
    """

    in_features: int
    out_features: int
    adapter_layer_names = (*LoraLinear.adapter_layer_names, "lora_finished")
    other_param_names = (*LoraLinear.other_param_names, "live")

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        # Before the parent's constructor, which already calls update_layer.
        require_linear(base_layer, kwargs.get("target_name", ""))
        self.live: dict[str, LiveAdapter] = {}
        self.frozen_adapters: set[str] = set()
        self.stays_in_graph = False
        super().__init__(base_layer, adapter_name, **kwargs)
        # The parent takes it from the configuration, which a model with both kinds of layer shares.
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Create the pair, b (m, r) and a (r, n), and the empty finished components of an adapter."""
        if "lora_finished" not in self._modules:
            self.lora_finished = nn.ModuleDict()
        self.lora_finished[adapter_name] = FinishedComponents(self.in_features, self.out_features)
        self.frozen_adapters.discard(adapter_name)  # left by a deleted adapter of that name
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    # The pair and its state ------------------------------------------------------------------------------------------

    def pair(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the trainable pair b (m, r) and a (r, n)."""
        return self.lora_B[adapter_name].weight, self.lora_A[adapter_name].weight

    def finished(self, adapter_name: str) -> FinishedComponents:
        """Return the finished components of an adapter."""
        finished = self.lora_finished[adapter_name]
        assert isinstance(finished, FinishedComponents)
        return finished

    def is_frozen(self, adapter_name: str) -> bool:
        """Whether the module is outer-converged: its pair is zero and skipped."""
        return adapter_name in self.frozen_adapters

    def rank(self, adapter_name: str) -> int:
        """Return the rank of the update: finished components, and the pair once it has moved."""
        return len(self.components(adapter_name)[1])

    @torch.no_grad()
    def whole_pair(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return b (m, r) and a (r, n), detached. A sharded pair is copied whole; all ranks call this together."""
        b, a = gathered(self.pair(adapter_name))
        return b.detach(), a.detach()

    @torch.no_grad()
    def components(self, adapter_name: str, pair: Factors | None = None) -> Factors:
        """Return the whole update as B (m, R) with the scale folded in and A (R, n), the pair last if it has moved.

        Args:
            adapter_name: Name of the adapter.
            pair: Its whole pair b (m, r) and a (r, n) if known; otherwise all ranks gather a sharded one together.
        """
        finished = self.finished(adapter_name)
        B = self._scaled(finished.B, adapter_name)
        if pair is None and self.is_frozen(adapter_name):
            return B, finished.A
        pair = self.whole_pair(adapter_name) if pair is None else pair
        return with_pair((B, finished.A), pair, self.scaling[adapter_name])

    def _scaled(self, B: Tensor, adapter_name: str) -> Tensor:
        """Scale left factors B (m, R) by what PEFT's `set_scale` scales the adapter by temporarily, mostly 1."""
        scale, own = self.scaling[adapter_name], self.live[adapter_name].config.scale
        return B if scale == own else B * (scale / own)

    # The steps of Algorithm 1 that change a module -------------------------------------------------------------------

    @torch.no_grad()
    def merge_pair(self, adapter_name: str, pair: Factors | None = None) -> None:
        """Merge: the pair becomes finished components; `pair`, if known, is whole, b (m, r) and a (r, n)."""
        b, a = self.whole_pair(adapter_name) if pair is None else pair
        self.finished(adapter_name).append(b * self.live[adapter_name].config.scale, a)

    @torch.no_grad()
    def start_pair(self, adapter_name: str, a: Tensor, b: Tensor | None = None) -> None:
        """Reinit: write `a` (r, n) and `b` (m, r), zero by default, into the pair and drop its gradient."""
        pair_b, pair_a = self.pair(adapter_name)
        write(pair_a, a)
        write(pair_b, a.new_zeros(self.out_features, a.shape[0]) if b is None else b)
        pair_a.grad = pair_b.grad = None

    @torch.no_grad()
    def freeze(self, adapter_name: str) -> None:
        """Freeze for good: the pair is dropped, and only the finished components remain."""
        self.frozen_adapters.add(adapter_name)
        a = self.pair(adapter_name)[1]
        self.start_pair(adapter_name, torch.zeros(self.r[adapter_name], self.in_features).to(a.device, a.dtype))
        self._require_gradients(adapter_name, self.stays_in_graph)

    def stay_in_graph(self, adapter_name: str, stays: bool, growths: int | None = None) -> None:
        """Decide whether a frozen pair still requires a gradient; applies to a pair that is frozen already.

        `growths`: how many components the storage holds before it is replaced, and a graph compiled again.
        """
        self.stays_in_graph = stays
        if growths is not None:
            a = self.pair(adapter_name)[1]
            like = torch.empty(0, dtype=a.dtype, device=a.device)
            self.finished(adapter_name).reserve(growths * self.live[adapter_name].config.r, like)
        if self.is_frozen(adapter_name):
            self._require_gradients(adapter_name, stays)

    def unfreeze(self, adapter_name: str) -> None:
        """Let the pair train again, once it is active (a restored checkpoint may be older than the freezing)."""
        self.frozen_adapters.discard(adapter_name)
        self._require_gradients(adapter_name, adapter_name in self.active_adapters)

    def _require_gradients(self, adapter_name: str, required: bool) -> None:
        for parameter in self.pair(adapter_name):
            parameter.requires_grad_(required)

    # What PEFT calls -------------------------------------------------------------------------------------------------

    def weight_matrix(self) -> Tensor:
        """Return W0 as (m, n): a view, or a copy if it is quantised or sharded; all ranks gather one together."""
        base = self.get_base_layer()
        weight: Tensor = gathered([base.weight])[0]
        if self.is_quantised:
            # PEFT's dequantize_module_weight would put an 8-bit weight without its scales back on a CPU.
            weight = dequantize_bnb_weight(base.weight, getattr(base, "state", None))
        matrix: Tensor = self._as_matrix(weight.detach())
        return matrix

    def _as_matrix(self, weight: Any) -> Any:
        """Return a weight of the base layer's shape, or a rank's part of it, as W0 (m, n), or the other way round."""
        return weight.T if self.fan_in_fan_out else weight

    @property
    def is_quantised(self) -> bool:
        """Whether bitsandbytes has quantised the base layer's weight."""
        weight = self.get_base_layer().weight
        return not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ΔW = B A + s b a, computed in float32 or better, in the shape of the layer's weight."""
        B, A = self.components(adapter)
        precise = torch.promote_types(B.dtype, torch.float32)
        delta: Tensor = self._as_matrix(B.to(precise) @ A.to(precise))
        return delta

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active and trainable, as PEFT does, except for frozen pairs."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for adapter_name in () if self.stays_in_graph else self.frozen_adapters & set(self.lora_A):
            self._require_gradients(adapter_name, False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `x` (…, n) to (…, m); see the class for the equation."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        named = [] if self.disable_adapters or self.merged else self.active_adapters
        adapters = [*filter(self._adds, named)]
        if (
            len(adapters) == 1
            and not args
            and not kwargs
            and not compat.is_traced(x)
            and self._can_be_fused(x, adapters[0])
        ):
            base = self.base_layer
            return linear_with_update(x, self._as_matrix(base.weight), base.bias, self._update(adapters[0]))
        return self._composed(x, adapters, *args, **kwargs)

    def _adds(self, adapter_name: str) -> bool:
        """Whether an adapter changes the base layer's result."""
        if adapter_name not in self.lora_A:
            return False
        return self.evaluates_pair(adapter_name) or self.finished(adapter_name).padded[1].shape[0] > 0

    def evaluates_pair(self, adapter_name: str) -> bool:
        """Whether the pair is evaluated; a frozen one only in a compiled graph, which then need not change."""
        return (self.stays_in_graph and torch.compiler.is_compiling()) or not self.is_frozen(adapter_name)

    def _update(self, adapter_name: str) -> Update:
        B, A = self.finished(adapter_name).padded
        b, a = self.pair(adapter_name) if self.evaluates_pair(adapter_name) else (B[:, :0], A[:0])
        dropout = self.lora_dropout[adapter_name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return Update(A, self._scaled(B, adapter_name), a, b, self.scaling[adapter_name], p)

    def _can_be_fused(self, x: Tensor, adapter_name: str) -> bool:
        """Whether base layer and pair are plain matmuls without hooks, the base frozen, all in one dtype, x (…, n)."""
        base = self.base_layer
        pair = [] if self.is_frozen(adapter_name) else [self.lora_A[adapter_name], self.lora_B[adapter_name]]
        if type(base) not in (nn.Linear, Conv1D) or any(type(one) is not nn.Linear for one in pair):
            return False
        if compat.is_hooked(base, *pair):
            return False
        for parameter in (base.weight, base.bias):
            if parameter is not None and (parameter.requires_grad or type(parameter) is not nn.Parameter):
                return False
        finished, (b, _) = self.finished(adapter_name).padded, self.pair(adapter_name)
        return autocast_dtype(x) is not None or x.dtype == base.weight.dtype == finished[0].dtype == b.dtype

    def _composed(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Map `x` (…, n) to (…, m) in operations of PyTorch alone, which compilers and transforms look into."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter_name in adapters:
            update = self._update(adapter_name)
            precise = update.a.dtype
            inputs = self._cast_input_dtype(x, precise)
            if update.A.shape[0]:
                result = result + F.linear(F.linear(inputs, update.A.to(precise)), update.B.to(precise))
            if update.a.shape[0]:
                h = self.lora_A[adapter_name](self.lora_dropout[adapter_name](inputs))
                result = result + self.lora_B[adapter_name](h) * update.scale
        return result.to(dtype)


def require_linear(base: nn.Module, name: str) -> None:
    """Raise unless a layer, of the given name in the model, can grow.

    Raises:
        ConfigError: Naming it, and what to do.
    """
    is_quantised = type(base).__name__ in ("Linear8bitLt", "Linear4bit")
    # torch.nn.MultiheadAttention reads the weight of its NonDynamicallyQuantizableLinear, and never calls it.
    if isinstance(base, NonDynamicallyQuantizableLinear) or not (isinstance(base, nn.Linear | Conv1D) or is_quantised):
        raise bad_value(
            "target_modules",
            name,
            f"it is a {type(base).__name__}, and only linear layers grow; leave it out, or name it in "
            "exclude_modules; aroma.compress cuts others, of PEFT's LoraConfig",
        )


def live_adapter(model: nn.Module, adapter_name: str = "default") -> LiveAdapter:
    """Return the live state of an adapter of `model`, a PeftModel or a model with injected layers, wrapped or not.

    Raises:
        ConfigError: The model has no growing adapter of that name.
    """
    for module in model.modules():
        if isinstance(module, AromaLinear) and adapter_name in module.live:
            return module.live[adapter_name]
    raise bad_value(
        "adapter_name",
        adapter_name,
        f"{type(model).__name__} has no AROMA adapter of that name; make one with "
        "get_peft_model(model, AromaConfig(...))",
    )
