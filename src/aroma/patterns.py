"""Names of modules and of tensors."""

from __future__ import annotations


def is_named(module: str, name: str) -> bool:
    """Whether a list of names, such as target_modules, names a module by `name`: its whole name, or the end of it."""
    return module == name or module.endswith(f".{name}")


def is_component(name: str) -> bool:
    """Whether a tensor of a plain adapter, by its name in a file, is a factor of a module's components."""
    return any(mark in name for mark in (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B"))
