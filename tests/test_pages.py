"""Every code block of the docs: Python runs, commands parse, YAML loads; what the pages name is there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig

import aroma
from aroma import AromaConfig
from aroma.cli import make_parser
from aroma_lab.run.recipe import load_recipe
from models import base, batch
from quick import slow_but
from test_sft import tokenizer
from trainer_runs import examples, tiny_bert

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]}
BLOCKS = [
    (name, language, text)
    for name, page in sorted(PAGES.items())
    for language, text in re.findall(r"^```(.*?)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
]
STRANGERS = {
    *("pip", "python", "python3", "torchrun", "pytest", "mkdocs"),
    *("vllm", "text-generation-launcher", "llama-server", "ollama"),  # engines, which do not run here
}


def sections(page: str) -> dict[str, list[str]]:
    """The Python blocks of a page by the title above them; those before the first title by an empty one."""
    parts = re.split(r"^## (.*)$", f"\n{PAGES[page]}", flags=re.MULTILINE)
    texts = zip(["", *parts[1::2]], parts[::2], strict=True)
    python = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
    return {title: python.findall(text) for title, text in texts if python.search(text)}


GUIDE = sections("guide.md")


def blocks(language: str, page: str | None = None) -> list[str]:
    return [text for name, kind, text in BLOCKS if kind == language and page in (None, name)]


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    parts = (part for line in lines for part in re.split(r" && | & ", line.replace(".venv/bin/", "")))
    found = (shlex.split(part, comments=True) for part in parts)
    return [command for command in found if command and "=" not in command[0]]


def test_every_block_says_what_it_is() -> None:
    assert {language for _, language, _ in BLOCKS} == {"python", "bash", "yaml", "text"}


def test_the_commands_of_the_pages_are_the_parsers() -> None:
    ours = [command[1:] for command in commands() if command[0] == "aroma"]
    ours += [
        command[command.index("aroma") + 1 :]
        for command in commands()
        if command[0] == "torchrun" and "aroma" in command
    ]
    assert len(ours) > 40
    for command in ours:
        make_parser().parse_args(command)
    names = {command[0] for command in ours}
    known = {entry.name for entry in entry_points(group="aroma.commands")} | {"inspect", "export"}
    assert names == known, "each command is shown on some page, and no other"


def test_the_other_programs_are_known_and_their_files_exist() -> None:
    for command in commands():
        assert command[0] in STRANGERS | {"aroma", "ruff", "mypy", "pre-commit"}, command
        files = [word for word in command if re.match(r"(examples|tests)/.*\.\w+$", word)]
        assert all((ROOT / file).exists() for file in files), command
        script = next((ROOT / file for file in files if file.startswith("examples/") and file.endswith(".py")), None)
        if command[0] in ("python", "torchrun") and script and "trl" not in script.name:
            options = [
                word for word in command[command.index(str(script.relative_to(ROOT))) :] if word.startswith("--")
            ]
            assert all(f'"{option}"' in script.read_text(encoding="utf-8") for option in options), command


@pytest.mark.parametrize("text", blocks("yaml"))
def test_the_yaml_loads(text: str) -> None:
    assert yaml.safe_load(text)


def test_the_recipe_is_the_one_that_is_run() -> None:
    recipe = ROOT / "examples" / "recipes" / "own-files.yaml"
    assert recipe.read_text(encoding="utf-8").endswith(blocks("yaml", "commandline.md")[0])
    assert load_recipe(str(recipe), []).trial.task.label == "stars"


def test_files_that_are_named_exist() -> None:
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_the_pages_name_of_the_package_is_exported() -> None:
    text = "".join(page for name, page in PAGES.items() if name != "CHANGELOG.md")
    named = {name for line in re.findall(r"from aroma import ([\w, ]+)", text) for name in line.split(", ")}
    named |= set(re.findall(r"\baroma\.([A-Z]\w+)", text))
    assert named <= set(aroma.__all__)
    assert all(getattr(aroma, name).__name__ == name for name in named)


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(re.findall(r": (\S+\.md)", nav))


# Python --------------------------------------------------------------------------------------------------------------


def given(folder: Path, count: int = 160) -> dict[str, Any]:
    """What the pages take as given, `count` examples among it."""
    rows = examples(count)
    args = TrainingArguments(
        str(folder / "out"),
        max_steps=60,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    dataset = Dataset.from_dict({name: [row[name].tolist() for row in rows] for name in rows[0]})
    return {"base": tiny_bert(), "fresh_base": tiny_bert(), "args": args, "dataset": dataset, "Trainer": Trainer}


CHECKPOINTS = "Checkpoints of the Trainer"


def run(texts: Iterable[str], names: dict[str, Any]) -> dict[str, Any]:
    """Run blocks one after another; `names` are what they take as given, and get what they make."""
    for text in texts:
        exec(compile(text, "a page", "exec"), names)
    return names


def test_pages_with_python_are_those_that_run() -> None:
    pages = {name for name, language, _ in BLOCKS if language == "python"}
    here = "index guide settings compress serving distributed"
    assert pages == {"README.md", *(f"{page}.md" for page in here.split())}  # the README: test_snippets.py
    assert [*sections("serving.md")] == ["PEFT and transformers", CHECKPOINTS]


def test_start_here_and_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = torch.tensor(given(tmp_path)["dataset"][:4]["input_ids"])
    names = run(blocks("python", "index.md"), given(tmp_path))
    assert names["compress"].compression.size.share < 1
    with torch.no_grad():
        answers = [one.eval()(rows).logits for one in (names["trainer"].model, names["model"], tiny_bert())]
        served = run(sections("serving.md")["PEFT and transformers"], given(tmp_path))
        answers += [served["merged"].eval()(rows).logits]
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(answers[3], answers[0], rtol=0, atol=1e-5)
    assert float((answers[2] - answers[0]).abs().max()) > 1e-3


def test_choosing_settings() -> None:
    compressed, published = blocks("python", "settings.md")
    assert run([compressed], {})["config"].r == 16
    assert run([published], {})["config"].r == 1


def test_compress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    get_peft_model(tiny_bert(), config).save_pretrained("adapter")
    batches = [{name: value[None] for name, value in row.items()} for row in examples(20)]
    finished, trainer = blocks("python", "compress.md")
    names = run([finished], {"base": tiny_bert(), "batches": batches})
    assert names["found"].size.effect >= 0.998
    assert Path("smaller/adapter_model.safetensors").is_file()
    model = get_peft_model(tiny_bert(), LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS"))
    run([trainer], {**given(tmp_path), "model": model})["trainer"].train()
    config = model.peft_config["default"]
    assert config.lora_alpha == config.r, "it was compressed"


SECTIONS = ["The Trainer", "A loop of your own", "TRL", "Several adapters over one model", "Logs, events and reports"]


def test_every_section_of_the_guide_is_run() -> None:
    of_others = {"", "Preferences and reinforcement learning", "Other layers"}  # test_trl.py, and below
    assert {*GUIDE} == of_others | {*SECTIONS}


@pytest.mark.parametrize("section", slow_but(SECTIONS[:2], SECTIONS))
def test_the_scripts_of_the_guide(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {**given(tmp_path), "rows": examples(160)}
    fresh: Any = tiny_bert
    if section == "TRL":
        args = SFTConfig("out", max_steps=60, max_length=16, bf16=False, gradient_checkpointing=False, use_cpu=True)
        texts = Dataset.from_dict({"text": ["the cat sees a bird"] * 160})
        names |= {"dataset": texts, "args": args, "tokenizer": tokenizer()}
        fresh = partial(base, "llama")
    if section == "Several adapters over one model":
        names["model"] = get_peft_model(tiny_bert(), AromaConfig(task_type="SEQ_CLS"))
    run(GUIDE[""], names)
    for block in GUIDE[section]:  # each begins with the model as it was loaded
        run([block], names := names | {"base": fresh()})
    if section == "The Trainer":
        assert names["compress"].compression.size.effect >= 0.998
    if section in ("The Trainer", "A loop of your own"):
        assert Path("adapter/adapter_model.safetensors").is_file()
    if section == "Logs, events and reports":
        assert names["events"]
        assert Path("ranks.png").stat().st_size > 5000
        assert Path("report.html").stat().st_size > 100_000


def test_other_layers_on_the_guide(tmp_path: Path) -> None:
    images, of_experts = GUIDE["Other layers"]
    rows = [{name: value[0] for name, value in batch("vit", seed).items()} for seed in range(100)]
    names = run([*GUIDE[""], images], {**given(tmp_path), "base": base("vit"), "dataset": rows})
    assert any(isinstance(layer, torch.nn.Conv2d) for layer in names["model"].modules())
    assert names["model"].peft_config["default"].lora_alpha == names["model"].peft_config["default"].r, "compressed"
    run([of_experts], names)
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"vocab_size": 40, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4}
    model = get_peft_model(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)), names["config"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    found = aroma.compress(model, None, rank=2)
    assert {after for _, after in found.ranks.values()} == {2}


def test_resuming_as_on_the_pages(tmp_path: Path) -> None:
    names = given(tmp_path)
    changes = {"save_strategy": "steps", "max_steps": 40, "save_steps": 20, "save_total_limit": 1}
    args = TrainingArguments(**{**names["args"].to_dict(), **changes})
    method = {"task_type": "SEQ_CLS", "max_inner_steps": 20}
    model = get_peft_model(names["base"], AromaConfig(**method))
    trainer = Trainer(model, args, train_dataset=names["dataset"], callbacks=[aroma.AromaCallback()])
    trainer.train()
    run(sections("serving.md")[CHECKPOINTS], {"trainer": trainer, "aroma": aroma, "args": args})
    assert trainer.state.global_step == 40


IMPORTS = """
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import *
from torch.distributed.fsdp import fully_shard
from aroma import AromaConfig, attach, save_adapter
"""


@pytest.mark.slow
def test_fsdp2_in_a_process_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train, forms, save, resume, *of_zero = blocks("python", "distributed.md")
    assert len(of_zero) == 3
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        names: dict[str, Any] = {"base": base("llama").train(), "folder": "out/checkpoint", "batches": batches(60)}
        exec(IMPORTS, names)
        exec(train, names)
        assert aroma.verify_adapter("out")
        exec(forms, names)
        assert aroma.verify_adapter("out/checkpoint")
        exec(save, names)
        again: dict[str, Any] = {"folder": "out/checkpoint", "torch": torch}
        exec(IMPORTS, again)
        again["model"] = get_peft_model(base("llama").train(), AromaConfig(task_type="CAUSAL_LM"))
        exec("fully_shard(model)", again)
        exec(resume, again)
        for one in (names, again):  # both go on
            one["batches"] = batches(5, seed=1)
            exec("for batch in batches:" + train.partition("for batch in batches:")[2].rpartition("save_")[0], one)
        for one, other in zip(names["model"].parameters(), again["model"].parameters(), strict=True):
            assert torch.equal(one.full_tensor(), other.full_tensor())
    finally:
        dist.destroy_process_group()


def batches(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [batch("llama", seed * count + number) for number in range(count)]


@pytest.mark.slow
def test_zero_in_a_process_of_one(tmp_path: Path, deepspeed: dict[str, str]) -> None:
    (tmp_path / "blocks.json").write_text(json.dumps(blocks("python", "distributed.md")[4:]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += [str(Path(__file__).parent / "zero_runs.py"), "page", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **deepspeed}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert aroma.verify_adapter(tmp_path / "adapter")
