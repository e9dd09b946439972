"""What a folder holds, ready to write: model, tokenizer, and the prompts that it was trained on."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aroma.errors import AromaError, bad_value
from aroma.export import read_adapter
from aroma.files import read_json, require_adapter_folder

from ..specs import ModelSpec
from .fingerprint import fingerprint_of
from .model import load_causal_lm, load_lm_tokenizer
from .prompt import PromptBuilder
from .task import LanguageTask, is_bare_model, load_language_task, task_of


class OpenedModel(NamedTuple):
    """A language model and all that it needs to write.

    Args:
        model: In evaluation mode, on the accelerator if there is one.
        tokenizer: Its tokenizer.
        builder: Makes its prompts.
    """

    model: Any
    tokenizer: Any
    builder: PromptBuilder


def open_adapter(folder: str | os.PathLike[str], base_model: str | None = None) -> OpenedModel:
    """Load a language model's adapter with its base model in plain PEFT; or a model's folder without an adapter.

    Args:
        folder: The adapter; a causal language model's folder; or `smollm2`, the model that comes with pip.
        base_model: Folder or hub name of the base model; the adapter's own by default.

    Raises:
        CheckpointError: The adapter is missing or damaged.
        ConfigError: It is no language model's, its base model cannot be loaded, or does not fit it.
    """
    if is_bare_model(folder):
        if base_model is not None:
            raise bad_value("base_model", base_model, f"{folder} is a whole model and no adapter; leave it out")
        whole = task_of(folder)
        tokenizer = load_lm_tokenizer(whole.model, None)
        builder = PromptBuilder(tokenizer, whole.language)
        return OpenedModel(_placed(load_causal_lm(whole.model)), tokenizer, builder)
    path = require_adapter_folder(folder)
    _require_language(path)
    task = load_language_task(path)
    spec = task.model if base_model is None else replace(task.model, name=base_model, gguf_file=None)
    if not spec.name:
        raise bad_value("base_model", spec.name, "the adapter does not name its base model; give its folder or name")
    tokenizer = _tokenizer_of(path, spec)
    builder = PromptBuilder(tokenizer, task.language)
    base = load_causal_lm(spec)
    _warn_of_others(base, path, spec, task)
    return OpenedModel(_placed(_with_adapter(base, path, spec)), tokenizer, builder)


def _require_language(path: Path) -> None:
    task_type = read_json(path / "adapter_config.json").get("task_type")
    if task_type != "CAUSAL_LM":
        remedy = f"its task_type is {task_type}, not CAUSAL_LM; give a language model's adapter"
        raise bad_value("adapter", str(path), remedy)


def _tokenizer_of(path: Path, spec: ModelSpec) -> Any:
    """Return the adapter's tokenizer, else the base model's; where there are both, they number the same tokens."""
    of_base = load_lm_tokenizer(spec, None)
    if not (path / "tokenizer_config.json").exists():
        return of_base
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(path)
    if own.get_vocab() != of_base.get_vocab():
        raise _does_not_fit(path, spec, "its vocabulary is another")
    return own


def _with_adapter(base: Any, path: Path, spec: ModelSpec) -> Any:
    from peft import PeftModel

    if read_json(path / "adapter_config.json").get("peft_type") == "LORA":
        _require_shapes(base, path, spec)
    try:
        return PeftModel.from_pretrained(base, str(path)).eval()
    except (ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise _does_not_fit(path, spec, f"PEFT cannot put the one into the other: {reason[:300]}") from error


def _require_shapes(base: Any, path: Path, spec: ModelSpec) -> None:
    """Refuse a base model that lacks an adapted matrix, which PEFT skips, or has another shape there."""
    for name, update in read_adapter(path).updates.items():
        try:
            shape = _shape_of(base.get_submodule(name))
        except AttributeError as error:
            raise _does_not_fit(path, spec, f"it has no {name}") from error
        wanted = (update.B.shape[0], update.A.shape[1])
        if shape != wanted:
            raise _does_not_fit(path, spec, f"{name} is {shape} there, and {wanted} in the adapter")


def _warn_of_others(base: Any, path: Path, spec: ModelSpec, task: LanguageTask) -> None:
    """Warn where the weights are not, or may not be, those that the adapter was trained on."""
    now = fingerprint_of(base) if task.fingerprint is not None else None
    if now == task.fingerprint and (now is not None or spec.name == task.model.name):
        return
    if now is None or task.fingerprint is None:
        if spec.name != task.model.name:
            warnings.warn(
                f"base_model={spec.name!r}: the adapter {path} was trained on {task.model.name!r}, and nothing tells "
                "whether that has the same weights",
                stacklevel=3,
            )
        return
    warnings.warn(
        f"base_model={spec.name!r}: its weights are not those that the adapter {path} was trained on "
        f"({task.model.name!r}), so its answers mean little; give that model",
        stacklevel=3,
    )


def _shape_of(module: Any) -> tuple[int, int]:
    """Return (m, n) of a matrix, quantized or not."""
    if hasattr(module, "in_features"):
        return module.out_features, module.in_features
    if hasattr(module, "nf"):  # GPT-2's Conv1D keeps its weight as (n, m)
        return module.weight.shape[1], module.weight.shape[0]
    return module.weight.shape[0], module.weight.shape[1]


def _does_not_fit(path: Path, spec: ModelSpec, reason: str) -> AromaError:
    trained_on = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    return bad_value(
        "base_model", spec.name, f"not the model of the adapter {path}, trained on {trained_on}: {reason}; give that"
    )


def _placed(model: Any) -> Any:
    if getattr(model, "quantization_method", None) is not None or not torch.accelerator.is_available():
        return model  # quantized weights are where they were loaded
    return model.to(torch.accelerator.current_accelerator())
