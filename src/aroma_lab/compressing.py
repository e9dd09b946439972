"""Compressing a finished adapter by the examples of a file: plain PEFT in, plain PEFT out, without any extra."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import compress as chosen
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, DataCollatorForSeq2Seq, DataCollatorWithPadding

from aroma.errors import DataError, bad_value
from aroma.evidence.checkup import Checkup, model_loss
from aroma.evidence.checkups import compress, require_standard_errors
from aroma.evidence.schedule import FEWEST, WANTED
from aroma.evidence.statistics import SIZES
from aroma.export import is_causal_lm
from aroma.files import read_tensors, write_json, write_tensors
from aroma.outputs import TASK_FILE, TOKENIZER_FILES, copy_files, filled_at_once, new_folder
from aroma.pictures import kept_picture
from aroma.state import read_config

from .language.data import examples_of
from .language.encode import NOT_LEARNED, encode_rows
from .language.model import language_task, load_for_inference, model_source, positions_of
from .run.machine import provenance
from .specs import ModelSpec
from .tasks.saved import open_classifier
from .tasks.sources import read_located
from .tasks.task import Task, save_task

REPORT, PICTURE, WEIGHTS = "compression.json", "ranks.png", "adapter_model.safetensors"
_TOKENS = 1024
"""Most tokens of a language model's example where nothing says it: the default of TRL's SFTTrainer."""


@dataclass(frozen=True)
class Wishes:
    """What a person may choose; None: as in training, or what the adapter and its data tell."""

    base: str | None = None
    standard_errors: float = 0.0
    batch_size: int | None = None
    max_length: int | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


class _Loaded(NamedTuple):
    """A model with its adapter, its held-out batches, a classifier's task, and what became of texts."""

    model: Any
    batches: list[Any]
    task: Task | None = None
    note: str = ""


def compress_adapter(folder: Path, data: str, out: str | os.PathLike[str], want: Wishes) -> dict[str, Any]:
    """Compress the adapter in `folder` by the examples of a file into the new folder `out`, and return the report.

    Raises:
        AromaError: The adapter, its base model or the data cannot be used, or nothing can be written to `out`.
    """
    require_standard_errors(want.standard_errors)
    target, config, weights = new_folder("--out", out), read_config(folder), folder / WEIGHTS
    if config["peft_type"] != "LORA":
        raise bad_value("peft_type", config["peft_type"], f"{folder} is no LoRA adapter; give one of those")
    types = {name: tensor.dtype for name, tensor in read_tensors(weights).items()}
    loaded = (_language if is_causal_lm(config) else _classifier)(folder, config, data, want)
    with tqdm(desc="evaluating held-out examples", total=len(loaded.batches) * (SIZES + 1)) as bar:

        def loss(model: Any, batch: Any) -> Any:
            bar.update()
            return model_loss(model, batch)

        found = compress(loaded.model, loaded.batches, standard_errors=want.standard_errors, loss=loss)
    with filled_at_once(target) as staging:
        loaded.model.save_pretrained(staging)
        kept = read_tensors(staging / WEIGHTS)  # PEFT computes in float32 what may be stored in fewer bits
        write_tensors(
            staging / WEIGHTS, {name: tensor.to(types.get(name, tensor.dtype)) for name, tensor in kept.items()}
        )
        copy_files([folder], staging, (*TOKENIZER_FILES, TASK_FILE))
        if loaded.task is not None and not (staging / TASK_FILE).exists():
            save_task(loaded.task, staging)
        inputs = {"adapter": str(folder), "data": data, "standard_errors": want.standard_errors}
        sizes = {"before": weights.stat().st_size, "after": (staging / WEIGHTS).stat().st_size}
        report = {**inputs, "bytes": sizes, **_report(loaded, found)}
        write_json(staging / REPORT, report)
        if find_spec("matplotlib"):
            pairs = {name: (max(before), max(found.ranks[name])) for name, before in found.ranks_before.items()}
            kept_picture(pairs, staging / PICTURE, f"{found.kept} of {found.sizes[-1]} directions stay")
    return report


def split_evenly(examples: Sequence[Any], most: int) -> list[list[Any]]:
    """Return examples, shuffled with seed 0, in 16 parts or more, each of at most `most`, that differ by one at most.

    Fewer than 16 examples are a part each.
    """
    shuffled = random.Random(0).sample(examples, len(examples))
    count = min(len(examples), max(WANTED, -(-len(examples) // most)))
    return [shuffled[start::count] for start in range(count)]


def _base_name(name: str | None) -> str:
    if not name:
        raise bad_value("--base", name, "the adapter does not name its base model; give its folder or hub name")
    if os.path.isabs(name) and not os.path.isdir(name):
        raise bad_value("--base", name, "no such folder; give the folder or the hub name of the base model")
    return name


def _batches(data: str, rows: Mapping[str, Sequence[Any]], collate: Callable[[Any], Any], most: int) -> list[Any]:
    examples = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    if len(examples) < FEWEST:
        remedy = f"{len(examples)} examples cannot tell savings from noise; give a file of {FEWEST} at the very least"
        raise bad_value("--data", data, remedy, DataError)
    if most < 1:
        raise bad_value("--batch-size", most, "give 1 or more")
    return [collate(some) for some in split_evenly(examples, most)]


def _classifier(folder: Path, config: Mapping[str, Any], data: str, want: Wishes) -> _Loaded:
    _base_name(want.base or config.get("base_model_name_or_path"))
    model, tokenizer, task, examples = open_classifier(
        folder,
        read_located("--data", data),
        base_model=want.base,
        text=want.text,
        text_pair=want.text_pair,
        label=want.label,
        max_length=want.max_length,
    )
    texts, pairs, labels = ([one.get(key) for one in examples] for key in ("text", "pair", "labels"))
    encoded = tokenizer(texts, pairs if task.text_pair else None, truncation=True, max_length=task.max_length)
    batches = _batches(data, {**encoded, "labels": labels}, DataCollatorWithPadding(tokenizer), want.batch_size or 16)
    return _Loaded(model, batches, task)


def _language(folder: Path, config: Mapping[str, Any], data: str, want: Wishes) -> _Loaded:
    task = language_task(folder)
    spec = task.model if want.base is None and task.model is not None else ModelSpec(want.base)
    _base_name(spec.name)
    examples = examples_of(read_located("--data", data), want.text)
    known = AutoConfig.from_pretrained(model_source(spec))
    length = want.max_length or task.max_length or min(_TOKENS, positions_of(known) or _TOKENS)
    is_free = not (folder / TASK_FILE).exists() and torch.accelerator.is_available()
    halved = is_free and known.dtype in (torch.float16, torch.bfloat16)
    model, tokenizer = load_for_inference(folder, want.base, "bfloat16" if halved else None)
    rows, _, note = encode_rows(examples, tokenizer, length, "--data")
    learned = [{*labels} != {NOT_LEARNED} for labels in rows["labels"]]  # of a single token nothing is
    rows = {name: [*chosen(values, learned)] for name, values in rows.items()}
    tokenizer.padding_side = "right"  # where no token sees it
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NOT_LEARNED)
    return _Loaded(model, _batches(data, rows, collate, want.batch_size or 8), note=note)


def _report(loaded: _Loaded, found: Checkup) -> dict[str, Any]:
    return {
        "examples": sum(len(batch["labels"]) for batch in loaded.batches),
        "batches": len(loaded.batches),
        "held_out_loss": {"base": found.losses[0], "adapter": found.losses[-1], "compressed": found.loss},
        "against_adapter": {"saves": found.gains, "standard_error": found.gains_error},
        "against_base": {"saves": found.saves, "standard_error": found.standard_error},
        "ranks": {"before": _totals(found.ranks_before), "after": _totals(found.ranks)},
        "kept_at_one_standard_error": found.smaller,
        "says": str(found),
        "matrices": {name: {"before": old, "after": found.ranks[name]} for name, old in found.ranks_before.items()},
        "loss_by_directions": dict(zip(map(str, found.sizes), found.losses, strict=True)),
        "note": loaded.note,
        "versions": provenance()["versions"],
    }


def _totals(ranks: Mapping[str, Sequence[int]]) -> dict[str, float]:
    every = [rank for some in ranks.values() for rank in some]
    return {"largest": max(every), "mean": sum(every) / len(every), "total": sum(every)}
