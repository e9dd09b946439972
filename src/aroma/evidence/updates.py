"""The updates s B A of a LoRA adapter, whatever layers hold them: read, split into directions, weakened, cut."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import AromaWarning, bad_value
from ..evaluation import evaluating
from ..reset import check_resettable
from ..sharding import (
    REPLICAS,
    gathered,
    require_equal_replicas,
    sharding_of,
    sharding_of_model,
    unwrapped,
    unwrapped_optimizer,
    write,
)

_NORM = 1 / math.sqrt(3)
"""Norm of a row of A of a direction that stays: that of PEFT's random start, whatever the layer's width."""
_ZERO = 1e-9
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True)
class Update:
    """The update of one adapted weight; of a stack of experts, all of theirs.

    Args:
        name: Name of the weight in the base model.
        layer: PEFT's layer.
        adapter: Name of the adapter.
        matrices: How many matrices it adapts: 1, or the number of experts.
    """

    name: str
    layer: LoraLayer
    adapter: str
    matrices: int

    @property
    def is_embedding(self) -> bool:
        """Whether it adapts an embedding, whose B starts at random and whose A starts at zero."""
        return self.adapter in self.layer.lora_embedding_A

    @property
    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters A and B, as PEFT shapes them."""
        if self.is_embedding:
            return self.layer.lora_embedding_A[self.adapter], self.layer.lora_embedding_B[self.adapter]
        return self.layer.lora_A[self.adapter].weight, self.layer.lora_B[self.adapter].weight

    @property
    def r(self) -> int:
        """Rank that the layer has room for, for each matrix."""
        r: int = self.layer.r[self.adapter]
        return r

    def rows(self, A: Tensor) -> Tensor:
        """Return A as rows of directions, (matrices, r, n)."""
        return A.reshape(self.matrices, -1, math.prod(A.shape[1:]))

    def columns(self, B: Tensor) -> Tensor:
        """Return B as columns of directions, (matrices, m, r)."""
        return B.reshape(len(B), -1, self.matrices).permute(2, 0, 1)

    def shaped(self, rows: Tensor, columns: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows (matrices, R, n) and columns (matrices, m, R) in the shape and dtype of A and B, for any R."""
        R = self.matrices * rows.shape[1]
        packed = columns.permute(1, 2, 0).reshape(len(B), R, *B.shape[2:])
        return rows.reshape(R, *A.shape[1:]).to(A.dtype), packed.to(B.dtype)


class Updates:
    """All updates of the active adapter of a model; the d directions of all of them count in one line.

    Args:
        model: A model with a LoRA adapter of PEFT, wrapped or not.
        optimizer: The optimizer that trains it; None where nothing trains.
        adapter_name: The adapter; the active one by default.

    Raises:
        ConfigError: There is no LoRA adapter, or one that cannot be cut.
    """

    def __init__(self, model: nn.Module, optimizer: Any | None = None, adapter_name: str | None = None) -> None:
        self.model = unwrapped(model)
        self.adapter = adapter_name or active_lora(self.model)
        self.optimizer = optimizer
        self._sharding = sharding_of_model(self.model, optimizer)
        self.each = _found(self.model, self.adapter)
        self._pairs: list[tuple[Tensor, Tensor]] = []

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds a part of the parameters, or of the optimizer's copies of them, only."""
        return self._sharding is not REPLICAS

    def require_equal_ranks(self, **facts: object) -> None:
        """Raise ConfigError unless all processes have the same adapter and `facts`, such as how much they will ask."""
        adapted = [(update.name, update.r) for update in self.each]
        parameter = self.each[0].pair[1]
        require_equal_replicas({"adapter": adapted, **facts}, [], sharding_of(parameter).device(parameter))

    @torch.no_grad()
    def to_singular_directions(self) -> Tensor:
        """Rewrite every B A as U Σ Vᵀ, largest first. The model computes the same, up to rounding in its dtype.

        Returns:
            Singular values of s B A, (d,) in float64 on the CPU; 0 for directions that do not exist.
        """
        whole = gathered([parameter for update in self.each for parameter in update.pair])
        self._pairs, sizes = [], []
        for update, A, B in zip(self.each, whole[::2], whole[1::2], strict=True):
            rows, columns, sigma = _singular(update.rows(A), update.columns(B))
            if update.is_embedding:  # here B is the factor that starts at random
                rows, columns = rows * _swap(len(B), sigma)[:, :, None], columns / _swap(len(B), sigma)[:, None]
            *pair, sigma = _as_of_first_rank(*update.shaped(rows, columns, A, B), sigma)
            self._pairs.append((pair[0], pair[1]))
            sizes.append((sigma * abs(_scale(update))).flatten().cpu())
        self._write(1.0)
        return torch.cat(sizes)

    @torch.no_grad()
    def keep(self, kept: Tensor, strength: float = 1.0) -> None:
        """Let the updates have the directions `kept` (d,) only, at some strength, until they are written again."""
        self._write(strength, kept)

    @torch.no_grad()
    def cut(self, kept: Tensor) -> None:
        """Set the directions that are not `kept` (d,) to zero, in A and B, and let their optimizer state begin anew.

        Both gradients of such a direction are exactly zero, so it stays zero without a mask.
        """
        pieces = kept.split([pair[0].shape[0] for pair in self._pairs])
        cut = []
        for update, (A, B), piece in zip(self.each, self._pairs, pieces, strict=True):
            mask = piece.to(A.device).view(update.matrices, update.r)
            cut.append(update.shaped(update.rows(A) * mask[:, :, None], update.columns(B) * mask[:, None], A, B))
        self._pairs = cut
        self._write(1.0)
        self._forget()

    def credits(self, losses: list[Callable[[], Tensor]]) -> Tensor:
        """Return what every direction saves on each batch, by the midpoint rule.

        With all updates at half strength the gradient of a direction's strength is −⟨∂L/∂b_k, b_k⟩ of its whole
        column b_k. Where the loss is quadratic, the credits sum to the loss that the whole update saves.

        Args:
            losses: Computes the loss of each batch of this process.

        Returns:
            Credits, (batches, d) in float64 on the CPU, the mean over the processes.
        """
        parameters = [update.pair[1] for update in self.each]
        found = []
        with self._asked(parameters):
            self._write(0.5)
            for loss in losses:
                gradients = self._gradients(loss(), parameters)
                found.append(torch.cat([*map(_saved, self.each, gradients, (B for _, B in self._pairs))]).cpu())
        return _mean_of_ranks(torch.stack(found), parameters[0])

    def losses(self, losses: list[Callable[[], Tensor]], kept: Tensor) -> Tensor:
        """Return the loss of each batch with the directions `kept` (d,) only, (batches,), the mean over processes."""
        with self._asked([]), torch.no_grad():
            self.keep(kept)
            found = torch.stack([loss().detach().double().cpu() for loss in losses])
        return _mean_of_ranks(found, self.each[0].pair[1])

    def ranks(self) -> dict[str, list[int]]:
        """Return how many directions each matrix has, by the name of the weight; experts one by one."""
        return {update.name: _kept(update, B) for update, (_, B) in zip(self.each, self._pairs, strict=True)}

    @contextmanager
    def _asked(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Evaluate, need gradients of `parameters`, and leave no trace: updates, gradients and modes as before."""
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        before = [(parameter, parameter.grad) for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for parameter, _ in before:
                parameter.grad = None
            with evaluating(self.model), torch.enable_grad(), _eagerly():
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for parameter, gradient in before:
                parameter.grad = gradient
            self._write(1.0)

    def _gradients(self, loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """Return ∂L/∂B of every update, whole; None where the loss did not reach one."""
        _require_loss(loss)
        if not any(isinstance(parameter, DTensor) for parameter in parameters):
            return [*torch.autograd.grad(loss, parameters, allow_unused=True)]
        loss.backward()  # FSDP2 puts gradients into its shards
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        for parameter in self.model.parameters():
            parameter.grad = None
        return [one.full_tensor() if isinstance(one, DTensor) else one for one in gradients]

    @torch.no_grad()
    def _write(self, strength: float, kept: Tensor | None = None) -> None:
        """Write B, and A, of every update; of directions that are not `kept` (d,) B is zero."""
        self._sharding.reshard(self.model)
        pieces = kept.split([A.shape[0] for A, _ in self._pairs]) if kept is not None else [None] * len(self._pairs)
        for update, (A, B), piece in zip(self.each, self._pairs, pieces, strict=True):
            scale = torch.full((len(A),), strength, dtype=B.dtype, device=B.device)
            if piece is not None:
                scale *= piece.to(B.device)
            scaled = update.columns(B) * scale.view(update.matrices, 1, -1)
            for parameter, values in zip(update.pair, update.shaped(update.rows(A), scaled, A, B), strict=True):
                write(parameter, values)

    @torch.no_grad()
    def _forget(self) -> None:
        """Let the optimizer's state begin anew; under ZeRO that of all it trains, which has one step count."""
        parameters = [parameter for update in self.each for parameter in update.pair]
        if self.optimizer is None:
            return
        if not self._sharding.has_flat_optimizer:
            for parameter in parameters:
                unwrapped_optimizer(self.optimizer).state.pop(parameter, None)
            return
        for parameter in parameters:
            check_resettable(self.optimizer, parameter, "prune")
        # In place: DeepSpeed refers to these tensors. Zeroed moments under an old count would make large steps.
        for state in self._sharding.base_optimizer(self.optimizer).state.values():
            for name, value in state.items():
                first = float(name == "mu_product")  # of NAdam
                state[name] = value.fill_(first) if isinstance(value, Tensor) else type(value)(first)


def _eagerly() -> Any:
    """Return a context in which compiled modules run as they are: a question is asked too rarely to compile for it."""
    is_loaded = "torch._dynamo" in sys.modules  # importing it takes a second
    return torch.compiler.set_stance("force_eager") if is_loaded else nullcontext()


def active_lora(model: nn.Module) -> str:
    """Return the name of the LoRA adapter of `model` that is active.

    Raises:
        ConfigError: There is none, several are, or it is one whose directions cannot be cut.
    """
    configs = getattr(model, "peft_config", {})
    names = [name for name in configs if name in model.active_adapters] if isinstance(model, PeftModel) else []
    if len(names) != 1 or getattr(configs[names[0]], "peft_type", None) != "LORA":
        found = [f"{name} ({configs[name].peft_type})" for name in names]
        remedy = "evidence needs one active LoRA adapter: get_peft_model(model, LoraConfig(...)), or set_adapter(NAME)"
        raise bad_value("model", ", ".join(found) or type(model).__name__, remedy)
    _refuse(configs[names[0]])
    return str(names[0])


_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def _refuse(config: Any) -> None:
    if config.init_lora_weights not in _STARTS:
        remedy = (
            "it changes the base weights, so a direction that goes would take a part of the base with it; use True"
        )
        raise bad_value("init_lora_weights", config.init_lora_weights, remedy)
    if config.lora_bias:
        raise bad_value("lora_bias", True, "a bias is no direction, and goes with a layer that keeps none; use False")


def _found(model: nn.Module, adapter: str) -> list[Update]:
    """Return the updates of an adapter, and warn of those that are left alone."""
    updates: list[Update] = []
    others: list[Update] = []
    for key, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or not {adapter} & {*layer.lora_A, *layer.lora_embedding_A}:
            continue
        # Several wrappers of one module lie within each other.
        name = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(layer, ParamWrapper):
            update = Update(f"{name}.{layer.parameter_name}", layer, adapter, layer.num_experts)
        else:
            update = Update(name, layer, adapter, 1)
        (updates if _is_product(update) else others).append(update)
    if others:
        shown = ", ".join(update.name for update in others[:3])
        warnings.warn(
            f"{len(others)} adapted layers are left alone, because their update is no product B A: {shown}",
            AromaWarning,
            stacklevel=4,
        )
    if not updates:
        raise bad_value(
            "model", adapter, "no layer of this adapter has an update B A; see docs/method.md for the kinds"
        )
    return updates


def _is_product(update: Update) -> bool:
    A, B = (getattr(parameter, "ds_shape", parameter.shape) for parameter in update.pair)
    base = update.layer.get_base_layer()
    groups = getattr(base, "groups", 1)
    return A[0] == B[1] == update.r * update.matrices and groups == 1 and not any(size > 1 for size in B[2:])


def _scale(update: Update) -> float:
    return float(update.layer.scaling[update.adapter])


def _singular(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (matrices, r, n), columns (matrices, m, r), singular values (matrices, r) of the same products."""
    r = rows.shape[1]
    left, R = torch.linalg.qr(columns.double())
    right, S = torch.linalg.qr(rows.double().mT)
    U, sigma, Vh = torch.linalg.svd(R @ S.mT, full_matrices=False)
    exists = sigma > _ZERO * sigma[:, :1]
    sigma = sigma * exists
    rows = _NORM * (Vh @ right.mT) * exists[:, :, None]
    columns = (left @ U) * (sigma / _NORM)[:, None]
    missing = r - sigma.shape[1]
    if missing:
        rows, columns, sigma = (
            nn.functional.pad(rows, (0, 0, 0, missing)),
            nn.functional.pad(columns, (0, missing)),
            nn.functional.pad(sigma, (0, missing)),
        )
    return rows, columns, sigma


def _swap(m: int, sigma: Tensor) -> Tensor:
    """Return what moves σ (matrices, r) from the columns to the rows, and gives columns the norm √m of their start."""
    exists = sigma > 0
    return torch.where(exists, sigma / (_NORM * math.sqrt(m)), torch.ones_like(sigma))


def _saved(update: Update, gradient: Tensor | None, B: Tensor) -> Tensor:
    """Return the credits of an update's directions, (matrices · r,)."""
    if gradient is None:
        return torch.zeros(update.matrices * update.r, dtype=torch.float64, device=B.device)
    credit = -(update.columns(gradient.to(B.device)).double() * update.columns(B).double()).sum(1)
    return credit.flatten()


def _kept(update: Update, B: Tensor) -> list[int]:
    counts: list[int] = update.columns(B).any(1).sum(1).tolist()
    return counts


def _require_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        remedy = "it must return one number that depends on the adapter; give loss=, a function of model and batch"
        raise bad_value("loss", kind, remedy)


def _as_of_first_rank(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors (any shapes) of rank 0, so that no rounding of a decomposition makes replicas differ."""
    if not (dist.is_available() and dist.is_initialized()):
        return [*tensors]
    sent = [tensor.contiguous() for tensor in tensors]
    for tensor in sent:
        dist.broadcast(tensor, src=0)
    return sent


def _mean_of_ranks(values: Tensor, near: Tensor) -> Tensor:
    """Return the mean of `values` (any shape, on the CPU) over all processes; `near` lies where these can reduce."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    summed = values.to(sharding_of(near).device(near))
    dist.all_reduce(summed)
    return summed.cpu() / dist.get_world_size()
