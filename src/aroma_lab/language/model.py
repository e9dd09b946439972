"""Pretrained causal language models and their tokenizers, as a recipe names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aroma.errors import AromaError, bad_value

from ..specs import ModelSpec
from ..tasks.model import loading_options
from .gguf_source import PACKAGED, packaged_gguf, resolve_gguf


def load_causal_lm(spec: ModelSpec) -> Any:
    """Return the pretrained model, in evaluation mode.

    Raises:
        ConfigError: There is no such model, or it is not a whole causal language model.
    """
    from transformers import AutoModelForCausalLM

    source, options = model_source(spec), loading_options(spec)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise _cannot_load(spec, error) from error
    if loading["missing_keys"]:
        raise bad_value(
            "model.name",
            spec.name,
            f"its checkpoint lacks {', '.join(sorted(loading['missing_keys'])[:3])}, so it is no trained causal "
            "language model; give one that is",
        )
    # transformers does not call every decoder one: GPT-NeoX is an example.
    if getattr(model.config, "is_decoder", None) is False and _looks_ahead(model):
        raise bad_value(
            "model.name", spec.name, "an encoder: each token sees the later ones; give a decoder-only model"
        )
    return model


def load_lm_tokenizer(spec: ModelSpec, max_length: int | None) -> Any:
    """Return the tokenizer of a causal language model; it can end a text, and it can pad.

    Args:
        spec: The model.
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
    rows = getattr(config, "vocab_size", None)
    if tokenizer.eos_token_id is None:
        remedy = "its tokenizer has no eos token, so no response could end; set eos_token in its tokenizer_config.json"
        raise bad_value("model.name", spec.name, remedy)
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


@torch.no_grad()
def _looks_ahead(model: Any) -> bool:
    """Return whether the logits of the first token depend on the second."""
    rows = [torch.tensor([[1, second]], device=model.device) for second in (2, 3)]
    one, other = (model(row).logits[0, 0].float() for row in rows)
    return not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


def _cannot_load(spec: ModelSpec, error: Exception, what: str = "") -> AromaError:
    reason = " ".join(str(error).split())
    return bad_value(
        "model.name", spec.name, f"{what}cannot be loaded as a causal language model ({reason}); check it"
    )


def base_model_of(adapter: str, name: str | None) -> str | None:
    """Return where the base model of an adapter is, for `aroma export`; None where PEFT's own record will do.

    PEFT records the folder that a GGUF file was converted to, which other machines do not have.

    Args:
        adapter: Folder of the adapter.
        name: The base model that the user named, or None.
    """
    from ..tasks.task import TASK_FILE
    from .inference import LANGUAGE_KIND, load_language_task, task_kind

    if name is not None:
        return model_source(ModelSpec(name))
    if (Path(adapter) / TASK_FILE).exists() and task_kind(adapter) == LANGUAGE_KIND:
        return model_source(load_language_task(adapter).model)
    return None
