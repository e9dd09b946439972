"""Predictions of a saved adapter for every row of a file, in plain PEFT."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from aroma.errors import DataError, NonFiniteError, bad_value
from aroma.files import replacing

from .tasks.data import checked_texts
from .tasks.saved import open_classifier
from .tasks.sources import Located, Row
from .tasks.task import Layout

PREDICTION, PROBABILITIES, FINISHED = "prediction", "probabilities", "finished"
PROBABILITY = "probability_"
"""Beginning of the column of a label's probability in CSV."""


def classify(
    rows: Sequence[Row],
    folder: str,
    *,
    base_model: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Row]:
    """Return `prediction` and `probabilities` by label of every row, or the number of a regression.

    Args:
        on_batch: Called after each batch with its number of rows.

    Raises:
        DataError: A row lacks its text.
        NonFiniteError: An answer is NaN or infinite.
        AromaError: The adapter or its base model cannot be loaded; see `open_classifier`.
    """
    from numpy import isfinite
    from scipy.special import softmax

    saved = open_classifier(
        folder, base_model=base_model, text=text, text_pair=text_pair, max_length=max_length, needs_label=False
    )
    task = saved.task
    logits = saved.answer(checked_texts(_located(rows), task.layout), batch_size, on_batch).astype("float64")
    for number in (~isfinite(logits).all(axis=1)).nonzero()[0]:
        raise NonFiniteError(f"data (row {number + 1}): the model's answer is NaN or infinite; check the model")
    if task.label_names is None:
        return [{PREDICTION: value} for value in logits[:, 0].tolist()]
    named = [dict(zip(task.label_names, row, strict=True)) for row in softmax(logits, axis=-1).tolist()]
    return [{PREDICTION: max(row, key=lambda name: row[name]), PROBABILITIES: row} for row in named]


def respond(
    rows: Sequence[Row],
    folder: str,
    *,
    base_model: str | None = None,
    text: str | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Row]:
    """Return the greedy text of a language model to the prompt of every row, and whether it `finished` by itself.

    Args:
        folder: The adapter, or a whole model.
        text: Column of the prompt; None: `prompt`, `messages`, or `instruction` and perhaps `input`.

    Raises:
        DataError: A row has no prompt, or one that leaves no room for an answer.
        AromaError: The adapter or its base model cannot be loaded.
    """
    from .language.data import messages_of
    from .language.encode import encode_chat, stop_ids
    from .language.model import load_for_inference, positions_of

    if max_new_tokens < 1:
        raise bad_value("--max-new-tokens", max_new_tokens, "give 1 or more")
    if text is not None:
        rows = [{"prompt": row["text"]} for row in checked_texts(_located(rows), Layout(text, None, ""))]
    chats = [(where, messages_of(where, row)) for where, row in _located(rows)]
    model, tokenizer = load_for_inference(folder, base_model)
    stops, most = stop_ids(tokenizer), positions_of(model.config)
    prompts = [encode_chat(tokenizer, chat, where)[0] for where, chat in chats]
    for (where, _), prompt in zip(chats, prompts, strict=True):
        if most is not None and len(prompt) + max_new_tokens > most:
            remedy = (
                f"{max_new_tokens} are to follow, and the model takes {most} in all; shorten it, or let fewer follow"
            )
            raise bad_value(where, f"{len(prompt)} tokens", remedy, DataError)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": stops}
    answers: list[Row] = []
    for start in range(0, len(prompts), batch_size):
        some = {"input_ids": prompts[start : start + batch_size]}
        batch = tokenizer.pad(some, padding_side="left", return_tensors="pt").to(model.device)
        written = model.generate(**batch, **options, pad_token_id=tokenizer.pad_token_id)
        for ids in written[:, batch["input_ids"].shape[1] :].tolist():
            said = [*takewhile(lambda token: token not in stops, ids)]
            answer = tokenizer.decode(said, skip_special_tokens=True).strip()
            answers.append({PREDICTION: answer, FINISHED: len(said) < len(ids)})
        on_batch(len(written))
    return answers


def write_answers(path: Path, rows: Sequence[Row], answers: Sequence[Row]) -> None:
    """Write rows with all their columns and what was predicted, as CSV or JSON lines; only a whole file gets its name.

    Raises:
        OutputError: It cannot be written.
    """
    whole = [row | answer for row, answer in zip(rows, answers, strict=True)]
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix.lower() == ".jsonl":
            stream.writelines(f"{_as_json(row)}\n" for row in whole)
            return
        for row in whole:
            row |= {f"{PROBABILITY}{name}": share for name, share in row.pop(PROBABILITIES, {}).items()}
        columns = dict.fromkeys(name for some in (rows, whole) for row in some for name in row)
        table = csv.DictWriter(stream, [*columns], lineterminator="\n")
        table.writeheader()
        for row in whole:
            table.writerow({key: _as_json(one) if isinstance(one, list | dict) else one for key, one in row.items()})


def _located(rows: Sequence[Row]) -> list[Located]:
    return [(f"data (row {number})", row) for number, row in enumerate(rows, start=1)]


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
