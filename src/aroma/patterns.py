"""Names of modules in lists such as target_modules."""

from __future__ import annotations


def is_named(module: str, name: str) -> bool:
    """Whether a list of names, such as target_modules, names a module by `name`: its whole name, or the end of it."""
    return module == name or module.endswith(f".{name}")
