"""AROMA: LoRA whose rank grows by itself, matrix by matrix (arXiv 2504.05343).

Importing the package registers the tuner with PEFT the first time a name is used; nothing heavy is imported before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import last_complete_checkpoint, save_adapter, verify_adapter, verify_checkpoint
    from .controller import AromaController
    from .errors import AromaError
    from .events import Event, ModuleSummary
    from .evidence.checkup import Checkup
    from .evidence.checkups import Checkups, compress
    from .evidence.compact import compact
    from .integrations.callback import AromaCallback
    from .integrations.evidence_callback import EvidenceCallback
    from .integrations.held_out import hold_out
    from .integrations.loop import Attachment, attach
    from .tuner import AromaConfig, AromaModel, aroma_layers

__version__ = "0.1.0"

_HOMES = {
    "AromaCallback": "integrations.callback",
    "AromaConfig": "tuner",
    "AromaController": "controller",
    "AromaError": "errors",
    "AromaModel": "tuner",
    "Attachment": "integrations.loop",
    "Checkup": "evidence.checkup",
    "Checkups": "evidence.checkups",
    "Event": "events",
    "EvidenceCallback": "integrations.evidence_callback",
    "ModuleSummary": "events",
    "aroma_layers": "tuner",
    "attach": "integrations.loop",
    "compact": "evidence.compact",
    "compress": "evidence.checkups",
    "hold_out": "integrations.held_out",
    "last_complete_checkpoint": "checkpoint",
    "save_adapter": "checkpoint",
    "verify_adapter": "checkpoint",
    "verify_checkpoint": "checkpoint",
}

__all__ = [
    "AromaCallback",
    "AromaConfig",
    "AromaController",
    "AromaError",
    "AromaModel",
    "Attachment",
    "Checkup",
    "Checkups",
    "Event",
    "EvidenceCallback",
    "ModuleSummary",
    "aroma_layers",
    "attach",
    "compact",
    "compress",
    "hold_out",
    "last_complete_checkpoint",
    "save_adapter",
    "verify_adapter",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'aroma' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
