"""The methods of comparison: a method is a small object, and adding one is one file."""

from __future__ import annotations

from .adalora import AdaLora
from .aroma import Aroma
from .base import Method, encoder_linears
from .bitfit import BitFit
from .bottleneck import Bottleneck, Houlsby, Pfeiffer
from .frozen import Frozen
from .full import Full
from .head_only import HeadOnly
from .hooks import Hooks, HooksCallback
from .lora import Lora
from .registry import METHODS, make_method
from .relora import ReLora
from .relora_components import Relora

__all__ = [
    "METHODS",
    "AdaLora",
    "Aroma",
    "BitFit",
    "Bottleneck",
    "Frozen",
    "Full",
    "HeadOnly",
    "Hooks",
    "HooksCallback",
    "Houlsby",
    "Lora",
    "Method",
    "Pfeiffer",
    "ReLora",
    "Relora",
    "encoder_linears",
    "make_method",
]
