"""Experts that share one 3-D parameter, as in Mixtral, Qwen-MoE and gpt-oss: each is a matrix that grows by itself.

.. code-block:: text

    W'[e] = W[e] + B_e A_e + s · b_e a_e          W (E, m, n), or (E, n, m) where the module is transposed

An experts module reads its parameter as it likes: expert by expert, as a batch, or with grouped matmuls. So the module
is called with W' in place of W, as PEFT's `ParamWrapper` does it: one copy of W, in the dtype of W, lives from forward
to backward. Backward gets G = ∂L/∂W', which PyTorch makes for all experts at once. All gradients are read off it:

.. code-block:: text

    ga = s bᵀ G,   gb = s G aᵀ          of every expert

An expert that got no token has G[e] = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call

from .. import compat
from ..errors import ConfigError, bad_value
from ..patterns import is_named
from ..sharding import Slice, is_sharded, sharded_slice
from .fused import without_autocast
from .layer import AromaLinear, BlockMatrix, refuse_zero3

if TYPE_CHECKING:
    from .config import AromaConfig

MATRICES = "aroma_matrices"
"""The child of a wrapper that holds its matrices; left out of their names."""

_SHOWN = 4


class ExpertWeight(nn.Module):
    """The weight of one expert: a view of a parameter that belongs to the experts module.

    Args:
        experts: The experts module.
        parameter: Name of its 3-D parameter.
        index: Number of the expert.
    """

    def __init__(self, experts: nn.Module, parameter: str, index: int) -> None:
        super().__init__()
        # In a tuple, so that the parameter does not appear twice in the model.
        self._experts = (experts,)
        self.parameter = parameter
        self.index = index

    @property
    def stack(self) -> Tensor:
        """The parameter, (E, m, n) or (E, n, m)."""
        found: Tensor = getattr(self._experts[0], self.parameter)
        return found

    @property
    def weight(self) -> Tensor:
        """The expert's matrix, (m, n) or (n, m); the whole parameter where it is sharded."""
        stack = self.stack
        return stack if is_sharded(stack) else stack[self.index]

    @property
    def is_transposed(self) -> bool:
        """Whether matrices are stored as (n, m)."""
        return bool(getattr(self._experts[0], "is_transposed", False))


class ExpertMatrix(BlockMatrix):
    """The growing update of one expert's matrix. `AromaExperts` evaluates it; it is never called."""

    asked_by = "target_parameters"

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, ExpertWeight)
        rows, columns = module.stack.shape[1:]
        return (rows, columns) if module.is_transposed else (columns, rows)

    def weight_matrix(self) -> Tensor | Any:
        """Return W0 as (m, n), a view; under FSDP2 what this rank holds of it.

        Raises:
            ConfigError: The parameter is sharded by ZeRO-3.
        """
        base = self.get_base_layer()
        self.refuse_sharding()
        if not is_sharded(base.stack):
            return super().weight_matrix()
        part: Slice = sharded_slice(base.stack, base.index)
        return self.kind.matrix(part)


class AromaExperts(nn.Module):
    """An experts module whose 3-D parameters grow, expert by expert.

    Args:
        base_layer: The experts module.

    Attributes:
        base_layer: As given.
        aroma_matrices: `ExpertMatrix` of every expert, by parameter, in the order of the module's parameters.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.aroma_matrices = nn.ModuleDict()

    def grow(self, parameter: str, adapter_name: str, config: AromaConfig, **kwargs: Any) -> None:
        """Let the matrices of a parameter grow in an adapter."""
        if parameter not in self.aroma_matrices:
            count = getattr(self.base_layer, parameter).shape[0]
            weights = [ExpertWeight(self.base_layer, parameter, index) for index in range(count)]
            made = [ExpertMatrix(weight, adapter_name, config=config, **kwargs) for weight in weights]
            grown = {**self.aroma_matrices, parameter: nn.ModuleList(made)}
            # An adapter that came before may grow later parameters alone; PEFT wraps them in the order of the module.
            names = [name for name, _ in self.base_layer.named_parameters(recurse=False) if name in grown]
            self.aroma_matrices = nn.ModuleDict({name: grown[name] for name in names})
            return
        for matrix in self.matrices(parameter):
            matrix.update_layer(adapter_name, config=config, **kwargs)

    def matrices(self, parameter: str) -> list[ExpertMatrix]:
        """Return the matrices of a parameter, by number of the expert."""
        found: Any = self.aroma_matrices[parameter]
        return [*found]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the experts module with W' in place of W.

        Raises:
            ConfigError: `adapter_names` asks for a batch of several adapters, or ZeRO-3 shards the parameter.
        """
        changed = {}
        for name in self.aroma_matrices:
            weight: Tensor = getattr(self.base_layer, name)
            updated = _updated(weight, self.matrices(name))
            if updated is not weight:
                changed[name] = updated
        if not changed:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, changed, args, kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the experts module, with the update merged into it if `merge`; PEFT calls this."""
        if merge:
            for name in self.aroma_matrices:
                for matrix in self.matrices(name):
                    matrix.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


# The update of a parameter -------------------------------------------------------------------------------------------


def _updated(weight: Tensor, matrices: list[ExpertMatrix]) -> Tensor:
    """Return W' for W, (E, m, n) or (E, n, m): a copy, or W itself where nothing is added."""
    first = matrices[0]
    if first.disable_adapters:
        for matrix in matrices if first.merged else ():
            matrix.unmerge()
        return weight
    if first.merged:
        return weight
    first.refuse_sharding()  # before what ZeRO-3 hooks is taken for what PEFT does
    if compat.has_hooks(first):
        # PEFT hands `adapter_names` to tuner layers by hooks.
        raise ConfigError(
            "adapter_names: experts of a 3-D parameter do not take batches of several adapters; give each adapter a "
            "batch of its own (set_adapter)"
        )
    for adapter_name in first.active_adapters:
        if adapter_name in first.lora_A:
            stack = _stacked(matrices, adapter_name)
            if stack is not None:
                node: Callable[..., Tensor] = _Updated.apply
                weight = node(weight, *stack, first.fan_in_fan_out)
    return weight


class _Stack(NamedTuple):
    """The updates of all experts by one adapter; what is missing or frozen is zero.

    Args:
        b: Left factors of the pairs in training, (E, m, r).
        a: Right factors, (E, r, n).
        B: Left factors of the finished components, scale folded in, (E, m, R).
        A: Right factors, (E, R, n).
        scale: s of the pairs.
    """

    b: Tensor
    a: Tensor
    B: Tensor
    A: Tensor
    scale: float


def _stacked(matrices: list[ExpertMatrix], adapter_name: str) -> _Stack | None:
    """Return the updates of all experts by one adapter; None where none adds anything."""
    finished = [_finished(matrix, adapter_name) for matrix in matrices]
    trains = [matrix.evaluates_pair(adapter_name) for matrix in matrices]
    rank = max(len(own_A) for _, own_A in finished)
    if not any(trains) and not rank:
        return None
    pairs = [matrix.pair(adapter_name) for matrix in matrices]
    zero_b, zero_a = (torch.zeros_like(factor, requires_grad=False) for factor in pairs[0])
    b = torch.stack([b if train else zero_b for (b, _), train in zip(pairs, trains, strict=True)])
    a = torch.stack([a if train else zero_a for (_, a), train in zip(pairs, trains, strict=True)])
    B, A = b.new_zeros(len(matrices), b.shape[1], rank), a.new_zeros(len(matrices), rank, a.shape[2])
    for index, (matrix, (own_B, own_A)) in enumerate(zip(matrices, finished, strict=True)):
        if len(own_A):
            B[index, :, : len(own_A)] = matrix._scaled(own_B, adapter_name)
            A[index, : len(own_A)] = own_A
    return _Stack(b, a, B, A, matrices[0].scaling[adapter_name])


def _finished(matrix: ExpertMatrix, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return the finished components B (m, K) and A (K, n); in a compiled graph with their padding, as `padded`."""
    finished = matrix.finished(adapter_name)
    return finished.padded if torch.compiler.is_compiling() else (finished.B, finished.A)


class _Updated(torch.autograd.Function):
    """W' of W; gradients go to W, b and a."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, b: Tensor, a: Tensor, B: Tensor, A: Tensor, scale: float, transposed: bool
    ) -> Tensor:
        """Return W', (E, m, n) or (E, n, m); see `_Stack` for the shapes."""
        ctx.save_for_backward(b, a)
        ctx.scale, ctx.transposed = scale, transposed
        up, down = torch.cat([B, b * scale], 2).to(weight.dtype), torch.cat([A, a], 1).to(weight.dtype)
        factors = (down.mT, up.mT) if transposed else (up, down)
        # Under autocast the module casts W' itself, as it casts W.
        with without_autocast(weight.device):
            return torch.baddbmm(weight, *factors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients for that of W'; see `_Stack` for the shapes."""
        b, a = ctx.saved_tensors
        G = gradient.mT if ctx.transposed else gradient
        with without_autocast(G.device):
            ga = ((b * ctx.scale).to(G.dtype).mT @ G).to(a.dtype)
            gb = (G @ a.to(G.dtype).mT).to(b.dtype) * ctx.scale
        own = gradient if ctx.needs_input_grad[0] else None
        return own, gb, ga, None, None, None, None


# Putting them into a model -------------------------------------------------------------------------------------------


def inject_experts(model: nn.Module, adapter_name: str, config: AromaConfig, low_cpu_mem_usage: bool) -> list[str]:
    """Let the 3-D parameters that `config.target_parameters` names grow, and return their names.

    A name fits a parameter of that name, and parameters whose name ends with it after a dot, as in PEFT.

    Raises:
        ConfigError: A name fits nothing, or what it fits is no stack of experts' matrices that can be trained.
    """
    wanted = sorted(set(config.target_parameters or ()))
    found: dict[str, list[str]] = {name: [] for name in wanted}
    chosen: list[tuple[str, nn.Module, str]] = []
    for key, module, parameter in _parameters(model):
        name = f"{key}.{parameter}" if key else parameter
        fitting = [one for one in wanted if is_named(name, one)]
        for one in fitting:
            found[one].append(name)
        if fitting:
            chosen.append((key, module, parameter))
    for one, names in found.items():
        if not names:
            raise bad_value("target_parameters", one, f"the model has no such parameter; {_stacks(model)}")
    for key, module, parameter in chosen:
        _require_stack(key, module, parameter)
    kwargs = {"r": config.r, "lora_alpha": config.lora_alpha}
    for key, module, parameter in chosen:
        parent, _, last = key.rpartition(".")
        holder = model.get_submodule(parent)
        wrapper = getattr(holder, last)
        if not isinstance(wrapper, AromaExperts):
            wrapper = AromaExperts(module)
            wrapper.train(module.training)
            setattr(holder, last, wrapper)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            wrapper.grow(parameter, adapter_name, config, **kwargs)
    return [f"{key}.{parameter}" for key, _, parameter in chosen]


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield name of a module in the base model, the module, and name of a parameter of its own."""
    for key, module in [*model.named_modules()]:
        if f".{MATRICES}." in f"{key}." or ".lora_" in key:
            continue
        for parameter, _ in module.named_parameters(recurse=False):
            yield key.replace(".base_layer", ""), module, parameter


def _stacks(model: nn.Module) -> str:
    """Say which parameters could grow."""
    names = {
        name.rpartition(".")[0].rpartition(".")[2] + "." + parameter
        for key, module, parameter in _parameters(model)
        if getattr(module, parameter).ndim == 3 and (name := f"{key}.{parameter}")
    }
    if not names:
        return "it has no 3-D parameter, so name its layers in target_modules"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"its 3-D parameters are {', '.join(sorted(names)[:_SHOWN])}{more}"


def _require_stack(key: str, module: nn.Module, parameter: str) -> None:
    """Raise unless a parameter holds the matrices of experts, in numbers that can be trained."""
    weight = getattr(module, parameter)
    name = f"{key}.{parameter}"
    refuse_zero3(ExpertMatrix.asked_by, weight)
    remedy = None
    if not weight.is_floating_point() or weight.itemsize < 2 or getattr(weight, "quant_state", None) is not None:
        kind = str(weight.dtype).removeprefix("torch.")
        remedy = (
            f"its experts are quantised ({kind}), and their update is added to the weight itself; load the model in "
            "16 or 32 bits (for gpt-oss: Mxfp4Config(dequantize=True)), or leave it out"
        )
    elif weight.ndim != 3:
        is_layer = parameter == "weight" and hasattr(module, "in_features")
        other = "name the layer in target_modules" if is_layer else "leave it out"
        remedy = f"it has the shape {tuple(weight.shape)}, and only 3-D parameters of experts grow; {other}"
    elif not key:
        remedy = "it belongs to the model itself, which cannot be wrapped; put it into a module of its own"
    elif min(weight.shape) < 1:
        remedy = f"it has the shape {tuple(weight.shape)}: there is no matrix in it; leave it out"
    if remedy is not None:
        raise bad_value("target_parameters", name, remedy)


# The layout of PEFT --------------------------------------------------------------------------------------------------


def pack(updates: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the updates of all experts as PEFT's `ParamWrapper` holds them, of one rank r, padded with zeros.

    Args:
        updates: B_e (m, R_e) and A_e (R_e, n) of every expert.

    Returns:
        B (m, r · E), where column k E + e is column k of expert e; A (r · E, n), where row e r + k is its row k.
    """
    count, rank = len(updates), max(1, *(A.shape[0] for _, A in updates))
    B, A = updates[0]
    whole_B, whole_A = B.new_zeros(B.shape[0], rank, count), A.new_zeros(count, rank, A.shape[1])
    for index, (B, A) in enumerate(updates):
        whole_B[:, : B.shape[1], index] = B
        whole_A[index, : A.shape[0]] = A
    return whole_B.reshape(whole_B.shape[0], -1), whole_A.reshape(-1, whole_A.shape[2])


def unpack(B: Tensor, A: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Undo `pack`: B (m, r · E) and A (r · E, n) to the updates of `count` experts, without their padding."""
    whole_B, whole_A = B.reshape(B.shape[0], -1, count), A.reshape(count, -1, A.shape[1])
    updates = []
    for index in range(count):
        own_B, own_A = whole_B[:, :, index], whole_A[index]
        used = (own_B.any(0) | own_A.any(1)).nonzero()
        rank = int(used[-1]) + 1 if len(used) else 0
        updates.append((own_B[:, :rank].contiguous(), own_A[:rank].contiguous()))
    return updates


def experts_of(layers: Mapping[str, AromaLinear]) -> dict[str, dict[str, list[str]]]:
    """Return the keys of `layers` that are experts' matrices, by experts module and parameter, in their order."""
    found: dict[str, dict[str, list[str]]] = {}
    for key, layer in layers.items():
        if isinstance(layer, ExpertMatrix):
            module, _, rest = key.rpartition(f".{MATRICES}.")
            found.setdefault(module, {}).setdefault(rest.rpartition(".")[0], []).append(key)
    return found


def peft_stems(module: str, parameters: Sequence[str]) -> dict[str, str]:
    """Return under which name PEFT saves the update of every parameter of an experts module.

    It wraps the module once for each parameter, in their order, so the last one is outermost.

    Args:
        module: Name of the module.
        parameters: Its parameters that grow, in the order of the module.
    """
    return {name: module + ".base_layer" * (len(parameters) - 1 - place) for place, name in enumerate(parameters)}
