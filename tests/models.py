"""Tiny random models of several architectures, their inputs, and adapters made by hand or by a few steps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from aroma import AromaConfig, Attachment, Event, aroma_layers, attach

transformers.logging.set_verbosity_error()

VOCABULARY, LENGTH, LABELS = 40, 8, 3

METHOD: dict[str, Any] = {
    "inner_check_interval": 2,
    "inner_tolerance": 0.5,
    "max_inner_steps": 4,
    "outer_tolerance": 1e-3,
    "rewarmup_steps": 1,
    "component_seed": 5,
}
"""A method whose inner loops last at most 4 steps, so that ranks grow within a dozen."""

Batch = dict[str, Tensor]


# Architectures -------------------------------------------------------------------------------------------------------


def _tokens(seed: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(seed))


def _classified(seed: int) -> Batch:
    tokens = _tokens(seed)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % LABELS}


def _continued(seed: int) -> Batch:
    tokens = _tokens(seed)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


def _translated(seed: int) -> Batch:
    return {"input_ids": _tokens(seed), "labels": _tokens(seed + 1)}


def _pictured(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(4, 3, 8, 8, generator=generator),
        "labels": torch.randint(0, LABELS, (4,), generator=generator),
    }


@dataclass(frozen=True)
class Architecture:
    """How to build one, what it eats, and how its adapter is configured.

    Args:
        model_class: Class in transformers.
        config: Its configuration's class and arguments.
        batch: Seed → inputs with labels.
        targets: How many modules "all-linear" must grow, the head left out.
        adapter: Arguments of the adapter's configuration.
    """

    model_class: type[Any]
    config: Callable[[], Any]
    batch: Callable[[int], Batch]
    targets: int
    adapter: dict[str, Any] = field(default_factory=dict)


_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
    "num_labels": LABELS,
}

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        transformers.BertForSequenceClassification,
        partial(transformers.BertConfig, **_ENCODER),
        _classified,
        13,  # six a layer, and the pooler
        {"task_type": "SEQ_CLS"},
    ),
    "roberta": Architecture(
        transformers.RobertaForSequenceClassification,
        partial(transformers.RobertaConfig, **_ENCODER),
        _classified,
        12,
        {"task_type": "SEQ_CLS"},
    ),
    "gpt2": Architecture(
        transformers.GPT2LMHeadModel,
        partial(
            transformers.GPT2Config,
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=2,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
        ),
        _continued,
        8,
        {"task_type": "CAUSAL_LM"},
    ),
    "llama": Architecture(
        transformers.LlamaForCausalLM,
        partial(
            transformers.LlamaConfig,
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            initializer_range=0.2,
        ),
        _continued,
        14,
        {"task_type": "CAUSAL_LM"},
    ),
    "t5": Architecture(
        transformers.T5ForConditionalGeneration,
        partial(
            transformers.T5Config,
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        _translated,
        32,  # 2 encoder layers of 6, 2 decoder layers of 10
        {"task_type": "SEQ_2_SEQ_LM"},
    ),
    "vit": Architecture(
        transformers.ViTForImageClassification,
        partial(
            transformers.ViTConfig,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=8,
            patch_size=4,
            initializer_range=0.2,
            num_labels=LABELS,
        ),
        _pictured,
        12,
        {"modules_to_save": ["classifier"]},
    ),
}


_HOME = tempfile.TemporaryDirectory(prefix="aroma-bases-")


@cache
def saved_base(name: str) -> str:
    """Folder of the pretrained model, written once; a fresh process can load it."""
    torch.manual_seed(1)
    architecture = ARCHITECTURES[name]
    folder = Path(_HOME.name) / name
    architecture.model_class(architecture.config()).save_pretrained(folder)
    return str(folder)


def base(name: str, **options: Any) -> Any:
    """The pretrained model, in evaluation mode; two calls give equal ones."""
    return ARCHITECTURES[name].model_class.from_pretrained(saved_base(name), **options).eval()


def batch(name: str, seed: int = 3) -> Batch:
    return ARCHITECTURES[name].batch(seed)


def adapted(name: str, model: Any = None, **changes: Any) -> Any:
    """The pretrained model with a growing adapter at its start."""
    config = AromaConfig(**{**METHOD, **ARCHITECTURES[name].adapter, **changes})
    return get_peft_model(model if model is not None else base(name), config).eval()


@torch.no_grad()
def logits(model: Any, inputs: Batch) -> Tensor:
    """The model's answer, in evaluation mode."""
    model.eval()
    answer: Tensor = model(**inputs).logits
    return answer


# Growth --------------------------------------------------------------------------------------------------------------


def grow(
    model: Any,
    inputs: Batch,
    steps: int = 10,
    optimizer: Any = None,
    on_event: Callable[[Event], None] | None = None,
    total_steps: int | None = None,
) -> tuple[Attachment, list[float]]:
    """Train on one batch in a plain loop; return the attachment and the losses."""
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-2)
    growth = attach(model, optimizer, total_steps=total_steps or steps, on_event=on_event)
    return growth, train(model, inputs, optimizer, steps)


def train(model: Any, inputs: Batch, optimizer: Any, steps: int) -> list[float]:
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def set_ranks(
    model: nn.Module, ranks: list[int], pair: bool = False, seed: int = 7, adapter: str = "default"
) -> dict[str, int]:
    """Give the modules random finished components of the ranks in turn, and with `pair` a moved pair to every module.

    Returns the rank of every module, the pair included.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    result = {}
    for index, (name, layer) in enumerate(aroma_layers(model, adapter).items()):
        m, n = layer.out_features, layer.in_features
        rank = ranks[index % len(ranks)]
        if rank:
            layer.finished(adapter).append(0.2 * draw(m, rank), 0.2 * draw(rank, n))
        if pair:
            b, a = layer.pair(adapter)
            layer.start_pair(adapter, 0.2 * draw(*a.shape), 0.2 * draw(*b.shape))
        result[name] = rank + pair * layer.r[adapter]
    return result


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """ΔW of every growing module, by the product itself: s·b a and B A as they lie in the layer."""
    result = {}
    for name, layer in aroma_layers(model).items():
        b, a = (parameter.detach().double() for parameter in layer.pair("default"))
        finished = layer.finished("default")
        result[name] = finished.B.double() @ finished.A.double() + layer.scaling["default"] * (b @ a)
    return result


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: layer.rank("default") for name, layer in aroma_layers(model).items()}


def unlike(model: Any) -> Any:
    """Give the growing layers base weights of very different norms, so that they freeze at different times."""
    for index, layer in enumerate(aroma_layers(model).values()):
        layer.base_layer.weight.data *= 2.0 ** (index % 5 - 1)
    return model
