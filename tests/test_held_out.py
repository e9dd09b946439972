"""`hold_out`: what is held out of training depends on a seed, and loses nothing; and the loss of a model."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset, Subset

from aroma import hold_out
from aroma.errors import ConfigError
from aroma.evidence.checkup import model_loss
from trainer_runs import examples


def tokenized(count: int = 160, **changes: Any) -> Dataset:
    rows = examples(count, **changes)
    columns = {name: [row[name].tolist() for row in rows] for name in rows[0]}
    return Dataset.from_dict({**columns, "text": [f"text {row}" for row in range(count)]})


class Stream(IterableDataset[Any]):
    """A stream that knows how long it is."""

    def __iter__(self) -> Iterator[Any]:
        return iter(examples(40))

    def __len__(self) -> int:
        return 40


@pytest.mark.parametrize("dataset", [iter(examples(6)), {"train": examples(6)}, Stream()])
def test_what_has_no_examples_by_index_is_refused(dataset: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^dataset='{type(dataset).__name__}': it has no examples by index; give "):
        hold_out(dataset)


def test_a_list_is_split_too() -> None:
    train, held_out = hold_out([*range(20)], share=0.25)
    assert isinstance(train, Subset)
    assert len(held_out) == 5
    assert sorted([*train, *held_out]) == [*range(20)]


@pytest.mark.parametrize("output", [{"loss": torch.ones(())}, SimpleNamespace(loss=torch.ones(()))])
def test_the_loss_of_a_model(output: Any) -> None:
    class Model(torch.nn.Module):
        def forward(self, labels: Any = None) -> Any:
            return output if labels is not None else SimpleNamespace(loss=None)

    assert model_loss(Model(), {"labels": 1}).item() == 1
    with pytest.raises(ConfigError, match=r"^loss=None: Model returns none of a batch; give labels"):
        model_loss(Model(), {})


def test_the_split_depends_on_its_seed_alone_and_loses_nothing() -> None:
    rows = tokenized(50)
    parts = [hold_out(rows, share=0.2, seed=seed) for seed in (0, 0, 1)]
    texts = [[list(part["text"]) for part in pair] for pair in parts]
    assert texts[0] == texts[1] != texts[2]
    assert all(len(growth) == 10 and sorted(train + growth) == sorted(rows["text"]) for train, growth in texts)
    for share in (0, 1, -0.1, 0.001):
        with pytest.raises(ConfigError, match=f"share={share!r}: of 50 examples it leaves one part empty"):
            hold_out(rows, share=share)
