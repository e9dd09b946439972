"""Growth by evidence resumes to the bit, in a plain loop and in the Trainer, from every phase of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainerCallback

from aroma.errors import AromaWarning, CheckpointError, ConfigError
from evidence_runs import (
    LONG,
    LONG_METHOD,
    PHASES,
    STEPS,
    WIDTH,
    Loop,
    Net,
    bert,
    bert_trainer,
    births,
    by_heart,
    growth_dataset,
    held_out,
    long,
    net,
    rows,
)
from quick import slow_but
from trainer_runs import assert_same, growth, live, on_disk, tiny_bert

# A plain loop --------------------------------------------------------------------------------------------------------


def shuffled() -> DataLoader[Any]:
    """Held-out batches in an order that is drawn, as a user's DataLoader has it."""
    return DataLoader(TensorDataset(*rows(200, seed=2)), batch_size=8, shuffle=True)


def quantised(bits: int) -> Net:
    """The net with weights as bitsandbytes stores them."""
    model = Net()
    for index, layer in enumerate(model.layers):
        of_few_bits = (
            bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            if bits == 4
            else bnb.nn.Linear8bitLt(WIDTH, WIDTH, bias=False, has_fp16_weights=False)
        )
        of_few_bits.load_state_dict(layer.state_dict())
        model.layers[index] = of_few_bits.to("cpu")  # which quantises it
    return model


class Uneven(Net):
    """Of matrices that have room for 8, 8, 16 and 12 slots."""

    def __init__(self) -> None:
        super().__init__()
        for place, (n, m) in enumerate(((WIDTH, 10), (10, 48), (48, 24), (24, WIDTH))):
            self.layers[place] = torch.nn.Linear(n, m, bias=False)
            torch.nn.init.orthogonal_(self.layers[place].weight, generator=torch.Generator().manual_seed(place))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = torch.tanh(layer(y))
        return x + y


OPTIONS: dict[str, Any] = {
    "first pass alone": dict,
    "held out in every phase": lambda: {**long(), "steps_per_pass": 3, "growth_batches": held_out()},
    "held out in growth, shuffled": lambda: {**long(), "steps_per_pass": 34, "growth_batches": shuffled()},
    "held out, some overflow": lambda: {
        **{"steps": 2 * LONG, "model": net(trial_share=1 / 30), "steps_per_pass": 3},
        "growth_batches": held_out(overflowing=(2, 11, 12, 13)),  # 11 to 13 duel one after the other
    },
    "held out, learnt by heart": by_heart,
    "one slot": lambda: {"model": net(slots=1)},
    "matrices of all sizes": lambda: {
        **{"steps": LONG, "model": net(Uneven(), slots=None, **LONG_METHOD)},
        **{"steps_per_pass": 3, "growth_batches": held_out()},
    },
    "dropout, no exact scale": lambda: {"model": net(lora_dropout=0.2, lora_alpha=3)},
    "bfloat16": lambda: {"model": net(Net().bfloat16(), lora_alpha=3)},
    "float64": lambda: {"model": net(Net().double())},
    "SGD": lambda: {"optimizer": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)},
    "4-bit base": lambda: {"model": net(quantised(4))},
    "8-bit base": lambda: {"model": net(quantised(8))},
}


@pytest.mark.parametrize(
    "name",
    slow_but(["held out in growth, shuffled", "bfloat16", "4-bit base", "matrices of all sizes"], OPTIONS),
)
def test_a_plain_loop_resumes_to_the_bit(tmp_path: Path, name: str) -> None:
    torch.manual_seed(3)
    whole, states = Loop(**OPTIONS[name]()), {}
    phases = {**PHASES, "rest": 90} if name == "held out, some overflow" else PHASES
    if name == "held out, learnt by heart":  # squeezed early at step 204, and shortened at the last step
        phases = {**PHASES, "rest": 207, "to be shortened": 490}
    for phase, step in phases.items():
        whole.go_on(step).save(tmp_path / phase)
        states[phase] = torch.get_rng_state()
        if phase == "after births":
            assert whole.growth.controller.rule.phase == "growth"
    if name == "held out, some overflow":
        assert whole.growth.controller.rule.state()["overflows"] == 3
    expected = whole.go_on().came_to()
    layers = {matrix.name: matrix.layer for matrix in whole.growth.controller.modules}
    assert whole.growth.controller.ranks() == {name: layer.rank("default") for name, layer in layers.items()}
    squeezed = {step for step, _, kind in births(whole.events) if kind == "squeezed"}
    assert bool(squeezed) or name not in ("held out in every phase", "matrices of all sizes")
    if name == "held out, learnt by heart":
        assert squeezed == {204, 480}, "early, and where growth ends"
        assert whole.growth.controller.rule.strength < 1
    if name == "matrices of all sizes":
        assert [layer.r["default"] for layer in layers.values()] == [8, 8, 16, 12]
    born = [event.step for event in whole.events if event.kind == "born"]
    assert min(born) < PHASES["after births"] < max(born), "it is to grow after it was saved"
    for phase, step in phases.items():
        torch.manual_seed(99)
        resumed = Loop.resumed(tmp_path / phase, step, **OPTIONS[name]())
        torch.set_rng_state(states[phase])
        resumed.go_on()
        assert_same(resumed.came_to(), expected, phase)
        assert births(resumed.events) == [event for event in births(whole.events) if event[0] > step]


def test_a_run_that_is_resumed_with_other_held_out_batches_says_so(tmp_path: Path) -> None:
    given: dict[str, Any] = {**long(), "steps_per_pass": 3}
    Loop(**given, growth_batches=held_out(40)).go_on(20).save(tmp_path)
    Loop.resumed(tmp_path, 20, **given, growth_batches=held_out(40))  # the same: a warning would be an error
    for other, said in (({"growth_batches": held_out(20)}, "20 held-out batches"), ({}, "no held-out batches")):
        with pytest.warns(AromaWarning, match=f"{said} decide from here on, and 40 did"):
            Loop.resumed(tmp_path, 20, **given, **other)


@pytest.mark.parametrize("holds_out", [False, True])
def test_a_trial_that_goes_on_resumes_to_the_bit(tmp_path: Path, holds_out: bool) -> None:
    """At this rate the components swing: the trial is doubled, to 32 steps, and then half of each is judged."""

    def options() -> dict[str, Any]:
        growth = {"steps_per_pass": 3, "growth_batches": held_out()} if holds_out else {}
        model = net(significance=0.05)
        return {"model": model, "optimizer": lambda p: torch.optim.AdamW(p, lr=0.15), "steps": 80, **growth}

    way = [
        (18, (0, "questions", "opening")),
        (22, (0, "questions", "base")),
        (28, (1, "trial", "base")),
        (34, (1, "questions", "opening")),
        (38, (1, "questions", "base")),
        (44, (1, "questions", "half")),
        (52, (1, "growth", "half")),
    ]
    if holds_out:  # they answer between two steps
        way = [(28, (1, "trial", "base")), (34, (1, "growth", "half"))]
    whole = Loop(**options())
    for step, expected_stage in way:
        whole.go_on(step).save(tmp_path / str(step))
        rule = whole.growth.controller.rule
        assert (rule.doublings, rule.phase, rule.state()["stage"]) == expected_stage
    expected = whole.go_on().came_to()
    assert {event.step for event in whole.events if event.kind == "settled"} == {32 if holds_out else 48}
    for step, _ in way:
        resumed = Loop.resumed(tmp_path / str(step), step, **options()).go_on()
        assert_same(resumed.came_to(), expected, str(step))


def test_questions_about_what_was_dropped_resume_to_the_bit(tmp_path: Path) -> None:
    whole = Loop(**long()).go_on(28)
    whole.save(tmp_path)
    rule = whole.growth.controller.rule.state()
    assert (rule["phase"], rule["stage"], len(rule["credits"])) == ("questions", "dropped", 4)
    kept = sum(len(matrix.slots) for matrix in whole.growth.controller.modules)
    expected = whole.go_on(60).came_to()
    settled = [event for event in whole.events if event.kind == "settled"]
    assert {event.step for event in settled} == {32}
    assert sum(event.rank for event in settled) > kept, "some of it begins anew"
    resumed = Loop.resumed(tmp_path, 28, **long()).go_on(60)
    assert_same(resumed.came_to(), expected)


def test_held_out_batches_leave_the_random_numbers_of_the_training_alone() -> None:
    """A DataLoader that shuffles draws when it begins, and so does every round of it."""
    drawn = []
    for options in ({}, {"steps_per_pass": 3, "growth_batches": shuffled()}):
        torch.manual_seed(3)
        Loop(**options).go_on()
        drawn.append(torch.get_rng_state())
    assert torch.equal(*drawn)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    whole = Loop().go_on(PHASES["growth"])
    whole.save(tmp_path)
    resumed = Loop.resumed(tmp_path, PHASES["growth"])
    resumed.growth.controller.modules[0].births += 1
    with pytest.raises(AssertionError):
        assert_same(resumed.came_to(), whole.came_to())


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    Loop().go_on(PHASES["trial"]).save(tmp_path)
    with pytest.raises(ConfigError, match=r"duel_factor=0\.5 \(checkpoint: 0\.01\)"):
        Loop.resumed(tmp_path, PHASES["trial"], model=net(duel_factor=0.5))
    with pytest.raises(ConfigError, match=r"slots=2 \(checkpoint: 3\)"):
        Loop.resumed(tmp_path, PHASES["trial"], model=net(slots=2), optimizer=lambda p: _Any(p))


class _Any(torch.optim.AdamW):
    """Takes any state."""

    def load_state_dict(self, state_dict: Any) -> None:
        """Leave everything."""


def test_an_adapter_of_another_moment_is_refused(tmp_path: Path) -> None:
    loop = Loop().go_on(PHASES["growth"])
    loop.save(tmp_path / "early")
    shutil.copytree(tmp_path / "early", tmp_path / "mixed")
    loop.go_on(PHASES["after births"]).save(tmp_path / "late")
    (tmp_path / "mixed" / "adapter_model.safetensors").write_bytes(
        (tmp_path / "late" / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: "):
        Loop.resumed(tmp_path / "mixed", PHASES["growth"])
    late = net()
    late.load_adapter(str(tmp_path / "late"), "default", is_trainable=True)
    with pytest.raises(CheckpointError, match="components are not those"):
        Loop(late).attach(resume_from=str(tmp_path / "early"))


def test_a_state_that_lacks_a_field_is_refused_before_anything_changes() -> None:
    loop = Loop().go_on(PHASES["growth"])
    controller = loop.growth.controller
    saved = controller.state_dict()
    for field in controller.rule.state():
        left = {name: value for name, value in saved["state"].items() if name != field}
        with pytest.raises(CheckpointError, match=rf"aroma_state\.json: it lacks '{field}', so another version wrote"):
            controller.load_state_dict({**saved, "state": left})
    assert controller.state_dict()["state"] == saved["state"]


def test_a_saved_adapter_can_grow_further(tmp_path: Path) -> None:
    """Loaded into a new run: what it has found stays, trains no more, and is grown upon."""
    first = Loop().go_on()
    first.save(tmp_path)
    x = rows(16, seed=4)[0]
    first.model.eval()
    said, ranks = first.model(x), [summary.rank for summary in first.growth.controller.summary()]
    model = net()
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    again = Loop(model)
    again.attach()
    model.eval()
    torch.testing.assert_close(model(x), said)
    again.go_on()
    for before, now in zip(ranks, again.growth.controller.summary(), strict=True):
        assert now.rank > before
    again.save(tmp_path / "further")
    plain = PeftModel.from_pretrained(Net(), tmp_path / "further").eval()
    model.eval()
    torch.testing.assert_close(plain(x), model(x))


# The Trainer ---------------------------------------------------------------------------------------------------------


class SaveAt(TrainerCallback):
    def __init__(self, steps: Any) -> None:
        self.steps = set(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            control.should_save = True


TRAININGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "training batches": ({}, {"significance": 0.95}),
    "growth dataset": ({"growth": {"growth_dataset": growth_dataset()}, "max_steps": LONG}, LONG_METHOD),
    "everything awkward": (
        {
            "growth": {"growth_dataset": growth_dataset(320)},
            "max_steps": LONG,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": True,
        },
        {"lora_dropout": 0.1, "lora_alpha": 3, "significance": 0.95, **LONG_METHOD},  # else the trial goes on
    ),
    "bfloat16 pairs": ({}, {"half": True, "lora_alpha": 3}),
    "bfloat16 autocast": ({"bf16": True}, {"lora_alpha": 3, "significance": 0.95}),
}


@pytest.mark.filterwarnings("ignore:From optimizer step")
@pytest.mark.parametrize(
    ("name", "phases"),
    [
        ("growth dataset", ["trial", "after births"]),
        *(pytest.param(name, [*PHASES], marks=pytest.mark.slow) for name in TRAININGS),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} phases",
)
def test_the_trainer_resumes_to_the_bit(tmp_path: Path, name: str, phases: list[str]) -> None:
    training, method = TRAININGS[name]
    events: list[Any] = []
    steps = training.get("max_steps", STEPS)
    saving = {"callbacks": [SaveAt(PHASES.values())], "save_steps": steps}
    whole = bert_trainer(tmp_path / "whole", events, bert(**method), **saving, **training)
    whole.train()
    expected = live(whole)
    born = [event.step for event in events if event.kind == "born"]
    assert min(born) < PHASES["after births"] < max(born), "it is to grow after it was saved"
    for step in (PHASES[phase] for phase in phases):
        again: list[Any] = []
        resumed = bert_trainer(tmp_path / f"{step}", again, bert(**method), **saving, **training)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(live(resumed), expected, f"from step {step}")
        assert births(again) == [event for event in births(events) if event[0] > step]
        last = f"checkpoint-{steps}"
        assert_same(on_disk(tmp_path / f"{step}" / last), on_disk(tmp_path / "whole" / last), f"from step {step}")


@pytest.mark.filterwarnings("ignore:From optimizer step")
def test_the_trainer_goes_back_to_the_best_checkpoint(tmp_path: Path) -> None:
    """And the run can be evaluated, saved and looked at as it was then."""
    best = PHASES["growth"]

    trainer = bert_trainer(
        tmp_path,
        callbacks=[SaveAt(PHASES.values())],
        eval_strategy="steps",
        eval_steps=STEPS,
        save_steps=STEPS,
        load_best_model_at_end=True,
    )

    def remember(args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == best:
            state.best_model_checkpoint, state.best_metric = str(tmp_path / f"checkpoint-{best}"), -1.0

    keeper = TrainerCallback()
    keeper.on_save = remember
    trainer.add_callback(keeper)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    controller = growth(trainer).controller
    saved = on_disk(tmp_path / f"checkpoint-{best}")
    assert controller.global_step == best
    assert_same(controller.state_dict(), saved["controller"])
    trainer.save_model(str(tmp_path / "end"))
    batch = {"input_ids": torch.arange(1, 9)[None]}
    with torch.no_grad():
        one, other = (
            PeftModel.from_pretrained(tiny_bert(), tmp_path / folder).eval()(**batch).logits
            for folder in ("end", f"checkpoint-{best}")
        )
        assert torch.equal(one, other)
        torch.testing.assert_close(trainer.model.eval()(**batch).logits, one)
