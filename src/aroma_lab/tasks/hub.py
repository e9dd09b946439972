"""Columns out of hub data sets, as plain Python lists."""

from __future__ import annotations

from collections.abc import Sequence

from aroma.errors import DataError, bad_value

from .sources import Choices, Columns, no_rows, require_fitting


def read_hub(
    field: str, split: str, name: str, config: str | None, wanted: Sequence[str], name_field: str = "data.name"
) -> Columns:
    """Read the columns `wanted` of one split of a hub data set; see `read_fitting_hub`."""
    return read_fitting_hub(field, split, name, config, [wanted], name_field)[1]


def read_fitting_hub(
    field: str, split: str, name: str, config: str | None, choices: Choices, name_field: str = "data.name"
) -> tuple[int, Columns]:
    """Read one split of a hub data set whose columns are one of several known sets; class labels come as their names.

    Args:
        field: The recipe's key of the split, for errors.
        split: Name of the split.
        name: Hub name or local folder.
        config: Configuration, where the data set has several.
        choices: Sets of column names; the first that the split has is read.
        name_field: The recipe's key of the data set, for errors.

    Returns:
        The index of the choice, and its columns.

    Raises:
        DataError: The data set or the split is missing, or a column, or there are no rows.
    """
    from datasets import ClassLabel, load_dataset

    known = hub_splits(name, config, name_field)
    if split.partition("[")[0] not in known:
        raise bad_value(field, split, f"{name} has no such split; it has {', '.join(known)}", DataError)
    try:
        data = load_dataset(name, config, split=split)
    except ValueError as error:  # a slice that datasets cannot read, as train[:10%
        reason = " ".join(str(error).split())
        raise bad_value(
            field, split, f"not a split ({reason}); write it as train or train[:10%]", DataError
        ) from error
    if not len(data):
        raise no_rows(field, split)
    choice = require_fitting(field, split, data.column_names, choices)
    columns: Columns = {column: list(data[column]) for column in choices[choice]}
    for column, values in columns.items():
        feature = data.features[column]
        if isinstance(feature, ClassLabel):
            # The hub's mark of a hidden label is −1.
            columns[column] = [None if i is None or i < 0 else feature.names[i] for i in values]
    return choice, columns


def hub_splits(name: str, config: str | None, name_field: str = "data.name") -> list[str]:
    """Return the names of the splits of a hub data set.

    Raises:
        DataError: There is no such data set or configuration.
    """
    from datasets import get_dataset_split_names

    try:
        return list(get_dataset_split_names(name, config))
    except (OSError, ValueError) as error:
        raise bad_value(
            name_field,
            name,
            f"cannot be loaded with configuration {config!r} ({' '.join(str(error).split())}); give local files "
            "instead",
            DataError,
        ) from error
