"""Tiny models with experts in 3-D parameters, for the tests of `target_parameters`."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from aroma import AromaConfig
from small_nets import METHOD, WIDTH

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
EXPERTS = 4
UNUSED = 3
"""An expert of `RoutedNet` that no token reaches."""

_SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}

FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig, {"num_local_experts": EXPERTS}),
    "qwen3-moe": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        {"num_experts": EXPERTS, "moe_intermediate_size": 12},
    ),
    "gpt-oss": (transformers.GptOssForCausalLM, transformers.GptOssConfig, {"num_local_experts": EXPERTS}),
}
"""gpt-oss stores the matrices of its experts transposed, and has biases."""


def language_model(family: str) -> Any:
    """A random model of a family, in evaluation mode; two calls give equal ones."""
    kind, config, sizes = FAMILIES[family]
    torch.manual_seed(4)
    return kind(config(**{**_SIZES, **sizes})).eval()


class RoutedNet(nn.Module):
    """A layer of experts whose tokens are sent by the signs of their first two numbers; none is sent to the last."""

    def __init__(self, implementation: str = "grouped_mm", transposed: bool = False) -> None:
        super().__init__()
        kind, config = (
            (GptOssExperts, transformers.GptOssConfig) if transposed else (MixtralExperts, transformers.MixtralConfig)
        )
        settings: Any = config(**{**_SIZES, "num_local_experts": EXPERTS})
        settings._experts_implementation = implementation
        self.experts: Any = kind(settings)
        generator = torch.Generator().manual_seed(8)
        for parameter in self.experts.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / WIDTH**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Map x (T, n) to the same shape."""
        chosen = ((x[:, 0] > 0).long() + (x[:, 1] > 1).long())[:, None]
        result: Tensor = x + self.experts(x, chosen, torch.ones(chosen.shape, dtype=x.dtype))
        return result


def routed(base: nn.Module | None = None, **changes: Any) -> Any:
    """The net with a growing adapter on its experts."""
    fields = {**METHOD, "target_modules": [], "target_parameters": PARAMETERS, **changes}
    return get_peft_model(RoutedNet() if base is None else base, AromaConfig(**fields), autocast_adapter_dtype=False)
