"""The second half of a sublayer of BERT or RoBERTa, with a bottleneck adapter in it."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

Place = Literal["houlsby", "pfeiffer"]

_INITIAL_STD = 1e-2
"""Of the weights at the start, truncated at two of it, as in 1902.00751: the adapter adds next to nothing."""


class BottleneckAdapter(nn.Module):
    """What an adapter adds: up(f(down(x))), of x (…, width) and as large; nearly 0 at the start.

    Args:
        width: Width d of the encoder.
        size: Neurons of the bottleneck.
        activation: f, between the two layers.
    """

    def __init__(self, width: int, size: int, activation: nn.Module) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.activation = activation
        self.up = nn.Linear(size, width)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=_INITIAL_STD, a=-2 * _INITIAL_STD, b=2 * _INITIAL_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, width) to (…, width)."""
        added: Tensor = self.up(self.activation(self.down(x)))
        return added


class AdaptedSublayer(nn.Module):
    """Takes the place of `…layer.N.attention.output` or `…layer.N.output`, which it keeps as `sublayer`.

    .. code-block:: text

        h = dropout(dense(x))                                     the sublayer's projection back to width d
        y = LayerNorm(h + skip)                                   without an adapter
        y = LayerNorm(h + adapter(h) + skip)                      Houlsby: after the projection, before the skip
        y = LayerNorm(h + adapter(LayerNorm(h + skip)) + skip)    Pfeiffer: reads what the layer would have returned

    Pfeiffer's is the best of that paper's search, and what AdapterHub calls `pfeiffer`: the pretrained LayerNorm
    stands before the adapter and after it, and the adapter's residual is taken before the first. Activations are
    theirs, too: GELU in Houlsby's, ReLU in Pfeiffer's.

    Args:
        sublayer: Module with `dense`, `dropout` and `LayerNorm`; see `can_be_adapted`.
        size: Neurons of the bottleneck.
        place: `"houlsby"` or `"pfeiffer"`.
    """

    def __init__(self, sublayer: Any, size: int, place: Place) -> None:
        super().__init__()
        self.sublayer = sublayer
        self.place = place
        activation = nn.GELU() if place == "houlsby" else nn.ReLU()
        weight = sublayer.dense.weight
        self.adapter = BottleneckAdapter(weight.shape[0], size, activation).to(weight)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Map the sublayer's hidden states (…, n) and its input, the skip, (…, d) to (…, d)."""
        h = self.sublayer.dropout(self.sublayer.dense(hidden_states))
        skipped = h + input_tensor
        added = self.adapter(h if self.place == "houlsby" else self.sublayer.LayerNorm(skipped))
        result: Tensor = self.sublayer.LayerNorm(skipped + added)
        return result


def can_be_adapted(sublayer: nn.Module) -> bool:
    """Whether a module is built as BERT's `BertSelfOutput` and `BertOutput` are."""
    parts = dict(sublayer.named_children())
    kinds = {"dense": nn.Linear, "dropout": nn.Dropout, "LayerNorm": nn.LayerNorm}
    return parts.keys() == kinds.keys() and all(isinstance(parts[name], kind) for name, kind in kinds.items())
