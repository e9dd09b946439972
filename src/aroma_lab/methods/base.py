"""What a method of comparison is: how it builds a model, which parameters train, and what it does around a step.

To add a method, write one class and give it a name in `METHODS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from aroma.errors import bad_value
from aroma.files import write_tensors

from .head import head_of

TRAINED_FILE = "trained.safetensors"
"""File of the trained parameters of a method that is no PEFT adapter, by their names in the built model."""


class Hooks(TrainerCallback):
    """What a method does after an optimizer step, in the Trainer or in a loop that calls it; most do nothing.

    Trained parameters, optimizer, schedule and the state of the hooks together make a resumed run exact.
    """

    def after_step(self, step: int) -> None:
        """Called after optimizer step `step`, counted from 1, before the gradients are cleared."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the tensors that an exact resume needs besides the trained parameters."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`."""

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Call `after_step`."""
        self.after_step(state.global_step + 1)


@dataclass(frozen=True)
class Method(ABC):
    """How a pretrained transformers model is fine-tuned.

    A method holds no state of a run: questions about a model take the model as an argument.
    """

    writes_backbone: ClassVar[bool] = False
    """Whether training writes the weights of the backbone, so that models cannot share them."""
    trains: ClassVar[bool] = True
    """Whether anything trains; if not, a run only evaluates what `build` returns."""

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """Return the type of every option, by its name in an experiment's file."""
        hints = get_type_hints(cls)
        return {field.name: hints[field.name] for field in fields(cls)}

    @abstractmethod
    def build(self, model: Any, planned_steps: int) -> Any:
        """Adapt a transformers model in place, or wrap it, and freeze what does not train; its head trains.

        ConfigError if the method cannot adapt the model, or cannot plan for a run of this length.
        """

    def hooks(self, model: Any) -> Hooks:
        """Return the hooks of a model from `build`."""
        return Hooks()

    def callbacks(
        self, model: Any, on_event: Callable[[Any], None] | None = None, early_stop: bool = True
    ) -> list[TrainerCallback]:
        """Return the callbacks that drive the method inside the Hugging Face Trainer.

        `Hooks` must be given their state on resume; AROMA's own is in the Trainer's checkpoints.

        Args:
            on_event: Called with every event of a growing adapter.
            early_stop: Whether training ends when every module of a growing adapter has finished.
        """
        return [self.hooks(model)]

    def ranks(self, model: Any) -> dict[str, int]:
        """Return the current rank of every adapted module's update, by the module's name in the base model."""
        return {}

    def check_steps(self, steps: int) -> None:  # noqa: B027 — most methods take any
        """Raise ConfigError if a run of `steps` optimizer steps is too short for the method."""

    def active_parameters(self, model: Any) -> int:
        """Return the number of parameters outside the head that train right now."""
        head = head_of(model)
        return sum(one.numel() for name, one in trained_tensors(model).items() if not head.holds(name))

    def components(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the whole update ΔW = B A of every adapted module, by the module's name in the base model.

        B has shape (m, R), with the scale folded in, and A (R, n); both are detached, and R may be 0. Empty for a
        method whose updates have no factors.
        """
        return {}

    def save(self, model: Any, folder: Path) -> None:
        """Write the trained parameters into a new folder: a PEFT adapter if the method is one, else `TRAINED_FILE`."""
        write_tensors(folder / TRAINED_FILE, trained_tensors(model))

    def _require(self, valid: bool, option: str, remedy: str) -> None:
        if not valid:
            raise bad_value(option, getattr(self, option), remedy)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that train, detached, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
