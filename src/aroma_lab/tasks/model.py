"""A pretrained classifier that grows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from aroma.errors import bad_value
from aroma.tuner import AromaConfig

from ..specs import AdapterSpec, ModelSpec, TrainSpec


def adapter_config(adapter: AdapterSpec, training: TrainSpec, task: str = "classification") -> AromaConfig:
    """Return the configuration of an adapter.

    Args:
        adapter: The adapter.
        training: The loop, whose seed the components have unless they have their own.
        task: What it is for, as `data.task` has it.

    Raises:
        ConfigError: A field of `adapter` that cannot work.
    """
    chosen = asdict(adapter)
    if adapter.component_seed is None:
        chosen["component_seed"] = training.seed
    return AromaConfig(task_type="CAUSAL_LM" if task == "causal_lm" else "SEQ_CLS", **chosen)


def load_classifier(name: str | ModelSpec, label_names: tuple[str, ...] | None, pad_token_id: int | None) -> Any:
    """Load a pretrained model with a fresh classification head, or a regression head of one output.

    Args:
        name: Hub name or local folder, for a model in float32; or how it is loaded.
        label_names: Names of the classes by index; None for a regression.
        pad_token_id: The tokenizer's padding token, for decoders, which pool at the last other one.

    Raises:
        ConfigError: There is no such model, or it has no sequence-classification head.
    """
    from transformers import AutoModelForSequenceClassification

    from ..language.model import loading_options
    from ..methods.head import remember_head

    spec = name if isinstance(name, ModelSpec) else ModelSpec(name)
    options: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if label_names is not None:
        options = {
            "num_labels": len(label_names),
            "id2label": dict(enumerate(label_names)),
            "label2id": {label: index for index, label in enumerate(label_names)},
            "problem_type": "single_label_classification",
        }
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            spec.name, output_loading_info=True, **loading_options(spec), **options
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise bad_value(
            "model.name", spec.name, f"cannot be loaded as a classifier ({reason}); check the name"
        ) from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_token_id
    remember_head(model, loading["missing_keys"])
    return model


def grow(model: Any, config: AromaConfig) -> Any:
    """Put a growing adapter into `model`; its head trains with it.

    Raises:
        ConfigError: No module of the model can grow under `config.target_modules`, or a part of the head cannot train.
    """
    from ..methods.lora import wrap

    return wrap(model, config)


def count_trainable(model: Any) -> dict[str, int]:
    """Return the numbers of trainable parameters: `adapter`, `head`."""
    from ..methods.head import head_of

    head, counts = head_of(model), {"adapter": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["head" if head.holds(name) else "adapter"] += parameter.numel()
    return counts
