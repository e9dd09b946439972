"""Tiny models of transformers with adapters to compress, and their effects by torch's own distributions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from models import base
from models import batch as batch_of
from random_lora import randomize, zoo


def transformer(name: str, **options: Any) -> Any:
    """Return a tiny model of transformers with a LoRA adapter whose updates are drawn."""
    model = get_peft_model(
        base(name, ignore_mismatched_sizes=True, **options), LoraConfig(r=4, target_modules="all-linear", **PEFT[name])
    )
    randomize(model, 0)
    return model.eval()


PEFT = {"bert": {"task_type": "SEQ_CLS"}, "llama": {"task_type": "CAUSAL_LM"}, "t5": {}, "gpt2": {}, "vit": {}}


def several(name: str) -> list[dict[str, Tensor]]:
    return [batch_of(name, seed) for seed in range(4)]


def effect_of(kind: str, before: Any, after: Any, given: list[dict[str, Tensor]]) -> float:
    """Return the effect kept, by torch's own distributions."""
    none = copy.deepcopy(before)
    for name, parameter in none.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    lost, everything = (sum(apart(kind, before, one, batch) for batch in given) for one in (after, none))
    return 1 - float(lost / everything)


def apart(kind: str, whole: Any, other: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the divergence of a batch by torch's own distributions; of a language model at the next tokens."""
    with torch.no_grad():
        one, two = (model(**batch).logits.double() for model in (whole, other))
    if one.dim() == 3 and whole.config.model_type != "t5":
        one, two = one[:, :-1], two[:, :-1]
    if kind == "values":
        return kl_divergence(Normal(one, 1.0), Normal(two, 1.0)).sum()
    made = Bernoulli if kind == "labels" else Categorical
    return kl_divergence(made(logits=one), made(logits=two)).sum()


def reloaded(model: Any, folder: Path, base: nn.Module | None = None) -> Any:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(base or zoo(), folder).double().eval()
