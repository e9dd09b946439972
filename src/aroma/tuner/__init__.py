"""The PEFT tuner of AROMA."""

from ..compat import TUNER_NAMES, require_names
from .config import AromaConfig
from .layer import AromaLinear
from .model import AromaModel, aroma_layers, register

require_names(TUNER_NAMES)
register()

__all__ = ["AromaConfig", "AromaLinear", "AromaModel", "aroma_layers"]
