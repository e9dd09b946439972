"""Models that see: which modules grow, what is saved, and that plain PEFT and a merge give the same answers."""

from __future__ import annotations

import copy
import json
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import kinds_runs
from aroma import AromaCallback, AromaConfig, aroma_layers, attach
from aroma.cli import main
from aroma.errors import ConfigError
from aroma.export import export_merged, export_uniform, rank_table
from quick import slow_but
from ranks import launch

transformers.logging.set_verbosity_error()

LABELS, TOKENS, SIDE = 3, 6, 16
IMAGE_TOKEN = 39
"""The last of a vocabulary of 40: a place for one patch of an image."""


def pictured(seed: int, **others: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(4, 3, SIDE, SIDE, generator=generator), **others}


def labelled(seed: int) -> dict[str, Any]:
    return pictured(seed, labels=torch.arange(4) % LABELS)


def captioned(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = torch.randint(3, 38, (4, TOKENS), generator=generator)
    tokens[:, -1] = 2  # where CLIP reads its text from
    return pictured(seed, input_ids=tokens, attention_mask=torch.ones_like(tokens), return_loss=True)


def asked(seed: int) -> dict[str, Any]:
    """Return images, each as four tokens, before a text to be continued."""
    generator = torch.Generator().manual_seed(seed + 1)
    text = torch.randint(3, 38, (4, TOKENS), generator=generator)
    tokens = torch.cat([torch.full((4, 4), IMAGE_TOKEN), text], 1)
    labels = tokens.masked_fill(tokens == IMAGE_TOKEN, -100)
    return pictured(seed, input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels)


@dataclass(frozen=True)
class Family:
    """How to build a model, what it eats, and what of it grows.

    Args:
        make: Makes the model, at random.
        batch: Seed → inputs from which it computes a loss.
        targets: `target_modules`.
        grows: How many modules of which kind that must be.
        adapter: Further arguments of the configuration.
        answer: The field of the output that is compared.
    """

    make: Callable[[], Any]
    batch: Callable[[int], dict[str, Any]]
    targets: list[str]
    grows: dict[str, int]
    adapter: dict[str, Any]
    answer: str = "logits"


TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
EYE = {**TOWER, "image_size": SIDE, "patch_size": 8}
READER = {**TOWER, "vocab_size": 40, "max_position_embeddings": TOKENS, "bos_token_id": 1, "eos_token_id": 2}
HEAD = {"modules_to_save": ["classifier"]}
ATTENTION = ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]


def two_towers(kind: str) -> Any:
    config, model = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}Model")
    return model(config(text_config={**READER, "projection_size": 16}, vision_config=EYE, projection_dim=8))


def llava() -> Any:
    text = transformers.LlamaConfig(**{**READER, "max_position_embeddings": 32}, num_key_value_heads=1)
    eye = transformers.CLIPVisionConfig(**{**EYE, "num_hidden_layers": 2})
    config = transformers.LlavaConfig(vision_config=eye, text_config=text, image_token_id=IMAGE_TOKEN)
    return transformers.LlavaForConditionalGeneration(config)


FAMILIES = {
    "vit": Family(
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**EYE, num_labels=LABELS)),
        labelled,
        [*ATTENTION, "o_proj", "patch_embeddings.projection"],
        {"Linear": 6, "Conv2d": 1},
        HEAD,
    ),
    "swin": Family(
        lambda: transformers.SwinForImageClassification(
            transformers.SwinConfig(
                image_size=SIDE,
                patch_size=2,
                embed_dim=8,
                depths=[2, 1],
                num_heads=[2, 2],
                window_size=2,
                drop_path_rate=0.0,  # it is drawn in every forward, and no generator is restored here
                initializer_range=0.2,
                num_labels=LABELS,
            )
        ),
        labelled,
        [*ATTENTION, "o_proj", "reduction", "projection"],
        {"Linear": 3 * 6 + 1, "Conv2d": 1},
        HEAD,
    ),
    "convnext": Family(
        lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(
                hidden_sizes=[8, 12],
                depths=[1, 1],
                num_stages=2,
                layer_scale_init_value=1.0,
                initializer_range=0.2,
                num_labels=LABELS,
            )
        ),
        labelled,
        ["pwconv1", "pwconv2", "patch_embeddings", "downsampling_layer.1"],
        {"Linear": 4, "Conv2d": 2},
        HEAD,
    ),
    "clip": Family(
        lambda: two_towers("CLIP"),
        captioned,
        [*ATTENTION, "out_proj", "visual_projection", "text_projection", "patch_embedding", "token_embedding"],
        {"Linear": 2 * 6 + 2, "Conv2d": 1, "Embedding": 1},
        {},
        "logits_per_image",
    ),
    "siglip": Family(
        lambda: two_towers("Siglip"),
        captioned,
        [*ATTENTION, "self_attn.out_proj", "patch_embedding", "position_embedding"],
        # The pooling of the eye has an MLP of its own.
        {"Linear": 2 * 6 + 2, "Conv2d": 1, "Embedding": 2},
        {},
        "logits_per_image",
    ),
    "llava": Family(
        llava,
        asked,
        [*ATTENTION, "out_proj", "o_proj", "up_proj", "linear_1", "patch_embedding", "embed_tokens"],
        # Two layers of the eye, one of the text, and the projector. The last layer of the eye is never read.
        {"Linear": 2 * 6 + 5 + 1, "Conv2d": 1, "Embedding": 1},
        {"task_type": "CAUSAL_LM"},
    ),
}

RULE = {"max_inner_steps": 4, "inner_check_interval": 2, "outer_tolerance": 1e-4, "rewarmup_steps": 1}
STEPS = 14


def base(name: str) -> Any:
    torch.manual_seed(1)
    return FAMILIES[name].make().eval()


def adapted(name: str, **changes: Any) -> Any:
    family = FAMILIES[name]
    fields = {"target_modules": family.targets, "component_seed": 5, **family.adapter, **RULE, **changes}
    return get_peft_model(base(name), AromaConfig(**fields)).eval()


@torch.no_grad()
def answer(model: Any, name: str, seed: int = 12) -> Tensor:
    found: Tensor = getattr(model.eval()(**FAMILIES[name].batch(seed)), FAMILIES[name].answer)
    return found


def train(model: Any, name: str, start: int = 0, stop: int = STEPS, resume: Path | None = None) -> Any:
    """Train steps start to stop, on two batches in turn."""
    if resume is not None:
        model.load_adapter(str(resume), "default", is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if resume is not None:
        optimizer.load_state_dict(torch.load(resume / "optimizer.pt"))
    growth = attach(model, optimizer, total_steps=STEPS + 10, resume_from=resume)
    model.train()
    for step in range(start, stop):
        model(**FAMILIES[name].batch(step % 2)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return growth, optimizer


@pytest.mark.parametrize("name", slow_but(["convnext", "clip"], FAMILIES))
def test_grown_saved_reloaded_and_merged(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    model = adapted(name)
    torch.testing.assert_close(answer(model, name), answer(base(name), name), rtol=0, atol=0)
    kinds = [type(layer.get_base_layer()).__name__ for layer in aroma_layers(model).values()]
    assert {kind: kinds.count(kind) for kind in kinds} == family.grows
    train(model, name)
    ranks = {module: layer.rank("default") for module, layer in aroma_layers(model).items()}
    grown = {kind for kind, rank in zip(kinds, ranks.values(), strict=True) if rank > 1}
    assert grown == {*family.grows}
    assert max(ranks.values()) > 1

    expected = answer(model, name)
    assert (expected - answer(base(name), name)).abs().max() > 0.05
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    assert {row.name: row.rank for row in rank_table(folder)} == ranks
    export_uniform(folder, tmp_path / "uniform")
    for saved in (folder, tmp_path / "uniform"):
        loaded = PeftModel.from_pretrained(base(name), saved)
        assert type(loaded.base_model).__name__ == "LoraModel"
        torch.testing.assert_close(answer(loaded, name), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer(loaded.merge_and_unload(), name), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer(model.merge_and_unload(), name), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_resumed_exactly(tmp_path: Path, name: str) -> None:
    whole, first, second = (adapted(name) for _ in range(3))
    middle = STEPS - 5
    train(whole, name)
    _, optimizer = train(first, name, stop=middle)
    first.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(second, name, start=middle, resume=tmp_path)
    assert torch.equal(answer(whole, name), answer(second, name))
    assert not torch.equal(answer(whole, name), answer(first, name))


def test_export_of_the_merged_model(tmp_path: Path) -> None:
    base("vit").save_pretrained(tmp_path / "base")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, AromaConfig(target_modules=["projection", "fc1"], **HEAD, **RULE)).eval()
    train(model, "vit")
    model.save_pretrained(tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.ViTForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(merged, "vit"), answer(model, "vit"), rtol=1e-4, atol=1e-4)


def test_all_linear_leaves_convolutions_and_embeddings_alone_as_in_peft() -> None:
    model = adapted("clip", target_modules="all-linear")
    assert {type(layer.get_base_layer()) for layer in aroma_layers(model).values()} == {nn.Linear}
    excluded = ["head.attention.out_proj"]  # as docs/vision.md says
    assert aroma_layers(adapted("siglip", target_modules="all-linear", exclude_modules=excluded))


@pytest.mark.parametrize(
    ("name", "targets", "reason"),
    [
        ("convnext", ["dwconv"], r"it is a Conv2d, and groups=8 \(depthwise"),
        # The pooling of SigLIP's eye is a torch.nn.MultiheadAttention.
        ("siglip", "all-linear", "torch.nn.MultiheadAttention reads the weight"),
    ],
)
def test_what_cannot_grow_is_named(name: str, targets: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^target_modules='.*': .*{reason}.*exclude_modules$"):
        adapted(name, target_modules=targets)


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = str(Path(__file__).parent.parent / "examples" / "vision.py")
    monkeypatch.chdir(tmp_path)
    seeds, steps = ["--seeds", "1", "--first-seed", "7"], ["--pretrain-steps", "60", "--steps", "60"]
    monkeypatch.setattr("sys.argv", [example, *seeds, *steps])
    runpy.run_path(example, run_name="__main__")
    printed = capsys.readouterr().out
    assert "seed 7: the base knows [1, 3, 4, 7, 8] (" in printed
    assert "%); 628 images of the others" in printed
    out = tmp_path / "out" / "vision"
    written = json.loads((out / "digits.json").read_text())
    methods = [run["method"] for run in written["runs"]]
    loras = ["LoRA r=1", "LoRA r=4", "LoRA r=8"]
    assert methods == ["head alone", *loras, "AROMA"]
    assert {run["seed"] for run in written["runs"]} == {7}
    assert {"versions", "git_revision", "steps"} <= {*written}
    for run in written["runs"]:
        assert f"  {run['method']}: {run['accuracy']:.1%} of 270 test images" in printed
    assert (out / "digits.md").read_text() in printed
    ranks = dict(zip(written["modules"], written["runs"][-1]["ranks"], strict=True))
    assert len(ranks) == 13
    assert {row.name: row.rank for row in rank_table(out / "digits-7")} == ranks
    with pytest.raises(SystemExit):
        runpy.run_path(example, run_name="__main__")
    assert "digits.json exists: give another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    launch(2, kinds_runs.__file__, str(tmp_path))
    for way in kinds_runs.WAYS:
        found = torch.load(tmp_path / f"{way}.pt")
        alone = kinds_runs.updates(way, tmp_path)
        for name, update in alone.items():
            torch.testing.assert_close(found[name], update, rtol=1e-6, atol=1e-9)
            assert update.any(), "it has grown"
        one, two = (
            {row.name: row.rank for row in rank_table(tmp_path / f"{way}-{processes}")} for processes in (1, 2)
        )
        assert one == two


# Embeddings that an output layer shares ------------------------------------------------------------------------------


def language_model(tied: bool, kind: str = "llama") -> Any:
    torch.manual_seed(2)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=tied
            )
        )
    config = transformers.LlamaConfig(
        **{**READER, "max_position_embeddings": 32}, num_key_value_heads=1, tie_word_embeddings=tied
    )
    return transformers.LlamaForCausalLM(config)


def words(seed: int = 0) -> dict[str, Tensor]:
    tokens = torch.randint(3, 38, (4, TOKENS), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}


def trained_on_words(tied: bool, targets: list[str], kind: str = "llama", **fields: Any) -> Any:
    config = AromaConfig(target_modules=targets, task_type="CAUSAL_LM", **RULE, **fields)
    model = get_peft_model(language_model(tied, kind), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attach(model, optimizer, total_steps=20)
    for _ in range(10):
        model(**words()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_what_else_reads_such_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    language_model(False).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    targets = ["embed_tokens", "q_proj"]
    model = get_peft_model(model, AromaConfig(target_modules=targets, task_type="CAUSAL_LM", **RULE))
    rows = [{name: tensor[0] for name, tensor in words(seed).items()} for seed in range(8)]
    options = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    arguments = transformers.TrainingArguments(str(tmp_path / "out"), report_to=[], disable_tqdm=True, **options)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, callbacks=[AromaCallback(report=tmp_path / "report.html")]
    )
    trainer.train()
    model.save_pretrained(tmp_path / "adapter")
    assert "embed_tokens" in (tmp_path / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert "embed_tokens" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "adapter"), "--json"]) == 0
    found = {one["name"]: one["rank"] for one in json.loads(capsys.readouterr().out)["matrices"]}
    assert found == {name: layer.rank("default") for name, layer in aroma_layers(model).items()}
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "it.gguf"), "--gguf"]) == 2
    assert "error: target_modules='model.embed_tokens': only self_attn.q_proj" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(("kind", "targets"), [("llama", ["embed_tokens", "lm_head", "q_proj"]), ("gpt2", ["wte"])])
def test_an_embedding_is_saved_as_plain_lora_whole_or_not(tmp_path: Path, kind: str, targets: list[str]) -> None:
    # PEFT knows by the name that embed_tokens is a target, and takes wte with all that is in it.
    model = trained_on_words(False, targets, kind)
    expected = model(**words(3)).logits
    for whole in (True, False):
        folder = tmp_path / str(whole)
        model.save_pretrained(folder, save_embedding_layers=whole)
        loaded = PeftModel.from_pretrained(language_model(False, kind), folder)
        torch.testing.assert_close(loaded(**words(3)).logits, expected, rtol=1e-4, atol=1e-5)
        ranks = {name: layer.rank("default") for name, layer in aroma_layers(model).items()}
        assert {row.name: row.rank for row in rank_table(folder)} == ranks
        sizes = [(folder / "adapter_model.safetensors").stat().st_size for folder in tmp_path.iterdir()]
    assert len({*sizes}) == 2


def test_a_weight_that_two_layers_share_is_not_merged(tmp_path: Path) -> None:
    model = trained_on_words(True, ["embed_tokens"])
    before = copy.deepcopy(model.base_model.model.lm_head.weight)
    with pytest.raises(
        ConfigError, match=r"^target_modules='model\.embed_tokens': another module has the same weight"
    ):
        model.merge_and_unload()
    assert torch.equal(model.base_model.model.lm_head.weight, before)
    with pytest.raises(ConfigError, match=r"target_modules='model\.embed_tokens'"):
        model.merge_adapter()
    language_model(True).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"target_modules='model\.embed_tokens'"):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base_model=str(tmp_path / "base"))
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ConfigError, match=r"^ensure_weight_tying=True: .*leave it out"):
        trained_on_words(True, ["embed_tokens"], ensure_weight_tying=True)
