"""The updates s B A of a LoRA adapter, whatever layers hold them: read, split into directions, measured, cut."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from .. import distributed, sharding
from ..errors import AromaWarning, NonFiniteError, bad_value
from ..reset import check_resettable
from ..spectra import double

_NORM = 1 / math.sqrt(3)
"""Norm of a row of A of a direction that stays: that of PEFT's random start, whatever the layer's width."""
_ZERO = 1e-9
"""Singular values below this share of the largest are rounding."""
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are."""
_VARIANTS = ("use_dora", "velora_config", "monteclora_config", "alora_invocation_tokens")
"""Variants of LoRA that keep A and B as they are."""

Losses = Sequence[Callable[[], Tensor]]
"""Computes the loss of each batch of this process."""


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
    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters A and B, as PEFT shapes them."""
        if self.adapter in self.layer.lora_embedding_A:
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

    def is_product(self) -> bool:
        """Whether the update is a product B A of each matrix, as that of a grouped convolution is not."""
        A, B = (getattr(parameter, "ds_shape", parameter.shape) for parameter in self.pair)
        groups = getattr(self.layer.get_base_layer(), "groups", 1)
        return A[0] == B[1] == self.r * self.matrices and groups == 1 and all(size == 1 for size in B[2:])


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
        self.model = distributed.unwrapped(model)
        self.adapter = _lora(self.model, adapter_name)
        self._optimizer = optimizer
        self._sharding = sharding.sharding_of_model(self.model, optimizer)
        self.each = _found(self.model, self.adapter)
        configs: Any = self.model.peft_config
        _require_products(configs[self.adapter])
        self._pairs: list[tuple[Tensor, Tensor]] = []

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds a part of the parameters, or of the optimizer's copies of them, only."""
        return self._sharding is not sharding.REPLICAS

    def require_equal_ranks(self, **facts: object) -> None:
        """Raise ConfigError unless all processes have the same adapter and `facts`, such as counts of batches."""
        adapted = [(update.name, update.r) for update in self.each]
        distributed.require_equal({"adapter": adapted, **facts})

    @torch.no_grad()
    def to_singular_directions(self) -> Tensor:
        """Rewrite every B A as U Σ Vᵀ, largest first. The model computes the same, up to rounding in its dtype.

        Returns:
            Singular values of s B A, (d,) in float64 on the CPU; 0 for directions that do not exist.

        Raises:
            NonFiniteError: An update is NaN or infinite.
        """
        whole = sharding.gathered([parameter for update in self.each for parameter in update.pair])
        self._pairs, sizes = [], []
        for update, A, B in zip(self.each, whole[::2], whole[1::2], strict=True):
            # The SVD of such numbers fails with an error that names nothing.
            if not (A.isfinite().all() and B.isfinite().all()):
                raise NonFiniteError(f"{update.name}: its adapter is NaN or infinite; lower the learning rate")
            rows, columns, sigma = _singular(update.rows(A), update.columns(B))
            A, B, sigma = _as_of_first_rank(*update.shaped(rows, columns, A, B), sigma)
            self._pairs.append((A, B))
            sizes.append((sigma * abs(float(update.layer.scaling[self.adapter]))).flatten().cpu())
        self._write(self._pairs)
        return torch.cat(sizes)

    @torch.no_grad()
    def cut(self, kept: Tensor) -> dict[str, list[int]]:
        """Set the directions that are not `kept` (d,) to zero, in A and B, and let their optimizer state begin anew.

        Returns `ranks()`. Both gradients of such a direction are exactly zero, so it stays zero without a mask.
        """
        self._pairs = self._only(kept)
        self._write(self._pairs)
        self.forget()
        ranks, self._pairs = self.ranks(), []  # a copy of the whole adapter
        return ranks

    def losses(self, losses: Losses, kept: Tensor) -> Tensor:
        """Return the loss of each batch with the directions `kept` (d,) only, (batches,), the mean over processes."""
        try:
            self._write(self._only(kept))
            with _evaluating(self.model), torch.no_grad(), _eagerly():
                found = torch.stack([_number(loss()) for loss in losses])
        finally:
            self._write(self._pairs)
        return self._mean_of_ranks(found)

    def ranks(self) -> dict[str, list[int]]:
        """Return how many directions each matrix has, by the name of the weight; experts one by one."""
        pairs = zip(self.each, self._pairs, strict=True)
        return {update.name: update.columns(B).any(1).sum(1).tolist() for update, (_, B) in pairs}

    def _only(self, kept: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return A and B of every update with the directions `kept` (d,), and zeros for the others."""
        pieces = kept.split([len(A) for A, _ in self._pairs])
        chosen = []
        for update, (A, B), piece in zip(self.each, self._pairs, pieces, strict=True):
            by = piece.to(B).view(update.matrices, update.r)
            chosen.append(update.shaped(update.rows(A) * by[:, :, None], update.columns(B) * by[:, None], A, B))
        return chosen

    @torch.no_grad()
    def _write(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Write the whole A and B of every update, in the shapes of PEFT."""
        self._sharding.reshard(self.model)
        for update, pair in zip(self.each, pairs, strict=True):
            for parameter, values in zip(update.pair, pair, strict=True):
                sharding.write(parameter, values)

    @torch.no_grad()
    def forget(self) -> None:
        """Let the optimizer's state begin anew; under ZeRO that of all it trains, which has one step count."""
        parameters = [parameter for update in self.each for parameter in update.pair]
        if self._optimizer is None:
            return
        if not self._sharding.has_flat_optimizer:
            for parameter in parameters:
                distributed.unwrapped_optimizer(self._optimizer).state.pop(parameter, None)
            return
        for parameter in parameters:
            check_resettable(self._optimizer, parameter, "prune")
        # In place: DeepSpeed refers to these tensors. Zeroed moments under an old count would make large steps.
        for state in self._sharding.base_optimizer(self._optimizer).state.values():
            for name, value in state.items():
                first = float(name == "mu_product")  # of NAdam
                state[name] = value.fill_(first) if isinstance(value, Tensor) else type(value)(first)

    def _device(self) -> torch.device:
        """Return a device whose tensors the processes can reduce."""
        parameter = self.each[0].pair[1]
        return self._sharding.device(parameter)

    def _mean_of_ranks(self, values: Tensor) -> Tensor:
        """Return the mean of `values` (any shape, on the CPU) over all processes."""
        if not distributed.is_distributed():
            return values
        summed = values.to(self._device())
        dist.all_reduce(summed)
        return summed.cpu() / dist.get_world_size()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate a model: no dropout, and the state of the random numbers is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    with torch.random.fork_rng([*{p.device for p in model.parameters() if p.is_cuda}]):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _eagerly() -> Any:
    """Return a context in which compiled modules run as they are: checkups are too rare to compile for."""
    is_loaded = "torch._dynamo" in sys.modules  # importing it takes a second
    return torch.compiler.set_stance("force_eager") if is_loaded else nullcontext()


def _lora(model: nn.Module, name: str | None) -> str:
    """Return the name of the LoRA adapter of `model` that has this name, or else is active."""
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    wanted = getattr(model, "active_adapters", ()) if name is None else (name,)
    names = [name for name in configs if name in wanted]
    if len(names) != 1 or configs[names[0]].peft_type != "LORA":
        found = ", ".join(f"{name} ({configs[name].peft_type})" for name in names) or name or type(model).__name__
        remedy = "evidence needs one active LoRA adapter: get_peft_model(model, LoraConfig(...)), or set_adapter(NAME)"
        raise bad_value("model", found, remedy)
    return str(names[0])


def _require_products(config: Any) -> None:
    """Raise ConfigError for a LoRA whose updates are not products B A beside unchanged base weights."""
    if config.init_lora_weights not in _STARTS:
        remedy = "it changes the base weights, and a direction that goes would take a part of them with it; use True"
        raise bad_value("init_lora_weights", config.init_lora_weights, remedy)
    if config.lora_bias:
        raise bad_value("lora_bias", True, "a bias is no direction, and goes with a layer that keeps none; use False")
    for field in fields(config):
        is_other = field.metadata.get("is_lora_variant") and field.name not in _VARIANTS
        if is_other and getattr(config, field.name):
            raise bad_value(field.name, getattr(config, field.name), "its updates are no products B A; leave it out")


def _found(model: nn.Module, adapter: str) -> list[Update]:
    """Return the updates of an adapter, and warn of those that are left alone."""
    found = []
    for key, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or not {adapter} & {*layer.lora_A, *layer.lora_embedding_A}:
            continue
        # Several wrappers of one module lie within each other.
        name = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(layer, ParamWrapper):
            found.append(Update(f"{name}.{layer.parameter_name}", layer, adapter, layer.num_experts))
        else:
            found.append(Update(name, layer, adapter, 1))
    others = [update.name for update in found if not update.is_product()]
    if len(others) == len(found):
        raise bad_value("model", adapter, "no layer of this adapter has an update B A; see docs/evidence.md")
    if others:
        said = f"{len(others)} adapted layers are left alone, because their update is no product B A: "
        warnings.warn(said + ", ".join(others[:3]), AromaWarning, stacklevel=4)
    return [update for update in found if update.is_product()]


def _singular(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (matrices, r, n), columns (matrices, m, r), singular values (matrices, r) of the same products."""
    left, R = torch.linalg.qr(double(columns))
    right, S = torch.linalg.qr(double(rows).mT)
    U, sigma, Vh = torch.linalg.svd(R @ S.mT, full_matrices=False)
    exists = sigma > _ZERO * sigma[:, :1]
    sigma = sigma * exists
    missing = rows.shape[1] - sigma.shape[1]
    pad = nn.functional.pad
    return (
        pad(_NORM * (Vh @ right.mT) * exists[:, :, None], (0, 0, 0, missing)),
        pad((left @ U) * (sigma / _NORM)[:, None], (0, missing)),
        pad(sigma, (0, missing)),
    )


def _number(loss: Any) -> Tensor:
    """Return a loss, of any device and dtype, as a scalar in float64 on the CPU."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise bad_value(
            "loss", kind, "it must return a tensor of one number; give loss=, a function of model and batch"
        )
    return loss.detach().cpu().double().reshape(())


def _as_of_first_rank(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors (any shapes) of rank 0, so that no rounding of a decomposition makes replicas differ."""
    sent = [tensor.contiguous() for tensor in tensors]
    if distributed.is_distributed():
        for tensor in sent:
            dist.broadcast(tensor, src=0)
    return sent
