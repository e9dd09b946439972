"""Growth by evidence whatever surrounds it: micro-batches, scaled losses, checkpointing, precisions, compilers."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from peft import PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import Adafactor, BitsAndBytesConfig, LlamaForCausalLM

import models
from aroma import AromaConfig, aroma_layers, attach, save_adapter
from aroma.errors import AromaWarning, ConfigError, NonFiniteError
from aroma.integrations import callback
from aroma.slots import SlotMatrices
from evidence_runs import (
    LONG,
    LONG_METHOD,
    METHOD,
    STEPS,
    Loop,
    ModelLoop,
    Net,
    Rows,
    bear_everywhere,
    bert_trainer,
    births,
    by_heart,
    grown,
    growth_dataset,
    held_out,
    long,
    loss_of,
    model_batches,
    net,
    trainable,
)
from models import base, batch, logits
from quick import slow_but
from test_precision import sixteen_bit_folder
from trainer_runs import assert_same, growth


def followed(loop: Any) -> list[Tensor]:
    """The directions that were followed last, in the growth of the matrices."""
    assert loop.growth.controller.rule.phase == "rest"
    assert all(side.numel() for side in loop.followed)
    return list(loop.followed)


def noted(loop: Any) -> list[Any]:
    """What the rule has counted."""
    return [(matrix.born, matrix.heads, matrix.flips) for matrix in loop.growth.controller.modules]


def assert_same_growth(one: Any, other: Any) -> None:
    assert births(one.events) == births(other.events)
    assert noted(one) == noted(other)


def assert_grew(loop: Any) -> None:
    assert any(event.kind == "born" and event.step > 32 for event in loop.events), "it is to grow"


# Scales and parts of a batch -----------------------------------------------------------------------------------------


def test_micro_batches_give_the_births_of_the_whole_batch() -> None:
    def in_parts(model: Any, data: Rows) -> None:
        for part in range(4):
            (loss_of(model, (data[0][part::4], data[1][part::4])) / 4).backward()

    whole, parts = (Loop(net(Net().double()), **options).go_on() for options in ({}, {"backward": in_parts}))
    assert_grew(whole)
    assert_same_growth(parts, whole)
    for one, other in zip(followed(parts), followed(whole), strict=True):
        torch.testing.assert_close(one, other)


def scaled(factor: float) -> Loop:
    """A loss times `factor`, at a rate that makes up for it."""
    return Loop(
        backward=lambda model, data: (factor * loss_of(model, data)).backward(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3 / factor),
        steps_per_pass=34,
        growth_batches=held_out(),
        growth_loss=lambda model, data: factor * loss_of(model, data),
    ).go_on()


def test_a_scaled_loss_gives_the_same_births_to_the_bit() -> None:
    """Directions have length one, and a duel compares: a power of two cancels without rounding."""
    plain, large = scaled(1), scaled(1024)
    assert_grew(plain)
    assert_same_growth(large, plain)
    assert_same(followed(large), followed(plain))
    assert_same(dict(large.model.state_dict()), dict(plain.model.state_dict()))


class Scaler:
    """What a loop with a gradient scaler does, and here and there a batch that overflows.

    Args:
        overflows: Numbers of the batches that do.
        clip: Largest norm of the gradients.
        doubles: After so many steps without an overflow the scale is twice as large.
    """

    def __init__(self, overflows: tuple[int, ...] = (), clip: float | None = None, doubles: int = 10_000) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=doubles)
        self.overflows, self.clip = overflows, clip

    def run(self, optimizer: Callable[[Any], Any] = lambda p: torch.optim.SGD(p, lr=0.3)) -> Loop:
        loop = Loop(optimizer=optimizer)
        loop.attach(scaler=self.scaler)
        for number in range(STEPS):
            loop.optimizer.zero_grad()
            loss = loss_of(loop.model, loop.batch(number))
            self.scaler.scale(loss * float("inf") if number in self.overflows else loss).backward()
            if self.clip is not None:
                self.scaler.unscale_(loop.optimizer)
                torch.nn.utils.clip_grad_norm_(trainable(loop.model), self.clip)
            self.scaler.step(loop.optimizer)
            self.scaler.update()
        return loop


@pytest.mark.parametrize("doubles", [3, 19, 10_000])
def test_a_gradient_scaler_changes_nothing(doubles: int) -> None:
    """Nor does a scale that changes within the first steps, the questions or the averages of unused directions."""
    plain = Loop(optimizer=lambda p: torch.optim.SGD(p, lr=0.3)).go_on()
    loop = Scaler(doubles=doubles).run()
    assert_grew(plain)
    assert_same_growth(loop, plain)
    assert_same(followed(loop), followed(plain))
    assert loop.growth.summary() == plain.growth.summary()
    assert_same(dict(loop.model.state_dict()), dict(plain.model.state_dict()))


def test_batches_that_overflow_say_nothing_and_stop_nothing() -> None:
    """In each phase; the scaler skips their steps, of which a plain optimizer never hears.

    In the first steps no component is there to overflow, so that one is taken.
    """
    loop = Scaler(overflows=(2, 11, 20, 45)).run()
    assert loop.growth.controller.global_step == STEPS - 3
    assert all(tensor.isfinite().all() for tensor in followed(loop))
    assert_grew(loop)


def asking(*overflowing: int) -> Loop:
    """A run that asks held-out batches alone: 0 to 7 twice at step 16, 9 at step 57, and so on every 54th step."""
    batches = held_out(overflowing=overflowing)
    return Loop(net(**LONG_METHOD), steps=LONG, steps_per_pass=3, growth_batches=batches)


@pytest.mark.parametrize(
    ("overflowing", "asked"),
    [
        ((0, 1, 2, 7, 8), 13),
        ((10, 11, 12), 8),
        pytest.param((2,), 9, marks=pytest.mark.slow),
        pytest.param((9,), 8, marks=pytest.mark.slow),
    ],
)
def test_held_out_batches_that_overflow_stop_nothing(overflowing: tuple[int, ...], asked: int) -> None:
    """In place of a question that overflows another one is asked, in the same step; so it is of what was dropped."""
    loop = asking(*overflowing).go_on(16)
    assert {event.step for event in loop.events if event.kind == "settled"} == {16}
    assert loop.growth.controller.rule.state()["asked"] == 2 * asked
    assert_grew(loop.go_on())


@pytest.mark.parametrize(("count", "asked"), [(9, 18), (7, 16), (40, 20), (None, 20)])
def test_a_batch_is_not_asked_twice(count: int | None, asked: int) -> None:
    """But for the eight that decide at least; about what was dropped the same ones are asked.

    Of 28 batches in all twelve decide, and eight are left for the squeeze, so eight are asked of what was dropped.
    """
    batches = iter(held_out()) if count is None else held_out(count)
    method = net(trial_share=0.097)  # 24 steps
    loop = Loop(method, steps=LONG, steps_per_pass=3, growth_batches=batches).go_on(24)
    assert any(event.kind == "settled" for event in loop.events)
    assert loop.growth.controller.rule.state()["asked"] == asked


def test_held_out_examples_spare_the_training_its_questions() -> None:
    """Without them eight training batches are asked and not trained on; with them every step trains."""
    still = []
    for options in ({}, {"growth_batches": held_out()}):
        loop, before = Loop(**options), []
        for step in range(14, 30):
            loop.go_on(step)
            before.append([parameter.detach().clone() for parameter in loop.optimizer.param_groups[0]["params"]])
        unchanged = [all(map(torch.equal, *pair)) for pair in pairwise(before)]
        still.append(sum(unchanged))
    # The last question lets directions be dropped, so that something changes.
    assert still == [7, 0]


@pytest.mark.parametrize("steps_per_pass", [3, 150])
def test_a_run_asks_few_held_out_batches(steps_per_pass: int) -> None:
    """At most 12 % of its steps, and those that are asked at the end of the trial anyhow."""
    steps, asked = 320, []

    def loss(model: Any, batch: Any) -> Tensor:
        asked.append(batch)
        return loss_of(model, batch)

    held = held_out(60)
    model = net(significance=0.05)
    loop = Loop(model, steps=steps, steps_per_pass=steps_per_pass, growth_batches=held, growth_loss=loss).go_on()
    questions = loop.growth.controller.rule.state()["asked"]
    assert 0 < questions < len(asked) <= 0.12 * steps


def test_a_held_out_batch_that_overflows_says_nothing() -> None:
    """Step 57 asks the first one after the trial, and step 111 the next."""
    first, later = (
        min(event.step for event in asking(*overflowing).go_on(120).events if event.kind == "born" and event.step > 17)
        for overflowing in ((), (9,))
    )
    assert first < 111 <= later


@pytest.mark.parametrize(("overflowing", "asked"), [((1, 2, 3, 4), 16), ((9, 10, 11, 12), 219)])
def test_four_held_out_batches_in_a_row_that_overflow_stop_the_run(overflowing: tuple[int, ...], asked: int) -> None:
    loop = asking(*overflowing).go_on(asked - 1)
    with pytest.raises(
        NonFiniteError, match=r"^layers\.0: the gradient .* not finite on 4 batches in a row.*held-out"
    ):
        loop.go_on(asked + 3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_is_as_if_it_had_not_been(fused: bool) -> None:
    """A fused optimizer takes the step, and changes nothing; a Trainer says so to `skip_step`."""
    loops = []
    for skips in (False, True):
        loop = Loop(optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, fused=fused or None))
        loop.attach()
        for number in range(STEPS):
            if skips and number in (3, 40):
                (loss_of(loop.model, loop.batch(0)) * float("inf")).backward()
                if fused:
                    loop.optimizer.found_inf, loop.optimizer.grad_scale = torch.tensor(1.0), torch.tensor(1.0)
                    loop.optimizer.step()
                    del loop.optimizer.found_inf, loop.optimizer.grad_scale
                else:
                    loop.growth.controller.skip_step()
                loop.optimizer.zero_grad()
            loss_of(loop.model, loop.batch(number)).backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        loops.append(loop)
    assert_grew(loops[0])
    assert_same_growth(*loops)
    assert_same(*(dict(loop.model.state_dict()) for loop in loops))


def test_clipping_does_not_reach_the_probe() -> None:
    free, clipped = (Scaler(clip=clip).run(lambda p: torch.optim.SGD(p, lr=0.0)) for clip in (None, 1e-3))
    assert_same(followed(clipped), followed(free))
    assert_grew(Scaler(clip=1.0).run())


def test_a_penalty_of_gradients_grows_too() -> None:
    """With create_graph autograd puts gradients into new tensors."""

    def penalised(model: Any, data: Rows) -> None:
        x = data[0].requires_grad_()
        loss = loss_of(model, (x, data[1]))
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + 0.1 * slope.square().sum()).backward()

    def graphed(model: Any, data: Rows) -> None:
        loss_of(model, data).backward(create_graph=True)

    assert_grew(Loop(backward=penalised).go_on())
    plain, kept = Loop().go_on(), Loop(backward=graphed).go_on()
    assert_same_growth(kept, plain)
    for one, other in zip(followed(kept), followed(plain), strict=True):
        torch.testing.assert_close(one, other)  # sums of another order


# Checkpointed activations --------------------------------------------------------------------------------------------


def checkpointed(name: str, reentrant: bool | None, dropout: float) -> ModelLoop:
    model = grown(name, base(name).double(), lora_dropout=dropout, lora_alpha=3, trial_share=1 / 20)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    torch.manual_seed(4)
    batches = {"steps_per_pass": 80, "growth_batches": model_batches(name)}

    def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """A reentrant forward rounds otherwise: a small eps makes steps of that alone, a high rate lets it grow."""
        return torch.optim.AdamW(parameters, lr=0.003, eps=1e-4)

    return ModelLoop(model, name, steps=320, optimizer=adam, **batches).go_on(320)


@pytest.mark.parametrize("name", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reentrant", slow_but([False], [False, True]))
def test_checkpointing_changes_nothing(name: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out batches are checkpointed too, and are evaluated as in an evaluation both times.

    A reentrant forward has no gradients, so it draws no dropout for a probe alone, and later draws are others.
    """
    modes = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def watched(function: Any, *args: Any, **kwargs: Any) -> Any:
        modes.append(getattr(getattr(function, "__self__", None), "training", None))
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr("aroma.evaluation.checkpoint", watched)
    dropout = 0.0 if reentrant else 0.1
    plain, other = checkpointed(name, None, dropout), checkpointed(name, reentrant, dropout)
    assert len(modes) >= 2 * 8, "each of both layers, for each of 8 questions"
    assert set(modes) == {False}
    assert_grew(plain)
    assert_same_growth(other, plain)
    for one, two in zip(followed(other), followed(plain), strict=True):
        torch.testing.assert_close(one, two)
    for module in other.model.modules():
        assert "forward" not in vars(module)
    assert vars(other.model.config).get("use_cache") == vars(plain.model.config).get("use_cache")


def test_a_reentrant_checkpoint_of_ones_own_is_refused_by_name() -> None:
    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=True)

    assert_grew(Loop(net(Own())).go_on())
    loop = Loop(net(Own()), steps_per_pass=3, growth_batches=held_out())
    with pytest.raises(ConfigError, match=r"use_reentrant=True.: .*use_reentrant=False"):
        loop.go_on()


def test_held_out_examples_see_no_dropout_and_leave_the_model_as_it_was() -> None:
    seen = []

    class Noisy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, self.dropout.training))
            return super().forward(self.dropout(x))

    model = net(Noisy())
    model.base_model.model.dropout.eval()  # as a user left it
    loop = Loop(model, steps_per_pass=3, growth_batches=held_out())
    loop.attach()
    for number in range(STEPS):
        model.base_model.model.train()
        model.base_model.model.dropout.eval()
        loop.optimizer.zero_grad()
        loss_of(model, loop.batch(number)).backward()
        state = torch.get_rng_state()
        loop.optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
        assert (model.base_model.model.training, model.base_model.model.dropout.training) == (True, False)
    assert set(seen) == {(True, False), (False, False)}
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


# Precisions, bases and ways in ---------------------------------------------------------------------------------------


def autocast(model: Any, data: Any, dtype: torch.dtype = torch.bfloat16) -> None:
    with torch.autocast("cpu", dtype):
        loss = model(**data).loss
    loss.backward()


def four_bits() -> Any:
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4")
    return LlamaForCausalLM.from_pretrained(wide_llama(), quantization_config=quantised)


@cache
def wide_llama() -> str:
    """A Llama of width 64, as bitsandbytes' blocks want it."""
    return sixteen_bit_folder(Path(tempfile.mkdtemp(prefix="aroma-wide-")))


WAYS: dict[str, Callable[[], ModelLoop]] = {
    "bfloat16 autocast": lambda: ModelLoop(grown("llama"), "llama", autocast),
    "float16 autocast": lambda: ModelLoop(
        grown("llama"), "llama", lambda model, data: autocast(model, data, torch.float16)
    ),
    "bfloat16 base": lambda: ModelLoop(grown("llama", base("llama", dtype=torch.bfloat16)), "llama"),
    "4-bit base": lambda: ModelLoop(grown("llama", four_bits()), "llama"),
    "Conv1D": lambda: ModelLoop(grown("gpt2"), "gpt2"),
    "encoder and decoder": lambda: ModelLoop(grown("t5"), "t5"),
    "pictures": lambda: ModelLoop(grown("vit"), "vit"),
    "dropout": lambda: ModelLoop(grown("llama", lora_dropout=0.3), "llama"),
    "held out": lambda: ModelLoop(grown("llama"), "llama", steps_per_pass=3, growth_batches=model_batches("llama")),
}


@pytest.mark.parametrize("way", slow_but(["float16 autocast", "4-bit base", "Conv1D"], WAYS))
def test_it_grows_and_plain_peft_loads_it(tmp_path: Path, way: str) -> None:
    loop = WAYS[way]()
    assert loop.growth.controller.config.has_slots
    loop.go_on(40)
    bear_everywhere(loop.growth)
    before = {name: layer.rank("default") for name, layer in aroma_layers(loop.model).items()}
    loop.go_on()
    after = {name: layer.rank("default") for name, layer in aroma_layers(loop.model).items()}
    assert all(after[name] > before[name] for name in before), "the newborn have moved"
    assert all(tensor.isfinite().all() for tensor in followed(loop))
    assert all(summary.steepness for summary in loop.growth.controller.summary())
    inputs = batch(loop.name)
    said = logits(loop.model, inputs)
    save_adapter(loop.model, tmp_path)
    dtype = torch.bfloat16 if way == "bfloat16 base" else torch.float32
    beneath = four_bits() if way == "4-bit base" else base(loop.name, dtype=dtype)
    before = logits(beneath.eval(), inputs)
    plain = PeftModel.from_pretrained(beneath, tmp_path).eval()
    if way == "4-bit base":  # which multiplies in another order
        assert (logits(plain, inputs) - said).norm() < 0.015 * (said - before).norm()
    else:
        close = 1e-2 if way == "bfloat16 base" else 1e-3
        torch.testing.assert_close(logits(plain, inputs).float(), said.float(), rtol=close, atol=close)


@pytest.mark.parametrize("way", slow_but(["add_adapter"], ["inject_adapter_in_model", "add_adapter"]))
def test_it_grows_where_peft_makes_no_peft_model(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The newest transformers asks for a peft that is not out yet.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    config = AromaConfig(**METHOD)
    model = base("llama")
    if way == "add_adapter":
        model.add_adapter(config)
    else:
        model = inject_adapter_in_model(config, model)
    loop = ModelLoop(model, "llama").go_on()
    peft = ModelLoop(grown("llama"), "llama").go_on()
    assert [event[::2] for event in births(loop.events)] == [event[::2] for event in births(peft.events)]
    assert_same(followed(loop), followed(peft))


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("holds_out", [False, True])
def test_a_compiled_model_takes_as_many_graphs_as_without_growth(in_place: bool, holds_out: bool) -> None:
    """Neither phases nor births nor merges make a graph of their own, beyond those of what is asked.

    Held-out batches are evaluated, and asked of the model beneath a wrapper, which is not compiled.
    """
    torch._dynamo.reset()
    counters.clear()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = compiled = grown("llama", **LONG_METHOD)
    if in_place:
        model.compile(backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    held: dict[str, Any] = {"steps_per_pass": 34, "growth_batches": model_batches("llama")} if holds_out else {}
    growth = attach(compiled, optimizer, total_steps=LONG, **held)
    seen = []
    for number in range(STEPS):
        model.train()
        compiled(**batch("llama", number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number in (36, 38, 40, 42):
            bear_everywhere(growth)
        seen.append(len(graphs))
    assert all(matrix.rank for matrix in growth.controller.modules), "some have merged"
    assert not counters["graph_break"]
    most = 6 + 2 * (in_place and holds_out)
    assert seen[-1] <= most, "one for what is asked in each phase; two held out"
    assert seen[50] == seen[35], "births and merges make no graph"


# Optimizers ----------------------------------------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=3e-4),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Muon": lambda p: torch.optim.Muon(p, lr=1e-2),
    "Lion": lambda p: bitsandbytes.optim.Lion(p, lr=1e-3),
    "AdamW8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3, min_8bit_size=16),
    "RMSprop32bit": lambda p: bitsandbytes.optim.RMSprop32bit(p, lr=3e-4),
}


@pytest.mark.parametrize("name", slow_but(["AdamW", "Adafactor"], OPTIMIZERS))
def test_a_newborn_takes_no_larger_steps_than_its_siblings(name: str) -> None:
    loop = Loop(net(duel_factor=1e9, slots=8, max_components=4), OPTIMIZERS[name], steps=600).go_on(300)
    matrices = [matrix for matrix in loop.growth.controller.modules if 0 < len(matrix.slots) < 8]
    assert matrices, "some have siblings, and room"
    old = {matrix.name: matrix.slots for matrix in matrices}
    loop.growth.controller.matrices.bear([(matrix, 0) for matrix in matrices])
    newborn, siblings = [], []
    for _ in range(8):
        before = [[part.detach().clone() for part in matrix.pair] for matrix in matrices]
        loop.go_on(loop.done + 1)
        for matrix, (b0, a0) in zip(matrices, before, strict=True):
            (b, a), (new,) = matrix.pair, set(matrix.slots) - set(old[matrix.name])
            for part, dim in ((b - b0, 1), (a - a0, 0)):
                steps = part.detach().norm(dim=1 - dim)
                newborn.append(float(steps[new]))
                siblings.append(float(steps[old[matrix.name]].mean()))
    assert max(newborn) > 0
    assert max(newborn) <= 2 * max(siblings), (max(newborn), max(siblings))


def test_an_optimizer_without_a_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer='Adafactor': it has no learning rate \(relative_step=True\)"):
        Loop(optimizer=lambda p: Adafactor(p, relative_step=True)).attach()
    assert_grew(Loop(optimizer=lambda p: Adafactor(p, lr=0.01, relative_step=False)).go_on())


def test_a_copy_of_the_model_is_asked_nothing() -> None:
    """And shares nothing with the original, whose growth goes on."""
    plain, copied = Loop().go_on(38), Loop().go_on(38)
    other = copy.deepcopy(copied.model)
    assert all(layer.probes for layer in aroma_layers(copied.model).values())
    assert not any(layer.probes for layer in aroma_layers(other).values())
    x, y = held_out()[0]
    copied.model.eval()
    torch.testing.assert_close(other.eval()(x), copied.model(x))
    loss_of(other.train(), (x, y)).backward()
    assert_same_growth(copied.go_on(), plain.go_on())
    assert_same(followed(copied), followed(plain))


def test_births_and_merges_replace_nothing_that_the_optimizer_holds() -> None:
    loop = Loop().go_on(38)
    held = [(id(p), p.data_ptr(), p.shape) for group in loop.optimizer.param_groups for p in group["params"]]
    for _ in range(4):
        bear_everywhere(loop.growth)
    assert all(matrix.rank for matrix in loop.growth.controller.modules), "some have merged"
    loop.go_on()
    assert [(id(p), p.data_ptr(), p.shape) for p in trainable(loop.model)] == held


def test_unknown_state_is_refused_at_the_first_step() -> None:
    class Strange(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["iterate"] = parameter.detach().clone()

    loop = Loop(optimizer=lambda p: Strange(p, lr=0.1))
    with pytest.raises(ConfigError.__mro__[1], match=r"optimizer=Strange: it keeps state 'iterate'"):
        loop.go_on(1)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"significance": 0}, r"^significance=0: .*in \(0, 1\)"),
        ({"significance": 1.0}, r"^significance=1\.0: .*in \(0, 1\)"),
        ({"slots": 0}, r"^slots=0: "),
        ({"slots": 17}, r"^slots=17: \S+ is 16×16, and has rank 16 at most; set slots=16, or leave it out with excl"),
        ({"inner_tolerance": 0.5}, r"^inner_tolerance=0\.5: growth='evidence' does not read it"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        net(**fields)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_makes_no_difference(by_name: bool) -> None:
    """Not even to the averages of the optimizer while training batches are asked, which are not trained on."""
    plain, loop = Loop().go_on(), Loop()
    loop.attach()

    def closure() -> Tensor:
        loop.optimizer.zero_grad()
        loss = loss_of(loop.model, loop.batch(loop.done))
        loss.backward()
        return loss

    for loop.done in range(STEPS):
        loop.optimizer.step(closure=closure) if by_name else loop.optimizer.step(closure)
    loop.done = STEPS
    assert_grew(plain)
    assert_same(loop.came_to(), plain.came_to())


def test_a_step_within_autocast_is_a_step() -> None:
    """Directions stay orthogonal: what the rule computes is in the precision of the components."""
    plain, loop = Loop().go_on(), Loop()
    step = loop.optimizer.step

    def within(*given: Any, **named: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            step(*given, **named)

    loop.attach()
    loop.optimizer.step = within
    assert_grew(plain)
    assert_same(loop.go_on().came_to(), plain.came_to())
    assert_same(followed(loop), followed(plain))


def test_a_step_that_a_loop_gives_up_leaves_nothing() -> None:
    def backward(model: Any, batch: Rows) -> None:
        if batch[0].mean() > 0:
            (1000 * loss_of(model, batch)).backward()
            loop.growth.controller.skip_step()
            loop.optimizer.zero_grad()
        loss_of(model, batch).backward()

    plain, loop = Loop().go_on(), Loop(backward=backward)
    assert_grew(plain)
    assert_same(loop.go_on().came_to(), plain.came_to())


def test_a_step_that_is_skipped_is_one_of_those_that_the_trainer_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([False, False, True])
    monkeypatch.setattr(callback, "was_skipped", lambda optimizer: next(told, False))
    trainer = bert_trainer(tmp_path, growth={"growth_dataset": growth_dataset()})
    trainer.train()
    rule = growth(trainer).controller.rule
    assert (rule.global_step, rule.state()["skipped"]) == (STEPS - 1, 1)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    given = {"significance": np.float64(0.7), "slots": np.int64(3), "duel_factor": np.float32(0.5)}
    model = net(**given)
    config = model.peft_config["default"]
    assert [type(getattr(config, name)) for name in given] == [float, int, float]
    model.save_pretrained(tmp_path)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    controller = attach(model, optimizer, total_steps=np.int64(60), steps_per_pass=np.int64(60)).controller
    assert type(controller.total_steps) is int
    json.dumps(controller.state_dict()["state"])


def test_what_only_looks_like_an_optimizer_is_refused() -> None:
    model = net()
    inner = torch.optim.SGD(trainable(model), lr=0.1)
    wrapper = SimpleNamespace(param_groups=inner.param_groups, state=inner.state, step=inner.step)
    with pytest.raises(ConfigError, match=r"^optimizer='SimpleNamespace': it is no torch.optim.Optimizer; give the"):
        attach(model, wrapper, total_steps=60)


def test_an_optimizer_that_climbs_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^optimizer='AdamW': with maximize=True it climbs, .*minimise the negative"
    ):
        Loop(optimizer=lambda parameters: torch.optim.AdamW(parameters, maximize=True)).attach()


def test_a_run_that_goes_on_for_longer_than_was_planned_grows_again(tmp_path: Path) -> None:
    loop = Loop().go_on()
    assert loop.growth.controller.rule.phase == "rest"
    loop.save(tmp_path)
    longer = Loop.resumed(tmp_path, STEPS, steps=LONG)
    longer.go_on(STEPS + 1)
    assert longer.growth.controller.rule.phase == "growth"
    assert "nothing is born after" not in longer.growth.controller.explanation()
    longer.go_on()
    assert births(longer.events), "there is room for births"
    assert all(STEPS < event.step <= LONG for event in longer.events)
    assert f"nothing is born after step {longer.growth.controller.rule._settings.last_step}" in (
        longer.growth.controller.explanation()
    )


def squeezing(**changes: Any) -> dict[str, Any]:
    """A run that is squeezed at step 232."""
    return {**long(), "steps_per_pass": 3, "growth_batches": held_out(), **changes}


def test_a_run_that_was_squeezed_and_goes_on_for_longer_follows_the_gradient_anew(tmp_path: Path) -> None:
    loop = Loop(**squeezing()).go_on()
    assert any(event.kind == "squeezed" for event in loop.events)
    loop.save(tmp_path)
    longer = Loop.resumed(tmp_path, LONG, **squeezing(steps=2 * LONG))
    longer.go_on(LONG + 1)
    rule = longer.growth.controller.rule
    assert rule.phase == "growth"
    assert not any(matrix.log_evidence or any(matrix.heads) for matrix in longer.growth.controller.modules)
    groups = longer.growth.controller.matrices._groups
    before = [side.clone() for group in groups for side in (group.u, group.v)]
    longer.go_on(LONG + 5)
    after = [side for group in groups for side in (group.u, group.v)]
    assert not any(map(torch.equal, before, after))
    longer.go_on()
    assert rule.phase == "rest"
    assert any(event.kind == "squeezed" and event.step > LONG for event in longer.events), "there is a new end"


def test_without_the_held_out_examples_that_it_was_planned_with_a_run_is_not_squeezed(tmp_path: Path) -> None:
    loop = Loop(**squeezing()).go_on(200)
    assert loop.growth.controller.rule.state()["last_questions"] > 0
    loop.save(tmp_path)
    given = {"model": net(**LONG_METHOD), "steps": LONG, "steps_per_pass": 3}
    with pytest.warns(AromaWarning, match="no held-out batches decide from here on"):
        resumed = Loop.resumed(tmp_path, 200, **given)
    resumed.go_on()
    assert resumed.growth.controller.rule.phase == "rest"
    assert not any(event.kind == "squeezed" for event in resumed.events)


def unsqueezed(**changes: Any) -> Any:
    """A loop right before the squeeze of step 232, which the optimizer has taken."""
    return without_its_rule(Loop(**squeezing(**changes)).go_on(231))


def without_its_rule(loop: Any) -> Any:
    """A loop after one more step, which the optimizer alone has taken."""
    loop.optimizer.zero_grad()
    loss_of(loop.wrapped, loop.batch(loop.done)).backward()
    loop.growth.detach()
    loop.optimizer.step()
    return loop


def assert_nothing_is_halved(loop: Any, **changes: Any) -> None:
    assert loop.growth.controller.rule.phase == "growth"
    assert_same(dict(loop.model.state_dict()), dict(unsqueezed(**changes).model.state_dict()))
    assert all(group.p.any(2).all() for group in loop.growth.controller.matrices._groups), "directions are followed"


def test_what_interrupts_the_squeeze_leaves_nothing_halved(tmp_path: Path) -> None:
    """As Ctrl-C does: what is saved then is the whole adapter, and the run that is resumed is squeezed."""
    asked: list[int] = []

    def loss(model: Any, batch: Any) -> Tensor:
        if hasattr(loop, "growth") and loop.growth.controller.rule.phase == "squeeze":
            asked.append(loop.growth.controller.rule.global_step)
            if len(asked) == 1:
                raise KeyboardInterrupt
        return loss_of(model, batch)

    loop = Loop(**squeezing(growth_loss=loss))
    loop.go_on(231)
    with pytest.raises(KeyboardInterrupt):
        loop.go_on(232)
    assert_nothing_is_halved(loop)
    loop.save(tmp_path)
    loop = Loop.resumed(tmp_path, 232, **squeezing(growth_loss=loss))
    loop.go_on()
    assert asked == [232, *[236] * 8]


def interrupted(when: Callable[[Any], bool]) -> Any:
    """A loop that learns by heart, and whose held-out loss raises as Ctrl-C does where that holds of its rule."""
    loops: list[Any] = []

    def loss(model: Any, batch: Any) -> Tensor:
        if loops and hasattr(loops[0], "growth") and when(loops[0].growth.controller.rule):
            raise KeyboardInterrupt
        return loss_of(model, batch)

    loops.append(Loop(**by_heart(), growth_loss=loss))
    return loops[0]


@pytest.mark.parametrize("answers", [1, 6])
def test_what_interrupts_an_early_squeeze_leaves_nothing_halved(answers: int) -> None:
    """Four batches say whether all updates overshoot, and eight what each of them saves."""
    asked: list[int] = []

    def is_last(rule: Any) -> bool:
        if rule.phase == "squeeze":
            asked.append(rule.global_step)
        return len(asked) == answers and rule.phase == "squeeze"

    loop = interrupted(is_last)
    loop.go_on(203)
    with pytest.raises(KeyboardInterrupt):
        loop.go_on(204)
    assert loop.growth.controller.rule.phase == "growth"
    untouched = without_its_rule(Loop(**by_heart()).go_on(203))
    assert_same(dict(loop.model.state_dict()), dict(untouched.model.state_dict()))
    loop.go_on(212)
    assert asked == [204] * answers + [208] * 12
    assert {event.step for event in loop.events if event.kind == "squeezed"} == {208}


def test_what_interrupts_the_question_of_strength_leaves_all_updates_at_full_strength() -> None:
    loop = interrupted(lambda rule: rule.phase == "squeeze" and rule.state()["stage"] == "strength")
    loop.go_on(479)
    with pytest.raises(KeyboardInterrupt):
        loop.go_on(480)
    untouched = without_its_rule(Loop(**by_heart()).go_on(479))
    losses = [float(loss_of(one.wrapped, one.batch(0))) for one in (loop, untouched)]
    assert losses[0] == losses[1]


def test_what_a_run_ends_with_is_shortened_in_its_last_step_alone(tmp_path: Path) -> None:
    loop = Loop(**by_heart()).go_on(2 * LONG - 1)
    left = loop.growth.controller.rule.strength
    assert left < 1
    loop.save(tmp_path)
    whole = without_its_rule(Loop.resumed(tmp_path, 2 * LONG - 1, **by_heart()))
    loop.go_on()
    for matrix, other in zip(loop.growth.controller.modules, whole.growth.controller.modules, strict=True):
        (b, a), (whole_b, whole_a) = matrix.pair, other.pair
        torch.testing.assert_close(b, left * whole_b, rtol=1e-6, atol=0)
        assert torch.equal(a, whole_a)


def test_a_run_that_goes_on_for_longer_ends_with_what_its_new_end_says(tmp_path: Path) -> None:
    loop = Loop(**by_heart()).go_on(2 * LONG - 4)
    assert loop.growth.controller.rule.strength < 1
    loop.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer = Loop.resumed(tmp_path, 2 * LONG - 4, **{**by_heart(), "steps": 3 * LONG}).go_on(2 * LONG)
    assert (longer.growth.controller.rule.phase, longer.growth.controller.rule.strength) == ("growth", 1.0)


@pytest.mark.parametrize("method", ["take_apart", "halve"])
def test_what_fails_on_the_way_to_the_questions_leaves_nothing_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """As running out of memory may. In a run that is resumed within its first pass every batch duels then."""
    loop = Loop(**squeezing(steps_per_pass=LONG)).go_on(231)
    whole = getattr(SlotMatrices, method)

    def fail(*given: Any) -> None:
        whole(*given)
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(SlotMatrices, method, fail)
        with pytest.raises(MemoryError):
            loop.go_on(232)
    assert_nothing_is_halved(loop, steps_per_pass=LONG)
    loop.save(tmp_path)
    for going in (loop, Loop.resumed(tmp_path, 232, **squeezing(steps_per_pass=LONG))):
        assert going.go_on(234).growth.controller.rule.phase == "growth"
        assert going.go_on().growth.controller.rule.phase == "rest"


@pytest.mark.parametrize("batches", [9, 12, None])
def test_held_out_batches_that_come_in_order_answer_alike_after_a_resume(tmp_path: Path, batches: int | None) -> None:
    """Duels have taken some before the squeeze, which goes on behind them."""

    def given() -> dict[str, Any]:
        held = iter(held_out()) if batches is None else held_out(batches)
        return squeezing(growth_batches=held)

    whole = Loop(**given()).go_on(222)
    whole.save(tmp_path)
    expected = whole.go_on().came_to()
    assert any(event.kind == "squeezed" for event in whole.events)
    assert_same(Loop.resumed(tmp_path, 222, **given()).go_on().came_to(), expected)


def test_components_that_are_not_finite_where_growth_ends_stop_the_run() -> None:
    loop = Loop(**squeezing()).go_on(231)
    with torch.no_grad():
        loop.growth.controller.modules[2].pair[0][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^layers\.\d: its components .* growth's last check"):
        loop.go_on(232)


def test_held_out_batches_that_cannot_decide_are_refused_before_training() -> None:
    for batches, said in (([], "0 batches"), (held_out(6), "6 batches")):
        with pytest.raises(ConfigError, match=rf"^growth_batches='{said}': it takes 7 batches"):
            Loop(net(significance=0.05), steps_per_pass=9, growth_batches=batches).attach()
    with pytest.raises(ConfigError, match=r"^steps_per_pass=0: "):
        Loop(steps_per_pass=0).attach()
    paper = models.adapted("llama")
    with pytest.raises(ConfigError, match=r"^growth_batches='given': only growth='evidence' reads it"):
        attach(paper, torch.optim.SGD(trainable(paper), lr=0.1), total_steps=99, growth_batches=held_out())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"growth_batches": 5}, r"^growth_batches='int': it is no iterable of batches; give a list of batches"),
        ({"growth_batches": {"input_ids": [1] * 9}}, r"^growth_batches='dict': it is no iterable of batches"),
        ({"growth_batches": iter(held_out(3))}, r"^growth_batches='3 batches': it takes 7 batches"),
        ({"growth_loss": lambda m, b: loss_of(m, b).detach()}, r"^growth_loss='shape \(\), requires_grad=False': "),
        ({"growth_loss": lambda m, b: m(b[0])}, r"^growth_loss='shape \(8, 16\), requires_grad=True': "),
        ({"growth_loss": lambda m, b: 0.5}, r"^growth_loss='float': it must return one number"),
        ({"growth_loss": None}, r"^growth_batches='tuple': PeftModel fails .*\(TypeError: .*give growth_loss="),
        ({"growth_batches": None, "growth_loss": loss_of}, r"^growth_loss='given': it is that of growth_batches"),
        ({"steps_per_pass": "3"}, r"^steps_per_pass='3': .*a whole number"),
        ({"steps_per_pass": 2.5}, r"^steps_per_pass=2\.5: "),
        ({"total_steps": "60"}, r"^total_steps='60': give the number"),
    ],
)
def test_what_cannot_decide_is_refused_before_training(given: dict[str, Any], said: str) -> None:
    model = net(significance=0.05)
    options = {"growth_batches": held_out(), "growth_loss": loss_of, "total_steps": 200, **given}
    with pytest.raises(ConfigError, match=said):
        attach(model, torch.optim.SGD(trainable(model), lr=0.1), **options)


def test_a_generator_that_ends_is_asked_nothing_twice() -> None:
    """As a list of the same batches is."""
    few = held_out(9)
    by_list, by_generator = (
        Loop(net(significance=0.05), steps=600, steps_per_pass=50, growth_batches=batches).go_on(100)
        for batches in (few, (batch for batch in few))
    )
    assert by_list.growth.controller.rule.questions == 9
    assert_same(by_generator.came_to(), by_list.came_to())


def test_batches_of_an_iterator_are_those_of_a_list() -> None:
    """Though the first are drawn beforehand, to see whether they are enough and have a loss."""
    by_list, by_iterator = (
        Loop(net(significance=0.05), steps=200, steps_per_pass=40, growth_batches=batches).go_on(120)
        for batches in (held_out(10), iter(held_out(10)))
    )
    assert by_list.growth.controller.rule.state()["asked"] == 20
    ends = by_iterator.came_to(), by_list.came_to()
    counts = [end["controller"]["state"].pop("held_out_batches") for end in ends]
    assert counts == [None, 10]  # the end of an iterator is not known
    assert_same(*ends)


class Again:
    """Batches of which nobody knows how many there are, and that can be iterated again."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@pytest.mark.parametrize("count", [9, 12])
def test_an_iterator_begins_anew_when_it_ends(count: int) -> None:
    """It cannot be iterated again, so its batches are kept."""
    again, once = (
        Loop(net(significance=0.05), steps=200, steps_per_pass=20, growth_batches=batches).go_on(200)
        for batches in (Again(held_out(count)), (batch for batch in held_out(count)))
    )
    assert again.growth.controller.rule.state()["asked"] == 2 * min(count, 10), "with the duels more than there are"
    assert_same(once.came_to(), again.came_to())


def test_a_run_in_which_too_few_batches_decide_is_told() -> None:
    with pytest.warns(UserWarning, match=r"significance=0\.05: a birth takes 7 batches, and 4 decide after the trial"):
        Loop(net(significance=0.05), steps=112, steps_per_pass=10, growth_batches=held_out()).attach()
    with pytest.warns(UserWarning, match=r"From optimizer step 40 on, growth is decided on examples .* trained on"):
        Loop(net(significance=0.05), steps=100, steps_per_pass=40).attach()


def test_a_trial_that_goes_on_and_leaves_too_few_batches_to_decide_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the first questions say that the updates cost loss, and that they point downhill at strength 0."""
    answers = iter([False, True, True] * 2)
    monkeypatch.setattr("aroma.algorithm.evidence.saves_together", lambda credits, alpha: next(answers, False))
    loop = Loop(net(significance=0.05), steps=200, steps_per_pass=20, growth_batches=held_out())
    with warnings.catch_warnings():
        warnings.simplefilter("error", AromaWarning)
        loop.go_on(79)
    with pytest.warns(AromaWarning, match=r"a birth takes 7 batches, and [0-6] decide after the trial") as told:
        loop.go_on()
    assert sum("decide after the trial" in str(one.message) for one in told) == 1
    assert loop.growth.controller.rule.doublings == 2


def test_a_loop_that_does_not_say_how_long_a_pass_is_is_told_what_that_means() -> None:
    with pytest.warns(AromaWarning, match=r"steps_per_pass is not given, so every batch counts as .*total_steps"):
        Loop(net(significance=0.05), steps=100).attach()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AromaWarning)
        warnings.filterwarnings("ignore", "significance=")
        Loop(net(significance=0.05), steps=100, steps_per_pass=100).attach()


def test_pairs_that_need_no_gradient_are_refused_before_training() -> None:
    loop = Loop()
    for parameter in trainable(loop.model):
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"the pair of 'layers\.0' needs no gradient.*is_trainable=True"):
        loop.attach()


@pytest.mark.parametrize("way", ["autograd.grad", "functional", "no backward", "reentrant without inputs"])
def test_a_probe_that_no_gradient_reaches_is_refused_at_the_first_step(way: str) -> None:
    def by_grad(model: Any, data: Rows) -> None:
        parameters = trainable(model)
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss_of(model, data), parameters, allow_unused=True), strict=True
        ):
            parameter.grad = gradient

    def functional(model: Any, data: Rows) -> None:
        parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

        def loss(values: Any) -> Tensor:
            return (torch.func.functional_call(model, values, (data[0],)) - data[1]).square().mean()

        for name, gradient in torch.func.grad(loss)(parameters).items():
            model.get_parameter(name).grad = gradient

    ways: dict[str, Callable[[Any, Rows], Any]] = {
        "autograd.grad": by_grad,
        "functional": functional,
        "no backward": lambda model, data: None,
    }
    if way in ways:
        loop: Any = Loop(backward=ways[way])
    else:

        class Own(Net):
            def __init__(self) -> None:
                super().__init__()
                self.bias = nn.Parameter(torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                return self.bias + torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=True)

        model = net(Own())
        model.base_model.model.bias.requires_grad_(True)  # what the loss reaches
        loop = Loop(model)
    loop.attach()
    before = [parameter.clone() for parameter in loop.model.parameters()]
    with pytest.raises(ConfigError, match=r"no gradient has reached a growing layer.*loss\.backward\(\)"):
        loop.go_on(1)
    assert all(map(torch.equal, before, loop.model.parameters()))  # not even the rest of the model has trained


def test_matrices_that_no_gradient_reaches_are_named_at_the_first_step() -> None:
    class Cut(Net):
        def forward(self, x: Tensor) -> Tensor:
            for index, layer in enumerate(self.layers):
                x = layer(x).detach() if index == 0 else layer(x)
            return x

    said = r"No gradient reaches 1 of 4 matrices, the first of them layers\.0, .*exclude_modules"
    with pytest.warns(AromaWarning, match=said):
        Loop(net(Cut())).go_on(1)


@pytest.mark.parametrize(
    ("where", "step"),
    [*product(["examples"], [2, 12, 20, 37]), *product(["component"], [12, 20, 37]), *product("pq", [2, 37])],
)
def test_nan_stops_the_run(where: str, step: int) -> None:
    """In any phase, within a few steps, or at the end of the trial; so does one in what the directions follow."""
    loop = Loop().go_on(step)
    group = loop.growth.controller.matrices._groups[0]
    if where == "examples":
        loop.x[loop.size * step :] = torch.nan
    elif where == "component":
        loop.growth.controller.modules[1].pair[1].data[:] = torch.nan
    else:
        getattr(group, where)[1, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="earlier checkpoints are untouched"):
        loop.go_on(max(step + 9, 17))


def test_a_held_out_batch_whose_loss_overflows_says_nothing_though_its_gradient_is_finite() -> None:
    """Nothing at the end of the trial, where another is asked, and nothing in a duel."""

    def overflowing(model: Any, batch: Rows) -> Tensor:
        loss = loss_of(model, batch)
        return loss + torch.where(batch[0].sum() == broken, torch.inf, 0.0)

    batches = held_out()
    plain, other = (
        Loop(net(significance=0.05), steps=200, steps_per_pass=20, growth_batches=given, growth_loss=overflowing)
        for given in (batches, [batches[0], *batches])
    )
    broken = batches[0][0].sum()
    loops = [loop.go_on(60) for loop in (plain, other)]
    asked = [loop.growth.controller.rule.state()["asked"] for loop in loops]
    questions = loops[0].growth.controller.rule.questions
    assert asked == [2 * (questions + 1), 2 * (questions + 2)], "also about what was dropped"


def test_batches_that_are_asked_leave_the_optimizer_alone() -> None:
    loop = Loop(net(target_modules=r"layers\.[012]", modules_to_save=["layers.3"]))
    loop.go_on(1)
    head = loop.model.base_model.model.layers[3].modules_to_save["default"].weight

    def notes() -> dict[str, Any]:
        return {"weight": head.detach().clone(), **{k: v.clone() for k, v in loop.optimizer.state[head].items()}}

    while loop.growth.controller.rule.phase != "questions":
        before = notes()
        loop.go_on(loop.done + 1)
        assert all(not torch.equal(value, notes()[name]) for name, value in before.items())
    before = notes()
    while loop.growth.controller.rule.phase == "questions":
        loop.go_on(loop.done + 1)
        assert_same(before, notes())
    loop.go_on(loop.done + 1)
    assert all(not torch.equal(value, notes()[name]) for name, value in before.items())


@pytest.mark.parametrize(("phase", "share", "step", "found_at"), [("trial", 0.4, 41, 80), ("rest", 0.1, 233, 240)])
def test_nan_in_a_component_stops_a_run_that_asks_nothing(phase: str, share: float, step: int, found_at: int) -> None:
    """Within forty steps: no question looks at the components then."""
    loop = Loop(net(trial_share=share), steps=250).go_on(step)
    assert loop.growth.controller.rule.phase == phase
    loop.growth.controller.modules[1].pair[1].data[:] = torch.nan
    said = rf"^layers\.\d: its components in training, .* not finite .* regular check of optimizer step {found_at}\."
    with pytest.raises(NonFiniteError, match=said):
        loop.go_on(step + 40)
