"""Fused weights as their parts: each block of outputs, as q, k and v of a fused projection, grows by itself.

.. code-block:: text

    y = [W_q x + B_q A_q x;  W_k x + B_k A_k x;  …]       the parts of W (m, n) lie one below the other

As plain LoRA of the whole module: A = [A_q; A_k; …], and B has B_q, B_k, … as blocks on its diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..errors import bad_value
from ..patterns import is_named
from ..sharding import is_sharded, sharded_columns, sharded_rows
from .experts import MATRICES
from .layer import AromaLinear, BlockMatrix, refuse_zero3

if TYPE_CHECKING:
    from .config import AromaConfig


class PartWeight(nn.Module):
    """One block of outputs of a Linear or Conv1D layer; its weight and bias are views.

    Args:
        whole: The layer.
        start: First output.
        stop: One past the last.
    """

    def __init__(self, whole: nn.Linear | Conv1D, start: int, stop: int) -> None:
        super().__init__()
        # In a tuple, so that its parameters do not appear twice in the model.
        self._whole = (whole,)
        self.start, self.stop = start, stop

    @property
    def whole(self) -> Any:
        """The layer."""
        return self._whole[0]

    @property
    def is_transposed(self) -> bool:
        """Whether the layer stores its weight as (n, m)."""
        return isinstance(self.whole, Conv1D)

    @property
    def weight(self) -> Tensor:
        """The block, (stop - start, n), or its transpose; the layer's whole weight where it is sharded."""
        weight: Tensor = self.whole.weight
        own = slice(self.start, self.stop)
        return weight if is_sharded(weight) else weight[:, own] if self.is_transposed else weight[own]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (…, n) to this block of the layer's outputs, (…, stop - start)."""
        weight, bias = self.weight, self.whole.bias
        return F.linear(
            x, weight.T if self.is_transposed else weight, None if bias is None else bias[self.start : self.stop]
        )


class PartMatrix(BlockMatrix):
    """The growing update of one block of outputs."""

    asked_by = "split_modules"

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, PartWeight)
        return module.whole.weight.shape[0 if module.is_transposed else 1], module.stop - module.start

    def weight_matrix(self) -> Any:
        """Return this block of W0 as (m, n), a view; under FSDP2 what this rank holds of it.

        Raises:
            ConfigError: ZeRO-3 shards the layer.
        """
        base = self.get_base_layer()
        self.refuse_sharding()
        if not is_sharded(base.whole.weight):
            return super().weight_matrix()
        part = sharded_columns if self.fan_in_fan_out else sharded_rows
        return self.kind.matrix(part(base.whole.weight, base.start, base.stop))


class AromaParts(nn.Module):
    """A layer whose blocks of outputs grow, each by itself.

    Args:
        base_layer: A Linear or Conv1D layer.
        sizes: Outputs of every block, in their order.
        adapter_name: Name of the adapter.
        kwargs: As for `AromaLinear`.

    Attributes:
        base_layer: As given.
        aroma_matrices: `PartMatrix` of every block, by its number.
    """

    def __init__(self, base_layer: nn.Linear | Conv1D, sizes: Sequence[int], adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        ends = [0, *accumulate(sizes)]
        weights = [PartWeight(base_layer, start, stop) for start, stop in pairwise(ends)]
        self.aroma_matrices = nn.ModuleDict(
            {str(place): PartMatrix(weight, adapter_name, **kwargs) for place, weight in enumerate(weights)}
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (…, n) to (…, m).

        Raises:
            ConfigError: ZeRO-3 shards the layer.
        """
        refuse_zero3(PartMatrix.asked_by, self.base_layer.weight)
        return torch.cat([matrix(x, *args, **kwargs) for matrix in self.aroma_matrices.values()], dim=-1)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the layer, with the updates merged into it if `merge`; PEFT calls this."""
        for matrix in self.aroma_matrices.values() if merge else ():
            assert isinstance(matrix, PartMatrix)
            matrix.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def parts_of(layers: Mapping[str, AromaLinear]) -> dict[str, list[str]]:
    """Return the keys of `layers` that are parts, by the key of their module, in their order."""
    found: dict[str, list[str]] = {}
    for key, layer in layers.items():
        if isinstance(layer, PartMatrix):
            found.setdefault(key.rpartition(f".{MATRICES}.")[0], []).append(key)
    return found


def sizes_of(config: AromaConfig, name: str, target: nn.Module) -> list[int] | None:
    """Return the outputs of every part of the module `name`; None where it is to stay whole.

    Raises:
        ConfigError: The module cannot be split so.
    """
    fitting = [key for key in config.split_modules or {} if is_named(name, key)]
    if not fitting:
        return None
    asked = (config.split_modules or {})[fitting[0]]
    if type(target) is not nn.Linear and type(target) is not Conv1D:
        raise bad_value(
            "split_modules", name, f"it is a {type(target).__name__}; only Linear and Conv1D layers can be split"
        )
    weight: Any = target.weight
    refuse_zero3(PartMatrix.asked_by, weight)
    m: int = weight.shape[1 if isinstance(target, Conv1D) else 0]
    sizes: list[int] = [m // asked] * asked if isinstance(asked, int) else [*asked]
    if sum(sizes) != m:
        raise bad_value(
            "split_modules",
            {fitting[0]: asked},
            f"{name} has {m} outputs; give the outputs of each part, which sum up",
        )
    return sizes


# The plain LoRA form -------------------------------------------------------------------------------------------------


def join(updates: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return B (m, R) and A (R, n) of the whole module from B_p (m_p, R_p) and A_p (R_p, n) of its parts."""
    return torch.block_diag(*(B for B, _ in updates)).to(updates[0][0]), torch.cat([A for _, A in updates])


def split(B: Tensor, A: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]] | None:
    """Undo `join`: B (m, R) and A (R, n) to the updates of parts with so many outputs; None if they are no such parts.

    A component belongs to the part in which its column of B is not zero; one whose column is all zero to the part of
    the component before it. Components of zero at the end are padding, and left out.
    """
    used = (B.any(0) | A.any(1)).nonzero()
    count = int(used[-1]) + 1 if len(used) else 0
    B, A = B[:, :count], A[:count]
    blocks = B.split([*sizes])
    owners, last = [], 0
    for column in torch.stack([block.any(0) for block in blocks], 1).tolist():
        own = [place for place, used in enumerate(column) if used]
        if len(own) > 1 or (own and own[0] < last):
            return None
        last = own[0] if own else last
        owners.append(last)
    chosen = [[k for k, owner in enumerate(owners) if owner == place] for place in range(len(blocks))]
    return [(block[:, own].contiguous(), A[own].contiguous()) for block, own in zip(blocks, chosen, strict=True)]
