"""Saved adapters for other uses: one rank for serving engines, or the merged model.

Reads any plain LoRA folder of PEFT; every saved AROMA adapter is one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import SEQ_CLS_HEAD_NAMES

from .about import LABELLED_TASKS, UNKNOWN
from .card import CARD_FILE
from .errors import bad_value
from .files import write_json, write_tensors
from .outputs import TASK_FILE, TOKENIZER_FILES, copy_files, filled_at_once, new_folder
from .saved import AdapterWeights, read_adapter, zero_update
from .state import write_adapter_state

SERVING_RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks that vLLM, TGI and SGLang all serve."""

MODEL_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Class of transformers that loads the base model, by PEFT's task type."""


def model_class_of(config: Mapping[str, Any]) -> str:
    """Return the class of an adapter's model, by its task type or as PEFT recorded it; `"None"` if unknown."""
    recorded = (config.get("auto_mapping") or {}).get("base_model_class")
    return str(MODEL_CLASSES.get(config["task_type"]) if config.get("task_type") else recorded)


def is_causal_lm(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's configuration is of a causal language model."""
    return model_class_of(config).endswith(("ForCausalLM", "LMHeadModel"))


def export_uniform(folder: str | os.PathLike[str], out: str | os.PathLike[str], rank: int | None = None) -> int:
    """Write an adapter of one rank for all modules, which every serving engine reads, and return that rank.

    Updates are zero-padded, the scale is 1 (`lora_alpha == r`), there are no patterns, and modules of rank 0 are there
    too. The format is for serving, not for resuming: a padded row gets no gradient.

    Args:
        folder: A plain LoRA adapter.
        out: Folder to write; must be new or empty.
        rank: Rank to pad to; by default the smallest of 8, 16, 32, 64, 128, 256 that is large enough.

    Raises:
        ConfigError: `rank` is too small, the adapter's rank is above 256, or its head is missing.
        OutputError: `out` is not empty, or cannot be written.
    """
    adapter = read_adapter(folder)
    if (heads := adapter.config.get("modules_to_save")) and not adapter.others:
        remedy = "the adapter has no tensor of them, so PEFT cannot load it; save it again with its head"
        raise bad_value("modules_to_save", heads, f"{remedy}, or set it and task_type to null to use the base model's")
    target = new_folder("out", out)
    uniform = _uniform_rank(adapter, rank)
    tensors = dict(adapter.others)
    for name, shape in adapter.shapes.items():
        tensors |= adapter.updates.get(name, zero_update(shape)).tensors(name, uniform)
    unset = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "inference_mode": True}
    ranks = {"r": uniform, "lora_alpha": uniform, "target_modules": sorted(adapter.shapes)}
    config = {**adapter.config, **unset, **patterns, **ranks}
    with filled_at_once(target) as staging:
        write_tensors(staging / "adapter_model.safetensors", tensors)
        write_json(staging / "adapter_config.json", config)
        copy_files([Path(folder)], staging, (*TOKENIZER_FILES, TASK_FILE, CARD_FILE))
        if adapter.state is not None:
            modules = {name: {**entry, "rank": uniform} for name, entry in adapter.state["modules"].items()}
            # Without the run: none goes on from an export.
            write_adapter_state(staging, {**adapter.state, "modules": modules, "controller": None}, config, {})
    return uniform


def _uniform_rank(adapter: AdapterWeights, wanted: int | None) -> int:
    largest = max(update.rank for update in adapter.updates.values())
    rank = wanted if wanted is not None else next((served for served in SERVING_RANKS if served >= largest), None)
    if rank is None:
        remedy = f"above {SERVING_RANKS[-1]}, which serving engines refuse; export --merged instead"
        raise bad_value("rank", largest, remedy)
    if rank < largest:
        raise bad_value("rank", wanted, f"a module has rank {largest}; give at least that")
    return rank


def export_merged(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base_model: str | None = None,
    dtype: str = "float32",
) -> None:
    """Write the full model with the adapter merged in, added in float32.

    The adapter is added to the weights that the base model has on disk, even if it was trained over quantised ones.

    Args:
        folder: A plain LoRA adapter.
        out: Folder to write; must be new or empty.
        base_model: Folder or hub name of the base model; the adapter's own by default.
        dtype: Type of the stored weights: float32, bfloat16 or float16. Below float32 each weight is rounded once,
            after the merge; a small update can vanish in that rounding.

    Raises:
        ConfigError: The base model or its class is not known, or the base model is quantised on disk.
        OutputError: `out` is not empty, or cannot be written.
        CheckpointError: The adapter is missing or damaged.
    """
    adapter = read_adapter(folder)
    target = new_folder("out", out)
    base_name = base_name_of(adapter, base_model)
    model = put_into(base_of(adapter, base_model), adapter, base_name)
    if getattr(model.get_base_model(), "is_quantized", False):
        remedy = "give the model in 16 or 32 bits that it was made from (--base-model)"
        raise bad_value("base_model", base_name, f"its weights are quantised on disk, so updates round; {remedy}")
    merged = model.merge_and_unload(safe_merge=True).to(getattr(torch, dtype))
    with filled_at_once(target) as staging:
        merged.save_pretrained(staging)
        copy_files([Path(folder), Path(base_name)], staging, TOKENIZER_FILES)
        copy_files([Path(folder)], staging, (TASK_FILE,))


# Loading -------------------------------------------------------------------------------------------------------------


def about_of(adapter: AdapterWeights) -> dict[str, Any]:
    """Return number and names of a classifier's outputs; see `aroma.about`.

    Where nothing beside the adapter says their number, it is the number of rows of the saved head's last tensor.
    """
    about: dict[str, Any] = (adapter.state or {}).get("about", UNKNOWN)
    if about["num_labels"] is not None or adapter.config.get("task_type") not in LABELLED_TASKS:
        return about
    rows = {name: tensor.shape[0] for name, tensor in sorted(adapter.others.items()) if tensor.ndim}
    head = [name for name in rows if set(name.split(".")) & set(SEQ_CLS_HEAD_NAMES)]
    # Heads of other names (classification_head, logits_proj): tensors with a row per label have the fewest rows.
    return {**about, "num_labels": rows[head[-1]] if head else min(rows.values(), default=None)}


def load_with_adapter(folder: str | os.PathLike[str], base_model: str | None = None) -> Any:
    """Load a plain LoRA adapter in plain PEFT, in float32 and evaluation mode; see `base_of` and `put_into`."""
    adapter = read_adapter(folder)
    return put_into(base_of(adapter, base_model), adapter, base_name_of(adapter, base_model))


def base_name_of(adapter: AdapterWeights, base_model: str | None) -> str:
    """Return folder or hub name of the base model: the given one, or the adapter's own; ConfigError without either."""
    base_name: str | None = base_model or adapter.config.get("base_model_name_or_path")
    if not base_name:
        raise bad_value("base_model", base_name, "the adapter does not name its base model; give its folder or name")
    return base_name


def base_of(adapter: AdapterWeights, base_model: str | None) -> Any:
    """Load the base model of an adapter (`base_model`, or its own) in float32, with the outputs of the adapter's head.

    Raises:
        ConfigError: The adapter does not tell the model class, or the base model cannot be loaded.
    """
    import transformers

    base_name = base_name_of(adapter, base_model)
    model_class: Any = getattr(transformers, model_class_of(adapter.config), None)
    if not hasattr(model_class, "from_pretrained"):
        remedy = "it does not tell the model class; set it in adapter_config.json to one of"
        raise bad_value("task_type", adapter.config.get("task_type"), f"{remedy} {sorted(MODEL_CLASSES)}")
    labels, count, problem_type = (about_of(adapter)[key] for key in UNKNOWN)
    # The adapter brings its head, so that of the base model may have another size.
    options: dict[str, Any] = {} if count is None else {"num_labels": count, "ignore_mismatched_sizes": True}
    if labels is not None:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if problem_type is not None:
        options["problem_type"] = problem_type
    if base_model is None and adapter.config.get("revision"):
        options["revision"] = adapter.config["revision"]
    try:
        return model_class.from_pretrained(base_name, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        remedy = f"cannot be loaded ({' '.join(str(error).split())[:500]}); give its folder or hub name"
        raise bad_value("base_model", base_name, remedy) from error


def put_into(base: Any, adapter: AdapterWeights, base_name: str) -> Any:
    """Put an adapter into `base`, in plain PEFT and in evaluation mode; every tensor of it finds its place.

    Raises:
        ConfigError: The base model is not the one that the adapter was trained on.
    """
    from peft import PeftModel

    cause, modules = None, dict(base.named_modules())
    reason = next((f"it has no place for {name}" for name in adapter.updates if name not in modules), None)
    if reason is None:
        try:
            with warnings.catch_warnings():
                # PEFT warns of places without tensors, and says nothing of tensors without a place.
                warnings.filterwarnings("error", message="Found missing adapter keys")
                return PeftModel.from_pretrained(base, str(adapter.folder)).eval()
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, UserWarning) as error:
            cause, reason = error, f"PEFT cannot put the one into the other: {' '.join(str(error).split())[:300]}"
    trained_on = adapter.config.get("base_model_name_or_path")
    remedy = f"not the model of the adapter {adapter.folder}, trained on {trained_on}: {reason}; give that"
    raise bad_value("base_model", base_name, remedy) from cause
