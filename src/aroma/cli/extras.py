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
        missing = [name for name in distributions_of(extra) if not is_installed(name)]
        if missing:
            raise ConfigError(f"{', '.join(missing)}: not installed; run: pip install '{DISTRIBUTION}[{extra}]'")


def is_installed(name: str) -> bool:
    """Whether a distribution is installed."""
    from importlib.metadata import distributions

    return any(True for _ in distributions(name=name))


def distributions_of(extra: str) -> Iterator[str]:
    """Yield the names of the distributions that an extra brings, those of extras within it included."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    for requirement in map(Requirement, requires(DISTRIBUTION) or ()):
        if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
            if requirement.name != DISTRIBUTION:
                yield requirement.name
            for nested in sorted(requirement.extras) if requirement.name == DISTRIBUTION else ():
                yield from distributions_of(nested)
