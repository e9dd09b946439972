"""How PEFT shapes the tensors of an update B A, by the kind of layer. AROMA grows linear ones, and reads all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Form:
    """Names and shapes of the two tensors of a module's update, B (m, R) and A (R, n).

    That of a linear layer has the defaults.

    Args:
        kernel: Of a convolution: input channels and sizes of the kernel. A is (R, *kernel), and B (m, R, 1, …).
        is_embedding: Whether A holds Bᵀ (R, m) and B holds Aᵀ (n, R), under other names.
    """

    kernel: tuple[int, ...] = ()
    is_embedding: bool = False

    def name(self, side: str) -> str:
        """Return what follows a module's name in the name of a tensor; `side` is "A" or "B", as PEFT calls them."""
        return f"lora_embedding_{side}" if self.is_embedding else f"lora_{side}.weight"

    def tensors(self, module: str, B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Return PEFT's tensors of the factors B (m, R) and A (R, n) of a module, by their names in a file."""
        if self.is_embedding:
            A, B = B.T.contiguous(), A.T.contiguous()
        elif self.kernel:
            A, B = A.reshape(-1, *self.kernel), B.reshape(*B.shape, *(1 for _ in self.kernel[1:]))
        return {f"{module}.{self.name('A')}": A, f"{module}.{self.name('B')}": B}

    def factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the factors B (m, R) and A (R, n) of PEFT's A and B, of any shape; None where they do not fit."""
        ones = tuple(1 for _ in self.kernel[1:])
        if A.ndim != B.ndim or A.shape[1:] != (self.kernel or A.shape[1:2]) or B.shape[1:] != (len(A), *ones):
            return None
        return (A.T.contiguous(), B.T.contiguous()) if self.is_embedding else (B.flatten(1), A.flatten(1))


LINEAR = Form()


def form_of_tensor(name: str, tensor: Tensor) -> tuple[str, Form] | None:
    """Return the module's name and form where a tensor of a file, any shape, is PEFT's A of a module; else None."""
    form = Form(kernel=tuple(tensor.shape[1:]) if tensor.ndim > 2 else ())
    for found in (form, Form(is_embedding=True)):
        ending = f".{found.name('A')}"
        if name.endswith(ending):
            return name.removesuffix(ending), found
    return None
