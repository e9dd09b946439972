"""Causal language models: pretrained ones with their tokenizers, and saved adapters, loaded in plain PEFT."""

from __future__ import annotations

import datetime
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from aroma.errors import bad_value
from aroma.export import is_causal_lm
from aroma.files import require_adapter_folder
from aroma.state import read_config

from ..specs import ModelSpec
from ..tasks.model import loading, loading_options, placed, with_adapter
from ..tasks.task import Task, read_task
from .encode import PLAIN_TEMPLATE, begins_with
from .gguf_source import PACKAGED, packaged_gguf, resolve_gguf


def load_causal_lm(spec: ModelSpec) -> Any:
    """Return the pretrained model, in evaluation mode.

    Raises:
        ConfigError: There is no such model, or it is not a whole causal language model.
    """
    from transformers import AutoModelForCausalLM

    source, options = model_source(spec), loading_options(spec)
    with loading(spec.name, "cannot be loaded as a causal language model"):
        model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        remedy = f"its checkpoint lacks {', '.join(missing[:3])}, so it is no trained causal language model; give one"
        raise bad_value("model.name", spec.name, remedy)
    return model


def load_lm_tokenizer(spec: ModelSpec, max_length: int | None, folder: Path | None = None) -> Any:
    """Return the tokenizer of a causal language model; it can pad, and has a chat template.

    Args:
        max_length: Tokens of the longest example, its response included; None: not known.
        folder: Where the tokenizer is, if not with the model.

    Raises:
        ConfigError: There is no such tokenizer, it has no eos token, or the model takes fewer tokens than
            `max_length`.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = model_source(spec)
    with loading(spec.name, "its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder or source)
        config = AutoConfig.from_pretrained(source)
    if tokenizer.eos_token_id is None:
        remedy = "its tokenizer has no eos token, so no response could end; set eos_token in its tokenizer_config.json"
        raise bad_value("model.name", spec.name, remedy)
    rows = getattr(config, "vocab_size", None)
    if tokenizer.pad_token_id is None or (rows is not None and tokenizer.pad_token_id >= rows):
        # Padding is masked in every batch, so any token that the model knows will do.
        tokenizer.pad_token = tokenizer.eos_token
    positions = positions_of(config)
    if max_length is not None and positions is not None and max_length > positions:
        raise bad_value("data.max_length", max_length, f"{spec.name} takes at most {positions} tokens")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = ("{{ bos_token }}" if begins_with(tokenizer) else "") + PLAIN_TEMPLATE
    # A template that writes today's date must ask tomorrow as in training. Llama 3's fall back on this day.
    day = datetime.date(2024, 7, 26)
    tokenizer.chat_template = re.sub(
        r"strftime_now\((['\"])(.*?)\1\)", lambda call: repr(day.strftime(call[2])), tokenizer.get_chat_template()
    )
    return tokenizer


def model_source(spec: ModelSpec) -> str:
    """Return hub name or folder that transformers loads; a GGUF file is converted for it.

    Raises:
        ConfigError: See `resolve_gguf` and `packaged_gguf`.
    """
    if not spec.name:
        raise bad_value("model.name", spec.name, "give a hub name or a local model folder")
    if spec.gguf_file is not None:
        return str(resolve_gguf(spec.name, spec.gguf_file))
    if spec.name == PACKAGED and not Path(spec.name).is_dir():
        file = packaged_gguf()
        return str(resolve_gguf(str(file.parent), file.name))
    return spec.name


def positions_of(config: Any) -> int | None:
    """Return the most tokens that a model of this configuration takes; None: no limit, or not known."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None


def language_task(folder: str | os.PathLike[str]) -> Task:
    """Return the task of a language model's adapter, or of a whole model: a merged export has that of its adapter.

    Raises:
        CheckpointError: The folder is no adapter, or the task was edited.
    """
    is_whole = _is_whole_model(folder)
    task = read_task(folder)
    if task is None:
        name = str(folder) if is_whole else read_config(folder).get("base_model_name_or_path")
        return Task("causal_lm", model=ModelSpec(name))
    return replace(task, model=ModelSpec(str(folder))) if is_whole else task


def is_language_model(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder is a language model's: by its task, PEFT's task type, or a whole model in it.

    Raises:
        CheckpointError: It is no adapter.
    """
    if (task := read_task(folder)) is not None:
        return task.kind == "causal_lm"
    return _is_whole_model(folder) or is_causal_lm(read_config(folder))


def base_model_of(adapter: str, name: str | None) -> str | None:
    """Return where the base model of an adapter is, for `aroma export`; None where PEFT's own record will do.

    PEFT records the folder that a GGUF file was converted to, which other machines do not have.

    Args:
        name: The base model that the user named, or None.
    """
    if name is not None:
        return model_source(ModelSpec(name))
    task = read_task(adapter)
    return None if task is None or task.model is None else model_source(task.model)


def _is_whole_model(folder: str | os.PathLike[str]) -> bool:
    """Return whether `folder` holds a model without an adapter, or is the name of the packaged model."""
    path = Path(folder)
    if not path.exists():
        return str(folder) == PACKAGED
    return (path / "config.json").exists() and not (path / "adapter_config.json").exists()


class LoadedModel(NamedTuple):
    """A language model, and its tokenizer with the chat template of the training."""

    model: Any
    tokenizer: Any


def load_for_inference(
    folder: str | os.PathLike[str], base_model: str | None = None, dtype: Any = None
) -> LoadedModel:
    """Load a language model's adapter with its base model in plain PEFT, or a whole model's folder.

    Args:
        folder: The adapter; a causal language model's folder; or `smollm2`, the packaged model.
        base_model: Folder or hub name of the base model; the adapter's own by default.
        dtype: Name of the type of an adapter's pretrained weights; as in training by default, or else float32.

    Returns:
        The model in evaluation mode, on the accelerator if there is one.

    Raises:
        CheckpointError: The adapter is missing or damaged.
        ConfigError: It is not a language model's, or its base model cannot be loaded or does not fit it.
    """
    if _is_whole_model(folder):
        spec = ModelSpec(str(folder))
        return LoadedModel(placed(load_causal_lm(spec)), load_lm_tokenizer(spec, None))
    path = require_adapter_folder(folder)
    if not is_causal_lm(read_config(path)):
        remedy = "it is not a causal language model's; give an adapter of one"
        raise bad_value("adapter", str(path), remedy)
    spec = language_task(path).model or ModelSpec()
    if base_model is not None:
        spec = replace(spec, name=base_model, gguf_file=None)
    if dtype is not None:
        spec = replace(spec, dtype=dtype)
    if not spec.name:
        raise bad_value("base_model", spec.name, "the adapter does not name its base model; give its folder or name")
    tokenizer = load_lm_tokenizer(spec, None, path if (path / "tokenizer_config.json").exists() else None)
    return LoadedModel(placed(with_adapter(load_causal_lm(spec), path, spec.name)), tokenizer)
