"""Commands that need more than the library's own dependencies say so before they begin."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import ConfigError

DISTRIBUTION = "aroma-peft"


def require_extra(*extras: str) -> None:
    """Raise unless everything that the named extras of `aroma-peft` bring is installed.

    Raises:
        ConfigError: Naming the missing distributions and the extra to install.
    """
    for extra in extras:
        if missing := [name for name in _brought_by(extra) if not is_installed(name)]:
            raise ConfigError(f"{', '.join(missing)}: not installed; run: pip install '{DISTRIBUTION}[{extra}]'")


def is_installed(name: str) -> bool:
    """Whether a distribution is installed."""
    from importlib.metadata import distributions

    return any(True for _ in distributions(name=name))


def _brought_by(extra: str) -> Iterator[str]:
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    for one in map(Requirement, requires(DISTRIBUTION) or ()):
        if one.marker is not None and one.marker.evaluate({"extra": extra}):
            if one.name != DISTRIBUTION:
                yield one.name
            for nested in sorted(one.extras) if one.name == DISTRIBUTION else ():
                yield from _brought_by(nested)
