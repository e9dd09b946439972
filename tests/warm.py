"""Imported once, by the process from which the ranks of `rank_kills` are forked: what each of them would make anew.

Nothing here starts a thread, a process group or accelerate's state, which would not survive the fork.
"""

import os

import torch

import rank_kills
from aroma.tuner import dropout
from trainer_runs import adapted

torch.set_num_threads(1)
adapted(**rank_kills.METHOD)
dropout._banks(rank_kills.METHOD["lora_dropout"], torch.device("cpu"))
if "DS_ACCELERATOR" in os.environ:
    from deepspeed.accelerator import get_accelerator

    import zero_runs  # noqa: F401

    get_accelerator().create_op_builder("ShareMemCommBuilder").load()
