"""How a plain LoRA adapter holds the components of a module: under which names, and in which shapes.

B (m, R) and A (R, n) are factors of the module's weight as a matrix. PEFT writes those of a linear layer as they are.
Of a convolution A is a convolution with the layer's kernel, and B one with a kernel of 1. Of an embedding, whose table
has m rows of n numbers, PEFT's A is Bᵀ and its B is Aᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Form:
    """The form of linear layers, and what the others change of it."""

    def name(self, side: str, adapter_name: str | None = None) -> str:
        """Return what follows a module's name in the name of a tensor.

        Args:
            side: "A" or "B", as PEFT calls them.
            adapter_name: Name of the adapter, which a state dict has and a file has not.
        """
        return f"lora_{side}.weight" if adapter_name is None else f"lora_{side}.{adapter_name}.weight"

    def tensors(self, module: str, B: Tensor, A: Tensor, adapter_name: str | None = None) -> dict[str, Tensor]:
        """Return PEFT's tensors of the factors B (m, R) and A (R, n) of a module, by their names; see `name`."""
        sides = zip("AB", self.write(B, A), strict=True)
        return {f"{module}.{self.name(side, adapter_name)}": tensor for side, tensor in sides}

    def write(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return PEFT's A and B, in this order, of the factors B (m, R) and A (R, n)."""
        return A, B

    def read(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the factors B (m, R) and A (R, n) of PEFT's A and B, of any shape; None where they do not fit."""
        return (B, A) if A.ndim == B.ndim == 2 and B.shape[1] == A.shape[0] else None

    def described(self) -> dict[str, Any]:
        """Return what aroma_state.json says of the form, JSON-able: nothing of a linear layer's."""
        return {}

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether a matrix of `shape` (m, n) can have the form."""
        return True


@dataclass(frozen=True)
class ConvolutionForm(Form):
    """The form of convolutions.

    Args:
        kernel: Input channels and sizes of the kernel; their product is n.
    """

    kernel: tuple[int, ...]

    def write(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (R, C, k, k) and B (m, R, 1, 1), in this order, of the factors B (m, R) and A (R, n)."""
        return A.reshape(-1, *self.kernel), B.reshape(*B.shape, *(1 for _ in self.kernel[1:]))

    def read(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the factors B (m, R) and A (R, n) of a file's A (R, C, k, k) and B (m, R, 1, 1)."""
        is_narrow = B.ndim == A.ndim and all(size == 1 for size in B.shape[2:])
        fits = is_narrow and tuple(A.shape[1:]) == self.kernel and B.shape[1] == A.shape[0]
        return (B.flatten(1), A.flatten(1)) if fits else None

    def described(self) -> dict[str, Any]:
        """Return the kernel, JSON-able."""
        return {"kernel": [*self.kernel]}

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether n is the product of the kernel's sizes; `shape` is (m, n)."""
        return math.prod(self.kernel) == shape[1]


@dataclass(frozen=True)
class EmbeddingForm(Form):
    """The form of embeddings."""

    def name(self, side: str, adapter_name: str | None = None) -> str:
        """Return what follows a module's name in the name of a tensor; see `Form.name`."""
        return f"lora_embedding_{side}" if adapter_name is None else f"lora_embedding_{side}.{adapter_name}"

    def write(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return Bᵀ (R, m) and Aᵀ (n, R), in this order, of the factors B (m, R) and A (R, n)."""
        return B.T.contiguous(), A.T.contiguous()

    def read(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the factors B (m, R) and A (R, n) of a file's A (R, m) and B (n, R)."""
        fits = A.ndim == B.ndim == 2 and B.shape[1] == A.shape[0]
        return (A.T.contiguous(), B.T.contiguous()) if fits else None

    def described(self) -> dict[str, Any]:
        """Return that it is an embedding, JSON-able."""
        return {"embedding": True}


LINEAR, EMBEDDING = Form(), EmbeddingForm()


def form_of_entry(entry: Mapping[str, Any]) -> Form:
    """Return the form that aroma_state.json says of a module."""
    if "kernel" in entry:
        return ConvolutionForm(tuple(entry["kernel"]))
    return EMBEDDING if entry.get("embedding") else LINEAR


def form_of_tensor(name: str, tensor: Tensor) -> tuple[str, Form] | None:
    """Return the module's name and form where a tensor of a file, any shape, is PEFT's A of a module; else None."""
    for form in (LINEAR, EMBEDDING):
        ending = f".{form.name('A')}"
        if name.endswith(ending):
            is_convolution = form is LINEAR and tensor.ndim > 2
            return name.removesuffix(ending), ConvolutionForm(tuple(tensor.shape[1:])) if is_convolution else form
    return None


def is_component(name: str) -> bool:
    """Whether a tensor of a plain adapter, by its name in a file, is a factor of a module's components."""
    return any(mark in name for mark in (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B"))
