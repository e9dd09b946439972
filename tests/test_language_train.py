"""A language model through `aroma train` and through an experiment, with the same promises as for classifiers."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from sacrebleu import corpus_chrf
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from aroma.cli import main
from aroma.errors import ConfigError, DataError
from aroma_lab.language.data import examples_of
from aroma_lab.language.encode import NOT_LEARNED, encode_chat
from aroma_lab.language.job import LanguageJob
from aroma_lab.language.model import load_for_inference
from aroma_lab.run.recipe import make_recipe
from aroma_lab.run.run import job_of, run_trial
from aroma_lab.run.trial import Trial
from aroma_lab.specs import ModelSpec, TaskSpec, TrainSpec
from aroma_lab.tasks.sources import read_located
from quick import slow_but
from tiny_lm import questions, save_tiny_lm, tiny_tokenizer, write_json_lines

STEPS = 30


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    save_tiny_lm(folder / "model")
    write_json_lines(folder / "train.jsonl", questions(80, seed=1))
    write_json_lines(folder / "test.jsonl", questions(23, seed=2))
    return folder


def values_of(files: Path, out: str, **changes: Any) -> dict[str, Any]:
    """Values of a recipe by dotted key."""
    return {
        "model.name": str(files / "model"),
        "data.kind": "causal_lm",
        "data.train": str(files / "train.jsonl"),
        "data.reported": {"test": str(files / "test.jsonl")},
        "data.held_out": 0.2,
        "data.max_length": 64,
        "adapter.max_inner_steps": 8,
        "adapter.inner_check_interval": 2,
        "adapter.rewarmup_steps": 2,
        "training.max_steps": STEPS,
        "training.batch_size": 8,
        "training.learning_rate": 0.01,
        "training.warmup_steps": 3,
        "training.save_steps": 20,
        "training.logging_steps": 1,
        "output": str(files / out),
        **changes,
    }


def run(files: Path, out: str, **changes: Any) -> Path:
    """Run a recipe."""
    run_trial(make_recipe(values_of(files, out, **changes)).trial, files / out, keep_checkpoints=True)
    return files / out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def losses(folder: Path) -> list[float]:
    return [loss for _, loss in read(folder / "history.json")["loss"]]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(files: Path) -> Path:
    nested: dict[str, Any] = {}
    for key, value in values_of(files, "run").items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    (files / "recipe.yaml").write_text(yaml.safe_dump(nested))
    assert main(["train", str(files / "recipe.yaml")]) == 0
    return files / "run"


# A run ---------------------------------------------------------------------------------------------------------------


def test_it_learns_and_plain_peft_loads_it(files: Path, finished: Path) -> None:
    told = losses(finished)
    assert len(told) == STEPS
    assert told[-1] < told[0] - 1
    result = read(finished / "result.json")
    assert result["examples"] == {"train": 64, "held_out": 16, "test": 23}
    assert set(result["reported"]) == {"test"}
    assert result["total_rank"] == sum(result["ranks"].values()) > 14
    assert result["parameters"]["head"] == 0
    config = read(finished / "adapter" / "adapter_config.json")
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(files / "model")
    loaded = PeftModel.from_pretrained(base, str(finished / "adapter")).eval()
    measured = result["reported"]["test"]
    assert mean_loss(loaded, files) == pytest.approx(measured["loss"], rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))
    page = (finished / "report.html").read_text()
    assert re.search(rf"perplexity, test</\w+>\s*<[^>]*>\s*{measured['perplexity']:.4f}", page), "the headline"


def test_its_adapter_merges_into_the_model_that_the_recipe_names(files: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    # As after a conversion on another machine: the folder that PEFT recorded is not there.
    config = {**read(tmp_path / "adapter" / "adapter_config.json"), "base_model_name_or_path": "/not/here"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--merged"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    measured = read(finished / "result.json")["reported"]["test"]["loss"]
    assert mean_loss(merged, files) == pytest.approx(measured, rel=1e-4)


def mean_loss(model: Any, files: Path) -> float:
    """Mean over the tokens of all test responses, one example after the other, by hand."""
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    total, tokens = 0.0, 0
    for example in examples_of(read_located("data.test", str(files / "test.jsonl"))):
        assert isinstance(example.content, list)
        ids, labels = encode_chat(tokenizer, example.content, "row")
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        total += float(cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="sum"))
        tokens += sum(label != NOT_LEARNED for label in labels)
    return total / tokens


@pytest.mark.parametrize("packing", slow_but([False], [False, True]))
def test_a_killed_run_ends_like_an_uninterrupted_one(files: Path, finished: Path, packing: bool) -> None:
    changes = {"training.packing": True, "data.max_length": 128} if packing else {}
    whole = run(files, "whole-packed", **changes) if packing else finished
    again = files / f"again-{packing}"
    again.mkdir()
    for name in ("trial.json", "events.jsonl"):
        shutil.copy(whole / name, again / name)
    shutil.copytree(whole / "checkpoints" / "checkpoint-20", again / "checkpoints" / "checkpoint-20")
    overrides = [f"{key}={str(value).lower()}" for key, value in changes.items()]
    assert main(["train", str(files / "recipe.yaml"), f"output={again}", *overrides, "--resume"]) == 0
    assert yaml.safe_load((again / "recipe.yaml").read_text())["output"] == str(again)
    assert read(again / "history.json") == read(whole / "history.json")
    assert (again / "events.jsonl").read_text() == (whole / "events.jsonl").read_text()
    one, other = adapter(again), adapter(whole)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


UNEVEN = [{"text": "bird " * (3 if number % 3 else 20)} for number in range(43)]
"""Rows of 3 words and of 20: the mean over tokens is not the mean of the means."""


def test_micro_batches_are_weighed_by_their_tokens(files: Path) -> None:
    train = str(write_json_lines(files / "uneven.jsonl", UNEVEN))
    changes: dict[str, Any] = {"data.train": train, "data.reported": None, "training.max_steps": 4}
    changes |= {"training.warmup_steps": 1, "adapter.max_inner_steps": 4}
    whole = run(files, "whole", **changes)
    parts = run(files, "parts", **changes, **{"training.batch_size": 2, "training.gradient_accumulation_steps": 4})
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.slow
def test_packed_rows_learn_the_same(files: Path) -> None:
    # Steps over all examples: packed or not, it is the mean loss of the same tokens.
    changes: dict[str, Any] = {"training.max_steps": 3, "training.warmup_steps": 1, "adapter.max_inner_steps": 2}
    changes["training.batch_size"] = 64
    plain = run(files, "plain", **changes)
    packed = run(files, "packed", **changes, **{"training.packing": True})
    assert losses(packed) == pytest.approx(losses(plain), rel=1e-4)
    one, other = (read(out / "result.json")["reported"]["test"]["loss"] for out in (packed, plain))
    assert one == pytest.approx(other, rel=1e-4)
    recipe = make_recipe(values_of(files, "x", **{"training.packing": True, "data.max_length": 128}))
    assert len(job_of(recipe.trial).rows["train"]) == 64 / 2  # two of some 46 tokens fit into 128


def test_adapters_on_a_quantized_base_stay_in_float32(tmp_path: Path, files: Path) -> None:
    torch.manual_seed(0)  # bitsandbytes needs rows of at least a block, 64
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer()), max_position_embeddings=128, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    changes = {"model.name": str(tmp_path / "model"), "model.quantization": "nf4", "model.dtype": "bfloat16"}
    out = run(files, "quantized", **changes, **{"training.max_steps": 10, "adapter.max_inner_steps": 4})
    for tensor in adapter(out).values():
        assert tensor.dtype is torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float())


def test_what_was_cut_is_told(files: Path, capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    changes = ["data.max_length=20", "training.max_steps=4", "training.warmup_steps=1", "adapter.max_inner_steps=2"]
    assert main(["train", str(files / "recipe.yaml"), f"output={files / 'cut'}", *changes]) == 0
    assert "64 prompts cut from the left" in " ".join(capsys.readouterr().out.split())
    assert any("64 prompts cut" in note for note in read(files / "cut" / "result.json")["notes"])


# What cannot work ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data.kind": "classification"}, DataError, "it has no column 'text', 'label'"),
        ({"data.max_length": 500}, ConfigError, "data.max_length=500"),
        ({"data.train": "nowhere.jsonl"}, DataError, "data.train='nowhere.jsonl'"),
        ({"data.max_length": 3}, DataError, "no example is left to learn from"),
        ({"data.text": "body"}, DataError, "name its columns messages"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    files: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(files, "refused", **changes)
    assert not (files / "refused").exists()


def test_adapted_output_embeddings_are_refused(files: Path) -> None:
    with pytest.raises(ConfigError, match="target_modules='lm_head': TRL computes the loss without"):
        run(files, "output", **{"adapter.target_modules": ["q_proj", "lm_head"]})


# In an experiment ----------------------------------------------------------------------------------------------------


GROWING = {"max_inner_steps": 4, "inner_check_interval": 2, "rewarmup_steps": 1}


@pytest.mark.slow
def test_methods_train_and_are_scored_on_whole_sets(files: Path, tmp_path: Path) -> None:
    options = {"source": str(files), "reported": {"easy": "test.jsonl"}, "max_length": 64, "held_out": 0.25}
    task = TaskSpec(name="reasoning", kind="commonsense", train_examples=50, **options)
    loop = TrainSpec(max_steps=12, batch_size=8, warmup_steps=2, learning_rate=0.01, save_steps=None, threads=1)
    methods: dict[str, dict[str, Any]] = {
        "adalora": {"init_r": 3, "target_r": 2},
        "aroma": {**GROWING, "target_modules": ["q_proj", "v_proj"]},
        "full": {},
    }
    for kind, some in methods.items():
        trial = Trial(kind, str(files / "model"), task, kind, kind, some, loop)
        result = run_trial(trial, tmp_path / kind)
        assert result["examples"] == {"train": 50, "held_out": 20, "easy": 23}
        hits = result["reported"]["easy"]["accuracy"] * 23
        assert hits == pytest.approx(round(hits))
        assert result["score"] == result["reported"]["easy"]["accuracy"]
        assert 0 < result["held_out_loss"] < 10
    assert set(result["reported"]["easy"]) == {"accuracy"}


def texts_of(spec: dict[str, Any], files: Path, **options: Any) -> Any:
    task = TaskSpec(name="texts", **{"held_out": 0.25, "max_length": 32, **spec})
    return LanguageJob(task, ModelSpec(str(files / "model")), False, **options)


def test_a_task_of_plain_text_reads_its_column(files: Path, tmp_path: Path) -> None:
    texts = [f"bird {number} sings" for number in range(8)]
    for split, some in (("train", texts), ("test", ["fish swím"])):
        rows = [{"instruction": "no", "output": "no", "body": text} for text in some]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = {"kind": "causal_lm", "source": str(tmp_path), "text": "body", "train_examples": 5, "held_out_examples": 1}
    job = texts_of(spec, files)
    assert {split: len(part) for split, part in job.parts.items()} == {"train": 5, "held_out": 1, "test": 1}
    assert job.parts["test"][0].content == "fish swím"
    assert not {one.content for one in job.parts["train"]} & {one.content for one in job.parts["held_out"]}
    model = job.load_model().eval()
    (row,) = job.rows["test"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    nats = float(cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]), reduction="sum"))
    found = job.predict(model, "test", 4).metrics["bits_per_byte"]
    assert found == pytest.approx(nats / math.log(2) / len("fish swím".encode()), rel=1e-5)
    assert set(texts_of(spec, files, reported=False).parts) == {"train", "held_out"}


def test_news_articles_are_a_task_of_plain_text(files: Path) -> None:
    job = texts_of({"kind": "causal_lm", "source": "bbc-news", "train_examples": 3, "held_out_examples": 2}, files)
    assert {split: len(part) for split, part in job.parts.items()} == {"train": 3, "held_out": 2, "test": 445}
    split = {"train": "train/tech", "reported": {"test": "test/tech"}}
    tech = texts_of({"kind": "causal_lm", "source": "bbc-news", **split}, files)
    assert {split: len(part) for split, part in tech.parts.items()} == {"train": 240, "held_out": 81, "test": 80}


# After training ------------------------------------------------------------------------------------------------------


def test_whatever_a_run_leaves_is_asked_as_in_training(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "model", tmp_path / "model")  # without a chat template, so that it gets the plain one
    tiny_tokenizer(chat_template=False).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    out = run(files, "plain-template", **{"model.name": str(tmp_path / "model")})
    assert main(["export", str(out / "adapter"), str(tmp_path / "merged"), "--merged"]) == 0
    assert main(["export", str(out / "adapter"), str(tmp_path / "uniform"), "--uniform"]) == 0
    folders = [out / "adapter", out / "checkpoints" / "checkpoint-20", tmp_path / "merged", tmp_path / "uniform"]
    # And by other programs, which know the tokenizer alone.
    tokenizers = [load_for_inference(folder).tokenizer for folder in folders]
    tokenizers.append(AutoTokenizer.from_pretrained(out / "adapter"))
    chat = [{"role": "system", "content": "bird"}, {"role": "user", "content": "Please choose"}]
    prompts = [one.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for one in tokenizers]
    assert prompts == ["Context:\nbird\n\nRequest:\nPlease choose\n\nReply:\n"] * 5


def test_generated_responses_are_scored_by_chrf(files: Path, finished: Path) -> None:
    spec = {"kind": "causal_lm", "source": str(files), "train": "train.jsonl", "metric": "chrf", "max_length": 64}
    job = texts_of({**spec, "reported": {"test": "test.jsonl"}}, files)
    model = PeftModel.from_pretrained(job.load_model(), str(finished / "adapter")).eval()
    said = [greedy_response(model, job.tokenizer, example) for example in job.parts["test"]]
    expected = [example.content[-1]["content"] for example in job.parts["test"]]
    by_hand = corpus_chrf(said, [expected]).score / 100
    assert 0.2 < by_hand < 1
    for batch_size in (1, 5):
        assert job.predict(model, "test", batch_size).metrics["chrf"] == pytest.approx(by_hand, abs=1e-9)


def greedy_response(model: Any, tokenizer: Any, example: Any) -> str:
    prompt = tokenizer.apply_chat_template(example.content[:-1], tokenize=False, add_generation_prompt=True)
    given = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = [*given]
    while len(ids) < 64 and ids[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[len(given) :], skip_special_tokens=True).strip()


def test_plain_texts_have_no_responses_to_score(files: Path, tmp_path: Path) -> None:
    write_json_lines(tmp_path / "train.jsonl", [{"text": f"bird {number} sings"} for number in range(8)])
    with pytest.raises(ConfigError, match=r"^data\.metric='chrf': it compares responses, and these are plain texts"):
        texts_of({"kind": "causal_lm", "source": str(tmp_path), "metric": "chrf"}, files, reported=False)
