"""The methods of comparison: what trains, what is done around the optimizer's step, and what can be asked then."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.adalora import SVDLinear
from transformers import Trainer, TrainingArguments

from aroma import aroma_layers
from aroma.errors import ConfigError
from aroma.files import read_tensors
from aroma_lab.bench.models import BenchSettings, make_batch, make_model
from aroma_lab.methods import (
    METHODS,
    AdaLora,
    Aroma,
    BitFit,
    Frozen,
    Full,
    HeadOnly,
    HooksCallback,
    Houlsby,
    Lora,
    Pfeiffer,
    ReLora,
    Relora,
    encoder_linears,
    make_method,
)
from aroma_lab.methods.modules import find_targets
from models import base

SETTINGS = BenchSettings(model="tiny", batch_size=4, length=12)
MODULES = 12
"""Linear modules in the layers of the tiny shape: six a layer."""

CASES = [
    Frozen(),
    HeadOnly(),
    BitFit(),
    Houlsby(),
    Pfeiffer(),
    Lora(r=2),
    Lora(r=2, dropout=0.1),
    AdaLora(),
    ReLora(),
    Relora(),
    Full(),
    Aroma(),
]
FACTORS = [
    Lora(r=2, alpha=5),
    AdaLora(init_r=4, target_r=2, alpha=3),
    ReLora(r=2, alpha=3, restart_every=4),
    Relora(max_components=3, max_inner_steps=9),
    Aroma(options={"max_inner_steps": 3, "inner_tolerance": None, "outer_tolerance": None, "rewarmup_steps": 0}),
]
"""Those whose updates are products of factors, at scales other than 1."""


def built(method, planned_steps=100):
    torch.manual_seed(0)
    return method.build(make_model(SETTINGS), planned_steps)


def train(method, model, steps, planned_steps=100, lr=1e-2):
    """Train as `aroma_lab.methods.base` says; return the optimizer and the hooks."""
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
    return model.eval()(input_ids=make_batch(model, SETTINGS)["input_ids"]).logits


# What trains ---------------------------------------------------------------------------------------------------------


def test_the_targets_are_the_linear_modules_of_the_layers():
    names = encoder_linears(make_model(SETTINGS))
    assert len(names) == MODULES
    assert all(name.startswith("roberta.encoder.layer.") for name in names)


@pytest.mark.parametrize("method", CASES, ids=lambda method: method.name)
def test_the_head_trains_and_the_backbone_only_where_it_must(method):
    model = built(method)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [name for name in names if "classifier" in name]
    adapter = [name for name in names if "lora_" in name or ".adapter." in name]
    backbone = [name for name in names if name not in head and name not in adapter]
    assert bool(head) == (not isinstance(method, Frozen))
    assert bool(backbone) == isinstance(method, Full | BitFit)
    expected = {Lora: 2 * MODULES, ReLora: 2 * MODULES, Relora: 2 * MODULES, AdaLora: 3 * MODULES, Aroma: 2 * MODULES}
    expected |= {Houlsby: 4 * 4, Pfeiffer: 2 * 4}
    assert len(adapter) == expected.get(type(method), 0)
    assert len(method.parameters(model)) == len(names)


@pytest.mark.parametrize("method", CASES[1:], ids=lambda method: method.name)
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
    assert [method.name for method in CASES] == [
        "frozen (floor)",
        "head only",
        "BitFit",
        "Houlsby size=8",
        "Pfeiffer size=16",
        "LoRA r=2",
        "LoRA r=2, dropout 0.1",
        "AdaLoRA r=12→8",
        "ReLoRA r=8",
        "ReLoRA 1×8",
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


def test_components_are_drawn_from_the_seed_of_the_run():
    starts = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        model = Aroma().build(make_model(dataclasses.replace(SETTINGS, seed=seed)), 100)
        starts.append(next(iter(aroma_layers(model).values())).pair("default")[1].detach())
    assert torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[1])
    torch.manual_seed(1)
    model = Aroma(options={"component_seed": 3}).build(make_model(SETTINGS), 100)
    torch.manual_seed(2)
    other = Aroma(options={"component_seed": 3}).build(make_model(SETTINGS), 100)
    assert all(torch.equal(pairs(model)[name], pairs(other)[name]) for name in pairs(model))


def test_relora_1x8_trains_eight_components_of_equal_length_whatever_they_come_to():
    method = Relora()
    model = built(method, planned_steps=40)
    events = []
    optimizer = torch.optim.AdamW(method.parameters(model), lr=1e-7)  # next to nothing is learned
    hooks = method.hooks(model, optimizer, 40)
    hooks.controller.subscribe(events.append)
    batch = make_batch(model, SETTINGS)
    for step in range(1, 41):
        model(**batch).loss.backward()
        hooks.before_step(step)
        optimizer.step()
        hooks.after_step(step)
        optimizer.zero_grad()
    merged = [event.step for event in events if event.kind == "merged"]
    assert sorted(set(merged)) == [5, 10, 15, 20, 25, 30, 35, 40]
    assert len(merged) == 8 * MODULES
    assert not any(event.kind == "checked" for event in events)
    assert set(method.ranks(model).values()) == {8}
    assert method.active_parameters(model) == 0


# What can be asked ---------------------------------------------------------------------------------------------------

WIDTH, FFN, LAYERS = 16, 32, 2
PAIR = LAYERS * (4 * 2 * WIDTH + 2 * (WIDTH + FFN))
"""Parameters of one component in every module."""


def test_active_parameters_are_what_the_closed_forms_say():
    backbone = sum(p.numel() for name, p in make_model(SETTINGS).named_parameters() if "classifier" not in name)
    expected = {
        Frozen(): 0,
        HeadOnly(): 0,
        # query, key, value, attention output, FFN output and two LayerNorms; the FFN; the embeddings' LayerNorm
        BitFit(): LAYERS * (7 * WIDTH + FFN) + WIDTH,
        Houlsby(size=3): 2 * LAYERS * (2 * WIDTH * 3 + 3 + WIDTH),
        Pfeiffer(size=3): LAYERS * (2 * WIDTH * 3 + 3 + WIDTH),
        Full(): backbone,
        Lora(r=2): 2 * PAIR,
        AdaLora(init_r=4, target_r=2): 4 * (PAIR + MODULES),
        ReLora(r=2): 2 * PAIR,
    }
    for method, count in expected.items():
        assert method.active_parameters(built(method)) == count, method.name
    for method in (Aroma(r=2), Relora(r=2)):
        assert method.active_parameters(built(method)) == 2 * PAIR


def test_masked_triplets_do_not_count():
    method = AdaLora(init_r=4, target_r=2)
    model = built(method, planned_steps=6)
    assert set(method.ranks(model).values()) == {4}
    train(method, model, 6, planned_steps=6)
    ranks = method.ranks(model)
    assert list(ranks) == encoder_linears(make_model(SETTINGS))
    assert sum(ranks.values()) == 2 * MODULES
    assert len(set(ranks.values())) > 1
    sizes = {
        name: sum(module.weight.shape) + 1 for name, module in make_model(SETTINGS).named_modules() if name in ranks
    }
    assert method.active_parameters(model) == sum(rank * sizes[name] for name, rank in ranks.items())
    assert {name: len(A) for name, (_, A) in method.components(model).items()} == ranks


def test_frozen_modules_do_not_count_any_more():
    options = {"max_inner_steps": 2, "inner_tolerance": None, "outer_tolerance": None, "rewarmup_steps": 0}
    method = Aroma(options={**options, "max_components": 2})
    model = built(method)
    assert set(method.ranks(model).values()) == {0}
    train(method, model, 3)
    assert set(method.ranks(model).values()) == {2}  # one finished, one in training
    assert method.active_parameters(model) == PAIR
    model = built(method)
    train(method, model, 4)
    assert method.active_parameters(model) == 0


def test_the_rank_of_relora_counts_what_it_merged():
    method = ReLora(r=2, restart_every=4)
    model = built(method)
    assert set(method.ranks(model).values()) == {2}
    train(method, model, 9)
    assert set(method.ranks(model).values()) == {6}


@pytest.mark.parametrize("method", FACTORS, ids=lambda method: method.name)
def test_components_are_the_whole_update(method):
    torch.manual_seed(0)
    pretrained = make_model(SETTINGS)
    before = {name: pretrained.get_submodule(name).weight.detach().clone() for name in encoder_linears(pretrained)}
    model = method.build(pretrained, 12)
    train(method, model, 11, planned_steps=12)
    components = method.components(model)
    assert list(components) == list(before) == list(method.ranks(model))
    merged = model.merge_and_unload()
    for name, module in merged.named_modules():
        if name in components:
            B, A = components[name]
            assert not B.requires_grad
            assert not A.requires_grad
            assert B.shape[1] == A.shape[0]
            assert B.abs().max() > 0
            torch.testing.assert_close(before[name] + B @ A, module.weight, atol=1e-6, rtol=1e-5)


def test_between_two_allocations_a_masked_triplet_may_add_something_and_is_a_component():
    method = AdaLora(init_r=4, target_r=2, interval=6)
    model = built(method, planned_steps=12)
    train(method, model, 7, planned_steps=12)
    values = [layer.lora_E["default"] for layer in model.modules() if isinstance(layer, SVDLinear)]
    components = method.components(model)
    assert [len(A) for _, A in components.values()] == [int((value != 0).sum()) for value in values]
    assert sum(len(A) for _, A in components.values()) > sum(method.ranks(model).values())


@pytest.mark.parametrize(
    "method", [HeadOnly(), BitFit(), Houlsby(), Pfeiffer(), Full()], ids=lambda method: method.name
)
def test_others_have_neither_ranks_nor_components(method):
    model = built(method)
    assert method.ranks(model) == method.components(model) == {}


# Targets -------------------------------------------------------------------------------------------------------------


def test_targets_are_found_by_name_ending_and_pattern_and_the_head_never():
    model = make_model(SETTINGS)
    layers = encoder_linears(model)
    assert find_targets(None, model) == find_targets("all-linear", model) == layers
    assert find_targets(["query", "output.dense"], model) == [
        name for name in layers if name.endswith(("query", "output.dense"))
    ]
    assert find_targets(["dense"], model) == [
        name for name in layers if name.endswith(".dense")
    ]  # not classifier.dense
    assert find_targets([layers[3]], model) == [layers[3]]
    assert find_targets(r".*layer\.1\..*(key|value)", model) == [layers[7], layers[8]]
    assert "bert.pooler.dense" in find_targets("all-linear", base("bert"))
    assert "bert.pooler.dense" not in find_targets(None, base("bert"))


@pytest.mark.parametrize(
    ("chosen", "shown"), [(["query", "kye"], "'kye'"), ("ke", "'ke'"), ([], r"\[\]"), (["classifier"], "'classifier'")]
)
def test_targets_that_are_not_there_are_refused(chosen, shown):
    with pytest.raises(ConfigError, match=rf"target_modules={shown}: no linear module outside the head is called so"):
        find_targets(chosen, make_model(SETTINGS))


@pytest.mark.parametrize(
    "method", [Lora(), AdaLora(), ReLora(), Relora(), Aroma()], ids=lambda method: type(method).__name__
)
def test_adapters_go_where_they_are_sent(method):
    method = dataclasses.replace(method, target_modules=["key", "intermediate.dense"])
    model = built(method)
    expected = [name for name in encoder_linears(make_model(SETTINGS)) if name.endswith(("key", "intermediate.dense"))]
    assert list(method.ranks(model)) == expected
    assert any("classifier" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


# Saving --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FACTORS, ids=lambda method: method.name)
def test_a_saved_adapter_gives_the_same_answers_in_plain_peft(method, tmp_path):
    model = built(method)
    train(method, model, 11)
    ranks = method.ranks(model)
    method.save(model, tmp_path / "adapter")
    method.save(model, tmp_path / "adapter")  # an interrupted run saves again
    assert method.ranks(model) == ranks
    torch.manual_seed(0)
    reloaded = PeftModel.from_pretrained(make_model(SETTINGS), tmp_path / "adapter")
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-5, rtol=1e-5)
    with reloaded.disable_adapter():
        assert not torch.allclose(logits(reloaded), logits(model), atol=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_merged_products_are_saved_as_a_plain_lora(tmp_path):
    method = ReLora(r=2, alpha=3, restart_every=4)
    model = built(method)
    train(method, model, 9)
    method.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 6, 6)


@pytest.mark.parametrize("method", [HeadOnly(), BitFit(), Houlsby(), Full()], ids=lambda method: method.name)
def test_others_save_what_they_trained(method, tmp_path):
    model = built(method)
    train(method, model, 3)
    method.save(model, tmp_path)
    saved = read_tensors(tmp_path / "trained.safetensors")
    again = built(method)
    assert again.load_state_dict(saved, strict=False).unexpected_keys == []
    assert torch.equal(logits(again), logits(model))


# In the Trainer ------------------------------------------------------------------------------------------------------


class OneBatch(torch.utils.data.Dataset):
    """The same examples again and again."""

    def __init__(self, batch, repeats):
        self.rows = [{name: values[row] for name, values in batch.items()} for row in range(len(batch["labels"]))]
        self.repeats = repeats

    def __len__(self):
        return len(self.rows) * self.repeats

    def __getitem__(self, index):
        return self.rows[index % len(self.rows)]


def trainer_for(method, model, steps, folder, **arguments):
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=SETTINGS.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        report_to="none",
        **arguments,
    )
    optimizer = torch.optim.AdamW(method.parameters(model), lr=1e-2)
    data = OneBatch(make_batch(model, SETTINGS), steps)
    trainer = Trainer(
        model, settings, train_dataset=data, callbacks=method.callbacks(model), optimizers=(optimizer, None)
    )
    trainer.model_accepts_loss_kwargs = False
    return trainer


@pytest.mark.parametrize(
    "method",
    [
        BitFit(),
        Houlsby(),
        Lora(r=2),
        AdaLora(init_r=4, target_r=2, final_share=0.25),
        ReLora(r=2, restart_every=5, rewarmup_steps=3),
        Relora(max_components=3),
        Aroma(options={"max_inner_steps": 4, "inner_tolerance": None, "outer_tolerance": None, "rewarmup_steps": 2}),
    ],
    ids=lambda method: method.name,
)
def test_the_trainer_does_what_the_plain_loop_does(method, tmp_path):
    looped, trained = built(method, planned_steps=12), built(method, planned_steps=12)
    train(method, looped.train(), 12, planned_steps=12)
    trainer_for(method, trained, 12, tmp_path).train()
    one, other = looped.state_dict(), trained.state_dict()
    assert one.keys() == other.keys()
    for name, values in one.items():
        torch.testing.assert_close(other[name], values, atol=1e-6, rtol=1e-5, msg=name)
    assert method.ranks(looped) == method.ranks(trained)


def test_the_learning_rate_that_was_used_is_logged(tmp_path):
    method = ReLora(r=2, restart_every=3, rewarmup_steps=2)
    trainer = trainer_for(method, built(method), 6, tmp_path)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-2, 0.0, 5e-3, 1e-2])


def test_every_method_has_one_callback_and_all_but_aroma_their_hooks():
    for method in CASES:
        (callback,) = method.callbacks(built(method), early_stop=False)
        if isinstance(method, Aroma):
            assert callback.early_stop is False
        else:
            assert isinstance(callback, HooksCallback)
            assert callback.hooks is None
    events = []
    assert Aroma().callbacks(None, on_event=events.append)[0].on_event == events.append


# By name -------------------------------------------------------------------------------------------------------------


def test_every_kind_can_be_made_and_built():
    assert list(METHODS) == [
        *("pretrained", "full", "head_only", "bitfit", "houlsby", "pfeiffer"),
        *("lora", "adalora", "relora", "relora_merge", "aroma"),
    ]
    for kind, made in METHODS.items():
        method = make_method(kind, {})
        assert type(method) is made
        model = built(method)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert any("classifier" in name for name in trained) == made.trains
        assert bool(trained) == made.trains


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("lora", {"r": 4, "alpha": 8, "dropout": 0.1}, Lora(r=4, alpha=8.0, dropout=0.1)),
        ("lora", {"target_modules": ["query"]}, Lora(target_modules=["query"])),
        ("lora", {"target_modules": "all-linear"}, Lora(target_modules="all-linear")),
        (
            "adalora",
            {"init_r": 4, "target_r": 1, "final_share": "0.5"},
            AdaLora(init_r=4, target_r=1, final_share=0.5),
        ),
        ("houlsby", {"size": 64}, Houlsby(size=64)),
        ("relora", {"max_components": 4, "reset": "zero"}, Relora(max_components=4, options={"reset": "zero"})),
        ("relora_merge", {"restart_every": 9}, ReLora(restart_every=9)),
        ("aroma", {"r": 2, "lora_dropout": 0.1}, Aroma(r=2, dropout=0.1)),
        (
            "aroma",
            {"reset": "none", "outer_tolerance": None},
            Aroma(options={"reset": "none", "outer_tolerance": None}),
        ),
        (
            "aroma",
            {"target_modules": ["key"], "lora_alpha": 2},
            Aroma(target_modules=["key"], options={"lora_alpha": 2}),
        ),
    ],
)
def test_options_by_name(kind, options, expected):
    assert make_method(kind, options) == expected


@pytest.mark.parametrize(
    ("kind", "options", "default"),
    [
        ("lora", {"r": 4, "target_modules": ["query"]}, ("dropout", 0.0)),
        ("adalora", {"init_r": 4, "target_r": 1}, ("orthogonality", 0.5)),
        ("houlsby", {"size": 64}, None),
        ("relora", {"max_components": 4, "reset": "zero"}, ("inner_tolerance", None)),
        ("relora_merge", {"restart_every": 9}, None),
        ("aroma", {"reset": "none", "lora_dropout": 0.1, "exclude_modules": ["key"]}, ("outer_tolerance", 5e-3)),
        ("full", {}, None),
    ],
)
def test_resolved_options_are_those_given_and_the_defaults(kind, options, default):
    resolved = make_method(kind, options).resolved_options()
    assert json.loads(json.dumps(resolved)) == resolved
    assert {name: resolved[name] for name in options} == options
    if default is not None:
        assert resolved[default[0]] == default[1]


def test_options_of_aroma_reach_its_configuration():
    options = {
        "reset": "zero",
        "max_inner_steps": 7,
        "inner_check_interval": 5,
        "lora_alpha": 2,
        "exclude_modules": ["key"],
    }
    model = built(make_method("aroma", options))
    config = model.peft_config["default"]
    assert (config.reset, config.max_inner_steps, config.inner_check_interval, config.lora_alpha) == ("zero", 7, 5, 2)
    assert len(aroma_layers(model)) == MODULES - LAYERS
    config = built(make_method("relora", {"max_inner_steps": 7, "prune_ratio": 0.5})).peft_config["default"]
    assert (config.inner_tolerance, config.outer_tolerance, config.max_components) == (None, None, 8)
    assert (config.max_inner_steps, config.prune_ratio) == (7, 0.5)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lroa", {}, "kind='lroa': there is no such kind of method; the nearest is 'lora'"),
        ("lora", {"rank": 8}, r"options\.rank=8: the method 'lora' has no such key; the nearest is 'options\.r'"),
        ("lora", {"task_type": "CAUSAL_LM"}, r"options\.task_type='CAUSAL_LM': the method 'lora' has no such key"),
        ("bitfit", {"r": 8}, r"options\.r=8: the method 'bitfit' has no options; leave it out"),
        ("houlsby", {"kind": "pfeiffer"}, r"options\.kind='pfeiffer': the method 'houlsby' has no such key"),
        ("relora", {"inner_tolerance": 0.1}, r"options\.inner_tolerance=0\.1: the method 'relora' has no such key"),
        ("aroma", {"options": {}}, r"options\.options={}: the method 'aroma' has no such key"),
        ("aroma", {"resett": "zero"}, r"options\.resett='zero': .* the nearest is 'options\.reset'"),
        ("aroma", {"reset": "half"}, r"options\.reset='half': give one of prune, zero, none"),
        ("aroma", {"max_inner_steps": 3}, "max_inner_steps=3: it is smaller than inner_check_interval=10"),
        ("lora", {"r": "many"}, r"options\.r='many': give a whole number"),
        ("lora", {"r": 1.5}, r"options\.r=1\.5: give a whole number"),
        ("lora", {"r": 0}, "r=0: the rank is 1 or more"),
        ("lora", {"dropout": 1}, r"dropout=1\.0: give a probability in \[0, 1\)"),
        ("adalora", {"final_share": 1.0}, r"final_share=1\.0: give a share of the planned steps"),
        ("adalora", {"initial_steps": -1}, "initial_steps=-1: give 0 optimizer steps or more"),
        ("adalora", {"interval": 0}, "interval=0: allocations are at least one optimizer step apart"),
        ("adalora", {"orthogonality": -0.1}, r"orthogonality=-0\.1: give 0 or more"),
        ("relora_merge", {"prune_ratio": 2}, r"prune_ratio=2\.0: give the share of moments to zero"),
        ("relora_merge", {"rewarmup_steps": -1}, "rewarmup_steps=-1: give 0 for no climb"),
        ("relora_merge", {"r": 0}, "r=0: the rank is 1 or more"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        make_method(kind, options)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_bitfit_needs_biases():
    with pytest.raises(ConfigError, match="model='LlamaForCausalLM': its backbone has no bias to train"):
        BitFit().build(base("llama"), 10)


def test_adaloras_phases_must_fit_the_planned_steps():
    with pytest.raises(ConfigError, match="final_steps=6: with 4 initial steps it leaves none of the 10 planned ones"):
        built(AdaLora(initial_share=0.4, final_steps=6), planned_steps=10)
    model = built(AdaLora(initial_share=0.4, final_steps=5), planned_steps=10)
    config = model.peft_config["default"]
    assert (config.tinit, config.tfinal, config.total_step) == (4, 5, 10)
    config = built(AdaLora(initial_steps=3, final_share=0.5), planned_steps=10).peft_config["default"]
    assert (config.tinit, config.tfinal) == (3, 5)


def test_adaloras_budget_is_planned_for_the_run_it_is_in():
    method = AdaLora()
    model = built(method, planned_steps=100)
    with pytest.raises(ConfigError, match="planned_steps=50: AdaLoRA's budget was planned for total_step=100"):
        method.hooks(model, None, 50)
