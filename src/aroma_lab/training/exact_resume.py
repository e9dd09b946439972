"""The Hugging Face Trainer, with what an exact resume needs for any method."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from aroma.errors import CheckpointError
from aroma.files import read_tensors, write_tensors

from ..methods.base import TRAINED_FILE, HooksCallback, trained_tensors
from .loss_window import LossWindow

HOOKS_FILE = "hooks.safetensors"
"""In a checkpoint, what the method's hooks remember."""


class ExactResume:
    """Lets a Trainer that it is mixed into train any method, and resume it to the bit.

    Its checkpoints hold the trained parameters whole, and the state of the method's hooks. PEFT's own files would not
    do: of AdaLoRA they lack the triplets that are masked for now, of ReLoRA what was merged into the backbone.

    Args:
        hooks: Calls the method's hooks; None for a model whose own files are exact, as AROMA's are.
        counts_items: Whether the model divides its loss by the number of items in the whole step, as language models
            do, whose held-out loss is the mean over all tokens too.
        describe: Called with the model and the folder of every checkpoint; None for nothing.
        **options: Of the Trainer.
    """

    # Of the Trainer that it is mixed into.
    add_callback: Any
    args: Any
    data_collator: Any
    model: Any
    state: Any

    def __init__(
        self,
        *,
        hooks: HooksCallback | None,
        counts_items: bool = False,
        describe: Callable[[Any, Path], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._hooks = hooks
        self._counts_items = counts_items
        self._describe = describe
        self.add_callback(LossWindow(self))
        if not counts_items:
            # The Trainer takes any model with **kwargs for one that does. Those with a classification head take the
            # mean over their micro-batch, and would be summed up.
            self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        if isinstance(sampler, LengthGroupedSampler):
            return EpochLengthSampler(sampler, self.args.seed)
        return sampler

    def evaluation_loop(self, dataloader: Any, *options: Any, metric_key_prefix: str = "eval", **further: Any) -> Any:
        """Evaluate; of a language model, loss and perplexity over all learned tokens, whatever the batches."""
        if not self._counts_items:
            return super().evaluation_loop(  # type: ignore[misc]
                dataloader, *options, metric_key_prefix=metric_key_prefix, **further
            )
        from ..language.loss import token_loss

        data = dataloader.dataset
        found = token_loss(self.model, data, self.data_collator, self.args.per_device_eval_batch_size)
        measured = {f"{metric_key_prefix}_loss": found.loss, f"{metric_key_prefix}_perplexity": found.perplexity}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=measured, num_samples=len(data))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._describe is not None:
            self._describe(self.model, Path(output_dir or self.args.output_dir))
        if self._hooks is None:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        assert self._hooks.hooks is not None, "the Trainer calls on_train_begin first"
        folder = Path(output_dir or self.args.output_dir)
        write_tensors(folder / TRAINED_FILE, trained_tensors(self.model))
        write_tensors(folder / HOOKS_FILE, self._hooks.hooks.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._hooks is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        load_trained(self.model, Path(resume_from_checkpoint) / TRAINED_FILE)
        self._hooks.load_state_dict(read_tensors(Path(resume_from_checkpoint) / HOOKS_FILE))

    def _load_best_model(self) -> None:
        if self._hooks is None:
            super()._load_best_model()  # type: ignore[misc]
            return
        assert self._hooks.hooks is not None, "it has trained"
        best = Path(self.state.best_model_checkpoint)
        load_trained(self.model, best / TRAINED_FILE)
        self._hooks.hooks.load_state_dict(read_tensors(best / HOOKS_FILE))


class MethodTrainer(ExactResume, Trainer):
    """The Hugging Face Trainer; see `ExactResume`."""


@torch.no_grad()
def load_trained(model: nn.Module, file: Path) -> None:
    """Write trained parameters back into the model that they are of.

    Raises:
        CheckpointError: The file is damaged, or of another model.
    """
    saved, parameters = read_tensors(file), trained_tensors(model)
    for name in sorted(saved.keys() ^ parameters.keys()):
        raise CheckpointError(f"{file}: {name} is in one of file and model only; it is a checkpoint of another run")
    for name, parameter in parameters.items():
        if saved[name].shape != parameter.shape:
            raise CheckpointError(
                f"{file}: {name} has the shape {tuple(saved[name].shape)}, and {tuple(parameter.shape)} in the model; "
                "it is a checkpoint of another run"
            )
        parameter.copy_(saved[name])


class EpochLengthSampler(LengthGroupedSampler):
    """transformers' groups of similar lengths, in an order that depends on seed and epoch alone.

    Drawn from the global random numbers, as transformers does it, an epoch's order could not be found again by a run
    that resumes in its midst; and every method, which draws its own dropout, would see other batches.

    Args:
        sampler: The sampler as the Trainer makes it.
        seed: Seed of the run.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        super().__init__(sampler.batch_size, lengths=sampler.lengths, generator=torch.Generator())
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # Hashed: with a sum, the second epoch of one seed would be the first of the next.
        digest = hashlib.sha256(f"{self._seed} {self._epoch}".encode()).digest()
        self.generator.manual_seed(int.from_bytes(digest[:7], "big"))
        return super().__iter__()
