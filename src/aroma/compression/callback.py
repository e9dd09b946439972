"""Compressing at the end of a training, in the Hugging Face Trainer and TRL's trainers."""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from .. import distributed, sharding
from ..errors import AromaError, AromaWarning, bad_value
from ..integrations.base import TrainingCallback
from .compress import FEWEST, compress
from .plan import Compression, Limits
from .predictions import OutputFunction
from .weights import Adapter

_NOT_INPUTS = {"fused_lm_head", "num_items_in_batch", "return_dict"}
"""What trainers pass with the inputs, and changes what a model returns: with the first, of TRL, it has no logits."""


class CompressCallback(TrainingCallback):
    """Compresses the LoRA adapter after the last step of a training; see `aroma.compress`.

    .. code-block:: python

        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
        Trainer(model, args, train_dataset=train, callbacks=[CompressCallback()]).train()
        model.save_pretrained("adapter")

    Nothing is held out, and training is as without it. It measures the adapter on the last inputs that the model was
    trained on, as TRL's trainers made them: of GRPO these are sampled answers. It works with `load_best_model_at_end`,
    whose weights it compresses. Checkpoints hold the adapter before. Under DDP every process uses its own inputs.

    Args:
        data: Examples to measure on in place of those of the training, prepared as its training set is.
        keep: As for `compress`, as are `size`, `rank` and `outputs`.
        examples: How many examples to measure on, of all processes together.

    Attributes:
        compression: What was found, a `Compression`; None before the training ends.

    Raises:
        ConfigError: A value out of range, or at the start of a training a model without LoRA adapter that can be cut,
            or one that is sharded (FSDP2, ZeRO).
    """

    def __init__(
        self,
        data: Any = None,
        *,
        keep: float | None = None,
        size: float | None = None,
        rank: int | None = None,
        examples: int = 256,
        outputs: OutputFunction | None = None,
    ) -> None:
        super().__init__()
        Limits(keep, size, rank).require_valid(has_examples=True)
        if isinstance(examples, bool) or not isinstance(examples, int) or examples < FEWEST:
            raise bad_value("examples", examples, f"give {FEWEST} or more")
        if data is not None and (not hasattr(data, "__len__") or len(data) < FEWEST):
            remedy = f"give a data set of {FEWEST} examples or more, with a length"
            raise bad_value("data", type(data).__name__, remedy)
        self.data, self.examples = data, examples
        self.compression: Compression | None = None
        self._options: dict[str, Any] = {"keep": keep, "size": size, "rank": rank, "outputs": outputs}
        self._trainer: Any = None
        self._seen: deque[_Batch] = deque()
        self._hook: Any = None

    def before_training(self, trainer: Any, resume_from_checkpoint: Any) -> Any:
        """Remember the trainer; come before its trackers, so that they are told the result before they close."""
        self._trainer, callbacks = trainer, trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        return resume_from_checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **kwargs: Any
    ) -> None:
        """Refuse what could not be compressed at the end; remember inputs from now on, or make those of `data`."""
        self._forget()
        self.compression = None
        if sharding.sharding_of_model(model, kwargs.get("optimizer")) is not sharding.REPLICAS:
            remedy = "shards keep their shape; leave the callback out, and run `aroma compress` on the saved adapter"
            raise bad_value("callbacks", "CompressCallback", remedy)
        adapter = Adapter(distributed.unwrapped(model), is_trained=False)
        if self.data is None:
            # A function of its own: a copy of the model, as of a moving average, would copy a method's owner too.
            self._hook = adapter.model.register_forward_pre_hook(lambda *given: self._note(*given), with_kwargs=True)
        else:
            self._seen.extend(map(_counted, self._batches()))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note(self, model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Keep the last inputs of training forwards, as many as have `examples`."""
        if not model.training or not torch.is_grad_enabled() or inputs:
            return
        given = {name: value for name, value in options.items() if name not in _NOT_INPUTS}
        self._seen.append(_counted(recursively_apply(lambda tensor: tensor.detach().cpu(), given)))
        texts, rows = (-(-count // distributed.world_size()) for count in (self.examples, FEWEST))
        while (
            sum(one.texts for one in self._seen) - self._seen[0].texts >= texts
            and sum(one.rows for one in self._seen) - self._seen[0].rows >= rows
        ):
            self._seen.popleft()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **kwargs: Any
    ) -> None:
        """Compress, and log what stays; the adapter is the best checkpoint's where that was loaded."""
        batches = [one.inputs for one in self._seen]
        self._forget()
        try:
            if not batches:
                raise bad_value("data", None, "no inputs were seen, as no step was taken; give data")
            self.compression = compress(model, batches, progress=not args.disable_tqdm, **self._options)
        except AromaError as error:  # the training is done, and nobody is to lose it
            message = f"the adapter stays as it was trained: {error}. `aroma compress` cuts it after it was saved"
            warnings.warn(f"CompressCallback: {message}", AromaWarning, stacklevel=2)
            return
        # A second training goes on with this optimizer, whose moments have the shapes before.
        distributed.unwrapped_optimizer(kwargs["optimizer"]).state.clear()
        if state.is_world_process_zero and not args.disable_tqdm:
            tqdm.write(str(self.compression))
        self._trainer.log({f"compress/{name}": value for name, value in self.compression.totals().items()})

    def _batches(self) -> list[Any]:
        """Return batches of `data` as the trainer makes them, this process's part."""
        trainer, data = self._trainer, _prepared(self._trainer, self.data)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: self.examples].tolist()
        rows = data.select(order) if hasattr(data, "select_columns") else Subset(data, order)
        base = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
        known = inspect.signature(base.forward).parameters
        with torch.random.fork_rng([]):  # a DataLoader draws a number, and a collator may
            batches = [send_to_device(batch, "cpu") for batch in trainer.get_test_dataloader(rows)]
        if not all(isinstance(batch, Mapping) and known.keys() & batch.keys() - {"labels"} for batch in batches):
            raise bad_value("data", type(trainer).__name__, "it makes no inputs of the model of them; leave data out")
        return [{name: value for name, value in batch.items() if name in known} for batch in batches]

    def _forget(self) -> None:
        self._seen.clear()
        if self._hook is not None:
            self._hook.remove()
        self._hook = None


class _Batch(NamedTuple):
    """Inputs of a model, and how many rows and texts they have: several texts may be packed into one row."""

    inputs: dict[str, Any]
    rows: int
    texts: int


def _counted(inputs: dict[str, Any]) -> _Batch:
    rows = next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 0)
    places = inputs.get("position_ids")
    begun = int((places == 0).sum()) if isinstance(places, Tensor) and rows == 1 else 0
    return _Batch(inputs, rows, max(rows, begun))


def _prepared(trainer: Any, data: Any) -> Any:
    """Return examples as a trainer of TRL prepares its data sets; of others, as they are."""
    prepare = getattr(trainer, "_prepare_dataset", None)
    trained = {*(getattr(trainer.train_dataset, "column_names", None) or [])}
    if prepare is None or not hasattr(data, "column_names") or trained <= {*data.column_names}:
        return data
    known = {
        "processing_class": trainer.processing_class,
        "args": trainer.args,
        "packing": getattr(trainer.args, "packing", False),
        "formatting_func": getattr(trainer, "_formatting_func", None),
        "dataset_name": "data",
    }
    return prepare(data, **{name: known[name] for name in inspect.signature(prepare).parameters if name in known})
