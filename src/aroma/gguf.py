"""A LoRA adapter as one GGUF file, which llama.cpp and programs built on it load beside the base model's GGUF.

Only models of the Llama architecture: for these the result was compared with PEFT in the engine itself
(`tests/engine`). An untested mapping could be wrong without any error.
"""

from __future__ import annotations

import errno
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, bad_value
from .export import base_name_of
from .files import replacing
from .outputs import new_file
from .saved import AdapterWeights, read_adapter


def export_gguf(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base_model: str | None = None,
) -> dict[str, int]:
    """Write an adapter as a GGUF file, in float32, and return the rank of every matrix by its name there.

    llama.cpp scales an update by alpha over the rank of its matrix. Here alpha is the largest rank, and each B is
    multiplied by its rank / alpha, so that the scale is 1 everywhere.

    Args:
        folder: A plain LoRA adapter.
        out: File to write, named `*.gguf`.
        base_model: Folder or hub name of the base model, whose configuration is read; the adapter's own by default.

    Raises:
        ConfigError: The base model is not a Llama, or not the one that the adapter was trained on; the adapter has
            more than updates of attention and MLP matrices.
        OutputError: `out` exists, or cannot be written.
        CheckpointError: The adapter is missing or damaged.
    """
    if Path(out).suffix != ".gguf":
        raise bad_value("out", str(out), "a GGUF adapter is one file; give a name that ends in .gguf")
    target = new_file("out", out)
    if find_spec("gguf") is None:
        raise ConfigError("gguf: not installed; run: pip install 'aroma-peft[gguf]'")
    adapter = read_adapter(folder)
    config = _llama_config(adapter, base_model)
    names = _gguf_names(adapter, config)
    alpha = max(update.rank for update in adapter.updates.values())
    tensors: dict[str, NDArray[np.float32]] = {}
    for module, update in adapter.updates.items():
        B = update.B.numpy() * np.float32(update.rank / alpha)
        if module.endswith((".q_proj", ".k_proj")):
            is_query = module.endswith(".q_proj")
            B = rotary_rows(B, config.num_attention_heads if is_query else config.num_key_value_heads)
        tensors[f"{names[module]}.lora_a"], tensors[f"{names[module]}.lora_b"] = update.A.numpy(), B
    with replacing(target) as temporary:
        _write(temporary, target.stem, alpha, tensors)
    return {name: adapter.updates[module].rank for module, name in names.items()}


def rotary_rows(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return the rows (heads · d, any) of a query or key matrix, with its own number of heads, in the order of GGUF.

    Rotary embeddings rotate pairs of rows within a head. transformers pairs row j with row j + d/2; GGUF puts the two
    side by side, as rows 2j and 2j + 1.
    """
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _llama_config(adapter: AdapterWeights, base_model: str | None) -> Any:
    from transformers import AutoConfig

    base_name = base_name_of(adapter, base_model)
    revision = adapter.config.get("revision") if base_model is None else None
    try:
        config = AutoConfig.from_pretrained(base_name, **({"revision": revision} if revision else {}))
    except (OSError, ValueError) as error:
        remedy = f"its configuration cannot be read ({' '.join(str(error).split())}); give its folder or hub name"
        raise bad_value("base_model", base_name, remedy) from error
    if config.model_type != "llama":
        remedy = f"a GGUF adapter can be written for llama only, not for {config.model_type}; export --merged instead"
        raise bad_value("base_model", base_name, remedy)
    return config


def _gguf_names(adapter: AdapterWeights, config: Any) -> dict[str, str]:
    """Return the name of the tensor in the base model's GGUF by module name."""
    import torch
    from gguf import MODEL_ARCH, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shapes = {name: (*one.shape,) for name, one in AutoModelForCausalLM.from_config(config).named_parameters()}
    table, names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers), {}
    for module, update in adapter.updates.items():
        if not module.endswith("proj"):
            remedy = "only matrices of attention and MLP go into a GGUF adapter; export --merged instead"
            raise bad_value("target_modules", module, remedy)
        if shapes.get(f"{module}.weight") != update.shape:
            remedy = f"it has no {module} of shape {update.shape}; give the model that the adapter was trained on"
            raise bad_value("base_model", config.name_or_path, remedy)
        names[module] = f"{table.get_name(module)}.weight"
    if adapter.others:
        remedy = "trained beside LoRA's matrices and would be lost; export --merged instead"
        raise bad_value("adapter", sorted(adapter.others), remedy)
    return names


def _write(path: Path, name: str, alpha: int, tensors: dict[str, NDArray[np.float32]]) -> None:
    from gguf import GGUFReader, GGUFType, GGUFWriter, Keys

    writer = GGUFWriter(path, "llama")
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:
        GGUFReader(path)  # numpy's `tofile`, which gguf calls, says nothing when the disk is full
    except (ValueError, IndexError) as error:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
