"""Quantised, 16-bit and mixed-precision training: what is kept in float32, and that small updates survive."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer

from aroma import AromaCallback, AromaConfig, Event, aroma_layers, attach, save_adapter
from aroma.errors import ConfigError
from aroma.export import export_merged
from aroma.tuner import AromaLinear
from aroma_lab.specs import ModelSpec
from aroma_lab.tasks.model import loading_options
from models import adapted, batch, deltas, grow, logits, ranks, train, trainable, unlike
from trainer_runs import adapted as adapted_bert
from trainer_runs import assert_same, growth, tiny_bert, trainer_for

STEPS = 10
KINDS = ["nf4", "int8"]


# Quantised bases -----------------------------------------------------------------------------------------------------


@cache
def sixteen_bit_folder(home: Path) -> str:
    """A Llama of width 64, as bitsandbytes' blocks want it, saved in bfloat16."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(home)
    return str(home)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sixteen_bit_folder(tmp_path_factory.mktemp("llama"))


def quantised_base(folder: str, kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    options = loading_options(ModelSpec("any", quantization=kind))
    return AutoModelForCausalLM.from_pretrained(folder, **{**options, "dtype": dtype}).eval()


class Training:
    """A plain run over a quantised base, which can be saved and gone on with."""

    def __init__(self, folder: str, kind: str, resume: Path | None = None) -> None:
        self.model = adapted("llama", quantised_base(folder, kind))
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=1e-2)
        self.events: list[Event] = []
        if resume is not None:
            self.model.load_adapter(str(resume), "default", is_trainable=True)
            self.optimizer.load_state_dict(torch.load(resume / "optimizer.pt", weights_only=True))
        self.growth = attach(
            self.model,
            self.optimizer,
            total_steps=STEPS,
            resume_from=None if resume is None else str(resume),
            on_event=self.events.append,
        )

    def advance(self, steps: int) -> list[float]:
        return train(self.model, batch("llama"), self.optimizer, steps)

    def save(self, folder: Path) -> None:
        save_adapter(self.model, folder)
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_from_training_to_the_merged_model(folder: str, kind: str, tmp_path: Path) -> None:
    whole = Training(folder, kind)
    layers = aroma_layers(whole.model)
    assert all(layer.is_quantised for layer in layers.values())
    assert {p.dtype for p in trainable(whole.model)} == {torch.float32}
    before = {name: layer.base_layer.weight.detach().clone() for name, layer in layers.items()}
    losses = whole.advance(6)
    whole.save(tmp_path / "middle")
    passed = len(whole.events)
    losses += whole.advance(STEPS - 6)
    assert losses[-1] < losses[0]
    assert max(ranks(whole.model).values()) > 1
    assert all(torch.equal(layers[name].base_layer.weight, weight) for name, weight in before.items())

    resumed = Training(folder, kind, tmp_path / "middle")
    assert resumed.advance(STEPS - 6) == losses[6:]
    assert resumed.events == whole.events[passed:]
    assert_same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))

    whole.save(tmp_path / "end")

    # Merged into what the base model has on disk, in float32, not into what it was quantised to.
    export_merged(tmp_path / "end", tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, delta in deltas(whole.model).items():
        expected = original.get_submodule(name).weight.double() + delta
        weight = merged.get_submodule(name).weight
        torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-6)
        quantised = layers[name].weight_matrix().double() + delta
        assert not torch.allclose(weight.double(), quantised, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_over_a_quantised_base_says_the_same(folder: str, kind: str, tmp_path: Path) -> None:
    # Results in float32, so that they are comparable: rounded to bfloat16, LLM.int8 quantises its inputs otherwise.
    model = adapted("llama", quantised_base(folder, kind, torch.float32))
    grow(model, batch("llama"), STEPS)
    assert max(ranks(model).values()) > 1
    save_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(quantised_base(folder, kind, torch.float32), str(tmp_path))
    mine, theirs = logits(model, batch("llama")), logits(plain, batch("llama"))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    bare = logits(quantised_base(folder, kind, torch.float32), batch("llama"))
    assert (mine - bare).norm() > 0.2 * mine.norm(), "the adapter says something"


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_not_merged_in_place(folder: str, kind: str) -> None:
    training = Training(folder, kind)
    training.advance(4)
    before = logits(training.model, batch("llama"))
    message = r"its weight is quantised or sharded.*16 or 32 bits.*aroma export --merged"
    for merge in (training.model.merge_adapter, training.model.merge_and_unload):
        with pytest.raises(ConfigError, match=message):
            merge()
        assert torch.equal(logits(training.model, batch("llama")), before)


def test_a_checkpoint_that_is_quantised_on_disk_is_not_merged_into(folder: str, tmp_path: Path) -> None:
    quantised_base(folder, "nf4").save_pretrained(tmp_path / "base")
    training = Training(folder, "nf4")
    training.advance(5)
    training.save(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"^base_model=.*quantised on disk.*16 or 32 bits"):
        export_merged(tmp_path / "adapter", tmp_path / "out", base_model=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


# Small updates -------------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def over_bfloat16(relative: float) -> tuple[Any, AromaLinear, Tensor]:
    """A bfloat16 layer with eight finished components that change each weight by about `relative` of it."""
    torch.manual_seed(4)
    net = OneLayer().bfloat16()
    model = get_peft_model(net, AromaConfig(target_modules=["linear"], max_inner_steps=10, component_seed=1))
    layer = aroma_layers(model)["linear"]
    weight = layer.base_layer.weight.detach().double()
    size = relative * float(weight.abs().mean())
    for _ in range(8):
        b, a = torch.randn(64, 1), torch.randn(1, 64)
        layer.start_pair("default", a, b * (size / 8**0.5 / layer.scaling["default"]))
        layer.merge_pair("default")
    layer.start_pair("default", torch.randn(1, 64))
    return model, layer, weight


def test_a_small_update_survives_that_merging_into_bfloat16_loses(tmp_path: Path) -> None:
    model, layer, weight = over_bfloat16(1e-3)
    true = layer.finished("default").B.double() @ layer.finished("default").A.double()
    assert layer.finished("default").A.dtype == torch.float32
    assert 5e-4 < true.norm() / weight.norm() < 2e-3

    save_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(OneLayer().bfloat16(), str(tmp_path))
    saved = plain.base_model.model.linear.get_delta_weight("default")
    for kept in (layer.get_delta_weight("default"), saved):
        assert (kept.double() - true).norm() < 1e-6 * true.norm()

    model.merge_adapter()
    left = layer.base_layer.weight.detach().double() - weight
    assert (left - true).norm() > 0.8 * true.norm(), "most of it was rounded away, and noise put in its place"
    assert (left == 0).double().mean() > 0.5, "most weights did not change at all"


# Skipped steps under float16 -----------------------------------------------------------------------------------------


def half_run(bad: set[int], fused: bool, criterion: str = "update_change") -> tuple[Any, list[Event], list[float]]:
    """Ten good steps under float16 autocast with a GradScaler, and overflows before those numbered in `bad`."""
    model = adapted("llama", inner_criterion=criterion, rewarmup_steps=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused)
    events: list[Event] = []
    attachment = attach(model, optimizer, total_steps=STEPS, on_event=events.append)
    # A scale that a skipped step does not change: the good steps are then the same bit for bit.
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10_000, backoff_factor=1.0 - 1e-12)
    used = []
    for number in range(STEPS):
        for overflows in (True, False) if number in bad else (False,):
            with torch.autocast("cpu", torch.float16):
                loss = model(**batch("llama")).loss
            scaler.scale(loss * (torch.inf if overflows else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update(64.0)
            optimizer.zero_grad()
        used.append(attachment.controller.lr_factor)
    assert attachment.controller.global_step == STEPS
    return attachment.controller, events, used


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_with_skipped_steps_is_the_run_without_them(fused: bool) -> None:
    plain, expected, factors = half_run(set(), fused)
    assert {"merged", "checked"} <= {event.kind for event in expected}
    assert min(factors) < 1
    skipping, events, used = half_run({0, 3, 4, 5, 8}, fused)
    assert events == expected
    assert used == factors
    assert_same(skipping.state_dict(), plain.state_dict())


def give_scaler(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Set the scaler of accelerate where it would have made one: it refuses fp16 without a GPU."""
    make = Accelerator.__init__

    def with_scaler(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, **options)

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)


class Overflowing(Trainer):
    """Trains under float16 autocast with a GradScaler, as fp16=True does on a GPU, and overflows at chosen steps."""

    bad: frozenset[int] = frozenset()
    calls = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        with torch.autocast("cpu", torch.float16):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * (torch.inf if self.calls in self.bad else 1.0)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_fp16_skips_is_no_step_in_the_trainer(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_scaler(monkeypatch)
    monkeypatch.setattr(Overflowing, "bad", frozenset({2, 5, 6}))
    events: list[Event] = []
    trainer = trainer_for(
        adapted_bert(tiny_bert()),
        tmp_path,
        AromaCallback(on_event=events.append),
        kind=Overflowing,
        max_steps=12,
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        optim=optim,
    )
    trainer.train()
    assert trainer.state.global_step == 12
    controller = growth(trainer).controller
    assert controller is not None
    assert controller.global_step == 9
    assert {event.step % 2 for event in events if event.kind == "checked"} == {0}
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} <= set(range(10))


# Recomputed activations ----------------------------------------------------------------------------------------------


def checkpointed_run(kind: str, dropout: float = 0.0) -> tuple[list[float], list[Event], dict[str, Tensor]]:
    """Modules freeze at different times, and all of them before the end."""
    torch.manual_seed(11)
    model = unlike(adapted("llama", outer_tolerance=0.03, max_inner_steps=2, max_components=3, lora_dropout=dropout))
    if kind != "none":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    events: list[Event] = []
    attach(model, optimizer, total_steps=STEPS, on_event=events.append)
    return train(model, batch("llama"), optimizer, STEPS), events, dict(model.state_dict())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_checkpointing_changes_nothing(kind: str, dropout: float) -> None:
    losses, events, state = checkpointed_run("none", dropout)
    frozen = {event.step for event in events if event.kind == "frozen"}
    assert len(frozen) > 1, "at different times"
    assert "finished" in {event.kind for event in events}
    assert losses[0] != losses[-1]
    same_losses, same_events, same_state = checkpointed_run(kind, dropout)
    assert same_losses == losses
    assert same_events == events
    assert_same(same_state, state)
