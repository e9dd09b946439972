"""AROMA: LoRA without choosing ranks: compressed to what carries its answers, or as published (arXiv 2504.05343).

Importing the package is light. The first use of `AromaConfig`, or of what needs it, registers the tuner with PEFT.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import last_complete_checkpoint, save_adapter, verify_adapter, verify_checkpoint
    from .compression.callback import CompressCallback
    from .compression.compress import compress
    from .compression.plan import Compression, Size
    from .controller import AromaController
    from .errors import AromaError
    from .events import Event, ModuleSummary
    from .integrations.callback import AromaCallback
    from .integrations.loop import Attachment, attach
    from .tuner import AromaConfig, AromaModel, aroma_layers

__version__ = "0.3.0"

_HOMES = {
    "checkpoint": "last_complete_checkpoint save_adapter verify_adapter verify_checkpoint",
    "controller": "AromaController",
    "compression.callback": "CompressCallback",
    "compression.compress": "compress",
    "compression.plan": "Compression Size",
    "errors": "AromaError",
    "events": "Event ModuleSummary",
    "integrations.callback": "AromaCallback",
    "integrations.loop": "Attachment attach",
    "tuner": "AromaConfig AromaModel aroma_layers",
}
"""Public names by the module that has them."""

__all__ = [
    "AromaCallback",
    "AromaConfig",
    "AromaController",
    "AromaError",
    "AromaModel",
    "Attachment",
    "CompressCallback",
    "Compression",
    "Event",
    "ModuleSummary",
    "Size",
    "aroma_layers",
    "attach",
    "compress",
    "last_complete_checkpoint",
    "save_adapter",
    "verify_adapter",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names.split():
            globals()[name] = getattr(import_module(f".{home}", __name__), name)
            return globals()[name]
    raise AttributeError(f"module 'aroma' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
