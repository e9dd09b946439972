"""Whether held-out examples are prepared as the training set is, and whether some are trained on."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, Subset
from tqdm.auto import tqdm

from ..errors import bad_value
from ..sharding import rank

_MOST_ROWS = 50_000
"""Most rows of the training set, and of the held-out ones, whose content is compared."""
_NUMBERS = (int, float)
_PATIENCE = 3.0
"""Seconds without a progress bar; texts take less, images may take minutes."""


def require_indexed(field: str, examples: Any) -> None:
    """Raise unless examples, given as `field`, have a length and items by index.

    Raises:
        ConfigError: They have not, as a stream or a DataLoader.
    """
    if isinstance(examples, int | float):
        remedy = f"it takes examples, and no share; train, growth = aroma.hold_out(dataset, {examples})"
        raise bad_value(field, examples, remedy)
    if isinstance(examples, str | bytes):
        raise bad_value(field, examples, "it takes the examples themselves; load them, as datasets.load_dataset does")
    if isinstance(examples, Mapping):
        splits = [*map(str, examples)]
        remedy = f"it has splits ({', '.join(splits)}), and no items by index; give one of them"
        raise bad_value(field, type(examples).__name__, f"{remedy}, as dataset[{splits[0]!r}]" if splits else remedy)
    if hasattr(examples, "iloc"):  # of pandas
        raise bad_value(field, type(examples).__name__, "its items are columns; give datasets.Dataset.from_pandas(it)")
    if not _is_indexed(examples):
        remedy = "it has no length, or no items by index; give a datasets.Dataset, a list or a torch Dataset"
        raise bad_value(field, type(examples).__name__, remedy)


def _is_indexed(examples: Any) -> bool:
    is_stream = isinstance(examples, IterableDataset)  # it may have a length, and inherits a __getitem__ that fails
    return hasattr(examples, "__len__") and hasattr(examples, "__getitem__") and not is_stream


def with_columns_of(training: Any, held_out: Any) -> Any:
    """Return held-out examples with the columns of the training set, from which the Trainer drops what no model reads.

    Raises:
        ConfigError: They lack one.
    """
    kept, own = (getattr(dataset, "column_names", None) for dataset in (training, held_out))
    if not isinstance(kept, list) or not isinstance(own, list):
        return held_out
    missing = [name for name in kept if name not in own]
    if missing:
        raise bad_value(
            "growth_dataset",
            f"columns {', '.join(own)}",
            f"the training set has {', '.join(missing)}; prepare both in the same way. SFTTrainer prepares what it is "
            "given: give it these examples as eval_dataset, and set callback.growth_dataset = trainer.eval_dataset",
        )
    return held_out.select_columns(kept)


def without_trained(held_out: Any, training: Any) -> Any:
    """Return the held-out examples that are not trained on: of the others all looks steep that is learnt by heart.

    Data sets have examples twice, and a split by chance parts some of them. The content of the first 50,000 rows of
    each is compared, of a `datasets.Dataset` before its transform, and of parts of one data set
    (`torch.utils.data.Subset`) all indices are. A stream is not.

    Raises:
        ConfigError: There are none, both sets are the same, or they share more than half of the held-out examples.

    Warns:
        UserWarning: They share fewer, which are left out; or they hold objects that have no content to compare.
    """
    if not len(held_out):
        raise bad_value("growth_dataset", "empty", "hold out some examples, as aroma.hold_out does")
    shared = {} if held_out is training else _shared_rows(held_out, training)
    if not shared and held_out is not training:
        return held_out
    row, trained = next(iter(shared.items()), (0, 0))
    said = f"its row {row} is row {trained} of the training set" if shared else "it is the training set"
    if held_out is training or 2 * len(shared) > len(held_out):
        raise bad_value(
            "growth_dataset",
            f"{len(held_out)} examples",
            f"{said}; growth must be decided on examples that are not trained on: split them first, "
            "train, growth = aroma.hold_out(dataset), and before that drop rows that come more than once",
        )
    warnings.warn(
        f"growth_dataset: {len(shared)} of {len(held_out)} examples are trained on, too ({said}). They are left out",
        stacklevel=2,
    )
    return rows_of(held_out, [row for row in range(len(held_out)) if row not in shared])


def _shared_rows(held_out: Any, training: Any) -> dict[int, int]:
    """Return which row of the training set each shared row of the held-out examples is."""
    if not _is_indexed(training):
        return {}
    try:
        found = _same_content(_untransformed(held_out), _untransformed(training))
    except _NoContentError as error:
        found = {}
        warnings.warn(
            f"growth_dataset: its examples hold objects of type {error}, which have no content to compare, so nobody "
            "knows whether some are trained on; hold them out with aroma.hold_out(dataset)",
            stacklevel=3,
        )
    return found | _shared_indices(held_out, training)


def _same_content(held_out: Any, training: Any) -> dict[int, int]:
    """Return the same of rows of the same content.

    Raises:
        _NoContentError: Examples of which nobody knows.
    """
    rows = tqdm(
        range(min(len(training), _MOST_ROWS) - 1, -1, -1),
        "comparing the training set with held-out examples",
        leave=False,
        delay=_PATIENCE,
        disable=rank() != 0,
    )
    known = {_digest(training[row]): row for row in rows}
    found = {row: known.get(_digest(held_out[row])) for row in range(min(len(held_out), _MOST_ROWS))}
    return {row: trained for row, trained in found.items() if trained is not None}


def _untransformed(dataset: Any) -> Any:
    """Return a `datasets.Dataset` without its format: a transform that augments never gives the same row twice."""
    return dataset.with_format(None) if hasattr(dataset, "with_format") else dataset


def _shared_indices(held_out: Any, training: Any) -> dict[int, int]:
    """Return the same of parts of one data set by their indices: one that augments never gives the same row twice."""
    (source, own), (other, trained) = _source_of(held_out), _source_of(training)
    if source is not other:
        return {}
    places = {index: row for row, index in enumerate(trained)}
    return {row: places[index] for row, index in enumerate(own) if index in places}


def _source_of(dataset: Any) -> tuple[Any, Sequence[int]]:
    """Return the data set that `dataset` is a part of, and the indices of its examples there."""
    indices: Sequence[int] = range(len(dataset))
    while isinstance(dataset, Subset):
        indices = [int(dataset.indices[index]) for index in indices]
        dataset = dataset.dataset
    return dataset, indices


def rows_of(dataset: Any, rows: list[int]) -> Any:
    """Return a part of a data set."""
    # pandas and torch have a `select` of another kind.
    return dataset.select(rows) if hasattr(dataset, "select_columns") else Subset(dataset, rows)


class _NoContentError(Exception):
    """A value that says nothing of itself but where it lies in memory."""


def _digest(example: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, example)
    return digest.digest()


def _is_numeric(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return all(isinstance(item, _NUMBERS) for item in value)
    return isinstance(value, _NUMBERS)


def _feed(digest: Any, value: Any) -> None:
    """Feed an example, so that lists, arrays and tensors of the same numbers are alike.

    Raises:
        _NoContentError: Part of it has none.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    elif _is_numeric(value):
        array = np.asarray(value)
        value = array if array.size and array.dtype.kind in "biuf" else value  # no integer of more than 64 bits
    if isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            digest.update(f"{key}:".encode())
            _feed(digest, value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            digest.update(b",")
            _feed(digest, item)
    elif isinstance(value, np.ndarray | np.number) and value.dtype.kind in "biuf":
        digest.update(np.asarray(value, dtype=np.float32 if value.dtype.kind == "f" else np.int64).tobytes())
    elif isinstance(value, np.ndarray):
        _feed(digest, value.tolist())
    elif hasattr(value, "tobytes"):  # as images of PIL have
        digest.update(f"{getattr(value, 'mode', '')}{getattr(value, 'size', '')}".encode())
        digest.update(value.tobytes())
    else:
        said = repr(value)
        if not isinstance(value, str | bytes) and re.search(r" at 0x[0-9a-f]+", said):
            raise _NoContentError(type(value).__name__)
        digest.update(said.encode())
