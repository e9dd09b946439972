"""Adapters read back: what vouches for them, what a person may edit, and what is refused before it costs anything."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file

from aroma.checkpoint import verify_adapter
from aroma.cli import main
from aroma.errors import AromaWarning, CheckpointError, ConfigError
from aroma.export import export_uniform, load_with_adapter, rank_table
from aroma.patterns import require_simple_patterns
from aroma.saved import read_adapter, read_config
from models import base, batch, logits, saved_base
from test_export import edit_config, foreign, saved

CONFIG, STATE = "adapter_config.json", "aroma_state.json"


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

EDITS: list[tuple[dict[str, Any], str]] = [
    ({"alpha_pattern": {}}, r"alpha_pattern={}: edited since the adapter was saved, as {'\^bert"),
    ({"rank_pattern": {}}, r"rank_pattern={}: edited"),
    ({"use_rslora": True}, r"use_rslora=True: edited since the adapter was saved, as False; put that back"),
    ({"lora_alpha": 16}, r"lora_alpha=16: edited since the adapter was saved, as 2; put that back"),
    ({"target_modules": ["query"]}, r"target_modules=\['query'\]: edited"),
    ({"exclude_modules": ["query"]}, r"exclude_modules=\['query'\]: edited since the adapter was saved, as None"),
    ({"modules_to_save": None}, r"modules_to_save=None: edited"),
    ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa': edited"),
    ({"task_type": "CAUSAL_LM"}, r"task_type='CAUSAL_LM': edited since the adapter was saved, as 'SEQ_CLS'"),
    ({"r": True}, r"r=True: edited"),
    ({"something_new": 1}, r"something_new=1: edited"),
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("changes", "message"), EDITS, ids=[next(iter(changes)) for changes, _ in EDITS])
def test_an_edited_configuration_is_refused_with_what_was_saved(
    adapter: Path, reader: str, changes: dict[str, Any], message: str
) -> None:
    edit_config(adapter, **changes)
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {message}") as caught:
        READERS[reader](adapter)
    assert "\n" not in str(caught.value)


def test_another_runs_configuration_is_refused(adapter: Path, tmp_path: Path) -> None:
    saved(tmp_path / "other", "bert", [2, 5, 0])
    shutil.copy(tmp_path / "other" / CONFIG, adapter / CONFIG)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: .*edited since the adapter was saved"):
        verify_adapter(adapter)


def test_a_configuration_that_peft_wrote_again_is_the_same(adapter: Path) -> None:
    before = verify_adapter(adapter)
    written = (adapter / CONFIG).read_bytes()
    PeftConfig.from_pretrained(str(adapter)).save_pretrained(str(adapter))
    config = json.loads((adapter / CONFIG).read_text())
    random.Random(0).shuffle(config["target_modules"])
    kept = {
        name: value for name, value in config.items() if value is not None and name not in ("lora_dropout", "bias")
    }
    (adapter / CONFIG).write_text(json.dumps(kept))
    assert (adapter / CONFIG).read_bytes() != written
    assert verify_adapter(adapter) == before


def test_a_base_model_that_has_moved(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = shutil.copytree(saved_base("bert"), tmp_path / "moved")
    before = logits(load_with_adapter(adapter), batch("bert"))
    edit_config(adapter, base_model_name_or_path=str(moved))
    with pytest.warns(AromaWarning, match=rf"base_model_name_or_path='{moved}': edited .* as '{saved_base('bert')}'"):
        assert torch.equal(logits(load_with_adapter(adapter), batch("bert")), before)
    assert main(["inspect", str(adapter)]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(told) == 1
    assert told[0].startswith(f"warning: {adapter / CONFIG}: base_model_name_or_path='{moved}': edited")


def test_a_task_type_may_be_filled_in(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", "bert", [2], task_type=None)
    edit_config(tmp_path / "adapter", task_type="SEQ_CLS")
    assert verify_adapter(tmp_path / "adapter")["adapter_config"]["task_type"] is None
    edit_config(tmp_path / "adapter", task_type="POETRY")
    with pytest.raises(ConfigError, match=r"task_type='POETRY': it does not tell the model class"):
        load_with_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    "content", ["[]", '"text"', "null", "1", "{}", "[" * 100_000, "{", '{"r": 1' + "0" * 5000 + "}"]
)
@pytest.mark.parametrize("reader", READERS)
def test_no_configuration_at_all(adapter: Path, reader: str, content: str) -> None:
    (adapter / CONFIG).write_text(content)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: .*use another checkpoint") as caught:
        READERS[reader](adapter)
    assert len(str(caught.value)) < 500


# The state -----------------------------------------------------------------------------------------------------------


def edit_state(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit aroma_state.json and make its checksum fit, as anybody can."""
    state = json.loads((folder / STATE).read_text())
    edit(state)
    del state["checksum"]
    state["checksum"] = sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    (folder / STATE).write_text(json.dumps(state))


def test_a_state_of_before_the_configuration_was_in_it(adapter: Path) -> None:
    edit_state(adapter, lambda state: state.pop("adapter_config"))
    verify_adapter(adapter)
    edit_config(adapter, alpha_pattern={})
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: lora_alpha=2\.0: bert\..* has rank 5"):
        verify_adapter(adapter)


def test_the_zeros_of_an_adapter_without_updates_are_no_rank(tmp_path: Path) -> None:
    model = saved(tmp_path / "adapter", "bert", [0])
    state = verify_adapter(tmp_path / "adapter")
    assert {entry["rank"] for entry in state["modules"].values()} == {0}
    assert {row.rank for row in rank_table(tmp_path / "adapter")} == {0}
    (name,) = json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"]
    edit_state(tmp_path / "adapter", lambda state: state["modules"][name].update(rank=1))  # as early versions did
    assert {row.rank for row in rank_table(tmp_path / "adapter")} == {0}
    torch.testing.assert_close(
        logits(load_with_adapter(tmp_path / "adapter"), batch("bert")), logits(model, batch("bert"))
    )
    edit_state(tmp_path / "adapter", lambda state: state["modules"][name].update(rank=2))
    with pytest.raises(CheckpointError, match="has shape and rank"):
        rank_table(tmp_path / "adapter")


def test_another_kind_of_adapter_is_no_checkpoint(adapter: Path) -> None:
    edit_state(adapter, lambda state: state.pop("adapter_config"))
    edit_config(adapter, use_dora=True)
    with pytest.raises(CheckpointError, match=r"use_dora=True: in .*adapter_config\.json: only plain LoRA adapters"):
        verify_adapter(adapter)
    with pytest.raises(ConfigError, match=r"^use_dora=True"):
        rank_table(adapter)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda state: state.update(processes=10**7), "processes=10000000"),
        (lambda state: state["files"].update({"/dev/zero": "0" * 64}), "files./dev/zero='000"),
        (lambda state: state["files"].update({"../secret": "0" * 64}), "files.../secret='000"),
        (lambda state: state["modules"].update({"a": {"shape": [10**9, 8], "rank": 0}}), "modules.a={'shape': [10000"),
        (lambda state: state["modules"].update({"a": {"shape": [8, 8], "rank": -1}}), "modules.a={'shape': [8, 8]"),
    ],
    ids=["processes", "a device", "outside", "a shape", "a rank"],
)
def test_a_forged_state_costs_nothing(adapter: Path, edit: Callable[[dict[str, Any]], Any], named: str) -> None:
    edit_state(adapter, edit)
    begin = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        verify_adapter(adapter)
    assert f"{adapter / STATE}: {named}" in str(caught.value)
    assert "no run writes that; use another checkpoint" in str(caught.value)
    assert time.perf_counter() - begin < 5


def test_a_uniform_export_that_the_disk_cannot_hold(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [2**24, 2**24]
    edit_state(
        adapter, lambda state: [state["modules"].update({f"a{i}": {"shape": rows, "rank": 0}}) for i in range(999)]
    )
    with pytest.raises(ConfigError, match=r"out=.*out': [0-9,]+ bytes are to be written, and [0-9,]+ are free there"):
        export_uniform(adapter, adapter.parent / "out")
    assert not (adapter.parent / "out").exists()


def test_a_rank_that_no_matrix_has(adapter: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"rank=1000000: no matrix of this adapter can have more than 256; give at most"
    ):
        export_uniform(adapter, adapter.parent / "out", rank=10**6)


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


def test_patterns_are_matched_as_peft_does(tmp_path: Path) -> None:
    fields = {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {r"layer\.[01]\.attention\.self\.(query|value)": 3, "query": 2, ".*key": 5},
        "alpha_pattern": {r".*\.1\..*": 7, "value": 1},
    }
    model = foreign(tmp_path, **fields)
    for name, update in read_adapter(tmp_path).updates.items():
        layer = model.get_base_model().get_submodule(name)
        assert update.rank == layer.r["default"]
        torch.testing.assert_close(update.B @ update.A, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("(?:(?:[a-z0-9._]|[a-z0-9._])*(?:a|[a-z0-9._])*)*[^a-z0-9._]", "takes too long; name the modules one by one"),
        ("(", "no regular expression"),
        ("a" * 2000, "longer than 1000 characters"),
    ],
    ids=["endless", "none", "long"],
)
def test_patterns_that_take_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, pattern: str, remedy: str
) -> None:
    monkeypatch.setattr("aroma.patterns._MATCHING_SECONDS", 0.1)
    foreign(tmp_path, r=2)
    edit_config(tmp_path, **{field: {pattern: 2} if field.endswith("pattern") else pattern})
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {field}=.*{remedy}"):
        read_adapter(tmp_path)
    assert time.process_time() - begin < 1


def test_patterns_of_another_method_are_names_or_refused(tmp_path: Path) -> None:
    config = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=4, target_r=2, total_step=10)
    get_peft_model(base("llama"), config).save_pretrained(tmp_path)
    require_simple_patterns(tmp_path, read_config(tmp_path))
    edit_config(tmp_path, target_modules="([a-z0-9._]*)*X")
    with pytest.raises(CheckpointError, match=r"target_modules='\(\[a-z.*take forever; name the modules one by one"):
        require_simple_patterns(tmp_path, read_config(tmp_path))


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_adapters_that_change_the_base_weights_are_refused(tmp_path: Path, start: str) -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2, init_lora_weights=start)
    get_peft_model(base("bert"), config).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"init_lora_weights='{start}': .*it changes the base weights, too; convert"
    ):
        rank_table(tmp_path)


def test_a_lora_A_that_is_missing(tmp_path: Path) -> None:
    foreign(tmp_path, r=2)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    lost = "base_model.model.bert.encoder.layer.0.attention.self.key.lora_A.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights)
    with pytest.raises(
        CheckpointError, match=r"self\.key\.lora_B\.weight has no lora_A beside it; the file is damaged"
    ):
        read_adapter(tmp_path)
    tensors[lost][0, 0] = torch.nan
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"self\.key\.lora_A\.weight has NaN or infinity in it; use another"):
        read_adapter(tmp_path)
