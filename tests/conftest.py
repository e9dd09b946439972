"""What holds for every test: no network, one thread, the same random numbers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

LONGEST = (
    "test_resume",
    "test_trial_resume",
    "test_sharded",
    "test_distributed",
    "test_trials",
    "test_train_processes",
)
"""Files that take longest. They come first, so that one of two workers does not end with them alone."""

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
