"""The methods of comparison; see `base.Method`."""

from __future__ import annotations

from .adalora import AdaLora
from .aroma import Aroma, GrowthHooks
from .base import Hooks, HooksCallback, Method
from .bottleneck import Bottleneck, Houlsby, Pfeiffer
from .head import encoder_linears, find_targets
from .lora import Lora, PeftAdapter
from .plain import BitFit, Frozen, Full, HeadOnly, Pretrained
from .registry import METHODS, make_method
from .relora import ReLoraComponents, ReLoraMerge

__all__ = [
    "METHODS",
    "AdaLora",
    "Aroma",
    "BitFit",
    "Bottleneck",
    "Frozen",
    "Full",
    "GrowthHooks",
    "HeadOnly",
    "Hooks",
    "HooksCallback",
    "Houlsby",
    "Lora",
    "Method",
    "PeftAdapter",
    "Pfeiffer",
    "Pretrained",
    "ReLoraComponents",
    "ReLoraMerge",
    "encoder_linears",
    "find_targets",
    "make_method",
]
