"""Every code block of the docs: Python runs, commands parse, YAML loads; what the pages name is there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
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


USAGE = {
    title: text
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGES["usage.md"], flags=re.DOTALL | re.MULTILINE)
    if "```python" in text
}


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
    assert len(ours) > 50
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


def test_the_recipe_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(blocks("yaml", "commandline.md")[0])
    recipe = load_recipe("recipe.yaml", [])
    assert (recipe.model.name, recipe.adapter, recipe.data.label) == ("minilm", {}, "stars")


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


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    for block in blocks("python", page):
        exec(compile(block, page, "exec"), names)
    return names


def test_pages_with_python_are_those_that_run() -> None:
    of_others = {"README.md", "reinforcement.md"}  # test_snippets.py, test_trl.py
    here = "index evidence serving settings usage files precision distributed layers"
    pages = {name for name, language, _ in BLOCKS if language == "python"}
    assert pages == of_others | {f"{page}.md" for page in here.split()}


def test_start_here_and_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = torch.tensor(given(tmp_path)["dataset"][:4]["input_ids"])
    names = run("index.md", given(tmp_path))
    with torch.no_grad():
        answers = [one.eval()(rows).logits for one in (names["trainer"].model, names["model"], tiny_bert())]
        served = run("serving.md", given(tmp_path))
        answers += [served["merged"].eval()(rows).logits]
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(answers[3], answers[0], rtol=0, atol=1e-5)
    assert float((answers[2] - answers[0]).abs().max()) > 1e-3


def test_evidence_in_the_trainer_and_in_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    in_trainer, in_loop = blocks("python", "evidence.md")
    names = {**given(tmp_path), "aroma": aroma}
    exec(compile(in_trainer, "evidence.md", "exec"), names)
    assert len(names["callback"].history) == 2
    assert Path("adapter/adapter_model.safetensors").is_file()
    model = get_peft_model(tiny_bert(), LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query"]))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    few = [{name: value[None] for name, value in row.items()} for row in examples(20)]
    names |= {"model": model, "optimizer": optimizer, "scheduler": scheduler, "batches": few[:10]}
    names |= {"training": few * 20}
    exec(compile(in_loop, "evidence.md", "exec"), names)
    assert [found.step for found in names["checkups"].history] == [400]


def test_choosing_settings(tmp_path: Path) -> None:
    names = run("settings.md", given(tmp_path))
    assert names["config"].r == 1


def test_other_layers(tmp_path: Path) -> None:
    images, of_experts = blocks("python", "layers.md")
    rows = [{name: value[0] for name, value in batch("vit", seed).items()} for seed in range(100)]
    names = {**given(tmp_path), "base": base("vit"), "dataset": rows}
    exec(compile(images, "layers.md", "exec"), names)
    assert any(isinstance(layer, torch.nn.Conv2d) for layer in names["model"].modules())
    exec(compile(of_experts, "layers.md", "exec"), names)
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"vocab_size": 40, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4}
    model = get_peft_model(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)), names["config"])
    assert [*aroma.compact(model).values()] == [1], "nothing is trained: one zero direction"


@pytest.mark.parametrize("section", slow_but(["The Trainer", "A loop of your own"], USAGE))
def test_the_scripts_of_usage(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {**given(tmp_path), "rows": examples(160)}
    first = next(iter(USAGE))
    if section == "TRL":
        args = SFTConfig("out", max_steps=60, max_length=16, bf16=False, gradient_checkpointing=False, use_cpu=True)
        texts = Dataset.from_dict({"text": ["the cat sees a bird"] * 40})
        names |= {"base": base("llama"), "dataset": texts, "args": args, "tokenizer": tokenizer()}
    # The page is read from the top: a section goes on from what the first one has made.
    beginning = (
        [] if section == first else re.findall(r"```python\n(.*?)trainer = ", USAGE[first], flags=re.DOTALL)[:1]
    )
    for block in [*beginning, *re.findall(r"```python\n(.*?)```", USAGE[section], flags=re.DOTALL)]:
        exec(compile(block, f"usage.md, {section}", "exec"), names)
    if section == "What a run tells":
        assert names["events"]
        assert Path("ranks.png").stat().st_size > 5000
    if section == "A report to look at":
        assert Path("report.html").stat().st_size > 100_000


def test_resuming_as_on_the_page_of_files_and_of_precisions(tmp_path: Path) -> None:
    names = given(tmp_path)
    args = TrainingArguments(
        **{
            **names["args"].to_dict(),
            "save_strategy": "steps",
            "max_steps": 40,
            "save_steps": 20,
            "save_total_limit": 1,
        }
    )
    method = {"task_type": "SEQ_CLS", "max_inner_steps": 20}
    model = get_peft_model(names["base"], AromaConfig(**method))
    trainer = Trainer(model, args, train_dataset=names["dataset"], callbacks=[aroma.AromaCallback()])
    trainer.train()
    folder = aroma.last_complete_checkpoint(args.output_dir)
    run("files.md", {"trainer": trainer, "aroma": aroma, "args": args})
    assert trainer.state.global_step == 40

    model = get_peft_model(tiny_bert(), AromaConfig(**method))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    from peft import load_peft_weights, set_peft_model_state_dict

    names = {"load_peft_weights": load_peft_weights, "set_peft_model_state_dict": set_peft_model_state_dict}
    names |= {"attach": aroma.attach, "folder": folder, "model": model, "optimizer": optimizer}
    run("precision.md", names)


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
