"""The errors a user of AROMA can meet: each names the field, its value and the remedy."""

from __future__ import annotations


class AromaError(ValueError):
    """Base of every error that AROMA raises on purpose."""


class ConfigError(AromaError):
    """A configuration that cannot work, refused before any training."""


class DataError(AromaError):
    """A data set that cannot be used as described."""


class CheckpointError(AromaError):
    """A saved adapter or training state that is missing, damaged, edited, or of another run."""


class OutputError(ConfigError, OSError):
    """A place where nothing can be written: taken, out of reach, read-only, or on a disk that is full."""

    def __str__(self) -> str:  # OSError's own has no room for a remedy
        return str(self.args[0])


class ResetError(AromaError):
    """An optimizer whose state for a component cannot be reset."""


class NonFiniteError(AromaError):
    """NaN or infinity in a loss or in a component."""


class AromaWarning(UserWarning):
    """Something that a user should know and that AROMA goes on with."""


def bad_value(field: str, value: object, remedy: str, kind: type[AromaError] = ConfigError) -> AromaError:
    """Return (not raise) an error of `kind` that reads ``field=value: remedy``; a long value is cut."""
    return kind(f"{field}={shown_value(value)}: {remedy}")


def shown_value(value: object, most: int = 300) -> str:
    """Return a value as an error shows it, cut after `most` characters."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
