"""LoRA as PEFT has it, started as usual, by EVA or by LoRA-GA, and what all methods that are PEFT adapters share."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import preprocess_loraga
from torch import Tensor

from aroma.errors import bad_value
from aroma.files import write_tensors
from aroma.tuner.layout import PEFT_PREFIX

from .base import Batch, Hooks, Method, with_dropout
from .head import Head, find_targets, head_of, require_new_trains
from .merged import ADAPTER, MergedWeights, joined, layers_of, merged_of, note_merged, pair_of

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
        self._require(0 <= self.dropout < 1, "dropout", "give a probability in [0, 1)")

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
        init: `"kaiming"`: A is random and B zero. `"eva"` (arXiv 2410.07170): A is what the inputs of a layer vary in
            most; every layer keeps rank r. `"lora_ga"` (arXiv 2407.05000): A and B are singular directions of the
            gradient, and their product is taken away from the base weight; the update of the original base has rank
            2 r then, and so has what is saved. Both read `INITIALIZATION_BATCHES` batches, drawn with the run's seed.
    """

    init: Literal["kaiming", "eva", "lora_ga"] = "kaiming"

    @property
    def name(self) -> str:
        """Name for tables and pictures."""
        return super().name.replace("LoRA", _NAMES[self.init], 1)

    @property
    def data_option(self) -> str | None:
        """Name of the option that asks for a start from data; see `Method.data_option`."""
        return None if self.init == "kaiming" else "init"

    def config(self, targets: list[str], planned_steps: int) -> LoraConfig:
        """Return PEFT's configuration."""
        config = super().config(targets, planned_steps)
        if self.init == "eva":
            # The label mask of PEFT's default is one of tokens, as language models have it.
            config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0, use_label_mask=False)
        return config

    def initialize(self, model: Any, batches: Sequence[Batch]) -> None:
        """Compute the start of the pairs by PEFT's own routines; see `Method.initialize`.

        Raises:
            ConfigError: A layer is too small for the directions, or LoRA-GA would change weights of lower precision.
        """
        needed = self.r if self.init == "eva" else 2 * self.r
        for name, layer in layers_of(model, LoraLinear).items():
            if needed > (least := min(layer.in_features, layer.out_features)):
                remedy = f"the start takes {needed} directions, and {name} has only {least}; give a lower rank"
                raise bad_value("r", self.r, remedy)
            if self.init == "lora_ga" and (dtype := layer.get_base_layer().weight.dtype) != torch.float32:
                remedy = f"it changes the pretrained weights, which are {dtype} and would be rounded; use float32"
                raise bad_value("init", "lora_ga", remedy)
        if self.init == "eva":
            some = [dict(batch) for batch in batches]
            initialize_lora_eva_weights(model, some, prepare_layer_inputs_fn=_rows, show_progress_bar=False)
        else:
            _start_from_gradients(model, batches)

    def hooks(self, model: Any, optimizer: Any, planned_steps: int) -> Hooks:
        """Return what keeps the base weights that LoRA-GA has changed; see `Method.hooks`."""
        return MergedWeights(layers_of(model, LoraLinear)) if self.init == "lora_ga" else Hooks()


def _rows(inputs: tuple[Tensor, ...], places: Tensor, name: str) -> Tensor:
    """Return the inputs of a layer at the `places` of tokens, padding left out; a pooler's are one an example."""
    values: Tensor = inputs[0]
    return values[places.T.unbind()] if values.dim() == 3 else values


def _start_from_gradients(model: Any, batches: Sequence[Batch]) -> None:
    """Set the pair of every layer to singular directions of its weight's gradient; the weight loses their product."""
    layers, settings = layers_of(model, LoraLinear), LoraGAConfig()

    def backward() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    # PEFT looks for the modules before it wraps them; in a wrapped model they are one level down.
    inside = [f"{name}.base_layer" for name in layers]
    config = LoraConfig(target_modules=inside, init_lora_weights="lora_ga", lora_ga_config=settings)
    with warnings.catch_warnings():
        # PEFT counts backwards with hooks, also on the modules behind the embeddings, which nothing trains.
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
        preprocess_loraga(model.get_base_model(), config, backward)
    for layer in layers.values():
        layer.lora_ga_init(ADAPTER, settings)
        B, A = pair_of(layer)
        note_merged(layer, (-B, A))


def wrap(model: Any, config: Any) -> Any:
    """Wrap `model` with PEFT, so that its head trains whole beside the adapter and is saved with it.

    Args:
        model: A transformers classifier, causal language model, or model without a head.
        config: PEFT's configuration of the adapter. The head's modules are added to its `modules_to_save`, and a
            missing task type is filled in.

    Raises:
        ConfigError: A parameter that the checkpoint lacks would not train.
    """
    head, given = head_of(model), config.modules_to_save or []
    if not config.task_type:  # it decides the wrapper, and whether a head trains
        causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        config.task_type = "CAUSAL_LM" if causal else "FEATURE_EXTRACTION" if head == Head() else "SEQ_CLS"
    config.modules_to_save = [*given, *head.modules_to_save()] or None
    wrapped = get_peft_model(model, config)
    require_new_trains(head, [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad])
    return wrapped


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success its files replace those of `folder`, on failure they vanish."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staging:
        yield Path(staging)
        for file in Path(staging).iterdir():
            os.replace(file, folder / file.name)
