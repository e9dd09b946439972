"""What all PEFT adapters share; LoRA as PEFT has it, and LoRA that is compressed at the end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import TrainerCallback

from aroma import CompressCallback, compress
from aroma.errors import bad_value

from .base import Hooks, Method
from .head import Head, base_name, find_targets, head_of

ADAPTER = "default"
"""The name that PEFT gives the adapter of `get_peft_model`."""

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class PeftAdapter(Method):
    """A method whose built model is a `PeftModel` with one adapter."""

    @abstractmethod
    def config(self, planned_steps: int) -> Any:
        """Return PEFT's configuration, with `target_modules` as in `head.find_targets`."""

    def build(self, model: Any, planned_steps: int) -> Any:
        """Wrap `model` with PEFT, so that its head trains whole and is saved with the adapter; see `Method.build`."""
        head = head_of(model)
        config = self.config(planned_steps)
        config.target_modules = set(find_targets(config.target_modules, model))
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
    """LoRA, as PEFT has it.

    Args:
        r: Rank of all modules at the start.
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

    def config(self, planned_steps: int) -> LoraConfig:
        """Return PEFT's configuration; see `PeftAdapter.config`."""
        alpha: Any = self.r if self.alpha is None else self.alpha
        return LoraConfig(r=self.r, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=self.target_modules)

    def ranks(self, model: Any) -> dict[str, int]:
        """Return the rank of every module's update; see `Method.ranks`."""
        return {name: layer.r.get(ADAPTER, 0) for name, layer in layers_of(model, LoraLinear).items()}

    def components(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the update of every module; see `Method.components`."""
        return {name: pair_of(layer) for name, layer in layers_of(model, LoraLinear).items()}


@dataclass(frozen=True)
class Compressed(Lora):
    """LoRA that is compressed after the last step, as `aroma.compress` does it.

    Args:
        by: `"effect"`: the directions stay that carry the answers to training examples; see `CompressCallback`.
            `"size"`: the largest singular directions stay, whatever examples say. With `size` that is PARA (arXiv
            2604.27796), with `rank` LoRA-Squeeze (2602.10993).
        keep: Share of the effect to keep.
        size: Most that stays, as a share of the parameters.
        rank: Largest rank of any matrix.
        examples: How many training examples are measured.
    """

    r: int = 16
    by: Literal["effect", "size"] = "effect"
    keep: float | None = None
    size: float | None = None
    rank: int | None = None
    examples: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("keep", "size"):
            self._require((share := getattr(self, option)) is None or 0 < share <= 1, option, "give a share in (0, 1]")
        self._require(self.rank is None or self.rank >= 1, "rank", "give 1 or more")
        self._require(self.examples >= 16, "examples", "give 16 or more")
        if self.by == "size":
            self._require((self.size, self.rank) != (None, None), "by", "give a size or a rank")
            self._require(self.keep is None, "keep", "by size no effect is measured; leave it out")

    def hooks(self, model: Any) -> Hooks:
        """Return what cuts by size after the last step; see `Method.hooks`."""
        return _Cut(self) if self.by == "size" else Hooks()

    def callbacks(
        self, model: Any, on_event: Callable[[Any], None] | None = None, early_stop: bool = True
    ) -> list[TrainerCallback]:
        """Return the callback that compresses by effect; see `Method.callbacks`."""
        wanted: dict[str, Any] = {name: getattr(self, name) for name in ("keep", "size", "rank", "examples")}
        compressing = [_Compress(**wanted)] if self.by == "effect" else []
        return [*super().callbacks(model, on_event, early_stop), *compressing]


class _Compress(CompressCallback):
    """Measures on examples drawn from the training set, so that a resumed run sees the same ones; see `Compressed`."""

    def before_training(self, trainer: Any, resume_from_checkpoint: Any) -> Any:
        """Take the training set."""
        self.data = trainer.train_dataset
        return super().before_training(trainer, resume_from_checkpoint)

    def on_train_end(self, *arguments: Any, **kwargs: Any) -> None:
        """Compress; ConfigError if that failed, of which the library only warns."""
        super().on_train_end(*arguments, **kwargs)
        if self.compression is None:
            raise bad_value("kind", "compressed", "the adapter could not be compressed; the warning before says why")


class _Cut(Hooks):
    def __init__(self, method: Compressed) -> None:
        self.method = method

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Cut, and make the adapter compact."""
        compress(model, None, size=self.method.size, rank=self.method.rank)


def layers_of(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Return the adapted layers of a `PeftModel`, in order, by their modules' names in the base model."""
    return {base_name(name): module for name, module in model.named_modules() if isinstance(module, kind)}


def pair_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Return the factors of a layer of PEFT's LoRA, as `Method.components` has them."""
    if ADAPTER not in layer.lora_A:  # cut away
        weight = layer.get_base_layer().weight
        return weight.new_zeros(layer.out_features, 0), weight.new_zeros(0, layer.in_features)
    scaled = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
    return scaled, layer.lora_A[ADAPTER].weight.detach().clone()
