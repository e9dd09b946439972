"""Which parts of a transformers model a method touches: its head, and the linear modules outside it.

The head is what did not come with the pretrained backbone, and has to train whole; the backbone's pooler belongs to it
where pretraining left it untrained.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers.pytorch_utils import Conv1D

from aroma.errors import bad_value
from aroma.state import PEFT_PREFIX

_ATTRIBUTE = "_aroma_head"
_TRAIN_A_POOLER = ("ForPreTraining", "ForNextSentencePrediction", "ForSequenceClassification", "ForMultipleChoice")
"""Endings of the classes of transformers whose loss reaches the pooler."""
_HAVE_NO_POOLER = ("ForMaskedLM",)
"""Endings of those without one: a pooler in their checkpoint is of an earlier pretraining on sentences, as BERT's."""

TrainPooler = bool | Literal["auto"]
"""Whether a backbone's pooler trains with the head; `"auto"`: where pretraining did not train it."""


@dataclass(frozen=True)
class Head:
    """The head of a model, by names as they are before PEFT wraps it.

    Args:
        modules: The modules that belong to it.
        new: Parameters that the checkpoint lacks, so that they start at random.
    """

    modules: tuple[str, ...] = ()
    new: tuple[str, ...] = ()

    def holds(self, name: str) -> bool:
        """Whether a parameter or module belongs to the head; `name` may have PEFT's prefix."""
        name = base_name(name)
        return any(f"{name}.".startswith(f"{module}.") for module in self.modules)

    def modules_to_save(self) -> list[str]:
        """Return PEFT's `modules_to_save`: all modules but those that it takes for SEQ_CLS anyway."""
        return [name for name in self.modules if name not in SEQ_CLS_HEAD_NAMES]


def base_name(name: str) -> str:
    """Return the name that a module or parameter had before PEFT wrapped the model."""
    return name.removeprefix(PEFT_PREFIX)


def head_of(model: Any) -> Head:
    """Return the head of a model, wrapped by PEFT or not; of an unmarked model, the modules outside its backbone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: Head | None = getattr(base, _ATTRIBUTE, None)
    return _find_head(base, ()) if found is None else found


def remember_head(model: Any, missing: Collection[str], train_pooler: TrainPooler) -> None:
    """Mark the head of a classifier that `from_pretrained` just returned.

    A head reads the backbone through its pooler. A pooler that pretraining never trained is a random projection, and
    with it frozen an adapter learns next to nothing; one that trains for nothing costs d² + d parameters. So with
    `train_pooler="auto"` it trains unless the checkpoint shows that pretraining did: its biases are not all zero, as
    they start, and it was saved by a class of transformers whose loss reaches it, or that has none.

    Args:
        missing: The keys that the checkpoint lacks, as transformers reports them.

    Raises:
        ConfigError: The checkpoint lacks a part of the backbone, such as a pooler that is not to train.
    """
    # Parameters that transformers itself freezes are computed, such as a table of sines, and are not learned.
    new = [name for name, parameter in model.named_parameters() if name in missing and parameter.requires_grad]
    head = _find_head(model, new, _decide_pooler(model, new, train_pooler))
    if loose := [name for name in new if not head.holds(name)]:
        remedy = "the checkpoint lacks it, and it would stay at its random start; take another checkpoint"
        raise bad_value("parameter", loose[0], remedy)
    setattr(model, _ATTRIBUTE, head)


def _decide_pooler(model: Any, new: list[str], train_pooler: TrainPooler) -> bool:
    name = _pooler_name(model)
    if name is None or train_pooler != "auto":
        return name is not None and train_pooler is True
    if any(parameter.startswith(f"{name}.") for parameter in new):
        return True
    named = model.get_submodule(name).named_parameters()
    biases = [parameter for key, parameter in named if key.split(".")[-1] == "bias"]
    is_untrained = bool(biases) and not any(bias.any() for bias in biases)
    saved_by = (getattr(model.config, "architectures", None) or [""])[0]
    return is_untrained or not saved_by.endswith((*_TRAIN_A_POOLER, *_HAVE_NO_POOLER))


def train_head_only(model: nn.Module) -> None:
    """Freeze everything but the head."""
    head = head_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(head.holds(name))


def _find_head(model: Any, new: Collection[str], trains_pooler: bool = False) -> Head:
    """Return the modules outside the backbone, and its pooler; output embeddings of a language model are inside."""
    prefix = getattr(model, "base_model_prefix", "")
    is_classifier = bool(prefix) and hasattr(model, prefix) and model.get_output_embeddings() is None
    modules = [f"{prefix}.pooler"] if trains_pooler else []
    for name, child in model.named_children():
        if any(True for _ in child.parameters()) and (
            name in SEQ_CLS_HEAD_NAMES or (is_classifier and name != prefix)
        ):
            modules.append(name)
    return Head(tuple(modules), tuple(new))


def _pooler_name(model: Any) -> str | None:
    prefix = getattr(model, "base_model_prefix", "")
    pooler = getattr(getattr(model, prefix, None), "pooler", None) if prefix else None
    return f"{prefix}.pooler" if isinstance(pooler, nn.Module) and [*pooler.parameters()] else None


# Targets of adapters -------------------------------------------------------------------------------------------------


def encoder_linears(model: nn.Module) -> list[str]:
    """Return the full names of the linear modules in numbered layers: PEFT's "all-linear" without head and pooler.

    In RoBERTa these are query, key, value, attention output, intermediate and output of every layer.
    """
    return [name for name in _linears(model) if re.search(r"\.\d+\.", name)]


def find_targets(chosen: Collection[str] | str | None, model: nn.Module) -> list[str]:
    """Return the full names of the linear modules to adapt; the head is never among them.

    Args:
        chosen: Names or their endings, a regular expression of whole names, "all-linear", or None for
            `encoder_linears`.

    Raises:
        ConfigError: A name that no linear module has, or a pattern that matches none.
    """
    if chosen is None:
        return encoder_linears(model)
    names = _linears(model)
    if chosen == "all-linear":
        # As in PEFT: the output embeddings of a language model are not among them.
        outputs = getattr(model, "get_output_embeddings", lambda: None)()
        return [name for name in names if outputs is None or model.get_submodule(name) is not outputs]
    given = [chosen] if isinstance(chosen, str) else list(chosen)
    matches = re.fullmatch if isinstance(chosen, str) else lambda ending, name: f".{name}".endswith(f".{ending}")
    for one in given or [""]:
        if not any(matches(one, name) for name in names):
            remedy = "no linear module outside the head is called so; give names of model.named_modules()"
            raise bad_value("target_modules", one or chosen, remedy)
    return [name for name in names if any(matches(one, name) for one in given)]


def _linears(model: nn.Module) -> list[str]:
    head = head_of(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name for name in linears if not head.holds(name)]
