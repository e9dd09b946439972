"""The methods of comparison: what trains, what is done around the optimizer's step, and what can be asked then."""

import copy
import json

import pytest
import torch
from peft import PeftModel

from aroma import CompressCallback
from aroma.errors import ConfigError
from aroma.integrations.callback import AromaCallback
from aroma.integrations.loop import attach
from aroma_lab.bench.models import BenchSettings, make_batch, make_model
from aroma_lab.methods import (
    METHODS,
    AdaLora,
    Aroma,
    BitFit,
    Compressed,
    Frozen,
    Full,
    HeadOnly,
    Hooks,
    Houlsby,
    Lora,
    Pfeiffer,
    ReLora,
    make_method,
)
from aroma_lab.methods.head import encoder_linears, find_targets
from aroma_lab.methods.lora import PeftAdapter
from models import base

SETTINGS = BenchSettings(model="tiny", batch_size=4, length=12)
MODULES = 12
"""Linear modules in the layers of the tiny shape: six a layer."""

GROWS = {"max_inner_steps": 3, "inner_tolerance": None, "outer_tolerance": None, "rewarmup_steps": 0}
"""AROMA with a new component every three steps."""
WIDTH, FFN, LAYERS = 16, 32, 2
PAIR = LAYERS * (4 * 2 * WIDTH + 2 * (WIDTH + FFN))
"""Parameters of one component in every module."""

CASES = [
    (Frozen(), 0),
    (HeadOnly(), 0),
    # query, key, value, attention output, FFN output and two LayerNorms; the FFN; the embeddings' LayerNorm
    (BitFit(), LAYERS * (7 * WIDTH + FFN) + WIDTH),
    (Houlsby(size=3), 2 * LAYERS * (2 * WIDTH * 3 + 3 + WIDTH)),
    (Pfeiffer(size=3), LAYERS * (2 * WIDTH * 3 + 3 + WIDTH)),
    (Lora(r=2, dropout=0.1), 2 * PAIR),
    (AdaLora(init_r=4, target_r=2), 4 * (PAIR + MODULES)),
    (ReLora(r=2), 2 * PAIR),
    (Full(), None),
    (Aroma(r=2), 2 * PAIR),
]
"""Methods, with the number of parameters that train outside the head; None: all of them."""
FACTORS = [
    Lora(r=2, alpha=5),
    AdaLora(init_r=4, target_r=2, alpha=3),
    ReLora(max_components=3, max_inner_steps=9),
    Aroma(**GROWS),
]
"""Those whose updates are products of factors, at scales other than 1."""


def built(method, planned_steps=100):
    torch.manual_seed(0)
    return started(method, make_model(SETTINGS), planned_steps)


def started(method, model, planned_steps):
    return method.build(model, planned_steps)


def train(method, model, steps, planned_steps=100, lr=1e-2, on_event=None, saved=None):
    """Train in a plain loop, from what was `saved` on; return all that a checkpoint holds."""
    batch = make_batch(model, SETTINGS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    hooks = method.hooks(model)
    if isinstance(method, Aroma):
        attach(model, optimizer, total_steps=planned_steps, on_event=on_event)
    done = 0
    if saved is not None:
        done, trained, state, of_hooks = saved
        model.load_state_dict(trained, strict=False)
        optimizer.load_state_dict(copy.deepcopy(state))
        hooks.load_state_dict(of_hooks)
    for step in range(done + 1, steps + 1):
        model(**batch).loss.backward()
        optimizer.step()
        hooks.after_step(step)
        optimizer.zero_grad()
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return steps, trained, copy.deepcopy(optimizer.state_dict()), hooks.state_dict()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=make_batch(model, SETTINGS)["input_ids"]).logits


# What trains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "count"), CASES, ids=str)
def test_every_method_trains_what_it_should_and_learns(method, count):
    model = built(method)
    backbone = sum(p.numel() for name, p in make_model(SETTINGS).named_parameters() if "classifier" not in name)
    assert method.active_parameters(model) == (backbone if count is None else count)
    assert method.ranks(model).keys() == method.components(model).keys()
    assert bool(method.ranks(model)) == isinstance(method, PeftAdapter)
    (callback,) = method.callbacks(model)
    assert isinstance(callback, AromaCallback if isinstance(method, Aroma) else Hooks)
    if not isinstance(method, Frozen):
        batch = make_batch(model, SETTINGS)
        before = float(model(**batch).loss.detach())
        train(method, model, 12)
        assert float(model(**batch).loss.detach()) < before


# AdaLoRA -------------------------------------------------------------------------------------------------------------


def test_adaloras_allocator_reaches_its_target_and_masked_triplets_do_not_count():
    method = AdaLora(init_r=4, target_r=2)
    model = built(method, planned_steps=6)
    assert set(method.ranks(model).values()) == {4}
    train(method, model, 3, planned_steps=6)
    assert 2 * MODULES < sum(method.ranks(model).values()) < 4 * MODULES
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


@pytest.mark.parametrize("stage", [2, 7, 13], ids=["nothing allocated", "between two allocations", "budget fixed"])
def test_a_resumed_adalora_is_the_uninterrupted_one_to_the_bit(stage):
    method = AdaLora(init_r=4, target_r=2, initial_steps=3, final_steps=4, interval=2)
    model, resumed = built(method, 16), built(method, 16)
    saved = train(method, model, stage, 16)
    whole = train(method, model, 16, 16, saved=saved)
    _, trained, _, state = train(method, resumed, 16, 16, saved=saved)
    assert method.ranks(resumed) == method.ranks(model)
    for ours, theirs in ((trained, whole[1]), (state, whole[3])):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# AROMA ---------------------------------------------------------------------------------------------------------------


def test_relora_1x8_trains_eight_components_of_equal_length_whatever_they_come_to():
    method = ReLora()
    model = built(method, planned_steps=40)
    events = []
    train(method, model, 40, planned_steps=40, lr=1e-7, on_event=events.append)  # next to nothing is learned
    merged = [event.step for event in events if event.kind == "merged"]
    assert sorted(set(merged)) == [5, 10, 15, 20, 25, 30, 35, 40]
    assert len(merged) == 8 * MODULES
    assert not any(event.kind == "checked" for event in events)
    assert set(method.ranks(model).values()) == {8}
    assert method.active_parameters(model) == 0


@pytest.mark.parametrize(
    "method",
    # Between two allocations of AdaLoRA the optimizer moves masked triplets too, and then they are components.
    [*FACTORS, AdaLora(init_r=4, target_r=2, interval=4, dropout=0.1)],
    ids=str,
)
def test_components_are_the_whole_update(method):
    torch.manual_seed(0)
    pretrained = make_model(SETTINGS)
    before = {name: pretrained.get_submodule(name).weight.detach().clone() for name in encoder_linears(pretrained)}
    model = started(method, pretrained, 12)
    train(method, model, 11, planned_steps=12)
    components = method.components(model)
    assert list(components) == list(before) == list(method.ranks(model))
    merged = model.merge_and_unload()
    for name, module in merged.named_modules():
        if name in components:
            B, A = components[name]
            assert not B.requires_grad | A.requires_grad
            assert B.shape[1] == A.shape[0]
            assert B.abs().max() > 0
            torch.testing.assert_close(before[name] + B @ A, module.weight, atol=1e-6, rtol=1e-5)


# Compressed at the end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "value"), [("rank", 2), ("size", 0.3)])
def test_by_size_the_largest_singular_values_stay_of_each_matrix_or_of_all(option, value):
    method = Compressed(r=4, alpha=5, by="size", **{option: value})
    model = built(method)
    train(method, model, 12)
    before = {name: torch.linalg.svdvals(B @ A) for name, (B, A) in method.components(model).items()}
    (hooks,) = method.callbacks(model)
    hooks.on_train_end(None, None, None, model=model)
    after, ranks = method.components(model), method.ranks(model)
    assert {name: B.shape[1] for name, (B, _) in after.items()} == ranks
    for name, (B, A) in after.items():
        torch.testing.assert_close(torch.linalg.svdvals(B @ A)[: ranks[name]], before[name][: ranks[name]])
    if option == "rank":
        assert set(ranks.values()) == {2}
    else:
        stored = sum(B.numel() + A.numel() for B, A in after.values())
        assert 0.25 < stored / (4 * PAIR) <= 0.3
        assert len(set(ranks.values())) > 1


def test_by_effect_is_the_library_s_own_callback():
    method = Compressed(keep=0.9, size=0.5, rank=3, examples=20)
    hooks, callback = method.callbacks(built(method))
    assert type(hooks) is Hooks
    assert isinstance(callback, CompressCallback)
    assert callback.examples == 20


# Targets -------------------------------------------------------------------------------------------------------------


def test_targets_are_found_by_name_ending_and_pattern_and_the_head_never():
    model = make_model(SETTINGS)
    layers = encoder_linears(model)
    assert find_targets(None, model) == find_targets("all-linear", model) == layers
    for ends in (["query", "output.dense"], ["dense"]):  # not classifier.dense
        assert find_targets(ends, model) == [name for name in layers if name.endswith(tuple(ends))]
    assert find_targets([layers[3]], model) == [layers[3]]
    assert find_targets(r".*layer\.1\..*(key|value)", model) == [layers[7], layers[8]]
    assert "bert.pooler.dense" in find_targets("all-linear", base("bert"))
    assert "bert.pooler.dense" not in find_targets(None, base("bert"))


@pytest.mark.parametrize("missing", ["kye", "ke", "classifier"])
def test_targets_that_are_not_there_are_refused(missing):
    with pytest.raises(ConfigError, match=rf"target_modules='{missing}': no linear module outside the head is called"):
        find_targets(missing if missing == "ke" else ["query", missing], make_model(SETTINGS))


# Saving --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FACTORS, ids=str)
def test_a_saved_adapter_gives_the_same_answers_in_plain_peft(method, tmp_path):
    model = built(method)
    train(method, model, 11)
    ranks = method.ranks(model)
    method.save(model, tmp_path / "adapter")
    method.save(model, tmp_path / "adapter")  # an interrupted run saves again
    assert method.ranks(model) == ranks
    torch.manual_seed(0)
    reloaded = PeftModel.from_pretrained(make_model(SETTINGS), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] != "AROMA"
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-5, rtol=1e-5)
    with reloaded.disable_adapter():
        assert not torch.allclose(logits(reloaded), logits(model), atol=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


# By name -------------------------------------------------------------------------------------------------------------


def test_options_by_name():
    assert make_method("lora", {"r": 4, "alpha": 8, "dropout": 0.1}) == Lora(r=4, alpha=8.0, dropout=0.1)
    assert all(type(make_method(kind, {})) is made for kind, made in METHODS.items())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lroa", {}, "kind='lroa': there is no such kind of method; the nearest is 'lora'"),
        ("lora", {"rank": 8}, r"options\.rank=8: the method 'lora' has no such key; the nearest is 'options\.r'"),
        ("bitfit", {"r": 8}, r"options\.r=8: the method 'bitfit' has no such key; it has none"),
        ("relora", {"inner_tolerance": 0.1}, r"options\.inner_tolerance=0\.1: the method 'relora' has no such key"),
        ("aroma", {"resett": "zero"}, r"options\.resett='zero': .* the nearest is 'options\.reset'"),
        ("lora", {"r": 0}, "r=0: the rank is 1 or more"),
        ("lora", {"dropout": 1}, r"dropout=1\.0: give a probability in \[0, 1\)"),
        ("compressed", {"keep": 0}, r"keep=0\.0: give a share in \(0, 1\]"),
        ("compressed", {"size": 1.1}, r"size=1\.1: give a share in \(0, 1\]"),
        ("compressed", {"rank": 0}, "rank=0: give 1 or more"),
        ("compressed", {"examples": 15}, "examples=15: give 16 or more"),
        ("compressed", {"by": "size"}, "by='size': give a size or a rank"),
        ("compressed", {"by": "size", "rank": 2, "keep": 0.9}, r"keep=0\.9: by size no effect is measured"),
        ("compressed", {"by": "loss"}, r"options\.by='loss'"),
        ("evidence", {}, "kind='evidence': there is no such kind of method"),
        ("adalora", {"target_r": 12}, "target_r=12: give 1 or more, and less than init_r=12"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        make_method(kind, options)
