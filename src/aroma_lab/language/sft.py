"""TRL's loop on the same recipe: the same rows, batches and learned tokens as the Trainer's."""

from __future__ import annotations

from typing import Any

from trl import SFTConfig, SFTTrainer

from ..training.trainer import ExactResume


class SftMethodTrainer(ExactResume, SFTTrainer):
    """TRL's SFTTrainer, resumed as exactly as the Trainer; see `ExactResume`."""


def sft_arguments(**options: Any) -> SFTConfig:
    """Return TRL's arguments with the Trainer's `options`; what is encoded already is left as it is.

    Packing stays ours: TRL's own would make other rows of the same examples.
    """
    return SFTConfig(**options, packing=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
