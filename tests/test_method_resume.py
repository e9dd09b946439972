"""Exact resume: trained parameters, optimizer and the hooks' state are all that a method needs to go on as if nothing
had happened. The Trainer's part in it is tested with the trials, and so is AROMA, whose state the Trainer keeps."""

import copy
import dataclasses
import functools

import pytest
import torch
from safetensors.torch import load, save

from aroma.errors import CheckpointError
from aroma_lab.bench.models import BenchSettings, make_batch, make_model
from aroma_lab.methods import (
    AdaLora,
    BitFit,
    Full,
    HeadOnly,
    Hooks,
    Houlsby,
    Lora,
    Pfeiffer,
    ReLoraMerge,
)
from quick import slow_but

SETTINGS = BenchSettings(model="tiny", batch_size=4, length=12)
PLANNED = 16

CASES = {
    "full": Full(),
    "head_only": HeadOnly(),
    "bitfit": BitFit(),
    "houlsby": Houlsby(),
    "pfeiffer": Pfeiffer(),
    "lora": Lora(r=2),
    "lora_ga": Lora(r=2, init="lora_ga"),
    "adalora": AdaLora(init_r=4, target_r=2, initial_steps=3, final_steps=4, interval=2),
    "relora_merge": ReLoraMerge(r=2, restart_every=5, rewarmup_steps=4),
}
STAGES = [2, 7, 13]
"""AdaLoRA: nothing allocated yet; between two allocations; the budget fixed. ReLoRA: nothing merged; one and two
restarts, the learning rate still climbing."""


class Run:
    """A method in training, on one batch a step, that can be put down and taken up again."""

    def __init__(self, method, seed=0, lr=2e-2, fresh=True):
        torch.manual_seed(seed)
        self.method = method
        self.model = method.build(make_model(SETTINGS), PLANNED).train()
        if fresh and method.data_option is not None:
            method.initialize(self.model, [make_batch(self.model, SETTINGS)])
        self.optimizer = torch.optim.AdamW(method.parameters(self.model), lr=lr)
        self.hooks = method.hooks(self.model).begin(self.optimizer, PLANNED)
        self.step = 0

    def go(self, until):
        for step in range(self.step + 1, until + 1):
            batch = make_batch(self.model, dataclasses.replace(SETTINGS, seed=step))
            self.model(**batch).loss.backward()
            self.hooks.before_step(step)
            self.optimizer.step()
            self.hooks.after_step(step)
            self.optimizer.zero_grad()
        self.step = until
        return self

    def put_down(self):
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {
            "step": self.step,
            "trained": save(trained),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "hooks": save(self.hooks.state_dict()),
        }

    def take_up(self, saved, with_hooks=True):
        trained = load(saved["trained"])
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in trained:
                    parameter.copy_(trained[name])
        self.optimizer.load_state_dict(saved["optimizer"])
        if with_hooks:
            self.hooks.load_state_dict(load(saved["hooks"]))
        self.step = saved["step"]
        torch.manual_seed(12345)  # a new process has drawn other numbers than the one that was killed
        return self

    def everything(self):
        tensors = {f"model.{name}": tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return tensors | {f"hooks.{name}": tensor for name, tensor in self.hooks.state_dict().items()}


@functools.cache
def whole_run(kind):
    """The uninterrupted run; nobody goes on with it."""
    return Run(CASES[kind]).go(PLANNED)


def differing(one, other):
    return sorted(name for name in one.keys() | other.keys() if not _equal(one.get(name), other.get(name)))


def _equal(one, other):
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(
    "kind",
    slow_but(["adalora", "relora_merge"], CASES),
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(kind):
    method, whole = CASES[kind], whole_run(kind)
    for stage in STAGES:
        saved = Run(method).go(stage).put_down()
        resumed = Run(method, fresh=False).take_up(saved).go(PLANNED)
        assert differing(resumed.everything(), whole.everything()) == [], stage
        assert method.ranks(resumed.model) == method.ranks(whole.model)
        assert method.active_parameters(resumed.model) == method.active_parameters(whole.model)
        ours, theirs = (method.components(run.model) for run in (resumed, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(one, two) for name in ours for one, two in zip(ours[name], theirs[name], strict=True))


@pytest.mark.parametrize(("kind", "stage"), [("adalora", 7), ("relora_merge", 2)])
def test_a_later_moment_goes_back_to_an_earlier_one(kind, stage):
    # As at the end of a run whose best checkpoint was an earlier one.
    run = Run(CASES[kind]).go(stage)
    saved, then = run.put_down(), run.everything()
    run.go(PLANNED)
    assert differing(run.everything(), then)
    for parameter in run.model.parameters():
        parameter.grad = None
    run.take_up(saved)
    assert differing(run.everything(), then) == []


@pytest.mark.parametrize("kind", ["lora", "lora_ga", "adalora", "relora_merge"])
def test_the_state_of_another_method_and_one_that_lacks_something_are_refused(kind):
    hooks = Run(CASES[kind]).go(6).hooks
    for foreign in [{"weight.of.nothing": torch.zeros(2)}, *([{}] if kind == "relora_merge" else [])]:
        with pytest.raises(CheckpointError, match="hooks: "):
            hooks.load_state_dict(foreign)


def test_a_training_that_goes_on_needs_the_state_of_its_hooks():
    from transformers import TrainerControl, TrainerState

    callback = Hooks()
    arguments = (None, TrainerState(global_step=3, max_steps=10), TrainerControl())
    with pytest.raises(CheckpointError, match="resumes at step 3 without their state"):
        callback.on_train_begin(*arguments, model=None, optimizer=None)
    callback.load_state_dict({})
    callback.on_train_begin(*arguments, model=None, optimizer=None)
