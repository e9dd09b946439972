"""A saved language model: what `aroma_task.json` says of it, and how it is loaded for inference in plain PEFT."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

import torch

from aroma.errors import AromaError, CheckpointError, ConfigError, bad_value
from aroma.export import read_adapter
from aroma.files import read_json, require_adapter_folder, write_json
from aroma.tuner.layout import PEFT_PREFIX

from ..settings import typed
from ..specs import LanguageSpec, ModelSpec
from ..tasks.task import TASK_FILE, load_task
from .gguf_source import PACKAGED
from .model import load_causal_lm, load_lm_tokenizer
from .template import Template

LANGUAGE_KIND: Literal["causal_lm"] = "causal_lm"

_CONFIG_FILE = "adapter_config.json"

_SAMPLES = 64
"""Weights of each tensor that a fingerprint reads."""


@dataclass(frozen=True)
class LanguageTask:
    """How an adapter's prompts were made, and which model it belongs to.

    Args:
        language: Template, system turn and columns.
        max_length: Most tokens of an example in training; None: not known.
        model: The pretrained model, loaded as in training.
        fingerprint: Of its weights, see `fingerprint_of`; None: not known.
        kind: Tells this task from a classifier's.
    """

    language: LanguageSpec
    max_length: int | None
    model: ModelSpec
    fingerprint: str | None = None
    kind: Literal["causal_lm"] = LANGUAGE_KIND

    def save(self, adapter: str | os.PathLike[str]) -> None:
        """Write the task into the folder of an adapter."""
        write_json(Path(adapter) / TASK_FILE, asdict(self))


def load_language_task(folder: str | os.PathLike[str]) -> LanguageTask:
    """Read the task of a language model's adapter, or of a whole model: a merged export has that of its adapter.

    For what AROMA did not train: the base model that PEFT recorded, and the prompts of default settings.

    Raises:
        CheckpointError: The folder is no adapter, or the task is another kind's, or was edited.
    """
    path, whole = Path(folder) / TASK_FILE, ModelSpec(str(folder))
    if not path.exists():
        if is_whole_model(folder):
            return LanguageTask(LanguageSpec(), None, whole)
        name = read_json(Path(folder) / _CONFIG_FILE).get("base_model_name_or_path")
        return LanguageTask(LanguageSpec(), None, ModelSpec(name))
    content = read_json(path)
    try:
        if content["kind"] != LANGUAGE_KIND:
            raise CheckpointError(f"{path}: its kind is {content['kind']!r}, not a language model's; use `aroma eval`")
        task = LanguageTask(
            language=_section(LanguageSpec, content["language"]),
            max_length=typed("max_length", content["max_length"], int | None),
            model=_section(ModelSpec, content["model"]),
            fingerprint=typed("fingerprint", content.get("fingerprint"), str | None),
        )
    except (AttributeError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path}: edited ({error}); restore the file that was saved") from error
    return replace(task, model=whole, fingerprint=None) if is_whole_model(folder) else task


def task_kind(folder: str | os.PathLike[str]) -> str:
    """Return what a folder is for: `"classification"`, `"regression"`, or `"causal_lm"`.

    A folder without a task is a language model's if PEFT says so, or if it holds a model and no adapter.

    Raises:
        CheckpointError: It cannot be told, or the task was edited.
    """
    path = Path(folder)
    if (path / TASK_FILE).exists():
        content = read_json(path / TASK_FILE)
        if isinstance(content, dict) and content.get("kind") == LANGUAGE_KIND:
            return LANGUAGE_KIND
    elif is_whole_model(folder) or _is_language_adapter(path):
        return LANGUAGE_KIND
    return load_task(folder).kind


def is_whole_model(folder: str | os.PathLike[str]) -> bool:
    """Return whether `folder` holds a model without an adapter, or is the name of the packaged model."""
    path = Path(folder)
    if (path / _CONFIG_FILE).exists():
        return False
    return (path / "config.json").exists() or (str(folder) == PACKAGED and not path.exists())


def _is_language_adapter(path: Path) -> bool:
    config = path / _CONFIG_FILE
    return config.exists() and read_json(config).get("task_type") == "CAUSAL_LM"


def _section(kind: type[Any], content: Mapping[str, Any]) -> Any:
    """Return a section of a recipe from its keys, each of its type."""
    hints = get_type_hints(kind)
    unknown = set(content) - set(hints)
    if unknown:
        raise KeyError(*sorted(unknown))
    return kind(**{key: typed(key, value, hints[key]) for key, value in content.items()})


# Loading -------------------------------------------------------------------------------------------------------------


class LoadedModel(NamedTuple):
    """A language model and what makes its prompts.

    Args:
        model: In evaluation mode, on the accelerator if there is one.
        template: Makes its prompts, and holds its tokenizer.
    """

    model: Any
    template: Template


def load_for_inference(folder: str | os.PathLike[str], base_model: str | None = None) -> LoadedModel:
    """Load a language model's adapter with its base model in plain PEFT; or a whole model's folder.

    Args:
        folder: The adapter; a causal language model's folder; or `smollm2`, the packaged model.
        base_model: Folder or hub name of the base model; the adapter's own by default.

    Raises:
        CheckpointError: The adapter is missing or damaged.
        ConfigError: It is not a language model's, or its base model cannot be loaded or does not fit it.
    """
    if is_whole_model(folder):
        if base_model is not None:
            raise bad_value("base_model", base_model, f"{folder} is a whole model and no adapter; leave it out")
        task = load_language_task(folder)
        template = Template(load_lm_tokenizer(task.model, None), task.language)
        return LoadedModel(_placed(load_causal_lm(task.model)), template)
    path = require_adapter_folder(folder)
    if not _is_language_adapter(path):
        task_type = read_json(path / _CONFIG_FILE).get("task_type")
        remedy = f"its task_type is {task_type}, not CAUSAL_LM; give a language model's adapter"
        raise bad_value("adapter", str(path), remedy)
    task = load_language_task(path)
    spec = task.model if base_model is None else replace(task.model, name=base_model, gguf_file=None)
    if not spec.name:
        raise bad_value("base_model", spec.name, "the adapter does not name its base model; give its folder or name")
    template = Template(_tokenizer_of(path, spec), task.language)
    base = load_causal_lm(spec)
    _warn_of_other_weights(base, path, spec, task)
    return LoadedModel(_placed(_with_adapter(base, path, spec)), template)


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

    if read_json(path / _CONFIG_FILE).get("peft_type") == "LORA":
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
            module = base.get_submodule(name)
        except AttributeError as error:
            raise _does_not_fit(path, spec, f"it has no {name}") from error
        wanted = (update.B.shape[0], update.A.shape[1])
        if hasattr(module, "in_features"):
            shape = (module.out_features, module.in_features)  # quantized weights have another shape
        else:
            shape = tuple(module.weight.shape)
            if hasattr(module, "nf"):  # GPT-2's Conv1D keeps its weight as (n, m)
                shape = shape[::-1]
        if shape != wanted:
            raise _does_not_fit(path, spec, f"{name} is {shape} there, and {wanted} in the adapter")


def _warn_of_other_weights(base: Any, path: Path, spec: ModelSpec, task: LanguageTask) -> None:
    """Warn where the weights are not, or may not be, those that the adapter was trained on."""
    now = fingerprint_of(base) if task.fingerprint is not None else None
    if now is not None and now != task.fingerprint:
        found = f"its weights are not those that the adapter {path} was trained on ({task.model.name!r}), so its "
        found += "answers mean little; give that model"
    elif now is None and spec.name != task.model.name:
        found = f"the adapter {path} was trained on {task.model.name!r}, and it is not known whether the weights are "
        found += "the same"
    else:
        return
    warnings.warn(f"base_model={spec.name!r}: {found}", stacklevel=3)


def _does_not_fit(path: Path, spec: ModelSpec, reason: str) -> AromaError:
    trained_on = read_json(path / _CONFIG_FILE).get("base_model_name_or_path")
    return bad_value(
        "base_model", spec.name, f"not the model of the adapter {path}, trained on {trained_on}: {reason}; give that"
    )


def _placed(model: Any) -> Any:
    if getattr(model, "quantization_method", None) is not None or not torch.accelerator.is_available():
        return model  # quantized weights are where they were loaded
    return model.to(torch.accelerator.current_accelerator())


@torch.no_grad()
def fingerprint_of(model: Any) -> str | None:
    """Return a digest of some weights of a frozen base model, the same in float32 and in bfloat16.

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
        count = min(_SAMPLES, flat.numel())
        offsets = torch.arange(count) * (flat.numel() - 1) // max(count - 1, 1)
        digest.update(name.encode())
        digest.update(flat[offsets.to(flat.device)].to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
