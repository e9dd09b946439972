"""The methods of comparison: a method is a small object, and adding one is one file."""

from __future__ import annotations

from .adalora import AdaLora
from .aroma import Aroma
from .base import Hooks, Method, encoder_linears
from .frozen import Frozen
from .full import Full
from .head_only import HeadOnly
from .lora import Lora
from .relora import ReLora

__all__ = ["AdaLora", "Aroma", "Frozen", "Full", "HeadOnly", "Hooks", "Lora", "Method", "ReLora", "encoder_linears"]
