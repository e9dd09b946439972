"""Commands that need more than the core of the distribution say so before they begin."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import ConfigError

_MODULES = {
    "train": ("datasets", "sklearn", "scipy"),
    "plot": ("matplotlib",),
    "search": ("optuna", "sqlalchemy"),
    "language": ("datasets", "sklearn", "trl", "lm_eval"),
}


def require_extra(*extras: str) -> None:
    """Raise unless what the named extras of `aroma-peft` bring is installed.

    Raises:
        ConfigError: Naming the missing modules and the extra to install.
    """
    for extra in extras:
        missing = [name for name in _MODULES[extra] if find_spec(name) is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)}: not installed; run: pip install 'aroma-peft[{extra}]'")
