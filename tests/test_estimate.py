"""`aroma estimate`: estimates equal what real models on the CPU hold and need, and what PyTorch shards and reduces."""

import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._C._profiler import _EventType
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from aroma import AromaConfig, aroma_layers
from aroma.cli import main
from aroma.errors import ConfigError
from aroma.measures import grown_norms, pair_norms
from aroma.tuner import fused
from aroma.tuner import layer as aroma_layer
from aroma_lab.bench.memory import kept_bytes, optimizer_bytes
from aroma_lab.cli.estimate import SHAPES as NAMED_SHAPES
from aroma_lab.estimate.devices import DEVICES, GIB, estimate, fit, kinds_of, needs_of, usable_bytes
from aroma_lab.estimate.memory import (
    PARTS,
    as_on_a_device,
    inner_check_bytes,
    outer_step_bytes,
    run_step,
    state_bytes,
    step_bytes,
)
from aroma_lab.estimate.model import SHAPES, EstimateSettings, build, layers_of, load_config
from aroma_lab.estimate.tensors import finished_bytes, take_inventory
from aroma_lab.run.machine import peak_bytes
from aroma_lab.specs import ModelSpec
from aroma_lab.tasks.model import loading_options
from models import ARCHITECTURES, METHOD, adapted, saved_base, trainable
from quick import slow_but

COMPONENTS = (0, 1, 8, 9, 100)


def settings_for(name: str, **changes: Any) -> EstimateSettings:
    return EstimateSettings(**{"model": saved_base(name), "dtype": "float32", "sequence_length": 8, **changes})


def bytes_of(tensors: Any) -> int:
    """Bytes of all storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def grown(name: str, components: int, r: int = 1, model: Any = None) -> Any:
    """A model that has really merged so many components into every module."""
    model = adapted(name, model, r=r)
    for layer in aroma_layers(model).values():
        for _ in range(components):
            layer.merge_pair("default")
    return model


def inventory_of(settings: EstimateSettings) -> Any:
    return take_inventory(build(settings, load_config(settings.model)), settings.dtype)


def test_the_command_names_the_shapes_that_there_are():
    assert (*SHAPES,) == NAMED_SHAPES, "the command knows them before PyTorch is loaded"


# What lies there -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta", "bert"])
def test_what_lies_on_one_device(name):
    for components in COMPONENTS:
        settings = settings_for(name, components=components)
        model = grown(name, components)
        found = inventory_of(settings)
        layers = aroma_layers(model).values()
        pairs = [parameter for layer in layers for parameter in layer.pair("default")]
        finished = [t for layer in layers for t in layer.finished("default").buffers()]
        head = [p for p in trainable(model) if all(p is not pair for pair in pairs)]
        assert sum(one.bytes for one in found.weights) == bytes_of(
            p for p in model.parameters() if not p.requires_grad
        )
        assert sum(one.bytes for one in found.pairs) == bytes_of(pairs)
        assert sum(one.bytes for one in found.head) == bytes_of(head)
        assert finished_bytes(found, settings) == bytes_of(finished)
        assert found.buffers == bytes_of(b for b in model.buffers() if all(b is not t for t in finished))
    base = ARCHITECTURES[name].model_class(load_config(settings.model))
    assert found.parameters == sum(p.numel() for p in base.parameters())


@pytest.mark.parametrize("adapter", ["aroma", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_meta_and_real_give_the_same_inventory(dtype, adapter):
    components = 9 if adapter == "aroma" else 0
    settings = settings_for("llama", dtype=dtype, components=components, r=2, adapter=adapter)
    base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, dtype))
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    real = grown("llama", 9, 2, base) if adapter == "aroma" else get_peft_model(base, lora)
    assert sum(one.bytes for one in inventory_of(settings).trained) == bytes_of(trainable(real))
    assert take_inventory(real, dtype) == inventory_of(settings)


MEDIUM = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


@pytest.fixture(scope="module")
def medium(tmp_path_factory) -> str:
    """Folder of a model of which rounding of blocks and scales shows."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("medium")
    AutoModelForCausalLM.from_config(MEDIUM).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind, medium):
    spec = ModelSpec(medium, dtype="bfloat16", quantization=kind)
    real = AutoModelForCausalLM.from_pretrained(medium, **loading_options(spec))
    constants = []
    for module in real.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            constants += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            constants.append(module.weight.SCB)
    assert len(constants) == (5 if kind == "nf4" else 1) * 7 * 5
    found = inventory_of(EstimateSettings(medium, dtype=kind, sequence_length=8))
    assert sum(one.bytes for one in found.weights) == bytes_of(real.parameters())
    assert found.constants == bytes_of(constants)
    model = get_peft_model(real, AromaConfig(**METHOD, task_type="CAUSAL_LM"))
    assert found.modules == tuple((one.out_features, one.in_features) for one in aroma_layers(model).values())
    tokens = torch.randint(2, 500, (2, 64))
    step = step_bytes(EstimateSettings(medium, 0, dtype=kind, batch_size=2, sequence_length=64), load_config(medium))
    measured = measured_peak(lambda: model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss.backward())
    gradients = bytes_of(parameter.grad for parameter in trainable(model))
    # How much scratch bitsandbytes needs for a matmul depends on the kernel that the machine has.
    assert measured * 0.9 <= step.peak + gradients <= measured * 1.1


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw8bit": bitsandbytes.optim.AdamW8bit,
    "adafactor": torch.optim.Adafactor,
    "sgd": torch.optim.SGD,
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
}


@pytest.mark.filterwarnings("ignore:r=300 is the rank of one component")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("r", [1, 300])  # of 300 the matrices are kept in 8 bits
def test_the_state_of_an_optimizer(name, r):
    model = adapted("llama", r=r)
    for parameter in trainable(model):
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer = OPTIMIZERS[name](trainable(model))
    optimizer.step()
    expected = optimizer_bytes(optimizer)
    assert state_bytes(name, inventory_of(settings_for("llama", r=r)).trained) == expected
    assert (expected == 0) == (name == "sgd")


# A step --------------------------------------------------------------------------------------------------------------

STEPS = {
    "roberta": RobertaConfig(
        architectures=["RobertaForSequenceClassification"],
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    "gpt2": GPT2Config(
        architectures=["GPT2LMHeadModel"],
        vocab_size=500,
        n_embd=64,
        n_layer=4,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "llama": MEDIUM,
}


def real_step(config: Any, settings: EstimateSettings) -> tuple[Any, Any]:
    """A real model with finished components, and the loss of a batch."""
    is_causal = settings.task == "causal-lm"
    kind = AutoModelForCausalLM if is_causal else AutoModelForSequenceClassification
    dtype = getattr(torch, settings.dtype)
    base = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    task = "CAUSAL_LM" if is_causal else "SEQ_CLS"
    lora = LoraConfig(r=settings.r, target_modules="all-linear", task_type=task)
    aroma = AromaConfig(**METHOD, task_type=task)
    model = get_peft_model(base, lora if settings.adapter == "lora" else aroma).train()
    for layer in aroma_layers(model).values():
        for _ in range(settings.components):
            layer.merge_pair("default")
    tokens = torch.randint(2, 500, (settings.batch_size, settings.sequence_length))
    labels = {"labels": tokens, "use_cache": False} if is_causal else {"labels": tokens[:, 0] % 2}
    return model, lambda: model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **labels).loss


def measured_peak(work: Any) -> int:
    """Most bytes that PyTorch's allocator has given out at a time while `work` runs, scratch of kernels included.

    Memory of before that is freed meanwhile does not count: not what `work` frees, and not the garbage of an earlier
    test, whose collection can fall within.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    todo = [*profiler.profiler.kineto_results.experimental_event_tree()]
    sizes = []
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    live, peak = {}, 0
    for _, address, size in sorted(sizes, key=lambda one: one[0]):
        if size > 0:
            live[address] = size
            peak = max(peak, sum(live.values()))
        else:
            live.pop(address, None)
    return peak


def test_the_measured_peak_knows_nothing_of_garbage_of_before():
    class Cycle:
        def __init__(self):
            self.itself, self.tensor = self, torch.zeros(4000)

    def work():
        gc.collect()
        torch.zeros(100_000)

    measured_peak(Cycle)  # memory that a profile has seen is given back in a later one
    assert measured_peak(work) == 400_000


# name, dtype, finished components or "lora", checkpointing, and by what share the peak may be underestimated: CPU
# kernels use scratch
CASES = [
    ("roberta", "float32", 9, False, 0.001),
    ("roberta", "bfloat16", 0, False, 0.1),
    ("gpt2", "float32", 0, False, 0.001),
    ("gpt2", "float32", 9, True, 0.001),
    ("llama", "float32", 9, False, 0.001),
    ("llama", "bfloat16", 100, False, 0.001),
    ("llama", "float32", "lora", False, 0.001),
    ("gpt2", "float32", "lora", True, 0.001),
]


@pytest.mark.parametrize(("name", "dtype", "components", "checkpointing", "scratch"), slow_but(CASES[1:4], CASES))
def test_what_a_step_keeps_and_its_peak(name, dtype, components, checkpointing, scratch):
    is_lora = components == "lora"
    settings = EstimateSettings(
        name,
        0 if is_lora else components,
        r=8 if is_lora else 1,
        adapter="lora" if is_lora else "aroma",
        dtype=dtype,
        batch_size=2,
        sequence_length=64,
        task="classification" if name == "roberta" else "causal-lm",
        gradient_checkpointing=checkpointing,
    )
    found = step_bytes(settings, STEPS[name])
    model, loss = real_step(STEPS[name], settings)
    if not checkpointing:  # what a checkpoint keeps is no saved tensor
        assert found.kept == pytest.approx(kept_bytes(loss, model), rel=0.005)
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    loss().backward()
    measured = measured_peak(lambda: loss().backward())
    if checkpointing:  # the state of the CPU's random numbers, which a checkpoint keeps on a CPU
        measured -= torch.get_rng_state().nbytes * STEPS[name].num_hidden_layers
    assert measured * (1 - scratch) <= found.peak <= measured * 1.01


@pytest.mark.slow
def test_dropout_keeps_a_byte_a_number():
    settings = EstimateSettings("roberta", dtype="float32", batch_size=2, sequence_length=64, task="classification")
    (small, smaller), (large, larger) = (
        [
            step_bytes(
                settings, RobertaConfig(**{**STEPS["roberta"].to_dict(), "hidden_dropout_prob": p, **layers})
            ).kept
            for p in (0.1, 0.0)
        ]
        for layers in ({"num_hidden_layers": 2}, {"num_hidden_layers": 3})
    )
    assert (large - larger) - (small - smaller) == 2 * 2 * 64 * 64, "behind attention and the feed-forward part"


@pytest.mark.parametrize("checkpointing", slow_but([False], [False, True]))
def test_a_deep_model_is_its_short_ones_continued(checkpointing):
    config = LlamaConfig(**{**MEDIUM.to_dict(), "num_hidden_layers": 7})
    settings = EstimateSettings("llama", 3, sequence_length=128, gradient_checkpointing=checkpointing)
    assert layers_of(config) == 7
    assert step_bytes(settings, config) == run_step(build(settings, config), settings, config)


@pytest.mark.parametrize("r", [1, 4])
def test_what_the_checks_need_for_a_while(r):
    settings = settings_for("llama", components=8, r=r)
    found = inventory_of(settings)
    model = grown("llama", 8, r)
    layers = [*aroma_layers(model).values()]
    pairs = [tuple(p.detach() for p in layer.pair("default")) for layer in layers]
    weights = [layer.weight_matrix for layer in layers]
    finished = [(layer.finished("default").B, layer.finished("default").A) for layer in layers]
    inner = measured_peak(lambda: pair_norms(pairs))
    outer = measured_peak(lambda: grown_norms(weights, finished, pairs, [1.0] * len(layers)))
    small = 64 * (len(layers) + 4)  # results, a number a module
    assert inner - small <= inner_check_bytes(found, settings) <= inner + small
    assert outer - small <= outer_step_bytes(found, settings) <= outer + small


# Several devices -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_group() -> Iterator[None]:
    """A process group of four of which only this process is there: PyTorch's own backend for such tests."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def test_what_fsdp2_leaves_on_a_device(fake_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    settings = settings_for("llama", components=9, r=3)
    model = grown("llama", 9, r=3)
    mesh = init_device_mesh("cpu", (4,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    local = {name: p.to_local() for name, p in model.named_parameters()}
    (needs,) = needs_of([settings])
    found = needs.on("fsdp2", 4)
    trained = {name: p for name, p in local.items() if model.get_parameter(name).requires_grad}

    def numbers(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    assert found["pairs"] == numbers(trained.values())
    assert found["weights"] == numbers(p for name, p in local.items() if name not in trained)
    assert found["finished"] == bytes_of(b for n, b in model.named_buffers() if "lora_finished" in n)
    assert found["optimizer"] == state_bytes("adamw", needs.inventory.trained) - 2 * (
        needs.on("one")["pairs"] - found["pairs"]
    )


def test_what_ddp_reduces_in_a_step(fake_group):
    settings = settings_for("roberta", components=8)
    model = grown("roberta", 8)
    replica = nn.parallel.DistributedDataParallel(model)
    sent = []

    def count(_, bucket):  # DDP reads annotations
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    replica.register_comm_hook(None, count)
    replica(**ARCHITECTURES["roberta"].batch(3)).loss.backward()
    (needs,) = needs_of([settings])
    assert needs.on("ddp", 4)["buckets"] == sum(sent) == needs.on("one")["gradients"]


def test_zero_shards_the_optimizer_then_gradients_then_weights():
    (needs,) = needs_of([settings_for("llama", components=9)])
    one, zero1, zero2, zero3 = (needs.on(name, 4) for name in ("one", "zero1", "zero2", "zero3"))
    assert zero1["optimizer"] < one["optimizer"]
    assert zero1["gradients"] == one["gradients"] > zero2["gradients"] == zero3["gradients"]
    assert zero1["weights"] == zero2["weights"] == one["weights"]
    assert one["weights"] / 4 <= zero3["weights"] < one["weights"] / 3.9
    assert zero3["gathered"] == one["weights"] + one["pairs"] + one["head"], "a small model is whole for a step"
    assert {one["finished"]} == {needs.on(name, 4)["finished"] for name in ("ddp", "fsdp2", "zero1", "zero3")}
    assert needs.on("zero3", 1) == needs.on("fsdp2", 1) == one


@pytest.mark.slow
def test_the_fewest_devices_are_enough_and_one_fewer_is_not():
    (needs,) = needs_of([EstimateSettings("llama3-8b", 10, sequence_length=2048, gradient_checkpointing=True)])
    usable = usable_bytes(10)
    found = fit(needs, usable)
    assert not found["on_one"]
    assert found["fsdp2_bytes"] == needs.on("fsdp2", found["fsdp2"])["total"]
    for strategy in ("fsdp2", "zero3"):
        assert found[strategy] > 2
        assert needs.on(strategy, found[strategy])["total"] <= usable
        assert needs.on(strategy, found[strategy] - 1)["total"] > usable
    assert fit(needs, usable_bytes(DEVICES["H200"]))["fsdp2"] == 1
    assert fit(needs, usable_bytes(5))["fsdp2"] is None
    assert needs.on("ddp", 8)["total"] > needs.on("one")["total"] > needs.on("fsdp2", 8)["total"]


@pytest.mark.parametrize(("model", "length"), [("roberta-base", 512), ("minilm", 512), ("gpt2", 1024), ("tiny", 64)])
def test_the_default_length_is_what_the_model_takes(model, length):
    (needs,) = needs_of([EstimateSettings(model)])
    assert needs.settings.sequence_length == length


@pytest.mark.slow
def test_405_billion_parameters_take_no_memory_here():
    before, began = peak_bytes(), time.process_time()
    settings = EstimateSettings("llama3.1-405b", 100, gradient_checkpointing=True)
    (found,) = estimate([settings], 16, kinds_of(["H100", "t4"]))["estimates"]
    assert found["settings"]["sequence_length"] == 2048
    assert found["parameters"]["base"] == 405_853_388_800
    assert found["bytes"]["one"]["weights"] == 2 * 405_853_388_800
    assert found["parameters"]["modules"] == 126 * 7
    assert 10 < found["fits"][0]["fsdp2"] < 100
    assert inventory_of(EstimateSettings("llama3-8b")).parameters == 8_030_261_248
    assert found["fits"][1]["fsdp2"] is None, "its finished components alone are more than a T4 has"
    assert peak_bytes() - before < GIB
    assert time.process_time() - began < 60


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent/model"], "model='absent/model': neither a shape"),
        (["gpt2", "--dtype", "int4"], "dtype='int4': choose one of float32, bfloat16, float16, nf4, int8"),
        (["gpt2", "--components", "-1"], "components=-1: give a whole number, 0 or more"),
        (["gpt2", "--r", "0"], "r=0: give a whole number, 1 or more"),
        (["gpt2", "--sequence-length", "2000"], "sequence_length=2000: the model takes at most 1024 tokens"),
        (["roberta-base", "--sequence-length", "513"], "sequence_length=513: the model takes at most 512 tokens"),
        (["gpt2", "--devices", "0"], "devices=0: give a whole number, 1 or more"),
        (["gpt2", "--device", "H1000"], "device='H1000': choose among T4"),
        (["gpt2", "--device-memory", "1"], "device_memory=1.0: give GiB"),
        (["gpt2", "--target-modules", "q_proj"], "target_modules="),
        (["roberta-base", "--dtype", "nf4", "--sequence-length", "8"], "dtype='nf4': bitsandbytes quantises the head"),
        (["gpt2", "--adapter", "lora", "--components", "3"], "components=3: LoRA has no finished components; give 0"),
        (["gpt2", "--json", "out.txt"], "--json='out.txt': the name of the results must end in .json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {message}")
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_neither_and_one_that_is_quantised_already(tmp_path):
    with pytest.raises(ConfigError, match="a vit: neither a causal language model nor a text classifier"):
        inventory_of(settings_for("vit"))
    config = LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="its checkpoint is quantised already"):
        load_config(str(tmp_path))


def test_nothing_of_the_layer_stays_changed():
    names = [(aroma_layer, "is_traced"), (aroma_layer, "autocast_dtype"), (fused, "autocast_dtype")]
    names += [(F, "dropout")]
    before = [getattr(*name) for name in names]
    with as_on_a_device():
        assert all(getattr(*name) is not one for name, one in zip(names, before, strict=True))
    assert [getattr(*name) for name in names] == before


# The command and the page --------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes(capsys, tmp_path):
    out = tmp_path / "e.json"
    options = ["--components", "0", "9", "--devices", "2", "--json", str(out)]
    assert main(["estimate", saved_base("llama"), *options]) == 0
    text = capsys.readouterr().out
    for part in ("finished components", "FSDP2", "ZeRO-3", "Does it fit?", "H100", "not measured"):
        assert part in text
    written = json.loads(out.read_text())
    assert [one["settings"]["components"] for one in written["estimates"]] == [0, 9]
    for one in written["estimates"]:
        assert set(one["bytes"]) == {"one", "ddp", "fsdp2", "zero1", "zero2", "zero3"}
        for found in one["bytes"].values():
            assert found["total"] == sum(found[name] for name in PARTS)
        assert [found["device"] for found in one["fits"]] == [*DEVICES]
    assert main(["estimate", saved_base("llama"), *options]) == 2, "nothing is overwritten"
    assert (
        f"error: --json='{out}': it exists, and nothing is overwritten; give another name" in capsys.readouterr().err
    )


ROOT = Path(__file__).parents[1]
RESULTS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "results" / "scale").glob("*.json"))}


def test_the_page_has_the_numbers_of_the_files():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert list(RESULTS) == ["llama3-70b", "llama3-8b", "llama3.1-405b", "roberta-base"]
    for name, result in RESULTS.items():
        assert [one["settings"]["components"] for one in result["estimates"]] == [1, 10, 100]
        for one in result["estimates"]:
            found = one["bytes"]["one"]
            trains = found["pairs"] + found["head"] + found["gradients"] + found["optimizer"]
            step = found["kept"] + found["step_extra"] + found["between_extra"]
            bytes_row = (found["weights"], trains, found["finished"], step, found["total"])
            fit_row = (str(fits["fsdp2"] or "–") for fits in one["fits"])
            for cells in ((f"{count / GIB:.2f}" for count in bytes_row), fit_row):
                row = " | ".join([name, str(one["settings"]["components"]), *cells])
                assert page.count(f"| {row} |") == 1, row


def test_the_page_has_the_numbers_of_the_largest_models():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for name in ("llama3.1-405b", "deepseek-v3", "kimi-k2"):
        result = json.loads((ROOT / "results" / "scale" / "beyond-100b" / f"{name}.json").read_text())
        assert result["devices"] == 32
        for one in result["estimates"]:
            assert (one["settings"]["dtype"], one["settings"]["quantise_experts"]) == ("nf4", True)
        for title, strategy in (("FSDP2", "fsdp2"), ("ZeRO-3", "zero3")):
            found = [one["bytes"][strategy] for one in result["estimates"]]
            first = found[0]
            trains = first["pairs"] + first["head"] + first["gradients"] + first["optimizer"]
            step = first["kept"] + first["step_extra"] + first["between_extra"]
            same = (first["weights"], first["constants"], trains, first["gathered"], step)
            cells = [f"{count / GIB:.2f}" for count in same]
            cells += [", ".join(f"{one[part] / GIB:.2f}" for one in found) for part in ("finished", "total")]
            row = " | ".join([name, title, *cells])
            assert page.count(f"| {row} |") == 1, row


@pytest.mark.slow
def test_the_files_are_what_the_command_writes_today():
    written = RESULTS["llama3-8b"]
    settings = [EstimateSettings(**one["settings"]) for one in written["estimates"]]
    assert json.loads(json.dumps(estimate(settings, written["devices"]))) == written
