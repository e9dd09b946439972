"""What every method of comparison is: build, parameters, hooks, and what can be asked of the model it made.

.. code-block:: python

    model = method.build(model, planned_steps)
    optimizer = torch.optim.AdamW(method.parameters(model), lr=...)
    hooks = method.hooks(model, optimizer, planned_steps)
    for step, batch in enumerate(batches, start=1):
        model(**batch).loss.backward()
        hooks.before_step(step)
        optimizer.step()
        hooks.after_step(step)  # before zero_grad: AdaLoRA's allocator reads the gradients
        optimizer.zero_grad()

In the Hugging Face Trainer `method.callbacks(model)` takes the place of the hooks. Adding a method is one file, and
one line in `registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

from torch import Tensor, nn
from transformers import TrainerCallback

from aroma.events import Event
from aroma.files import write_tensors

from .hooks import Hooks, HooksCallback
from .modules import count_active, encoder_linears, find_targets, train_head_only

__all__ = [
    "TRAINED_FILE",
    "Hooks",
    "Method",
    "encoder_linears",
    "find_targets",
    "train_head_only",
    "trained_tensors",
    "with_dropout",
]

TRAINED_FILE = "trained.safetensors"
"""Where a method that is no PEFT adapter saves what it trained, by the parameters' names in the built model."""


@dataclass(frozen=True)
class Method(ABC):
    """How a pretrained transformers model is fine-tuned.

    A method holds no state of a run: what there is to know of a model is asked with the model.

    Attributes:
        writes_backbone: Whether training writes the weights of the backbone, so that they cannot be shared between
            models.
        trains: Whether anything trains; if not, a run is the evaluation of what `build` makes.
    """

    writes_backbone: ClassVar[bool] = False
    trains: ClassVar[bool] = True

    # From options ----------------------------------------------------------------------------------------------------

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """Return the type of every option, by the name that it has in an experiment's file."""
        hints = get_type_hints(cls)
        return {
            field.name: hints[field.name] for field in fields(cls) if field.init and field.metadata.get("option", True)
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Return the method with `options`, of which `option_types` tells; see `registry.make_method`."""
        return cls(**options)

    def resolved_options(self) -> dict[str, Any]:
        """Return the value of every option, those that were left to their defaults too."""
        return {name: getattr(self, name) for name in self.option_types()}

    # A run -----------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def name(self) -> str:
        """Name for tables and pictures."""

    @abstractmethod
    def build(self, model: Any, planned_steps: int) -> Any:
        """Adapt `model` in place, or wrap it, and freeze what does not train.

        Args:
            model: A transformers model with a head.
            planned_steps: Optimizer steps of the run.

        Returns:
            The model to train. Its head trains, unless nothing does.

        Raises:
            ConfigError: A model that the method cannot adapt, or a run that it cannot plan for.
        """

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return what the optimizer trains."""
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def hooks(self, model: Any, optimizer: Any, planned_steps: int) -> Hooks:
        """Return what is done around each optimizer step of a model that `build` made."""
        return Hooks()

    def callbacks(
        self, model: Any, on_event: Callable[[Event], None] | None = None, early_stop: bool = True
    ) -> list[TrainerCallback]:
        """Return what drives the method inside the Hugging Face Trainer.

        Args:
            model: A model that `build` made.
            on_event: Called with every event of a growing adapter; other methods have none.
            early_stop: Whether training ends when every module of a growing adapter has finished.

        Returns:
            One callback: a `HooksCallback`, which has the attribute `hooks` and must be given their state on resume,
            or AROMA's own, which keeps its state in the Trainer's checkpoints.
        """
        return [HooksCallback(self.hooks)]

    # What a model has come to ----------------------------------------------------------------------------------------

    def ranks(self, model: Any) -> dict[str, int]:
        """Return the current rank of the update of every adapted module, by its name in the base model.

        Empty for a method whose updates have no rank.
        """
        return {}

    def active_parameters(self, model: Any) -> int:
        """Return the number of parameters that train right now; the head's do not count."""
        return count_active(model)

    def components(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the whole update of every adapted module, ΔW = B A, by its name in the base model.

        B is (m, R) with the scale folded in, A (R, n), detached; R may be 0. Empty where no update has factors.
        """
        return {}

    def save(self, model: Any, folder: Path) -> None:
        """Write what was trained: a PEFT adapter where the method is one, else `TRAINED_FILE`.

        Args:
            model: A model that `build` made.
            folder: A new folder.
        """
        write_tensors(folder / TRAINED_FILE, trained_tensors(model))


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that train, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_dropout(name: str, dropout: float) -> str:
    """Return `name`, and what is dropped if anything is."""
    return f"{name}, dropout {dropout:g}" if dropout else name
