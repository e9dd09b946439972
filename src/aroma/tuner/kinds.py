"""The kinds of layers that grow: how each uses its weight as a matrix W (m, n), and what two thin factors do for it.

.. code-block:: text

    Linear, Conv1D    y = W x for every token                      first a x, then b (a x)
    Conv1d, 2d, 3d    y = W · every patch of x, C k k = n numbers  first a convolution with a, then one of kernel 1
    Embedding         y = row of W (m rows of n numbers)           first the row of b, then (row of b) a

A convolution of transformers' GPT-2, `Conv1D`, is a linear layer with a transposed weight. Of an embedding b begins at
zero as everywhere, so a row that no example looks up is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..errors import bad_value
from .forms import EMBEDDING, LINEAR, ConvolutionForm, Form

_QUANTISED_LINEAR = ("Linear8bitLt", "Linear4bit")
_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
_REMEDY = "Leave it out of target_modules or name it in exclude_modules"


class Kind:
    """Linear, Conv1D and bitsandbytes layers, and what the other kinds change of them.

    Args:
        is_transposed: Whether the layer's weight is stored as (n, m), as that of Conv1D is.

    Attributes:
        form: How a plain adapter holds its components.
        is_matmul: Whether it maps every token by itself with a matmul, so that the fused node can.
        takes_dropout: Whether its input has entries that dropout can drop.
        b_is_first: Whether b comes before a on the way from input to output.
    """

    form: Form = LINEAR
    is_matmul = True
    takes_dropout = True
    b_is_first = False

    def __init__(self, is_transposed: bool = False) -> None:
        self.is_transposed = is_transposed

    def shape(self, in_features: int, out_features: int) -> tuple[int, int]:
        """Return (m, n) for the sizes that PEFT reads from the layer."""
        return out_features, in_features

    def matrix(self, weight: Any) -> Any:
        """Return a weight, or what this rank has of it, of the layer's shape as W (m, n): a view where possible."""
        return weight.T if self.is_transposed else weight

    def weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (m, n) in the shape of the layer's weight."""
        return matrix.T if self.is_transposed else matrix

    def first(self, x: Tensor, factor: Tensor) -> Tensor:
        """Map the layer's input to the R numbers of a place; `factor` is A (R, n), or B (m, R) where b is first."""
        return F.linear(x, factor)

    def second(self, h: Tensor, factor: Tensor) -> Tensor:
        """Map the R numbers of a place to the layer's output; `factor` is B (m, R), or A (R, n) where b is first."""
        return F.linear(h, factor)

    def ordered(self, b: Any, a: Any) -> tuple[Any, Any]:
        """Return what belongs to b and a in the order in which an input passes it."""
        return (b, a) if self.b_is_first else (a, b)

    def product(self, x: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """Map the layer's input by b a, for b (m, R) and a (R, n)."""
        first, second = self.ordered(b, a)
        return self.second(self.first(x, first), second)

    def factors(self, b: nn.Module, a: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Return the modules that hold b (m, r) and a (r, n) so that calling them does what they are for.

        Args:
            b: An nn.Linear whose weight is b.
            a: One whose weight is a.
        """
        return b, a


class Convolution(Kind):
    """Conv1d, Conv2d and Conv3d without groups and dilation, padded with zeros."""

    is_matmul = False

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        assert isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d), "kind_of has chosen"
        self._convolve = next(function for kind, function in _CONVOLUTIONS.items() if isinstance(base, kind))
        self._stride, self._padding = base.stride, base.padding
        self.form: ConvolutionForm = ConvolutionForm((base.in_channels, *base.kernel_size))
        self._ones = (1,) * len(base.kernel_size)

    def shape(self, in_features: int, out_features: int) -> tuple[int, int]:
        """Return (m, n): output channels, and the numbers of a patch."""
        return out_features, torch.Size(self.form.kernel).numel()

    def matrix(self, weight: Any) -> Any:
        """Return a weight (m, C, k, k), or what this rank has of it, as W (m, n)."""
        return weight.flatten(1)

    def weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (m, n) as a weight (m, C, k, k)."""
        return matrix.reshape(-1, *self.form.kernel)

    def first(self, x: Tensor, factor: Tensor) -> Tensor:
        """Convolve x (…, C, height, width) with A (R, n): (…, R, height, width) of the output."""
        return self._convolve(x, self.weight(factor), None, self._stride, self._padding)

    def second(self, h: Tensor, factor: Tensor) -> Tensor:
        """Convolve h (…, R, height, width) with B (m, R), a kernel of 1: (…, m, height, width)."""
        return self._convolve(h, factor.reshape(*factor.shape, *self._ones))

    def factors(self, b: nn.Module, a: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Return modules that convolve with b (m, r) and a (r, n)."""
        return Factor(b, self.second), Factor(a, self.first)


class Lookup(Kind):
    """Embedding: a table W of m rows."""

    form = EMBEDDING
    is_matmul = False
    takes_dropout = False
    b_is_first = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        assert isinstance(base, nn.Embedding), "kind_of has chosen"
        self._padding = base.padding_idx
        self._shape = base.num_embeddings, base.embedding_dim

    def shape(self, in_features: int, out_features: int) -> tuple[int, int]:
        """Return (m, n): rows, and numbers of a row."""
        return self._shape

    def first(self, x: Tensor, factor: Tensor) -> Tensor:
        """Look the rows x (…) up in B (m, R): (…, R). The padding row gets no gradient, as in the layer."""
        return F.embedding(x, factor, padding_idx=self._padding)

    def second(self, h: Tensor, factor: Tensor) -> Tensor:
        """Map h (…, R) to (…, n) by A (R, n)."""
        return h @ factor

    def factors(self, b: nn.Module, a: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Return modules that look up in b (m, r), and multiply with a (r, n)."""
        return Factor(b, self.first), Factor(a, self.second)


class Factor(nn.Module):
    """One factor of a pair, with what it does to an input.

    Args:
        linear: Holds the factor, a parameter of two dimensions.
        act: Maps an input and the factor to an output.
    """

    def __init__(self, linear: nn.Module, act: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Take the parameter (any shape) of `linear`."""
        super().__init__()
        assert isinstance(linear.weight, nn.Parameter), "PEFT makes linear layers"
        self.weight = linear.weight
        self._act = act

    def forward(self, x: Tensor) -> Tensor:
        """Map an input, of the shape that `act` takes."""
        return self._act(x, self.weight)


# Which kind a layer is -----------------------------------------------------------------------------------------------


def kind_of(base: nn.Module, name: str = "") -> Kind:
    """Return the kind of a layer.

    Args:
        base: The layer.
        name: Its name in the model, for the error.

    Raises:
        ConfigError: It cannot grow.
    """
    if isinstance(base, NonDynamicallyQuantizableLinear):
        why = "torch.nn.MultiheadAttention reads the weight of its out_proj and never calls it, so it would not learn"
        raise bad_value("target_modules", name, f"{why}; name it in exclude_modules")
    if isinstance(base, nn.Linear | Conv1D) or type(base).__name__ in _QUANTISED_LINEAR:
        return Kind(isinstance(base, Conv1D))
    if isinstance(base, tuple(_CONVOLUTIONS)):
        _refuse(base, name, _wrong_with_convolution(base), [*_CONVOLUTIONS])
        return Convolution(base)
    if isinstance(base, nn.Embedding):
        _refuse(base, name, _wrong_with_embedding(base), [nn.Embedding])
        return Lookup(base)
    raise bad_value(
        "target_modules",
        name,
        f"it is a {type(base).__name__}; AROMA grows torch.nn.Linear, Conv1d, Conv2d, Conv3d and Embedding, "
        f"transformers Conv1D and bitsandbytes 4/8-bit linear layers. {_REMEDY}",
    )


def _refuse(base: nn.Module, name: str, wrong: str | None, known: Sequence[type[nn.Module]]) -> None:
    """Raise if something is wrong with a layer, or if it is a subclass that computes in its own way."""
    if wrong is None and not any(type(base).forward is kind.forward for kind in known):
        wrong = "its forward is its own, and may be no product with its weight"
    if wrong is not None:
        raise bad_value("target_modules", name, f"it is a {type(base).__name__}, and {wrong}. {_REMEDY}")


def _wrong_with_convolution(base: Any) -> str | None:
    """Return why a convolution cannot grow; None if it can.

    PEFT's LoRA convolves without groups, with no dilation and with zeros around, so the saved adapter would be another
    function there.
    """
    if base.groups != 1:
        depthwise = "depthwise, " if base.groups == base.in_channels else ""
        return (
            f"groups={base.groups} ({depthwise}so its weight is no one matrix, and PEFT cannot merge into it); grow "
            "the convolutions and linear layers around it"
        )
    if any(step != 1 and size != 1 for step, size in zip(base.dilation, base.kernel_size, strict=True)):
        return f"dilation={base.dilation}, which PEFT's LoRA does not apply to its own convolution"
    if base.padding_mode != "zeros":
        return f"padding_mode={base.padding_mode!r}, where PEFT's LoRA pads with zeros"
    return None


def _wrong_with_embedding(base: Any) -> str | None:
    """Return why an embedding cannot grow; None if it can."""
    if base.max_norm is not None:
        return f"max_norm={base.max_norm}, which scales rows of its frozen weight while it is used"
    if base.scale_grad_by_freq:
        return "scale_grad_by_freq=True, which weighs examples differently than the loss does"
    return None
