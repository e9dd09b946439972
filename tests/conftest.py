"""What holds for every test: no network, one thread, the same random numbers."""

import gc
import os
import shutil
import tempfile
from functools import cache

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# On a disk each of thousands of saved files makes its fsync and its removal wait for milliseconds.
if "TMPDIR" not in os.environ and os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 4 << 30:
    os.environ["TMPDIR"] = tempfile.tempdir = "/dev/shm"

import jinja2
import pytest
import torch

from ranks import deepspeed_environment

LONGEST = (
    "test_demo",
    "test_trial_resume",
    "test_notebooks",
    "test_readme",
    "test_zero",
    "test_compress_distributed",
    "test_sharded",
    "test_resume",
    "test_grid_kill",
    "test_engine",
    "test_kills",
    "test_rank_kills",
    "test_language_model",
    "test_trl",
    "test_compress_callback",
    "test_distributed",
    "test_page_browser",
    "test_train_processes",
    "test_compile",
    "test_integrations",
    "test_pages",
    "test_memory",
    "test_commonsense",
    "test_fuzz",
    "test_language_train",
    "test_saving",
    "test_heads",
    "test_results",
    "test_cli_train",
    "test_site",
    "test_fused",
    "test_learning_rate",
    "test_several_adapters",
    "test_bench",
    "test_grid",
    "test_report",
    "test_callback",
)
"""Files that take longest, the longest of the slow tests first. They start first, so that one of two workers does not
end with them alone."""

torch.set_num_threads(1)

# PEFT writes a model card beside every adapter, and compiles the card's template each time.
jinja2.Environment.compile = cache(jinja2.Environment.compile)


def pytest_configure(config: pytest.Config) -> None:
    # xdist would start the files with most tests first, which take a second.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    # Every training of accelerate collects garbage among all objects, and those of the imported libraries are most.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def deepspeed() -> dict[str, str]:
    """What processes need in their environment to find DeepSpeed."""
    return deepspeed_environment()
