"""Saved adapters for other uses: one rank for serving engines, the merged model, and a table of ranks.

Reads any plain LoRA folder of PEFT; every saved AROMA adapter is one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import get_pattern_key
from torch import Tensor

from .errors import CheckpointError, bad_value
from .files import read_json, read_tensors, require_adapter_folder, told_of, write_json, write_tensors
from .outputs import new_folder, require_replaceable
from .spectra import effective_rank, singular_values
from .tuner.layout import PEFT_PREFIX
from .tuner.state import STATE_FILE, read_state, require_files

SERVING_RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks that vLLM, TGI and SGLang all serve."""

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model", "chat_template*")
_MODEL_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Update:
    """The update of one matrix, ΔW = B A.

    Args:
        B: (m, R), the scale folded in.
        A: (R, n).
    """

    B: Tensor
    A: Tensor


@dataclass(frozen=True)
class AdapterWeights:
    """A plain LoRA adapter in memory.

    Args:
        config: Content of `adapter_config.json`.
        updates: The update of every adapted module by its name in the base model, in the order of layers.
        others: Further tensors by their name in the file, such as trained heads (`modules_to_save`); any shape.
    """

    config: dict[str, Any]
    updates: dict[str, Update]
    others: dict[str, Tensor]


@dataclass(frozen=True)
class RankRow:
    """One line of the table of ranks.

    Args:
        name: Module name in the base model.
        rank: Rank of its update.
        effective_rank: Effective rank of its update (Appendix C).
        shape: (m, n) of its weight.
    """

    name: str
    rank: int
    effective_rank: float
    shape: tuple[int, int]


def read_adapter(folder: str | os.PathLike[str]) -> AdapterWeights:
    """Read a plain LoRA adapter, with each module's scale folded into its B.

    Raises:
        CheckpointError: The folder or a file is missing or damaged.
        ConfigError: The adapter is not a plain LoRA adapter.
    """
    path = require_adapter_folder(folder)
    if (path / STATE_FILE).exists():
        require_files(path, read_state(path))
    config = read_json(path / "adapter_config.json")
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("lora_bias"):
        raise bad_value(
            "peft_type", config.get("peft_type"), "only plain LoRA adapters can be read (no DoRA, no bias)"
        )
    tensors = read_tensors(path / "adapter_model.safetensors")
    updates: dict[str, Update] = {}
    stems = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    for stem in stems:
        A, B = tensors.pop(f"{stem}.lora_A.weight"), tensors.pop(f"{stem}.lora_B.weight", None)
        if B is None or B.shape[1] != A.shape[0]:
            raise CheckpointError(
                f"{path}: {stem} has an A of rank {A.shape[0]} and no fitting B; the file is damaged"
            )
        name = stem.removeprefix(PEFT_PREFIX)
        updates[name] = Update(B.float() * _scale(config, name, A.shape[0]), A.float())
    if not updates:
        raise CheckpointError(f"{path / 'adapter_model.safetensors'}: no lora_A and lora_B in it; not a LoRA adapter")
    return AdapterWeights(config, dict(sorted(updates.items(), key=lambda item: _natural(item[0]))), tensors)


def rank_table(folder: str | os.PathLike[str]) -> list[RankRow]:
    """Return rank and effective rank of every matrix that an adapter targets, including those of rank 0.

    Raises:
        CheckpointError: The folder or a file is missing or damaged.
    """
    adapter = read_adapter(folder)
    rows = []
    for name, shape in _grown_shapes(folder, adapter).items():
        update = adapter.updates.get(name)
        if update is None or not update.B.any():
            rows.append(RankRow(name, 0, 0.0, shape))
        else:
            sigma = singular_values(update.B, update.A)
            rows.append(RankRow(name, update.A.shape[0], effective_rank(sigma), shape))
    return rows


def evidence_of(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the saved state of a run with growth="evidence", JSON-able; None for other adapters.

    Its `modules` have name, heads, flips, log_evidence and steepness; beside them are `config`, `phase`,
    `global_step`, `births` and `last_birth`.

    Raises:
        CheckpointError: `aroma_state.json` is damaged.
    """
    if not (Path(folder) / STATE_FILE).exists():
        return None
    run: dict[str, Any] | None = read_state(folder).get("controller")
    return run if run is not None and run["config"].get("growth") == "evidence" else None


def export_uniform(folder: str | os.PathLike[str], out: str | os.PathLike[str], rank: int | None = None) -> int:
    """Write an adapter of one rank for all modules, which every serving engine reads, and return that rank.

    Updates are zero-padded, the scale is 1 (`lora_alpha == r`), there are no patterns, and every module that could
    grow is present, including those of rank 0. The format is for serving, not for resuming: a padded row gets no
    gradient.

    Args:
        folder: A plain LoRA adapter.
        out: Folder to write; must be new or empty.
        rank: Rank to pad to; by default the smallest of 8, 16, 32, 64, 128, 256 that is large enough.

    Raises:
        ConfigError: `rank` is too small, or the adapter's rank is above 256.
        OutputError: `out` is not empty, or cannot be written.
    """
    adapter = read_adapter(folder)
    target = require_new_folder("out", out)
    largest = max(update.A.shape[0] for update in adapter.updates.values())
    uniform = _uniform_rank(largest, rank)
    shapes = _grown_shapes(folder, adapter)
    tensors = dict(adapter.others)
    for name, (m, n) in shapes.items():
        B, A = torch.zeros(m, uniform), torch.zeros(uniform, n)
        if name in adapter.updates:
            update = adapter.updates[name]
            B[:, : update.B.shape[1]], A[: update.A.shape[0]] = update.B, update.A
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = B
    config = {
        **adapter.config,
        "r": uniform,
        "lora_alpha": uniform,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(shapes),
        "use_rslora": False,
        "inference_mode": True,
    }
    with _filled_at_once(target, _size_of(tensors)) as staging:
        write_tensors(staging / "adapter_model.safetensors", tensors)
        write_json(staging / "adapter_config.json", config)
        _copy_files([Path(folder)], staging, (*_TOKENIZER_FILES, "aroma_task.json"))
    return uniform


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
    if dtype not in ("float32", "bfloat16", "float16"):
        raise bad_value("dtype", dtype, "choose float32, bfloat16 or float16")
    target = require_new_folder("out", out)
    base_name = base_model or adapter.config.get("base_model_name_or_path")
    if not base_name:
        raise bad_value("base_model", base_name, "the adapter does not name its base model; give its folder or name")
    model = load_with_adapter(folder, base_name)
    if getattr(model.get_base_model(), "is_quantized", False):
        raise bad_value(
            "base_model",
            base_name,
            "its weights are quantised on disk, and adding to them would round the update away; give the model "
            "in 16 or 32 bits that it was made from (--base-model)",
        )
    merged = model.merge_and_unload(safe_merge=True).to(getattr(torch, dtype))
    _name_labels(merged.config, Path(folder))
    with _filled_at_once(target, _size_of(merged.state_dict())) as staging:
        merged.save_pretrained(staging)
        _copy_files([Path(folder), Path(base_name)], staging, _TOKENIZER_FILES)
        _copy_files([Path(folder)], staging, ("aroma_task.json",))


def _name_labels(config: Any, folder: Path) -> None:
    """Give a model's configuration the label names that the adapter was trained with, where it says them."""
    names = read_json(folder / "aroma_task.json").get("label_names") if (folder / "aroma_task.json").exists() else None
    if names and len(names) == config.num_labels:
        config.id2label = dict(enumerate(map(str, names)))
        config.label2id = {str(name): number for number, name in enumerate(names)}


def load_with_adapter(folder: str | os.PathLike[str], base_model: str | None = None) -> Any:
    """Load a base model and an adapter in plain PEFT, in float32 and evaluation mode.

    Args:
        folder: A plain LoRA adapter.
        base_model: Folder or hub name of the base model; the adapter's own by default.

    Raises:
        ConfigError: The adapter does not tell the model class, or the base model cannot be loaded.
    """
    import transformers
    from peft import PeftModel

    adapter = read_adapter(folder)
    base_name = base_model or adapter.config.get("base_model_name_or_path")
    mapping = adapter.config.get("auto_mapping") or {}
    class_name = _MODEL_CLASSES.get(adapter.config.get("task_type") or "") or mapping.get("base_model_class")
    if class_name is None or not hasattr(transformers, class_name):
        raise bad_value(
            "task_type",
            adapter.config.get("task_type"),
            f"it does not tell the model class; set it in adapter_config.json to one of {sorted(_MODEL_CLASSES)}",
        )
    labels = _head_size(adapter)
    # The adapter brings its head, so that of the base model may have another size.
    options: dict[str, Any] = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    if base_model is None and adapter.config.get("revision"):
        options["revision"] = adapter.config["revision"]
    try:
        base = getattr(transformers, class_name).from_pretrained(base_name, dtype=torch.float32, **options)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise bad_value(
            "base_model", base_name, f"cannot be loaded ({reason}); give its folder or hub name"
        ) from error
    return PeftModel.from_pretrained(base, str(folder)).eval()


def _head_size(adapter: AdapterWeights) -> int | None:
    """Return the number of labels of a saved classification head, the rows of its last weight or bias."""
    if adapter.config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    head = [name for name in sorted(adapter.others) if set(name.split(".")) & set(SEQ_CLS_HEAD_NAMES)]
    if head:
        return adapter.others[head[-1]].shape[0]
    # Heads of other names (classification_head, logits_proj): tensors with a row per label have the fewest rows.
    return min((tensor.shape[0] for tensor in adapter.others.values() if tensor.ndim), default=None)


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """Return what PEFT multiplies the update of a module by."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), name), config["lora_alpha"])
    return float(alpha / rank**0.5) if config.get("use_rslora") else float(alpha / rank)


def _grown_shapes(folder: str | os.PathLike[str], adapter: AdapterWeights) -> dict[str, tuple[int, int]]:
    """Return (m, n) of every module that could grow; without an `aroma_state.json`, of every adapted module."""
    if not (Path(folder) / STATE_FILE).exists():
        return {name: (update.B.shape[0], update.A.shape[1]) for name, update in adapter.updates.items()}
    modules = read_state(folder)["modules"]
    return {name: (entry["shape"][0], entry["shape"][1]) for name, entry in modules.items()}


def _uniform_rank(largest: int, wanted: int | None) -> int:
    """Return the rank to pad to: `wanted`, or the smallest served rank that holds the largest one."""
    rank = wanted if wanted is not None else next((rank for rank in SERVING_RANKS if largest <= rank), None)
    if rank is None:
        raise bad_value(
            "rank", largest, f"above {SERVING_RANKS[-1]}, which serving engines refuse; export --merged instead"
        )
    if rank < largest:
        raise bad_value("rank", wanted, f"a module has rank {largest}; give at least that")
    return rank


def require_new_folder(field: str, out: str | os.PathLike[str]) -> Path:
    """Return where an export named `out` is put in one step, once it is whole.

    Raises:
        OutputError: It is not a new or empty folder, or cannot be written.
    """
    target = new_folder(field, out)
    require_replaceable(field, out, target)
    return target


@contextmanager
def _filled_at_once(target: Path, size: int) -> Iterator[Path]:
    """Yield a folder beside `target` that becomes `target` in one step; after an error it is deleted.

    Args:
        target: The folder.
        size: Bytes that are put into it, for the error of a full disk.
    """
    with told_of(target, size):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            staging = Path(scratch) / target.name
            staging.mkdir()
            yield staging
            os.replace(staging, target)


def _size_of(tensors: dict[str, Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _copy_files(sources: list[Path], target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files that match `patterns` from the first of `sources` that has any."""
    for source in sources:
        files = {file for pattern in patterns for file in source.glob(pattern)} if source.is_dir() else set()
        if files:
            for file in files:
                shutil.copy2(file, target / file.name)
            return


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
