"""The methods of comparison, by their names in an experiment's file; see `base.Method`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from aroma.errors import bad_value

from .adalora import AdaLora
from .aroma import Aroma, ReLora
from .base import Hooks, Method
from .lora import Compressed, Lora
from .plain import BitFit, Frozen, Full, HeadOnly, Houlsby, Pfeiffer, Pretrained

__all__ = ["METHODS", "AdaLora", "Aroma", "BitFit", "Compressed", "Frozen", "Full", "HeadOnly", "Hooks"]
__all__ += ["Houlsby", "Lora", "Method", "Pfeiffer", "Pretrained", "ReLora", "make_method"]

METHODS: dict[str, type[Method]] = {
    "pretrained": Pretrained,
    "full": Full,
    "head_only": HeadOnly,
    "bitfit": BitFit,
    "houlsby": Houlsby,
    "pfeiffer": Pfeiffer,
    "lora": Lora,
    "adalora": AdaLora,
    "relora": ReLora,
    "aroma": Aroma,
    "compressed": Compressed,
}


def make_method(kind: str, options: Mapping[str, Any]) -> Method:
    """Return a method.

    Args:
        kind: One of `METHODS`.
        options: Its options by name; the others have their defaults.

    Raises:
        ConfigError: An unknown kind or option, with the nearest known one, or a value of a wrong type or out of range.
    """
    from ..settings import typed_fields  # of the extra `lab`, which those who load a model may lack

    if kind not in METHODS:
        nearest = difflib.get_close_matches(kind, METHODS, n=1, cutoff=0.0)[0]
        remedy = f"there is no such kind of method; the nearest is {nearest!r}, and all are {', '.join(METHODS)}"
        raise bad_value("kind", kind, remedy)
    types = METHODS[kind].option_types()
    return METHODS[kind](**typed_fields(types, options, f"the method {kind!r}", "options."))
