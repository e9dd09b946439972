"""16 experts under FSDP2 and DDP: two processes do what one does, and save an adapter that plain PEFT loads."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import expert_ranks
from aroma import verify_adapter
from expert_ranks import EXPERTS, REPLICATED_STEPS, Toy, ended, loop
from ranks import launch
from small_nets import rows
from trainer_runs import assert_same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks told what they came to."""
    out = tmp_path_factory.mktemp("experts")
    launch(2, expert_ranks.__file__, str(out))
    return out


@pytest.mark.parametrize("way", ["sharded", "replicas"])
def test_two_processes_do_what_one_does(told: Path, way: str) -> None:
    first, second = (torch.load(told / f"{way}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second)
    alone = ended(loop().go_on(REPLICATED_STEPS if way == "replicas" else None))
    assert first["events"] == alone["events"]
    assert first["ranks"] == alone["ranks"]
    assert first["weight norms"] == pytest.approx(alone["weight norms"], rel=1e-9)
    for matrix, update in first["weights"].items():
        torch.testing.assert_close(update, alone["weights"][matrix], rtol=1e-6, atol=1e-9)
    experts = {name: rank for name, rank in first["ranks"] if "experts" in name}
    assert len(experts) == 2 * EXPERTS


def test_the_saved_adapter_is_plain_lora(told: Path) -> None:
    verify_adapter(told / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
        plain = PeftModel.from_pretrained(Toy().double(), told / "adapter", autocast_adapter_dtype=False).eval()
    said = plain(rows(12, seed=7, dtype=torch.float64)[0])
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(told / f"said-{rank}.pt"), said.detach(), rtol=1e-5, atol=1e-6)
