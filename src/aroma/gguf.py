"""A LoRA adapter as one GGUF file, which llama.cpp and programs built on it load beside the base model's GGUF.

Only models of the Llama architecture: for these the result was compared with PEFT in the engine itself
(`tests/engine`). An untested mapping could be wrong without any error.
"""

from __future__ import annotations

import errno
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, bad_value
from .files import replacing
from .outputs import new_file
from .saved import AdapterWeights, Update, read_adapter

_MODULE = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<kind>.+)")


def export_gguf(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base_model: str | None = None,
    overwrite: bool | None = None,
) -> dict[str, int]:
    """Write an adapter as a GGUF file, in float32, and return the rank of every matrix by its name there.

    Every matrix keeps its own rank. llama.cpp scales an update by alpha over the rank of that matrix; alpha is the
    largest rank, and each B is multiplied by its rank / alpha, so that the scale is 1 everywhere.

    Args:
        folder: A plain LoRA adapter.
        out: File to write, named `*.gguf`.
        base_model: Folder or hub name of the base model, whose configuration is read; the adapter's own by default.
        overwrite: Whether `out` may exist, and is replaced.

    Raises:
        ConfigError: The base model is not a Llama, or not the one that the adapter was trained on; the adapter has
            more than updates of attention and MLP matrices.
        OutputError: `out` exists, or cannot be written.
        CheckpointError: The adapter is missing or damaged.
    """
    target = require_new_file("out", out, overwrite)
    _require_gguf()
    adapter = read_adapter(folder)
    config = _llama_config(adapter, base_model)
    names = _gguf_names(adapter, config)
    _refuse_others(adapter)
    alpha = max(update.A.shape[0] for update in adapter.updates.values())
    tensors: dict[str, NDArray[np.float32]] = {}
    for module, name in names.items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = _pair(module, adapter.updates[module], alpha, config)
    with replacing(target, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        _write(temporary, target.stem, alpha, tensors)
        _require_whole(temporary, tensors)
    return {name: adapter.updates[module].A.shape[0] for module, name in names.items()}


def rotary_rows(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Put the rows of a query or key matrix in the order of Llama GGUFs.

    Rotary embeddings rotate pairs of rows within a head. transformers pairs row j with row j + d/2; GGUF puts the two
    side by side, as rows 2j and 2j + 1.

    Args:
        rows: (heads · d, any), in transformers' order.
        heads: Heads of the matrix; for keys the number of key-value heads.

    Returns:
        (heads · d, any), in GGUF's order.
    """
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _pair(module: str, update: Update, alpha: int, config: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return A (R, n) and B (m, R) of a module as they are written: ΔW = alpha/R · B A."""
    B = update.B.numpy() * np.float32(update.A.shape[0] / alpha)
    if module.endswith(".q_proj"):
        B = rotary_rows(B, config.num_attention_heads)
    elif module.endswith(".k_proj"):
        B = rotary_rows(B, config.num_key_value_heads)
    return update.A.numpy(), B


def _shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Return (m, n) of the weight for every kind of matrix that can be exported."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def _gguf_names(adapter: AdapterWeights, config: Any) -> dict[str, str]:
    """Return the name of the tensor in the base model's GGUF by module name.

    Raises:
        ConfigError: A module is not an attention or MLP matrix, or the base model lacks it or has another shape there.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    shapes = _shapes(config)
    table = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    names = {}
    for module, update in adapter.updates.items():
        match = _MODULE.fullmatch(module)
        if match is None or match["kind"] not in shapes:
            raise bad_value(
                "target_modules", module, f"only {', '.join(shapes)} go into a GGUF adapter; export --merged instead"
            )
        name = table.get_name(module)
        expected, shape = shapes[match["kind"]], (update.B.shape[0], update.A.shape[1])
        if name is None or shape != expected:
            has = "no such layer" if name is None else f"{expected[0]}×{expected[1]} there"
            raise bad_value(
                "base_model",
                config.name_or_path,
                f"the adapter's {module} is {shape[0]}×{shape[1]}, this model has {has}; give the model that the "
                "adapter was trained on",
            )
        names[module] = f"{name}.weight"
    return names


def _llama_config(adapter: AdapterWeights, base_model: str | None) -> Any:
    """Return the base model's configuration.

    Raises:
        ConfigError: It cannot be read, or the architecture is not Llama's.
    """
    from transformers import AutoConfig

    base_name = base_model or adapter.config.get("base_model_name_or_path")
    if not base_name:
        raise bad_value("base_model", base_name, "the adapter does not name its base model; give its folder or name")
    revision = adapter.config.get("revision") if base_model is None else None
    try:
        config = AutoConfig.from_pretrained(base_name, **({"revision": revision} if revision else {}))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise bad_value(
            "base_model", base_name, f"its configuration cannot be read ({reason}); give its folder or hub name"
        ) from error
    if config.model_type != "llama":
        raise bad_value(
            "base_model",
            base_name,
            f"it has the architecture {config.model_type}, and a GGUF adapter can be written for llama only; "
            "export --merged and convert the whole model with llama.cpp's own converter",
        )
    return config


def _refuse_others(adapter: AdapterWeights) -> None:
    """Raise for trained heads and embeddings, which a GGUF adapter cannot hold."""
    if adapter.others:
        raise bad_value(
            "adapter",
            sorted(adapter.others),
            "trained beside LoRA's matrices and would be lost; export --merged instead",
        )


def require_new_file(field: str, out: str | os.PathLike[str], force: bool | None = None) -> Path:
    """Return where a GGUF file named `out` is written.

    Raises:
        ConfigError: It does not end in `.gguf`.
        OutputError: It exists and `force` is not true, or it cannot be written.
    """
    if Path(out).suffix != ".gguf":
        raise bad_value(field, str(out), "a GGUF adapter is one file; give a name that ends in .gguf")
    return new_file(field, out, force=force)


def _require_gguf() -> None:
    if find_spec("gguf") is None:
        raise ConfigError("gguf: not installed; run: pip install 'aroma-peft[gguf]'")


def _write(path: Path, name: str, alpha: int, tensors: dict[str, NDArray[np.float32]]) -> None:
    """Write A (R, n) and B (m, R) of every matrix by name."""
    from gguf import GGUFType, GGUFWriter, Keys

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


def _require_whole(path: Path, tensors: dict[str, NDArray[np.float32]]) -> None:
    """Read the file back: numpy's `tofile`, which gguf calls, says nothing when the disk is full.

    Raises:
        OSError: It does not hold the tensors.
    """
    from gguf import GGUFReader

    try:
        there = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    except (ValueError, IndexError):  # what numpy makes of an end that is missing
        there = {}
    if there.keys() != tensors.keys() or any(not np.array_equal(there[key], tensors[key]) for key in tensors):
        raise OSError(errno.ENOSPC, "the file could not be written to its end")
