"""LoRA as PEFT has it, started as usual, by EVA or by LoRA-GA, and what all methods that are PEFT adapters share.

LoRA-GA takes its first pair away from the base weight: the update of the original base is the pair in training less
the first one.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

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
from torch import Tensor, nn

from aroma.errors import bad_value
from aroma.files import write_tensors
from aroma.state import PEFT_PREFIX

from .base import Batch, Method
from .head import Head, base_name, find_targets, head_of

ADAPTER = "default"
"""The name that PEFT gives the adapter of `get_peft_model`."""

Layer = TypeVar("Layer", bound=nn.Module)

Product = tuple[Tensor, Tensor]
"""B (m, R), with the scale folded in, and A (R, n)."""


@dataclass(frozen=True)
class PeftAdapter(Method):
    """A method whose built model is a `PeftModel` with one adapter; every one has an option `target_modules`."""

    @abstractmethod
    def config(self, targets: list[str], planned_steps: int) -> Any:
        """Return PEFT's configuration for the modules `targets`."""

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT, so that its head trains whole and is saved with the adapter; see `Method.build`."""
        head = head_of(model)
        config = self.config(find_targets(self.target_modules, model), planned_steps)  # type: ignore[attr-defined]
        causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        # It decides the wrapper, and whether a head trains.
        config.task_type = "CAUSAL_LM" if causal else "FEATURE_EXTRACTION" if head == Head() else "SEQ_CLS"
        config.modules_to_save = head.modules_to_save() or None
        return get_peft_model(model, config)

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter as PEFT does, head included; see `Method.save`."""
        model.save_pretrained(folder)


@dataclass(frozen=True)
class Lora(PeftAdapter):
    """LoRA, as PEFT has it, with its default start or with one that is computed from training data.

    Args:
        r: Rank of all modules at the start.
        alpha: lora_alpha; None for r, so that the scale is 1.
        dropout: Dropout on the adapter's input.
        target_modules: Modules to adapt; see `head.find_targets`.
        init: `"kaiming"`: A is random and B zero. `"eva"` (arXiv 2410.07170): A has the directions in which a layer's
            inputs vary most; every layer keeps rank r. `"lora_ga"` (arXiv 2407.05000): A and B are singular directions
            of the gradient, and their product is taken away from the base weight; the update of the original base, and
            so the saved adapter, has rank 2 r. Both read `INITIALIZATION_BATCHES` batches, drawn with the run's seed.
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    init: Literal["kaiming", "eva", "lora_ga"] = "kaiming"

    def __post_init__(self) -> None:
        self._require(self.r >= 1, "r", "the rank is 1 or more")
        self._require(0 <= self.dropout < 1, "dropout", "give a probability in [0, 1)")

    @property
    def needs_data(self) -> bool:
        """Whether the start is computed from data; see `Method.needs_data`."""
        return self.init != "kaiming"

    def config(self, targets: list[str], planned_steps: int) -> LoraConfig:
        """Return PEFT's configuration."""
        alpha: Any = self.r if self.alpha is None else self.alpha
        config = LoraConfig(r=self.r, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=targets)
        if self.init == "eva":
            # The label mask of PEFT's default is one of tokens, as language models have it.
            config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0, use_label_mask=False)
        return config

    def ranks(self, model: Any) -> dict[str, int]:
        """Return the rank of every module's update; see `Method.ranks`."""
        layers = layers_of(model, LoraLinear)
        return {name: layer.r[ADAPTER] * (2 if hasattr(layer, "first_pair") else 1) for name, layer in layers.items()}

    def components(self, model: Any) -> dict[str, Product]:
        """Return the update of every module, the pair in training last; see `Method.components`."""
        return {name: update_of(layer) for name, layer in layers_of(model, LoraLinear).items()}

    def initialize(self, model: Any, batches: Sequence[Batch]) -> None:
        """Compute the start of the pairs by PEFT's own routines; see `Method.initialize`.

        ConfigError if LoRA-GA would change weights of lower precision.
        """
        if self.init == "eva":
            some = [dict(batch) for batch in batches]
            initialize_lora_eva_weights(model, some, prepare_layer_inputs_fn=_rows, show_progress_bar=False)
            return
        dtypes = {layer.get_base_layer().weight.dtype for layer in layers_of(model, LoraLinear).values()}
        if dtypes != {torch.float32}:
            remedy = f"it changes the pretrained weights, whose {dtypes} would round them; load them in float32"
            raise bad_value("init", "lora_ga", remedy)
        _start_from_gradients(model, batches)

    def save(self, model: Any, folder: Path) -> None:
        """Write a plain LoRA adapter of the original base model; see `Method.save`.

        Of LoRA-GA, PEFT would write the pairs alone, for the changed base.
        """
        if self.init != "lora_ga":
            super().save(model, folder)
            return
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        for name, (B, A) in self.components(model).items():
            tensors |= {f"{PEFT_PREFIX}{name}.lora_A.weight": A, f"{PEFT_PREFIX}{name}.lora_B.weight": B}
        config = copy.deepcopy(model.peft_config[ADAPTER])
        config.r = config.lora_alpha = 2 * self.r  # B includes the scale
        config.inference_mode = True
        config.save_pretrained(folder)
        write_tensors(folder / "adapter_model.safetensors", tensors)


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
        layer.first_pair = pair_of(layer)


def layers_of(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Return the adapted layers of a `PeftModel`, in order, by their modules' names in the base model."""
    return {base_name(name): module for name, module in model.named_modules() if isinstance(module, kind)}


def pair_of(layer: Any) -> Product:
    """Return copies of the factors of a layer of PEFT's LoRA; of one whose adapter was cut away, of rank 0."""
    if ADAPTER not in layer.lora_A:
        weight = layer.get_base_layer().weight
        return weight.new_zeros(layer.out_features, 0), weight.new_zeros(0, layer.in_features)
    scaled = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
    return scaled, layer.lora_A[ADAPTER].weight.detach().clone()


def update_of(layer: Any) -> Product:
    """Return the whole update of the original base weight, the pair in training last."""
    B, A = pair_of(layer)
    if not hasattr(layer, "first_pair"):
        return B, A
    first_B, first_A = layer.first_pair
    return torch.cat([-first_B, B], dim=1), torch.cat([first_A, A], dim=0)
