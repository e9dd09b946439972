"""The methods of comparison: what trains, and what is done around the optimizer's step."""

import pytest
import torch

from aroma import aroma_layers
from aroma.errors import ConfigError
from aroma.lab.bench.settings import BenchSettings
from aroma.lab.bench.shapes import make_batch, make_model
from aroma.lab.methods import AdaLora, Aroma, Frozen, Full, HeadOnly, Lora, ReLora, encoder_linears

SETTINGS = BenchSettings(model="tiny", batch_size=4, length=12)
MODULES = 12
"""Linear modules in the layers of the tiny shape: six a layer."""

METHODS = [Frozen(), HeadOnly(), Lora(r=2), Lora(r=2, dropout=0.1), AdaLora(), ReLora(), Full(), Aroma()]


def built(method, planned_steps=100):
    torch.manual_seed(0)
    return method.build(make_model(SETTINGS), planned_steps)


def train(method, model, steps, planned_steps=100, lr=1e-2):
    """Train as `aroma.lab.methods.base` says; return the optimizer and the hooks."""
    batch = make_batch(model, SETTINGS)
    optimizer = torch.optim.AdamW(method.parameters(model), lr=lr)
    hooks = method.hooks(model, optimizer, planned_steps)
    for step in range(1, steps + 1):
        model(**batch).loss.backward()
        hooks.before_step(step)
        optimizer.step()
        hooks.after_step(step)
        optimizer.zero_grad()
    return optimizer, hooks


@torch.no_grad()
def logits(model):
    return model.eval()(**make_batch(model, SETTINGS)).logits


# What trains ---------------------------------------------------------------------------------------------------------


def test_the_targets_are_the_linear_modules_of_the_layers():
    names = encoder_linears(make_model(SETTINGS))
    assert len(names) == MODULES
    assert all(name.startswith("roberta.encoder.layer.") for name in names)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_head_trains_and_the_backbone_only_where_it_must(method):
    model = built(method)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [name for name in names if "classifier" in name]
    adapter = [name for name in names if "lora_" in name]
    backbone = [name for name in names if name not in head and name not in adapter]
    assert bool(head) == (not isinstance(method, Frozen))
    assert bool(backbone) == isinstance(method, Full)
    expected = {Lora: 2, ReLora: 2, AdaLora: 3, Aroma: 2}.get(type(method), 0)
    assert len(adapter) == expected * MODULES
    assert len(method.parameters(model)) == len(names)


@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.name)
def test_every_method_learns(method):
    model = built(method)
    batch = make_batch(model, SETTINGS)
    before = float(model(**batch).loss.detach())
    train(method, model, 12)
    assert float(model(**batch).loss.detach()) < before


def test_the_floor_runs_backward_through_everything_and_trains_nothing():
    model = built(Frozen())
    reached = []
    for layer in model.roberta.encoder.layer:
        layer.register_full_backward_hook(lambda module, *gradients: reached.append(module))
    model(**make_batch(model, SETTINGS)).loss.backward()
    assert reached == list(model.roberta.encoder.layer)[::-1]
    assert Frozen().parameters(model) == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_names_say_what_differs():
    assert [method.name for method in METHODS] == [
        "frozen (floor)",
        "head only",
        "LoRA r=2",
        "LoRA r=2, dropout 0.1",
        "AdaLoRA r=12→8",
        "ReLoRA r=8",
        "full fine-tuning",
        "AROMA",
    ]


# AdaLoRA -------------------------------------------------------------------------------------------------------------


def test_adaloras_allocator_runs_and_reaches_its_target():
    method = AdaLora(init_r=4, target_r=2)
    model = built(method, planned_steps=6)
    train(method, model, 3, planned_steps=6)
    early = sum(map(sum, model.peft_config["default"].rank_pattern.values()))
    train(method, model, 6, planned_steps=6)
    late = sum(map(sum, model.peft_config["default"].rank_pattern.values()))
    assert 2 * MODULES < early < 4 * MODULES
    assert late == 2 * MODULES
    singular = [parameter for name, parameter in model.named_parameters() if "lora_E" in name]
    assert sum(int((values != 0).sum()) for values in singular) == late


def test_adaloras_loss_holds_the_orthogonality_term():
    losses, models = [], []
    for weight in (0.0, 0.5):
        models.append(built(AdaLora(orthogonality=weight)))
        losses.append(float(models[-1](**make_batch(models[-1], SETTINGS)).loss.detach()))
    factors = [
        (parameter.detach(), "lora_A" in name)
        for name, parameter in models[1].named_parameters()
        if "lora_A" in name or "lora_B" in name
    ]
    grams = [matrix @ matrix.T if rows else matrix.T @ matrix for matrix, rows in factors]
    term = sum(float((gram - torch.eye(len(gram))).norm()) for gram in grams) / len(grams)
    assert term > 1
    assert losses[1] - losses[0] == pytest.approx(0.5 * term, rel=1e-4)


@pytest.mark.parametrize("ranks", [(8, 8), (8, 12), (8, 0)])
def test_adalora_needs_something_to_allocate(ranks):
    with pytest.raises(ConfigError, match="target_r="):
        AdaLora(init_r=ranks[0], target_r=ranks[1])


# ReLoRA --------------------------------------------------------------------------------------------------------------


def pairs(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_a_restart_leaves_the_function_and_zeroes_the_pair():
    method = ReLora(r=2, restart_every=100)
    model = built(method)
    _, hooks = train(method, model, 5)
    before, trained = logits(model), pairs(model)
    weight = model.get_submodule("base_model.model.roberta.encoder.layer.0.output.dense.base_layer").weight
    old_weight = weight.detach().clone()
    hooks.restart()
    assert torch.allclose(logits(model), before, atol=1e-6)
    assert not torch.equal(weight, old_weight)
    fresh = pairs(model)
    assert all(fresh[name].any() == ("lora_A" in name) for name in fresh)
    assert all(trained[name].any() and not torch.equal(fresh[name], trained[name]) for name in fresh)


def test_restarts_come_when_due_and_reset_the_optimizer():
    method = ReLora(r=2, restart_every=4, prune_ratio=1.0)
    model = built(method)
    optimizer, hooks = train(method, model, 8)
    assert hooks._restarts == 2
    adapter = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert len(adapter) == 2 * MODULES
    assert all(not optimizer.state[parameter]["exp_avg"].any() for parameter in adapter)


def test_the_learning_rate_climbs_after_a_restart():
    method = ReLora(r=2, restart_every=2, rewarmup_steps=4)
    model = built(method)
    optimizer, hooks = train(method, model, 2)
    rates = []
    for step in (3, 4):
        hooks.before_step(step)
        rates.append(optimizer.param_groups[0]["lr"])
        hooks._rewarmup.end(optimizer, None)
    assert rates == pytest.approx([0.0, 0.0025])
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_restarts_cannot_be_closer_than_a_step():
    with pytest.raises(ConfigError, match="restart_every=0"):
        ReLora(restart_every=0)


# AROMA ---------------------------------------------------------------------------------------------------------------


def test_aroma_grows_under_its_hooks():
    options = {"max_inner_steps": 3, "inner_tolerance": None, "outer_tolerance": None, "rewarmup_steps": 0}
    method = Aroma(options=options)
    model = built(method)
    _, hooks = train(method, model, 7)
    assert hooks.controller.global_step == 7
    assert all(layer.finished("default").rank == 2 for layer in aroma_layers(model).values())
    assert len(aroma_layers(model)) == MODULES
