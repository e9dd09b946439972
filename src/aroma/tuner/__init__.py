"""The PEFT tuner of AROMA."""

import peft

from .config import AromaConfig
from .layer import AromaLinear
from .live import LiveAdapter, live_adapter
from .model import AromaModel, aroma_layers, register

if not hasattr(AromaModel.__mro__[1], "_get_adapter_state_dict"):
    raise ImportError(
        f"aroma needs peft >= 0.21 for its state-dict hooks, found peft {peft.__version__}: upgrade peft"
    )

register()

__all__ = ["AromaConfig", "AromaLinear", "AromaModel", "LiveAdapter", "aroma_layers", "live_adapter"]
