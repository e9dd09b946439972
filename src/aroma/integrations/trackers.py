"""Ranks in TensorBoard, MLflow, Trackio, Weights & Biases, and whatever else the Trainer reports to.

The Trainer calls its callbacks in the order of its list, and its own trackers stand before those of the user: what
`AromaCallback` adds to the logs comes too late for them. So one more callback stands at the front of the list.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..controller import AromaController

if TYPE_CHECKING:
    from .callback import AromaCallback

MODULE_PREFIX = "rank/"
"""What a matrix's name follows in the logs that trackers get."""

PICTURE = "ranks"
"""Name of the picture of ranks at the end of a run."""


class RankLogs(TrainerCallback):
    """Adds ranks to the logs before any tracker reads them, and draws them at the end; `tell_trackers` makes it.

    Args:
        growth: The callback whose controller knows the ranks.
        handler: The list of callbacks that it stands at the front of.
    """

    def __init__(self, growth: AromaCallback, handler: CallbackHandler) -> None:
        self._growth = growth
        self._handler = handler

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add total rank, matrices that still train, and the rank of every matrix."""
        if self._growth.controller is not None and logs is not None and "loss" in logs:
            add_ranks(self._growth.controller, logs, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the picture of ranks to trackers that take pictures, if matplotlib and Pillow are installed."""
        trackers = [callback for callback in self._handler.callbacks if type(callback).__name__ in _TAKE_PICTURES]
        controller = self._growth.controller
        if not trackers or controller is None or not all(map(find_spec, ("matplotlib", "PIL"))):
            return
        matrices = controller.summary()  # on all ranks, for sharded ones are gathered
        if state.is_world_process_zero:
            picture = _drawn(matrices)
            for tracker in trackers:
                _TAKE_PICTURES[type(tracker).__name__](tracker, picture, state.global_step)


def tell_trackers(growth: AromaCallback) -> None:
    """Put a `RankLogs` at the front of the Trainer's callbacks; called while the Trainer calls `growth`.

    The Trainer shows a callback neither itself nor its list, so the list is taken from the call that is under way.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is not None:
        handler = frame.f_locals["self"]
        # A new list: the call that is under way goes through the old one.
        handler.callbacks = [RankLogs(growth, handler), *handler.callbacks]


def add_ranks(controller: AromaController, logs: dict[str, Any], state: TrainerState) -> None:
    """Add the totals to logs and history, and the rank of every matrix to the logs."""
    ranks = controller.ranks()
    totals = {"total_rank": sum(ranks.values()), "active_modules": controller.active_modules}
    logs.update(totals)
    logs.update({f"{MODULE_PREFIX}{name}": rank for name, rank in ranks.items()})
    state.log_history[-1].update(totals)


def keep_totals(logs: dict[str, Any]) -> None:
    """Take the rank of every matrix out of the logs again: a line on a terminal has no room for hundreds."""
    for name in [name for name in logs if name.startswith(MODULE_PREFIX)]:
        del logs[name]


# Pictures ------------------------------------------------------------------------------------------------------------


def _drawn(matrices: Any) -> Any:
    """Return the picture of ranks, as Pillow has it."""
    import io

    from PIL import Image

    from ..pictures import draw_ranks

    drawn = io.BytesIO()
    draw_ranks({"Ranks grown by AROMA": matrices}).savefig(drawn, format="png", dpi=120)
    return Image.open(drawn).convert("RGB")


def _to_tensorboard(tracker: Any, picture: Any, step: int) -> None:
    import numpy as np

    if tracker.tb_writer is not None:
        tracker.tb_writer.add_image(PICTURE, np.asarray(picture), step, dataformats="HWC")


def _to_mlflow(tracker: Any, picture: Any, step: int) -> None:
    import mlflow

    if mlflow.active_run() is not None:
        mlflow.log_image(picture, artifact_file=f"{PICTURE}.png")


def _to_trackio(tracker: Any, picture: Any, step: int) -> None:
    import trackio

    trackio.log({PICTURE: trackio.Image(picture)})


_TAKE_PICTURES = {
    "TensorBoardCallback": _to_tensorboard,
    "MLflowCallback": _to_mlflow,
    "TrackioCallback": _to_trackio,
}
"""How a picture gets to the tracker of a callback of transformers, by the name of its class."""
