"""The model without data: settings, configurations, and the model with its adapter on the meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList, register_parametrization
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from aroma.errors import ConfigError, bad_value
from aroma.tuner import AromaConfig

from ..bench.models import SHAPES as ENCODERS
from ..bench.models import Shapes, longest_sequence, named_config

ADAPTER = "default"
ATTENTION = "aroma_estimate"
"""Name under which transformers finds the attention of `memory.attend`."""

DEFAULT_LENGTH = 2048
"""Tokens of a sequence where none are given; fewer if the model takes fewer."""

Dtype = Literal["float32", "bfloat16", "float16", "nf4", "int8"]
Optimizer = Literal["adamw", "adamw8bit", "adafactor", "sgd", "sgd-momentum"]
Task = Literal["auto", "causal-lm", "classification"]
Adapter = Literal["aroma", "lora"]


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, positions: int
) -> tuple[type[Any], dict[str, Any]]:
    return LlamaConfig, {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "num_key_value_heads": 8,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
    }


SHAPES: Shapes = {
    **ENCODERS,
    "gpt2": (GPT2Config, {"architectures": ["GPT2LMHeadModel"]}),
    "llama3-8b": _llama(4096, 14336, 32, 32, 8192),
    "llama3-70b": _llama(8192, 28672, 80, 64, 8192),
    "llama3.1-405b": _llama(16384, 53248, 126, 128, 131072),
    "mixtral-8x7b": (
        MixtralConfig,
        {"architectures": ["MixtralForCausalLM"], "max_position_embeddings": 32768},
    ),
    "qwen3-30b-a3b": (
        Qwen3MoeConfig,
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_hidden_layers": 48,
            "head_dim": 128,
            "max_position_embeddings": 40960,
        },
    ),
    "deepseek-v3": (
        DeepseekV3Config,
        {"architectures": ["DeepseekV3ForCausalLM"], "max_position_embeddings": 163840, "num_mtp_layers": 0},
    ),
    "kimi-k2": (
        DeepseekV3Config,
        {
            "architectures": ["DeepseekV3ForCausalLM"],
            "vocab_size": 163840,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "n_routed_experts": 384,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "max_position_embeddings": 131072,
            "num_mtp_layers": 0,
        },
    ),
}
"""Named shapes, with the values of their published configurations."""


# Settings and configurations -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EstimateSettings:
    """Settings of one estimate.

    Args:
        model: A named shape, a local folder or a hub name; only its configuration is used.
        adapter: `"aroma"` or `"lora"`.
        components: Finished components of every module, each of rank `r`, beside the one in training; 0 for LoRA.
        r: Rank of one component, or of LoRA.
        target_modules: As in `AromaConfig` and `LoraConfig`.
        target_parameters: Likewise: 3-D parameters of experts.
        dtype: Of the base weights; `"nf4"` and `"int8"` as bitsandbytes stores them, the rest in bfloat16, which
            includes 3-D parameters of experts.
        quantise_experts: Whether those are nf4, too, as `bitsandbytes.nn.parametrize.replace_parameter_4bit` makes
            them: it unpacks all experts of a parameter for each use.
        batch_size: Sequences in a batch on one device, without padding.
        sequence_length: Tokens in a sequence; None for 2048, or what the model takes if that is less.
        optimizer: `"sgd"` is without momentum.
        gradient_checkpointing: Whether each block keeps only its input and is computed again in backward.
        task: `"auto"` is a causal language model if the configuration says so, else a classifier of two classes.

    Raises:
        ConfigError: A value that cannot work.
    """

    model: str
    components: int = 10
    r: int = 1
    target_modules: str | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] = ()
    dtype: Dtype = "bfloat16"
    quantise_experts: bool = False
    batch_size: int = 1
    sequence_length: int | None = None
    optimizer: Optimizer = "adamw"
    gradient_checkpointing: bool = False
    task: Task = "auto"
    adapter: Adapter = "aroma"

    def __post_init__(self) -> None:
        require_whole("components", self.components, 0)
        if self.adapter == "lora" and self.components:
            raise bad_value("components", self.components, "LoRA has no finished components; give 0")
        for name in ("r", "batch_size", *(["sequence_length"] if self.sequence_length is not None else [])):
            require_whole(name, getattr(self, name), 1)
        for name, kinds in (("dtype", Dtype), ("optimizer", Optimizer), ("task", Task), ("adapter", Adapter)):
            choices: tuple[Any, ...] = get_args(kinds)
            if getattr(self, name) not in choices:
                raise bad_value(name, getattr(self, name), f"choose one of {', '.join(choices)}")
        if self.quantise_experts and self.dtype != "nf4":
            raise bad_value("quantise_experts", True, f"with dtype={self.dtype!r}: experts are packed as nf4 alone")
        if self.quantise_experts and self.target_parameters:
            remedy = (
                "their update is added to the weight itself, so quantised experts cannot grow; leave one of both out"
            )
            raise bad_value("quantise_experts", True, remedy)

    @property
    def rank(self) -> int:
        """Rank of the finished components of a module."""
        return self.components * self.r

    @property
    def weight_dtype(self) -> str:
        """Dtype of the weights that are not quantised, and of the activations."""
        return "bfloat16" if self.is_quantised else self.dtype

    @property
    def is_quantised(self) -> bool:
        """Whether bitsandbytes holds the weights."""
        return self.dtype in ("nf4", "int8")


def require_whole(name: str, value: object, minimum: int) -> None:
    """Raise ConfigError unless `value` is a whole number of at least `minimum`."""
    if not isinstance(value, int) or value < minimum:
        raise bad_value(name, value, f"give a whole number, {minimum} or more")


def load_config(model: str) -> Any:
    """Return the configuration of a model; ConfigError if there is none, or if its checkpoint is quantised already."""
    config = named_config(model, SHAPES)
    if getattr(config, "quantization_config", None) is not None:
        remedy = "its checkpoint is quantised already; give the model that it was made from, and the dtype nf4 or int8"
        raise bad_value("model", model, remedy)
    return config


def length_of(settings: EstimateSettings, config: Any) -> int:
    """Return the tokens of a sequence: those of the settings, or the default that fits the model.

    Raises:
        ConfigError: The model takes fewer than the settings say.
    """
    limit = longest_sequence(config)
    if settings.sequence_length is None:
        return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if limit is not None and settings.sequence_length > limit:
        raise bad_value("sequence_length", settings.sequence_length, f"the model takes at most {limit} tokens")
    return settings.sequence_length


def task_of(settings: EstimateSettings, config: Any) -> str:
    """Return what the model learns: `"causal-lm"` or `"classification"`.

    Raises:
        ConfigError: The model can learn neither, or is a quantised classifier.
    """
    task = settings.task
    if task == "auto":
        stated = (config.architectures or [""])[0]
        classifies = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            speaks = stated.endswith(("ForCausalLM", "LMHeadModel")) or not classifies
            task = "causal-lm" if speaks else "classification"
        elif classifies:
            task = "classification"
        else:
            remedy = f"a {config.model_type}: neither a causal language model nor a text classifier"
            raise bad_value("model", settings.model, remedy)
    if task == "classification" and settings.is_quantised:
        remedy = (
            "bitsandbytes quantises the head of a classifier too, which then cannot train; choose bfloat16, or the "
            "task causal-lm"
        )
        raise bad_value("dtype", settings.dtype, remedy)
    return task


# The model on the meta device ----------------------------------------------------------------------------------------


def build(settings: EstimateSettings, config: Any, layers: int | None = None) -> Any:
    """Return the model with an adapter at its start, on the meta device: nothing is allocated.

    `layers` replaces the configuration's number of blocks. ConfigError: no such model for the task, or no module fits.
    """
    task = task_of(settings, config)
    config = copy.deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
        for kinds in _KINDS:
            if getattr(config, kinds, None) is not None:
                setattr(config, kinds, getattr(config, kinds)[:layers])
    if config.pad_token_id is None:
        config.pad_token_id = 0  # a classifier of batches needs one
    kind = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    targets = settings.target_modules
    with torch.device("meta"):
        try:
            dtype = getattr(torch, settings.weight_dtype)
            model = kind.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise bad_value("model", settings.model, f"no model for {task} can be made of it ({reason})") from error
        if settings.is_quantised:
            _replace_linears(model)
        if settings.quantise_experts:
            _pack_experts(model)
        adapter = (AromaConfig if settings.adapter == "aroma" else LoraConfig)(
            r=settings.r,
            task_type="CAUSAL_LM" if task == "causal-lm" else "SEQ_CLS",
            target_modules=targets if isinstance(targets, str) else [*targets],
            target_parameters=[*settings.target_parameters] or None,
        )
        try:
            return get_peft_model(model, adapter, adapter_name=ADAPTER).train()
        except ConfigError:
            raise
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise bad_value("target_modules", targets, f"cannot be adapted ({reason})") from error


def adapted_layers(model: nn.Module) -> list[LoraLayer]:
    """Return the layers that the adapter is on, AROMA's or LoRA's."""
    return [module for module in model.modules() if isinstance(module, LoraLayer) and ADAPTER in module.lora_A]


_KINDS = ("layer_types", "mlp_layer_types")
"""Fields of a configuration that say of every block what kind it is."""


def leading_layers(config: Any) -> int:
    """Return the number of blocks without experts that a mixture of experts begins with."""
    return getattr(config, "first_k_dense_replace", 0) or 0


def layers_of(config: Any) -> int | None:
    """Return the number of the model's blocks; None if it is not known, or if not all after the leading are alike."""
    layers: int | None = getattr(config, "num_hidden_layers", None)
    kinds = [(getattr(config, name, None) or [])[leading_layers(config) :] for name in _KINDS]
    is_mixed = getattr(config, "mlp_only_layers", None) or (getattr(config, "decoder_sparse_step", 1) or 1) != 1
    return None if is_mixed or any(len(set(own)) > 1 for own in kinds) else layers


class QuantisedLinear(nn.Linear):
    """A layer of bitsandbytes without data: it has the shape of the original and keeps nothing for backward."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (…, n) to (…, m)."""
        y: Tensor = _Dequantising.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call, unused-ignore]
        return y


class _Dequantising(torch.autograd.Function):
    """A matmul whose weight is made in 16 bits each time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, torch.empty_like(weight), bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gy @ torch.empty_like(weight), None, None


def _replace_linears(model: Any) -> None:
    """Put quantised layers where transformers would; it leaves the output layer as it is."""
    kept = get_keys_to_not_convert(model)
    for name, module in [*model.named_modules()]:
        if not (type(module) is nn.Linear or isinstance(module, Conv1D)) or not should_convert_module(name, kept):
            continue
        m, n = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        quantised = QuantisedLinear(n, m, bias=module.bias is not None, device="meta", dtype=module.weight.dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, quantised)


class Unpacking(nn.Module):
    """Makes all experts of a packed parameter in 16 bits for each use, as bitsandbytes does."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return a copy of `weight`, (E, m, n)."""
        return torch.empty_like(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return `weight`, (E, m, n): what is packed has the shape of the original here."""
        return weight


def _pack_experts(model: Any) -> None:
    for module in [*model.modules()]:
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if parameter.ndim == 3:
                register_parametrization(module, name, Unpacking(), unsafe=True)


def packed_weights(model: nn.Module) -> list[Tensor]:
    """Return the weights of quantised layers, (m, n), and packed parameters of experts, (E, m, n)."""
    linears = [module.weight for module in model.modules() if isinstance(module, QuantisedLinear)]
    experts = [
        module.original
        for module in model.modules()
        if isinstance(module, ParametrizationList) and isinstance(module[0], Unpacking)
    ]
    return [*linears, *experts]
