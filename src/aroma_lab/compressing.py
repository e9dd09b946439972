"""Compressing a saved adapter by the examples of a file: plain PEFT in, plain PEFT out, without any extra."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import compress as chosen
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import AutoConfig, DataCollatorForSeq2Seq, DataCollatorWithPadding

from aroma import Compression, compress
from aroma.compression.compress import FEWEST
from aroma.compression.files import compress_saved
from aroma.compression.weights import require_products
from aroma.errors import DataError, bad_value
from aroma.export import is_causal_lm
from aroma.files import own_file, read_tensors, write_json, write_tensors
from aroma.outputs import TASK_FILE, TOKENIZER_FILES, copy_files, filled_at_once, new_folder
from aroma.pictures import compression_picture
from aroma.state import WEIGHTS_NAME, read_config

from .language.data import examples_of
from .language.encode import NOT_LEARNED, encode_rows
from .language.model import language_task, load_for_inference, model_source, positions_of
from .run.machine import provenance
from .specs import ModelSpec
from .tasks.saved import open_classifier
from .tasks.sources import Located, read_located

REPORT, PICTURE = "compression.json", "compression.png"
_TOKENS = 1024
"""Most tokens of a language model's example where nothing says it: the default of TRL's SFTTrainer."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Wishes:
    """What a person may choose; None: as in training, or what the adapter and its data tell."""

    keep: float | None = None
    size: float | None = None
    rank: int | None = None
    base: str | None = None
    examples: int = 256
    batch_size: int = 8
    max_length: int | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


class _Loaded(NamedTuple):
    """A model with its adapter, encoded examples, what makes a batch of them, and what became of them."""

    model: Any
    examples: list[dict[str, Any]]
    collate: Any
    note: str


def compress_adapter(
    folder: Path, data: str | None, out: str | os.PathLike[str], want: Wishes
) -> tuple[Compression, str]:
    """Compress the adapter in `folder` into the new folder `out`; return what was found, and what became of examples.

    Args:
        data: A file of examples; None: by size alone, without a base model.

    Raises:
        AromaError: The adapter, its base model or the data cannot be used, or nothing can be written to `out`.
    """
    note, target = "", new_folder("--out", out)
    if data is None:
        found = compress_saved(folder, target, size=want.size, rank=want.rank)
    else:
        found, note = _by_effect(folder, data, target, want)
    asked = asdict(want) if data else {"size": want.size, "rank": want.rank}
    inputs = {"adapter": str(folder), "data": data, **asked}
    report = {**found.as_dict(), "says": str(found), "note": note, "inputs": inputs}
    write_json(target / REPORT, report | {"versions": provenance()["versions"]})
    if find_spec("matplotlib"):
        compression_picture(found, target / PICTURE)
    return found, note


def _by_effect(folder: Path, data: str, target: Path, want: Wishes) -> tuple[Compression, str]:
    config, rows = read_config(folder), read_located("--data", data)
    require_products(config)
    _require_base(want.base or config.get("base_model_name_or_path"))
    tensors = read_tensors(own_file(folder, WEIGHTS_NAME))
    model, examples, collate, note = (_language if is_causal_lm(config) else _texts)(folder, rows, want)
    if len(examples) < FEWEST:
        remedy = f"{len(examples)} examples decide nothing; give {FEWEST} or more, some hundreds if there are"
        raise bad_value("--data", data, remedy, DataError)
    starts = range(0, len(examples), want.batch_size)
    batches = [collate(examples[start : start + want.batch_size]) for start in starts]
    loaded, stored = (
        next(tensor.dtype.itemsize for name, tensor in some if ".lora_" in name)
        for some in (model.named_parameters(), tensors.items())
    )
    found = compress(model, batches, keep=want.keep, size=want.size, rank=want.rank, progress=True)
    # PEFT computes in float32 what may be stored in fewer bits.
    found = replace(found, curve=[replace(one, bytes=one.bytes * stored // loaded) for one in found.curve])
    with filled_at_once(target) as staging:
        model.save_pretrained(staging)
        kept = read_tensors(staging / WEIGHTS_NAME)
        types = {name: tensors[name].dtype if name in tensors else tensor.dtype for name, tensor in kept.items()}
        write_tensors(staging / WEIGHTS_NAME, {name: tensor.to(types[name]) for name, tensor in kept.items()})
        copy_files([folder], staging, (*TOKENIZER_FILES, TASK_FILE))
    return found, note


def _require_base(name: str | None) -> None:
    if not name:
        raise bad_value("--base", name, "the adapter does not name its base model; give its folder or hub name")
    if os.path.isabs(name) and not os.path.isdir(name):
        raise bad_value("--base", name, "no such folder; give the folder or the hub name of the base model")


def _drawn(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most so many items, in random order with seed 0."""
    return random.Random(0).sample(items, min(most, len(items)))


def _examples(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _texts(folder: Path, rows: list[Located], want: Wishes) -> _Loaded:
    """Load a classifier, a regression, or an encoder that is compared by its hidden states."""
    columns = {"text": want.text, "text_pair": want.text_pair, "label": want.label}
    some = _drawn(rows, want.examples)
    saved = open_classifier(
        folder, some, base_model=want.base, max_length=want.max_length, needs_labels=False, **columns
    )
    texts, pairs = ([one.get(key) for one in saved.examples] for key in ("text", "pair"))
    length = {"truncation": True, "max_length": saved.task.max_length}
    encoded = dict(saved.tokenizer(texts, pairs if saved.task.text_pair else None, **length))
    if saved.task.label is not None:
        encoded["labels"] = [one["labels"] for one in saved.examples]
    return _Loaded(saved.model, _examples(encoded), DataCollatorWithPadding(saved.tokenizer), saved.note)


def _language(folder: Path, rows: list[Located], want: Wishes) -> _Loaded:
    if given := want.text_pair or want.label:
        raise bad_value("--text-pair or --label", given, "a language model has no such column; leave it out")
    task = language_task(folder)
    spec = task.model if want.base is None and task.model is not None else ModelSpec(want.base)
    examples = examples_of(_drawn(rows, want.examples), want.text)
    known = AutoConfig.from_pretrained(model_source(spec))
    length = want.max_length or task.max_length or min(_TOKENS, positions_of(known) or _TOKENS)
    is_free = not (folder / TASK_FILE).exists() and torch.accelerator.is_available()
    halved = is_free and known.dtype in (torch.float16, torch.bfloat16)
    model, tokenizer = load_for_inference(folder, want.base, "bfloat16" if halved else None)
    encoded, _, note = encode_rows(examples, tokenizer, length, "--data")
    learned = [{*labels} != {NOT_LEARNED} for labels in encoded["labels"]]  # of a single token nothing is
    parts = _drawn([*chosen(_examples(encoded), learned)], want.examples)  # of long texts
    tokenizer.padding_side = "right"  # where no token sees it
    return _Loaded(model, parts, DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NOT_LEARNED), note)
