"""LoRA as PEFT has it, and what all methods that are PEFT adapters share."""

from __future__ import annotations

import copy
import os
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from aroma.errors import bad_value
from aroma.files import write_tensors
from aroma.tuner.layout import PEFT_PREFIX

from .base import Batch, Hooks, Method, with_dropout
from .head import Head, base_name, find_targets, head_of, require_new_trains
from .initialization import start_from_gradients, start_from_inputs
from .merged import ADAPTER, MergedWeights, joined, layers_of, merged_of, pair_of

Init = Literal["kaiming", "eva", "lora_ga"]
_NAMES = {"kaiming": "LoRA", "eva": "EVA", "lora_ga": "LoRA-GA"}


@dataclass(frozen=True)
class PeftAdapter(Method):
    """A method whose built model is a `PeftModel` with one adapter; every one has an option `target_modules`."""

    @abstractmethod
    def config(self, targets: list[str], planned_steps: int) -> Any:
        """Return PEFT's configuration for the modules `targets`."""

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT; see `Method.build`."""
        targets = find_targets(self.target_modules, model)  # type: ignore[attr-defined]
        return wrap(model, self.config(targets, planned_steps))

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter as PEFT does, head included; see `Method.save`."""
        with staged(folder) as staging:
            model.save_pretrained(staging)


@dataclass(frozen=True)
class LoraBase(PeftAdapter):
    """What LoRA and a LoRA that restarts share: the same rank in all modules.

    Args:
        r: Rank.
        alpha: lora_alpha; None for r, so that the scale is 1.
        dropout: Dropout on the adapter's input.
        target_modules: Modules to adapt; see `head.find_targets`.
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        self._require(self.r >= 1, "r", "the rank is 1 or more")
        self._require_dropout(self.dropout)

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return with_dropout(f"LoRA r={self.r}", self.dropout)

    def config(self, targets: list[str], planned_steps: int) -> LoraConfig:
        """Return PEFT's configuration."""
        alpha: Any = self.r if self.alpha is None else self.alpha
        return LoraConfig(r=self.r, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=targets)

    def ranks(self, model: Any) -> dict[str, int]:
        """Return the rank of every module, products that its base weight includes counted; see `Method.ranks`."""
        layers = layers_of(model, LoraLinear)
        return {name: layer.r[ADAPTER] + merged_of(layer)[1].shape[0] for name, layer in layers.items()}

    def components(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return all products of every module, the pair in training last; see `Method.components`."""
        return {name: joined(merged_of(layer), pair_of(layer)) for name, layer in layers_of(model, LoraLinear).items()}

    def save(self, model: Any, folder: Path) -> None:
        """Write a plain LoRA adapter of the original base model; see `Method.save`.

        Where base weights include products, PEFT would write the pairs alone, for the changed base.
        """
        if not any(merged_of(layer)[1].shape[0] for layer in layers_of(model, LoraLinear).values()):
            super().save(model, folder)
            return
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        config = copy.deepcopy(model.peft_config[ADAPTER])
        for name, (B, A) in self.components(model).items():
            tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = A
            tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = B
            # B includes the scale, and all modules have the same rank.
            config.r = config.lora_alpha = A.shape[0]
        config.inference_mode = True
        with staged(folder) as staging:
            write_tensors(staging / "adapter_model.safetensors", tensors)
            config.save_pretrained(staging)


@dataclass(frozen=True)
class Lora(LoraBase):
    """LoRA, as PEFT has it, with its default start or with one that is computed from training data.

    Args:
        init: `"kaiming"`: A is random and B zero. `"eva"`: A is what the inputs of a layer vary in most. `"lora_ga"`:
            A and B are singular directions of the gradient, and their product is taken away from the base weight; the
            update of the original base has rank 2 r then, and so has what is saved. Both read
            `INITIALIZATION_BATCHES` batches, drawn with the run's seed; see `initialization`.
    """

    init: Init = "kaiming"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.init in get_args(Init), "init", f"give one of {', '.join(get_args(Init))}")

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return super().name.replace("LoRA", _NAMES[self.init], 1)

    @property
    def data_option(self) -> str | None:
        """Name of the option that asks for a start from data; see `Method.data_option`."""
        return None if self.init == "kaiming" else "init"

    def initialize(self, model: Any, batches: Sequence[Batch]) -> None:
        """Compute the start of the pairs; see `Method.initialize`."""
        if self.init == "eva":
            start_from_inputs(model, self.r, batches)
        elif self.init == "lora_ga":
            start_from_gradients(model, self.r, batches)

    def hooks(self, model: Any, optimizer: Any, planned_steps: int) -> Hooks:
        """Return what keeps the base weights that LoRA-GA has changed; see `Method.hooks`."""
        return MergedWeights(layers_of(model, LoraLinear)) if self.init == "lora_ga" else Hooks()


def wrap(model: Any, config: Any) -> Any:
    """Wrap `model` with PEFT, so that its head trains whole beside the adapter and is saved with it.

    Args:
        model: A transformers classifier, causal language model, or model without a head.
        config: PEFT's configuration of the adapter. The head's modules are added to its `modules_to_save`, and a
            missing task type is filled in.

    Raises:
        ConfigError: A parameter that the checkpoint lacks would not train, or one of the backbone would.
    """
    if not config.task_type:  # it decides the wrapper, and whether a head trains
        causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        bare = head_of(model) == Head()
        config.task_type = "CAUSAL_LM" if causal else "FEATURE_EXTRACTION" if bare else "SEQ_CLS"
    head, given = head_of(model), config.modules_to_save or []
    config.modules_to_save = [*given, *head.modules_to_save()] or None
    wrapped = get_peft_model(model, config)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    require_new_trains(head, trained)
    for name in trained:
        # PEFT takes every module whose name ends so.
        if ".modules_to_save." in name and not given and not head.holds(name):
            remedy = (
                f"PEFT would train it with the head, whose modules are {', '.join(head.modules)}, because their names "
                "are alike; take a method that is no PEFT adapter, such as 'bitfit'"
            )
            raise bad_value("parameter", base_name(name), remedy)
    return wrapped


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success its files replace those of `folder`, on failure they vanish."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staging:
        yield Path(staging)
        for file in Path(staging).iterdir():
            os.replace(file, folder / file.name)
