"""Adapters combined into one: held to a dense reference, and to what it is for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from aroma import aroma_layers, combine, save_adapter
from aroma.algorithm.questions import directions_to_keep
from aroma.errors import ConfigError
from aroma.saved import read_adapter
from aroma.tuner.live import live_adapter
from evidence_runs import Loop, Net, Rows, held_out, loss_of, net, rows

UNSEEN = rows(400, seed=77)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of one task that grew apart, on examples of their own."""
    folders = []
    for seed in (2, 3):
        loop = Loop(net(component_seed=seed), steps_per_pass=60, growth_batches=held_out())
        loop.x, loop.y = rows(8 * 60, seed=20 + seed)
        folder = tmp_path_factory.mktemp("apart")
        save_adapter(loop.go_on().model, folder)
        folders.append(folder)
    return folders


def rank_of(model: Any) -> int:
    return sum(layer.rank("default") for layer in aroma_layers(model).values())


def ranks_in(*folders: Path) -> int:
    return sum(update.rank for folder in folders for update in read_adapter(folder).updates.values())


def error_of(model: Any) -> float:
    with torch.no_grad():
        return float(loss_of(model.eval(), UNSEEN))


def combined(folders: list[Path], batches: list[Rows] | None = None, **options: Any) -> Any:
    return combine(Net(), folders, held_out(16) if batches is None else batches, loss=loss_of, **options)


def test_what_is_kept_is_what_the_dense_reference_keeps(apart: list[Path]) -> None:
    given, significance = held_out(12), 0.3
    model = combined(apart, given, weights=[0.5, 0.5], significance=significance)
    plain, deltas = Net(), {}
    for folder in apart:
        for name, update in read_adapter(folder).updates.items():
            deltas[name] = deltas.get(name, 0) + 0.5 * (update.B.double() @ update.A.double())
    assert [*deltas] == [*aroma_layers(model)]
    modules = dict(plain.named_modules())
    for name, delta in deltas.items():
        modules[name].weight.data += 0.5 * delta.float()
    split = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas.values()]
    counts = [int((sizes > 1e-6 * sizes[0]).sum()) for _, sizes, _ in split]
    credits = np.full((len(given), len(split), max(counts)), np.nan)
    for number, batch in enumerate(given):
        plain.zero_grad()
        loss_of(plain, batch).backward()
        for place, (name, (u, sizes, v), count) in enumerate(zip(deltas, split, counts, strict=True)):
            worth = -(sizes * (u.T @ modules[name].weight.grad.double() @ v.T).diagonal())
            credits[number, place, :count] = worth[:count]
    kept = [row.nonzero()[0].tolist() for row in directions_to_keep(credits, significance)]
    assert 0 < sum(map(len, kept)) < sum(counts)
    for place, layer in enumerate(aroma_layers(model).values()):
        u, sizes, v = split[place]
        B, A = layer.components("default")
        assert len(A) == len(kept[place])
        expected = (u[:, kept[place]] * sizes[kept[place]]) @ v[kept[place]]
        torch.testing.assert_close(B.double() @ A.double(), expected, rtol=0, atol=1e-5 * float(sizes[0]))


def summed(folders: list[Path], weights: list[float]) -> Any:
    """The plain sum, in plain PEFT."""
    model: Any = PeftModel.from_pretrained(Net(), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, str(number))
    model.add_weighted_adapter([*map(str, range(len(folders)))], weights, "sum", combination_type="cat")
    model.set_adapter("sum")
    return model


def test_it_is_smaller_than_the_sum_and_does_nearly_as_much(apart: list[Path], tmp_path: Path) -> None:
    model = combined(apart, weights=[0.5, 0.5])
    save_adapter(model, tmp_path / "combined")
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "combined")
    assert error_of(loaded) == pytest.approx(error_of(model), abs=1e-5)
    assert rank_of(model) < 0.9 * ranks_in(*apart)
    base, whole = error_of(Net()), error_of(summed(apart, [0.5, 0.5]))
    assert whole < 0.8 * base
    assert base - error_of(model) > 0.9 * (base - whole), "the directions that were dropped carried little"


def test_noise_is_dropped(apart: list[Path], tmp_path: Path) -> None:
    noise = net(component_seed=8)
    generator = torch.Generator().manual_seed(0)
    for layer in aroma_layers(noise).values():
        b, a = layer.pair("default")
        b.data = 0.1 * torch.randn(b.shape, generator=generator)
        a.data = torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5
    live_adapter(noise).ever_controlled = True
    save_adapter(noise, tmp_path / "noise")
    folders = [apart[0], tmp_path / "noise"]
    both = combined(folders)
    assert error_of(both) < error_of(by_size(folders, rank_of(both))), "than as many of the largest directions"


def by_size(folders: list[Path], count: int) -> Any:
    """The sum of adapters, of which the `count` largest directions are kept."""
    model = Net()
    sums: dict[str, torch.Tensor] = {}
    for folder in folders:
        for name, update in read_adapter(folder).updates.items():
            sums[name] = sums.get(name, torch.zeros(update.shape)) + update.B @ update.A
    split = {name: torch.linalg.svd(total) for name, total in sums.items()}
    least = torch.cat([sizes for _, sizes, _ in split.values()]).sort(descending=True).values[count - 1]
    for name, (u, sizes, v) in split.items():
        model.get_submodule(name).weight.data += (u * torch.where(sizes >= least, sizes, 0.0)) @ v
    return model


def test_a_sum_of_more_components_than_ranks(apart: list[Path]) -> None:
    many = combined([apart[0]] * 9, weights=[1 / 9] * 9)
    once = combined(apart[:1])
    for one, other in zip(aroma_layers(many).values(), aroma_layers(once).values(), strict=True):
        torch.testing.assert_close(one.get_delta_weight("default"), other.get_delta_weight("default"))


def save_with(folder: Path, grown: Collection[str]) -> Path:
    """Save an adapter of which only the matrices `grown` have a component."""
    model = net(component_seed=8)
    for name, layer in aroma_layers(model).items():
        b, _ = layer.pair("default")
        b.data.fill_(0.1 if name in grown else 0.0)
    live_adapter(model).ever_controlled = True
    save_adapter(model, folder)
    return folder


def test_matrices_that_have_nothing_stay_as_they_are(tmp_path: Path) -> None:
    *_, last = aroma_layers(net())
    model = combined([save_with(tmp_path / "last", [last])] * 2)
    assert [*aroma_layers(model)] == [last]
    with pytest.raises(ConfigError, match=r"^adapters=\[.*nothing.*\]: none has a component; give adapters that"):
        combined([save_with(tmp_path / "nothing", [])])


def test_what_cannot_be(apart: list[Path], tmp_path: Path) -> None:
    get_peft_model(Net(), LoraConfig(target_modules=r"layers\.\d+")).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^adapters=.*: AROMA did not save it.*give adapters of AROMA"):
        combined([tmp_path])
    with pytest.raises(
        ConfigError, match=r"^base='Net': the adapters have an update of layers\.3, \(16, 16\), and it has no"
    ):
        combine(Net(layers=3), apart, held_out(16), loss=loss_of)
    for wrong in ([], str(apart[0])):
        with pytest.raises(ConfigError, match=r"^adapters=.*: give a list of two or more folders"):
            combined(wrong)
    with pytest.raises(ConfigError, match=r"weights=\[1\.0\]: give one for each of the 2 adapters"):
        combined(apart, weights=[1.0])
    with pytest.raises(ConfigError, match=r"batches=7: so few decide nothing; give 8 or more"):
        combined(apart, held_out(7))
