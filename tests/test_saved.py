"""Adapters read back: what vouches for them, what a person may edit, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file

from aroma.checkpoint import verify_adapter
from aroma.errors import CheckpointError, ConfigError
from aroma.export import export_uniform, load_with_adapter
from aroma.ranks import rank_table
from aroma.saved import read_adapter
from models import base
from test_export import edit_config, foreign, saved

CONFIG, STATE, WEIGHTS = "adapter_config.json", "aroma_state.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter with ranks 0, 2 and 5."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    saved(folder, "bert", [0, 2, 5])
    return folder


@pytest.fixture
def adapter(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "adapter"))


READERS: dict[str, Callable[[Path], Any]] = {
    "verify_adapter": verify_adapter,
    "rank_table": rank_table,
    "export_uniform": lambda folder: export_uniform(folder, folder.parent / "out"),
    "load_with_adapter": load_with_adapter,
}


# The configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "changes",
    [{"alpha_pattern": {}}, {"use_rslora": True}, {"target_modules": ["query"]}, {"something_new": 1}],
    ids=lambda changes: next(iter(changes)),
)
def test_an_edited_configuration_is_refused(adapter: Path, reader: str, changes: dict[str, Any]) -> None:
    edit_config(adapter, **changes)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: edited since the adapter was saved"):
        READERS[reader](adapter)


def test_a_configuration_that_peft_wrote_again_is_the_same(adapter: Path) -> None:
    before = verify_adapter(adapter)
    written = (adapter / CONFIG).read_bytes()
    PeftConfig.from_pretrained(str(adapter)).save_pretrained(str(adapter))
    config = json.loads((adapter / CONFIG).read_text())
    config["target_modules"].reverse()
    kept = {name: value for name, value in config.items() if value is not None and name != "lora_dropout"}
    (adapter / CONFIG).write_text(json.dumps(kept))
    assert (adapter / CONFIG).read_bytes() != written
    assert verify_adapter(adapter) == before


def test_a_task_type_may_be_filled_in(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", "bert", [2], task_type=None)
    edit_config(tmp_path / "adapter", task_type="SEQ_CLS")
    verify_adapter(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", task_type="POETRY")
    with pytest.raises(ConfigError, match=r"task_type='POETRY': it does not tell the model class"):
        load_with_adapter(tmp_path / "adapter")


# Files ---------------------------------------------------------------------------------------------------------------


def test_the_hubs_cache_is_read(whole: Path, tmp_path: Path) -> None:
    """The files of a snapshot are symlinks to `blobs`, beside `snapshots`."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(whole.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert verify_adapter(snapshot) == verify_adapter(whole)
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(whole / CONFIG)
    with pytest.raises(CheckpointError, match=r"a symlink to .*, outside of its folder; put the file itself there"):
        verify_adapter(snapshot)


def test_what_a_copied_file_points_to_is_not_exported(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (adapter / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: a symlink to .*secret, outside of its folder"):
        export_uniform(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Adapters of others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': .*only plain LoRA"),
        ({"use_dora": True}, "use_dora=True: .*only plain LoRA"),
    ],
)
def test_updates_that_are_more_than_b_times_a_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2, **changes)
    get_peft_model(base("bert"), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_adapter(tmp_path)
    edit_config(tmp_path, peft_type="LOHA")
    with pytest.raises(ConfigError, match=r"peft_type='LOHA'"):
        rank_table(tmp_path)


def test_tensors_that_are_damaged(tmp_path: Path) -> None:
    foreign(tmp_path, r=2)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.bert.encoder.layer.0.attention.self.key"
    A, B = f"{key}.lora_A.weight", f"{key}.lora_B.weight"
    for changes, message in (
        ({A: None}, r"self\.key\.lora_B\.weight has no place in a plain LoRA adapter"),
        ({B: None}, "self.key has an A of rank 2 and no fitting B"),
        ({B: tensors[B][:, :1].contiguous()}, "no fitting B"),
        ({A: tensors[A] * torch.nan}, "has NaN or infinity in it"),
        ({A: tensors[A].int()}, r"components of torch\.int32"),
    ):
        kept = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
        save_file(kept, tmp_path / WEIGHTS)
        with pytest.raises(CheckpointError, match=rf"adapter_model\.safetensors: .*{message}"):
            read_adapter(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: the file is missing"):
        rank_table(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere.*adapter_config\.json"):
        read_adapter(tmp_path / "nowhere")


def test_convolutions_and_embeddings_of_plain_peft(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.window = torch.nn.Embedding(10, 6), torch.nn.Conv2d(3, 5, 2)

    model = get_peft_model(Net(), LoraConfig(target_modules=["words", "window"], r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert [(row.name, row.rank) for row in rank_table(tmp_path / "adapter")] == [("window", 2), ("words", 2)]
    export_uniform(tmp_path / "adapter", tmp_path / "out", rank=4)
    loaded = get_peft_model(Net(), LoraConfig(target_modules=["words", "window"], r=4, lora_alpha=4))
    loaded.load_adapter(str(tmp_path / "out"), "default")
    for name in ("words", "window"):
        one, other = (net.get_base_model().get_submodule(name).get_delta_weight("default") for net in (model, loaded))
        torch.testing.assert_close(one, other)
