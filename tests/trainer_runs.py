"""A deterministic tiny Trainer run that can be resumed, and killed at a chosen moment; also a script.

    python tests/trainer_runs.py OUT '{"steps": 40, "method": {"r": 2}}' [--resume]

`--resume` goes on from the last complete checkpoint in OUT, or begins anew where there is none.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from aroma import AromaCallback, AromaConfig, Event, last_complete_checkpoint
from aroma.checkpoint import record_checkpoint
from aroma.state import read_controller_state

transformers.logging.set_verbosity_error()

METHOD = {
    "inner_check_interval": 2,
    "inner_tolerance": 0.8,
    "max_inner_steps": 8,
    "outer_tolerance": 0.045,
    "rewarmup_steps": 2,
    "component_seed": 5,
}
"""Inner loops of different lengths, and modules that freeze at different outer steps, within 40 optimizer steps."""

BEST: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 8, "load_best_model_at_end": True}
"""Arguments with which a run of several processes ends with its first checkpoint, in which no module is frozen."""


@dataclass
class Run:
    """Everything that decides a run. JSON-able, so that another process can do the same run."""

    steps: int = 40
    method: dict[str, Any] = field(default_factory=dict)
    """Changes to METHOD."""
    training: dict[str, Any] = field(default_factory=dict)
    """Changes to the TrainingArguments."""
    early_stop: bool = True
    half: bool = False
    """Base model and pairs in bfloat16."""
    kill: str = ""
    """Where the process kills itself: '<moment> <step>'; see `die_at`."""

    def json(self) -> str:
        return json.dumps(self.__dict__)


# Model and data ------------------------------------------------------------------------------------------------------


def tiny_bert(seed: int = 1, **changes: Any) -> BertForSequenceClassification:
    """A random BERT of width 32 and depth 2, its weights of very different norms, so that modules freeze at different
    outer steps; with its dropout on, so that the global random numbers matter."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        num_labels=3,
        **changes,
    )
    model = BertForSequenceClassification(config)
    linear = [module for module in model.bert.modules() if isinstance(module, nn.Linear)]
    for index, module in enumerate(linear):
        module.weight.data *= 2.0 ** (index % 5 - 1)
    return model


def adapted(model: nn.Module | None = None, half: bool = False, **changes: Any) -> Any:
    model = model or tiny_bert()
    config = AromaConfig(task_type="SEQ_CLS", **{**METHOD, **changes})
    return get_peft_model(model.bfloat16() if half else model, config, autocast_adapter_dtype=not half)


def examples(count: int = 80, seed: int = 2) -> list[dict[str, Tensor]]:
    """Random token sequences, labelled by what their first two tokens are."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 40, (count, 8), generator=generator)
    labels = (tokens[:, 0] // 20 + tokens[:, 1] // 20) % 3
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def arguments(out: Path | str, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 40,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    return TrainingArguments(**{**settings, **changes})


def trainer_for(
    model: Any,
    out: Path | str,
    *callbacks: TrainerCallback,
    kind: type[Trainer] = Trainer,
    more: dict[str, Any] | None = None,
    **training: Any,
) -> Trainer:
    """A silent Trainer of `model`.

    Args:
        model: What to train.
        out: Its output folder.
        callbacks: Its callbacks.
        kind: Its class.
        more: Further arguments of the Trainer.
        training: Changes to the TrainingArguments of `arguments`.
    """
    trainer = kind(
        model=model,
        args=arguments(out, **training),
        train_dataset=examples(),
        eval_dataset=examples(16, seed=3),
        callbacks=list(callbacks),
        **(more or {}),
    )
    trainer.remove_callback(PrinterCallback)
    # The Trainer takes every model with **kwargs for one that divides its loss by the number of items, and sums the
    # losses of the micro-batches; this one averages.
    trainer.model_accepts_loss_kwargs = False
    return trainer


# Events on disk ------------------------------------------------------------------------------------------------------


def read_events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep_events(path: Path, last_step: int) -> None:
    """Drop the events after `last_step`: the resumed run has them again."""
    kept = [event for event in read_events(path) if event["step"] <= last_step]
    path.write_text("".join(json.dumps(event) + "\n" for event in kept))


def append_event(path: Path, event: Event) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(event.as_dict()) + "\n")


# Running -------------------------------------------------------------------------------------------------------------


def train(
    out: Path | str,
    run: Run,
    resume: str | None = None,
    callbacks: tuple[Any, ...] = (),
    base: nn.Module | None = None,
    events: str = "events.jsonl",
    **training: Any,
) -> Trainer:
    """Do `run` in the folder `out`, from the checkpoint `resume` if one is given, and keep its events there.

    Args:
        out: Output folder of the Trainer.
        run: The run.
        resume: A checkpoint.
        callbacks: Further callbacks.
        base: The model; `tiny_bert()` by default.
        events: File name of the events.
        training: TrainingArguments that `run` may override.
    """
    file = Path(out) / events
    file.parent.mkdir(parents=True, exist_ok=True)
    keep_events(file, int(resume.rsplit("-", 1)[1]) if resume else 0)
    trainer = trainer_for(
        adapted(base, half=run.half, **run.method),
        out,
        AromaCallback(early_stop=run.early_stop, on_event=partial(append_event, file)),
        *callbacks,
        **{"max_steps": run.steps, **training, **run.training},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def growth(trainer: Trainer) -> AromaCallback:
    """The callback at work: on resume the Trainer replaces the one it was given."""
    (callback,) = [found for found in trainer.callback_handler.callbacks if isinstance(found, AromaCallback)]
    return callback


def main(out: str, run_json: str, *flags: str) -> None:
    torch.set_num_threads(1)
    run = Run(**json.loads(run_json))
    die_at(run.kill)
    train(out, run, last_complete_checkpoint(out) if "--resume" in flags else None, (DieAtStep(run.kill),))


# What two runs must agree in -----------------------------------------------------------------------------------------


def live(trainer: Trainer) -> dict[str, Any]:
    """Everything that a run has in memory at its end, comparable by `assert_same`."""
    controller = growth(trainer).controller
    assert controller is not None
    return {
        "weights": dict(trainer.model.state_dict()),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "controller": controller.state_dict(),
        "summary": controller.summary(),
        "log": steps_of(trainer.state.log_history),
    }


def on_disk(checkpoint: Path | str) -> dict[str, Any]:
    """Everything that a checkpoint holds, comparable by `assert_same`."""
    folder = Path(checkpoint)
    state = json.loads((folder / "trainer_state.json").read_text())
    return {
        "weights": load_file(folder / "adapter_model.safetensors"),
        "config": json.loads((folder / "adapter_config.json").read_text()),
        "optimizer": torch.load(folder / "optimizer.pt", weights_only=True),
        "schedule": torch.load(folder / "scheduler.pt", weights_only=True),
        "controller": read_controller_state(folder),
        "log": steps_of(state["log_history"]),
        "callbacks": state["stateful_callbacks"],
    }


def resealed(checkpoint: Path | str) -> None:
    """Let the record of a checkpoint fit files that were edited on purpose, to meet what is behind it."""
    step = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]
    record_checkpoint(checkpoint, step)


def steps_of(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The logged training steps, without the wall-clock times of evaluations and of the end."""
    return [entry for entry in log_history if "loss" in entry]


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal in structure and bit for bit; the error names the first difference."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor), where
        assert one.dtype == other.dtype, where
        assert one.shape == other.shape, f"{where}: {tuple(one.shape)} and {tuple(other.shape)}"
        same = torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
        assert same, f"{where}: largest difference {(one.double() - other.double()).abs().max()}"
    elif isinstance(one, dict):
        assert list(map(str, sorted(one, key=str))) == list(map(str, sorted(other, key=str))), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), f"{where}: {len(one)} and {len(other)} entries"
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert one == other, f"{where}: {one!r} and {other!r}"


# Sudden death --------------------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(kill: str) -> None:
    """Let this process kill itself within the save of checkpoint N.

    Args:
        kill: '<moment> N'. Moments in the order of the save: 'adapter' (half of the tensors written), 'vouching'
            (before aroma_state.json), 'optimizer' (half of it written), 'scheduler' (before it), 'trainer' (half of
            trainer_state.json written). 'step' is not within a save: see `DieAtStep`.
    """
    if not kill:
        return
    import peft.peft_model

    import aroma.files

    moment, step = kill.split()
    folder = f"checkpoint-{step}"
    if moment == "adapter":
        _die_within(peft.peft_model, "safe_save_file", lambda _, path, **__: path, folder, "adapter_model")
    elif moment == "vouching":
        _die_before(aroma.files, "write_manifest", lambda path, *_: path, folder, "aroma_state.json")
    elif moment == "optimizer":
        _die_within(torch, "save", lambda _, path: path, folder, "optimizer.pt")
    elif moment == "scheduler":
        _die_before(torch, "save", lambda _, path: path, folder, "scheduler.pt")
    elif moment == "trainer":
        _die_within(transformers.TrainerState, "save_to_json", lambda _, path: path, folder, "trainer_state.json")
    else:
        assert moment == "step", f"no such moment: {moment}"


def _die_within(owner: Any, name: str, path_of: Any, *parts: str) -> None:
    """Kill the process when `owner.name` has written half of the file whose path has all `parts`."""
    write = getattr(owner, name)

    def half(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        path = str(path_of(*args, **kwargs))
        if all(part in path for part in parts):
            os.truncate(path, os.path.getsize(path) // 2)
            die()
        return result

    setattr(owner, name, half)


def _die_before(owner: Any, name: str, path_of: Any, *parts: str) -> None:
    """Kill the process when `owner.name` is about to write the file whose path has all `parts`."""
    write = getattr(owner, name)

    def never(*args: Any, **kwargs: Any) -> Any:
        if all(part in str(path_of(*args, **kwargs)) for part in parts):
            die()
        return write(*args, **kwargs)

    setattr(owner, name, never)


class DieAtStep(TrainerCallback):
    """Kills the process right after the optimizer step N of 'step N', before the save that may be due."""

    def __init__(self, kill: str = "") -> None:
        moment, _, step = kill.partition(" ")
        self.step = int(step) if moment == "step" else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            die()


if __name__ == "__main__":
    main(*sys.argv[1:])
