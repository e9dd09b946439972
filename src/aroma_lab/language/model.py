"""Causal language models: pretrained ones with their tokenizers, and saved adapters, loaded in plain PEFT."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from aroma.errors import AromaError, CheckpointError, bad_value
from aroma.export import put_into
from aroma.files import read_json, require_adapter_folder, write_json
from aroma.saved import is_plain, read_adapter, read_config
from aroma.tuner.layout import PEFT_PREFIX

from ..specs import LanguageSpec, ModelSpec
from ..tasks.model import loading_options
from ..tasks.task import TASK_FILE, load_task
from .gguf_source import PACKAGED, packaged_gguf, resolve_gguf
from .template import Template

LANGUAGE_KIND: Literal["causal_lm"] = "causal_lm"
_CONFIG_FILE = "adapter_config.json"


# Pretrained models ---------------------------------------------------------------------------------------------------


def load_causal_lm(spec: ModelSpec) -> Any:
    """Return the pretrained model, in evaluation mode.

    Raises:
        ConfigError: There is no such model, or it is not a whole causal language model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    source, options = model_source(spec), loading_options(spec)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise _cannot_load(spec, error) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        remedy = f"its checkpoint lacks {', '.join(missing[:3])}, so it is no trained causal language model; give one"
        raise bad_value("model.name", spec.name, remedy)
    encoder = model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if encoder and not getattr(model.config, "is_decoder", False):
        remedy = "an encoder: each token sees the later ones; give a decoder-only model"
        raise bad_value("model.name", spec.name, remedy)
    return model


def load_lm_tokenizer(spec: ModelSpec, max_length: int | None) -> Any:
    """Return the tokenizer of a causal language model; it can pad.

    Args:
        max_length: Tokens of the longest example, its response included; None: not known.

    Raises:
        ConfigError: There is no such tokenizer, it has no eos token, or the model takes fewer tokens than
            `max_length`.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = model_source(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _cannot_load(spec, error, "its tokenizer ") from error
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
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None


def _cannot_load(spec: ModelSpec, error: Exception, what: str = "") -> AromaError:
    reason = " ".join(str(error).split())
    remedy = f"{what}cannot be loaded as a causal language model ({reason}); check it"
    return bad_value("model.name", spec.name, remedy)


# The task beside an adapter ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageTask:
    """How an adapter's prompts were made, and which model it belongs to."""

    language: LanguageSpec
    """Template, system turn and columns."""
    max_length: int | None
    """Most tokens of an example in training; None: not known."""
    model: ModelSpec
    """The pretrained model, loaded as in training."""
    fingerprint: str | None = None
    """Of the model's weights, see `fingerprint_of`; None: not known."""
    kind: Literal["causal_lm"] = LANGUAGE_KIND
    """Tells this task from a classifier's."""

    def save(self, adapter: str | os.PathLike[str]) -> None:
        """Write the task into the folder of an adapter."""
        write_json(Path(adapter) / TASK_FILE, asdict(self))


def load_language_task(folder: str | os.PathLike[str]) -> LanguageTask:
    """Read the task of a language model's adapter, or of a whole model: a merged export has that of its adapter.

    For what AROMA did not train: the base model that PEFT recorded, and the prompts of default settings.

    Raises:
        CheckpointError: The folder is no adapter, or the task is another kind's, or was edited.
    """
    path, whole = Path(folder) / TASK_FILE, _is_whole_model(folder)
    if not path.exists():
        name = str(folder) if whole else read_config(folder).get("base_model_name_or_path")
        return LanguageTask(LanguageSpec(), None, ModelSpec(name))
    content = read_json(path)
    try:
        if content["kind"] != LANGUAGE_KIND:
            raise CheckpointError(f"{path}: its kind is {content['kind']!r}, not a language model's; use `aroma eval`")
        sections = {"language": LanguageSpec(**content["language"]), "model": ModelSpec(**content["model"])}
        task = LanguageTask(**{**content, **sections})
        if not (task.model.name and isinstance(task.model.name, str) and isinstance(task.model.gguf_file, str | None)):
            raise TypeError("model: its name or gguf_file is no name")
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: edited ({error}); restore the file that was saved") from error
    return replace(task, model=ModelSpec(str(folder)), fingerprint=None) if whole else task


def task_kind(folder: str | os.PathLike[str]) -> Literal["classification", "regression", "causal_lm", "unknown"]:
    """Return what a folder is for: `"classification"`, `"regression"`, `"causal_lm"`, or `"unknown"`.

    A folder without a task is a language model's if PEFT says so, or if it holds a model and no adapter. Another
    adapter without one is unknown: `tasks.saved.open_classifier` tells by its head whether it is a classifier's.

    Raises:
        CheckpointError: It is no adapter, or the task was edited.
    """
    path = Path(folder)
    if (path / TASK_FILE).exists():
        content = read_json(path / TASK_FILE)
        if isinstance(content, dict) and content.get("kind") == LANGUAGE_KIND:
            return LANGUAGE_KIND
    elif _is_whole_model(folder) or _is_language_adapter(path):
        return LANGUAGE_KIND
    elif read_config(folder):
        return "unknown"
    return load_task(folder).kind


def base_model_of(adapter: str, name: str | None) -> str | None:
    """Return where the base model of an adapter is, for `aroma export`; None where PEFT's own record will do.

    PEFT records the folder that a GGUF file was converted to, which other machines do not have.

    Args:
        name: The base model that the user named, or None.
    """
    if name is not None:
        return model_source(ModelSpec(name))
    if (Path(adapter) / TASK_FILE).exists() and task_kind(adapter) == LANGUAGE_KIND:
        return model_source(load_language_task(adapter).model)
    return None


def _is_whole_model(folder: str | os.PathLike[str]) -> bool:
    """Return whether `folder` holds a model without an adapter, or is the name of the packaged model."""
    path = Path(folder)
    if (path / _CONFIG_FILE).exists():
        return False
    return (path / "config.json").exists() or (str(folder) == PACKAGED and not path.exists())


def _is_language_adapter(path: Path) -> bool:
    return (path / _CONFIG_FILE).exists() and read_config(path).get("task_type") == "CAUSAL_LM"


# Loading for inference -----------------------------------------------------------------------------------------------


class LoadedModel(NamedTuple):
    """A language model, and the template that makes its prompts and holds its tokenizer."""

    model: Any
    template: Template


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
        if base_model is not None:
            raise bad_value("base_model", base_model, f"{folder} is a whole model and no adapter; leave it out")
        task = load_language_task(folder)
        template = Template(load_lm_tokenizer(task.model, None), task.language)
        return LoadedModel(placed(load_causal_lm(task.model)), template)
    path = require_adapter_folder(folder)
    if not _is_language_adapter(path):
        task_type = read_config(path).get("task_type")
        remedy = f"its task_type is {task_type}, not CAUSAL_LM; give a language model's adapter"
        raise bad_value("adapter", str(path), remedy)
    task = load_language_task(path)
    spec = task.model if base_model is None else replace(task.model, name=base_model, gguf_file=None)
    if dtype is not None:
        spec = replace(spec, dtype=dtype)
    if not spec.name:
        raise bad_value("base_model", spec.name, "the adapter does not name its base model; give its folder or name")
    template = Template(_tokenizer_of(path, spec), task.language)
    base = load_causal_lm(spec)
    now = None if task.fingerprint is None else fingerprint_of(base)
    if now is not None and now != task.fingerprint:
        warnings.warn(
            f"base_model={spec.name!r}: its weights are not those that the adapter {path} was trained on "
            f"({task.model.name!r}), so its answers mean little; give that model",
            stacklevel=2,
        )
    return LoadedModel(placed(with_adapter(base, path, spec)), template)


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


def with_adapter(base: Any, path: Path, spec: ModelSpec) -> Any:
    """Put an adapter into its base model: a plain LoRA checked throughout, one of another method as PEFT does it.

    Raises:
        CheckpointError: The adapter is damaged.
        ConfigError: The base model is not the one that the adapter was trained on.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel

    config = read_config(path)
    if is_plain(config):
        return put_into(base, read_adapter(path), spec.name or "")
    try:
        model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.get("task_type"), PeftModel)
        model = model_class(base, PeftConfig.from_pretrained(str(path), inference_mode=True))
        surplus = model.load_adapter(str(path), "default").unexpected_keys
    except (ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise _does_not_fit(path, spec, f"PEFT cannot put the one into the other: {reason[:300]}") from error
    if surplus:
        raise _does_not_fit(path, spec, f"it has no place for {surplus[0]}")
    return model.eval()


def _does_not_fit(path: Path, spec: ModelSpec, reason: str) -> AromaError:
    trained_on = read_config(path).get("base_model_name_or_path")
    remedy = f"not the model of the adapter {path}, trained on {trained_on}: {reason}; give that"
    return bad_value("base_model", spec.name, remedy)


def placed(model: Any) -> Any:
    """Return a model on the accelerator, if there is one; it is moved in place."""
    if getattr(model, "quantization_method", None) is not None or not torch.accelerator.is_available():
        return model  # quantized weights are where they were loaded
    return model.to(torch.accelerator.current_accelerator())


@torch.no_grad()
def fingerprint_of(model: Any) -> str | None:
    """Return a digest of 64 weights of each tensor of a base model, the same in float32 and in bfloat16.

    Args:
        model: The base model, or a `PeftModel` around it; adapters do not count.

    Returns:
        A digest; None where weights are held in another precision, in which they are not comparable.
    """
    digest = hashlib.sha256()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = {
        name.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."): parameter
        for name, parameter in base.named_parameters()
        if ".lora_" not in name
    }
    for name, parameter in sorted(named.items()):
        if parameter.dtype not in (torch.float32, torch.bfloat16) or parameter.is_meta:
            return None
        flat = parameter.detach().reshape(-1)
        count = min(64, flat.numel())
        offsets = torch.arange(count) * (flat.numel() - 1) // max(count - 1, 1)  # integers: float32 cannot count all
        digest.update(name.encode())
        digest.update(flat[offsets.to(flat.device)].to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
