"""The PEFT tuner of AROMA."""

from .config import AromaConfig
from .layer import AromaLinear, LiveAdapter, live_adapter
from .model import AromaModel, aroma_layers, register

register()

__all__ = ["AromaConfig", "AromaLinear", "AromaModel", "LiveAdapter", "aroma_layers", "live_adapter"]
