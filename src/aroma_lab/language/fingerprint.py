"""Which pretrained weights an adapter was trained on, in a few characters."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from aroma.tuner.layout import PEFT_PREFIX

_SAMPLES = 64
"""Weights of each tensor that count."""


@torch.no_grad()
def fingerprint_of(model: Any) -> str | None:
    """Return a digest of some weights of a frozen base model, the same in float32 and in bfloat16.

    Args:
        model: The base model, or a `PeftModel` around it; adapters do not count.

    Returns:
        A digest; None where weights are held in another precision, in which they are not comparable.
    """
    digest = hashlib.sha256()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = {_plain_name(name): parameter for name, parameter in base.named_parameters() if ".lora_" not in name}
    for name, parameter in sorted(named.items()):
        if parameter.dtype not in (torch.float32, torch.bfloat16) or parameter.is_meta:
            return None
        flat = parameter.detach().reshape(-1)
        count = min(_SAMPLES, flat.numel())
        places = torch.arange(count) * (flat.numel() - 1) // max(count - 1, 1)
        digest.update(name.encode())
        digest.update(flat[places.to(flat.device)].to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain_name(name: str) -> str:
    """Return the name that a parameter had before an adapter was put around its module."""
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
