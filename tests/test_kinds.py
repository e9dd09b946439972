"""Convolutions and embeddings: each is held to a dense weight, to the reference, and to plain PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aroma import AromaConfig, Attachment, aroma_layers, attach, lora_tensors
from aroma.errors import CheckpointError, ConfigError
from aroma.export import export_uniform, rank_table
from aroma.saved import read_adapter
from aroma.sharding import Partition
from aroma.tuner import AromaLinear
from corruptions import seal
from quick import slow_but
from reference import ReferenceAroma, Settings

draw = partial(torch.randn, dtype=torch.float64)
ROWS = 30
"""Of the embedding; examples look up the first half only."""


@dataclass(frozen=True)
class Case:
    """A layer, an input, and the same map as a function of the weight as a matrix (m, n)."""

    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    shape: tuple[int, int]
    use: Callable[[Tensor, Tensor], Tensor]


def images(*sizes: int) -> Callable[[], Tensor]:
    return lambda: draw(6, *sizes)


CASES = {
    "conv2d": Case(
        lambda: nn.Conv2d(4, 7, 3, stride=2, padding=1, bias=False),
        images(4, 9, 8),
        (7, 36),
        lambda x, W: F.conv2d(x, W.view(7, 4, 3, 3), stride=2, padding=1),
    ),
    "conv2d same": Case(
        lambda: nn.Conv2d(4, 7, (3, 1), padding="same", bias=False),
        images(4, 5, 5),
        (7, 12),
        lambda x, W: F.conv2d(x, W.view(7, 4, 3, 1), padding="same"),
    ),
    "conv2d 1x1": Case(
        # Dilation does nothing to a kernel of 1.
        lambda: nn.Conv2d(9, 7, 1, dilation=2, bias=False),
        images(9, 4, 4),
        (7, 9),
        lambda x, W: F.conv2d(x, W.view(7, 9, 1, 1)),
    ),
    "conv1d": Case(
        lambda: nn.Conv1d(4, 7, 3, bias=False), images(4, 9), (7, 12), lambda x, W: F.conv1d(x, W.view(7, 4, 3))
    ),
    "conv3d": Case(
        lambda: nn.Conv3d(2, 7, 2, stride=2, bias=False),
        images(2, 4, 4, 4),
        (7, 16),
        lambda x, W: F.conv3d(x, W.view(7, 2, 2, 2, 2), stride=2),
    ),
    "embedding": Case(
        lambda: nn.Embedding(ROWS, 9),
        lambda: torch.randint(0, ROWS // 2, (6, 5)),
        (ROWS, 9),
        lambda x, W: F.embedding(x, W),
    ),
}
QUICK = ["conv2d", "embedding"]
NAMES = {"two": QUICK, "all": [*CASES]}


class Net(nn.Module):
    """One layer of every case that is named, each with a regression of its own."""

    def __init__(self, names: list[str], seed: int = 0, rank: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleDict({name: CASES[name].make().double() for name in names})
        self.inputs = {name: torch.cat([CASES[name].input() for _ in range(4)]) for name in names}
        self.targets = {}
        for name in names:
            m, n = CASES[name].shape
            teacher = self.weights()[name] + draw(m, rank) @ draw(rank, n)
            answer = CASES[name].use(self.inputs[name], teacher)
            # With a perfect fit Adam would blow up rounding.
            self.targets[name] = answer + 0.3 * draw(answer.shape)

    def weights(self) -> dict[str, Tensor]:
        return {
            name: layer.weight.detach().clone().view(CASES[name].shape)  # type: ignore[union-attr, operator]
            for name, layer in self.layers.items()
        }

    def loss(self, maps: dict[str, Callable[[Tensor], Tensor]], examples: slice = slice(None)) -> Tensor:
        """Return the loss where layer `name` maps its input by `maps[name]`."""
        parts = [
            F.mse_loss(maps[name](self.inputs[name][examples]), self.targets[name][examples]) for name in self.layers
        ]
        return torch.stack(parts).sum()

    def forward(self, examples: slice = slice(None)) -> Tensor:
        return self.loss({**self.layers}, examples)  # type: ignore[dict-item]

    def dense_loss(self, weights: dict[str, Tensor], examples: slice = slice(None)) -> Tensor:
        return self.loss({name: partial(CASES[name].use, W=W) for name, W in weights.items()}, examples)


def grown(net: nn.Module, **fields: Any) -> Any:
    fields = {"target_modules": r"layers\..*", "component_seed": 3, **fields}
    return get_peft_model(net, AromaConfig(**fields), autocast_adapter_dtype=False)


def pairs(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# A layer and its dense weight ----------------------------------------------------------------------------------------


def layer_of(name: str, finished: int, **fields: Any) -> AromaLinear:
    """Return a layer with a moved pair, and finished components."""
    torch.manual_seed(5)
    model = grown(Net([name]), **{"r": 2, "lora_alpha": 6, **fields})
    (layer,) = aroma_layers(model).values()
    m, n = CASES[name].shape
    layer.start_pair("default", draw(layer.r["default"], n), draw(m, layer.r["default"]))
    if finished:
        layer.finished("default").append(draw(m, finished), draw(finished, n))
    return layer


@pytest.mark.parametrize("finished", [0, 3])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_a_dense_weight(name: str, finished: int) -> None:
    case, layer = CASES[name], layer_of(name, finished)
    b, a = layer.pair("default")
    x = case.input()
    if x.is_floating_point():
        x.requires_grad_()
    B, A = layer.finished("default").B, layer.finished("default").A
    W = (layer.weight_matrix() + B @ A + 3.0 * b.detach() @ a.detach()).requires_grad_()
    torch.testing.assert_close(layer.get_delta_weight("default").reshape(case.shape), (W - layer.weight_matrix()))
    expected, y = case.use(x, W), layer(x)
    torch.testing.assert_close(y, expected)
    toward = draw(y.shape)
    leaves = [W, x] if x.requires_grad else [W]
    G, *gx = torch.autograd.grad((expected * toward).sum(), leaves)
    gb, ga, *own_gx = torch.autograd.grad((y * toward).sum(), [b, a, *leaves[1:]])
    torch.testing.assert_close(gb, 3.0 * G @ a.T)
    torch.testing.assert_close(ga, 3.0 * b.T @ G)
    torch.testing.assert_close(own_gx, gx)
    with torch.no_grad():
        layer.merge()
        torch.testing.assert_close(layer(x), expected)
        layer.unmerge()
        torch.testing.assert_close(layer(x), expected)
    layer.freeze("default")
    torch.testing.assert_close(layer(x), case.use(x, layer.weight_matrix() + B @ A))


class Sizes(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation returns, views of `known` apart."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.largest, self.known = 0, {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        sizes = [tensor.numel() for tensor in tensors if tensor.untyped_storage().data_ptr() not in self.known]
        self.largest = max([self.largest, *sizes])
        return result


BIG: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(96, 128), lambda: torch.randn(12, 96)),
    "convolution": (lambda: nn.Conv2d(64, 128, 3), lambda: torch.randn(1, 64, 4, 4)),
    "embedding": (lambda: nn.Embedding(500, 64), lambda: torch.randint(0, 500, (2, 3))),
}
"""Layers with more entries than what they are given and return."""


@pytest.mark.parametrize("kind", BIG)
def test_no_matrix_of_the_size_of_the_weight_is_formed(kind: str) -> None:
    base, x = (make() for make in BIG[kind])
    model = grown(nn.ModuleDict({"layers": nn.ModuleDict({"it": base})}), r=3)
    (layer,) = aroma_layers(model).values()
    m, n = layer.out_features, layer.in_features
    layer.start_pair("default", torch.randn(3, n), torch.randn(m, 3))
    with Sizes(base.weight) as sizes:  # which makes the layer call PyTorch's operations one by one
        layer(x).square().sum().backward()
    assert all(factor.grad is not None and factor.grad.any() for factor in layer.pair("default"))
    assert sizes.largest < base.weight.numel() == m * n
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:  # as in any training
        layer(x).square().sum().backward()
    assert 0 < max(event.self_cpu_memory_usage for event in profiler.events()) < 4 * m * n


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", QUICK)
def test_a_base_in_16_bits_has_components_in_32(name: str, autocast: bool) -> None:
    case = CASES[name]
    net = Net([name])
    x = net.inputs[name] if name == "embedding" else net.inputs[name].bfloat16()
    net.layers.bfloat16()
    (layer,) = aroma_layers(get_peft_model(net, AromaConfig(target_modules=r"layers\..*"))).values()
    m, n = case.shape
    layer.finished("default").append(torch.randn(m, 2), torch.randn(2, n))
    layer.start_pair("default", torch.randn(1, n), torch.randn(m, 1))
    b, a = layer.pair("default")
    assert b.dtype == a.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    W = layer.weight_matrix().float() + layer.get_delta_weight("default").reshape(m, n)
    expected = case.use(x if name == "embedding" else x.float(), W)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    y.float().square().sum().backward()
    for parameter in (b, a):
        assert parameter.grad is not None
        assert parameter.grad.any()


@pytest.mark.parametrize("name", QUICK)
def test_a_layer_is_copied_scaled_and_used_again(name: str) -> None:
    layer = layer_of(name, 2)
    x, base = CASES[name].input(), layer.get_base_layer()
    expected, update = layer(x), layer(x) - base(x)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), expected)
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer(x), base(x) + 0.5 * update)
    torch.testing.assert_close(twin(x), expected)
    layer.delete_adapter("default")
    for _ in range(2):  # the sides of a matrix are those of its layer, however often PEFT has read them
        layer.update_layer("other", 1, 4, config=AromaConfig(r=1))
        assert (layer.out_features, layer.in_features) == CASES[name].shape
        layer.delete_adapter("other")


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_compiled(name: str) -> None:
    layer = layer_of(name, 2)
    x = CASES[name].input()
    torch._dynamo.reset()
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    b, a = layer.pair("default")
    for rank in (2, 3):
        y, expected = whole(x), layer(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            torch.autograd.grad(y.square().sum(), [b, a]), torch.autograd.grad(expected.square().sum(), [b, a])
        )
        layer.finished("default").append(draw(b.shape[0], 1), draw(1, a.shape[1]))
        assert layer.finished("default").rank == rank + 1


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", slow_but(["two"], ["two", "all"]))
def test_a_whole_run_of_the_paper_is_that_of_the_dense_reference(names: str) -> None:
    settings = Settings(12, r=1, inner_check_interval=4, outer_tolerance=0.02, rewarmup_steps=3, component_seed=3)
    net = Net(NAMES[names])
    weights = {f"layers.{name}": W for name, W in net.weights().items()}

    def dense(weights: dict[str, Tensor], step: int) -> Tensor:
        return net.dense_loss({name.removeprefix("layers."): W for name, W in weights.items()})

    adam = partial(torch.optim.AdamW, weight_decay=0.01)
    reference = ReferenceAroma(weights, settings, adam).train(dense, 80, lambda step: 0.03)
    model = grown(net, **asdict(settings))
    optimizer = adam(pairs(model), lr=0.03)
    events: list[Any] = []
    growth = attach(model, optimizer, total_steps=80, on_event=events.append)
    losses = []
    while len(losses) < 80 and not growth.finished:
        loss = model()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(reference.losses, rel=1e-6)
    ours = [(event.kind, event.step, event.module, event.rank) for event in events]
    assert ours == [(kind, step, module, rank) for kind, step, _, _, module, _, rank, _ in reference.events]
    assert min(reference.ranks().values()) >= 2, "a run without growth proves nothing"
    for name, layer in aroma_layers(model).items():
        delta = layer.get_delta_weight("default").reshape(weights[name].shape)
        torch.testing.assert_close(delta, reference.updates()[name], rtol=1e-6, atol=1e-8)


def test_rows_that_are_not_looked_up_never_change() -> None:
    net = Net(["embedding"])
    net.layers["embedding"] = nn.Embedding(ROWS, 9, padding_idx=4, sparse=True, dtype=torch.float64)
    model = grown(net, max_inner_steps=4, inner_check_interval=2)
    train(model, 32)
    (layer,) = aroma_layers(model).values()
    changed = set(layer.get_delta_weight("default").any(1).nonzero()[:, 0].tolist())
    seen = set(net.inputs["embedding"].unique().tolist())
    assert seen == {*range(ROWS // 2)}
    assert changed == seen - {4}


def test_the_part_of_a_convolution_that_zero_3_leaves_a_process_is_one_of_the_matrix() -> None:
    weight, W = draw(5, 2, 3, 3), torch.empty(5, 18, dtype=torch.float64).fill_(torch.nan)
    for start, stop in ((0, 37), (37, 61), (61, 90)):
        part = Partition(weight.reshape(-1)[start:stop], start, tuple(weight.shape))
        for block, rows, columns in part.flatten(1).blocks():
            W[rows, columns] = block
    assert torch.equal(W, weight.flatten(1))


# Saved, merged, resumed ----------------------------------------------------------------------------------------------


METHOD: dict[str, Any] = {
    "r": 2,
    "max_inner_steps": 6,
    "inner_check_interval": 2,
    "outer_tolerance": 1e-4,
    "rewarmup_steps": 2,
}


def train(
    model: Any, steps: int, start: int = 0, resume: Path | None = None
) -> tuple[Attachment, torch.optim.Optimizer]:
    if resume is not None:
        model.load_adapter(str(resume), "default", is_trainable=True)
    optimizer = torch.optim.Adam(pairs(model), lr=0.02)
    if resume is not None:
        optimizer.load_state_dict(torch.load(resume / "optimizer.pt"))
    growth = attach(model, optimizer, total_steps=60, resume_from=resume)
    for step in range(start, start + steps):
        examples = slice(6 * (step % 4), 6 * (step % 4) + 6)
        optimizer.zero_grad()
        model(examples).backward()
        optimizer.step()
    return growth, optimizer


def outputs(model: nn.Module, net: Net) -> list[Tensor]:
    with torch.no_grad():
        return [model.get_submodule(f"layers.{name}")(x) for name, x in net.inputs.items()]


def test_saved_as_plain_lora_that_peft_loads_and_merges(tmp_path: Path) -> None:
    net = Net([*CASES])
    base = copy.deepcopy(net)
    model = grown(net, **METHOD)
    train(model, 40)
    expected, before = outputs(model.base_model.model, net), outputs(base, net)
    model.save_pretrained(tmp_path / "adapter")
    ranks = {name: layer.rank("default") for name, layer in aroma_layers(model).items()}
    assert max(ranks.values()) > 1
    assert {row.name: row.rank for row in rank_table(tmp_path / "adapter")} == ranks
    shapes = {f"layers.{name}": case.shape for name, case in CASES.items()}
    assert {row.name: row.shape for row in rank_table(tmp_path / "adapter")} == shapes

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors = lora_tensors(model).tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in saved.items()}
    for name, tensor in saved.items():
        torch.testing.assert_close(tensors[name].to(tensor), tensor, rtol=1e-6, atol=1e-7)

    def assert_plain(folder: Path) -> None:
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        assert type(loaded.base_model).__name__ == "LoraModel"
        found = outputs(loaded.base_model.model, net)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        merged = loaded.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(outputs(merged, net), expected, rtol=1e-5, atol=1e-5)

    assert max(float((one - other).abs().max()) for one, other in zip(expected, before, strict=True)) > 0.1
    assert_plain(tmp_path / "adapter")
    assert export_uniform(tmp_path / "adapter", tmp_path / "uniform") >= max(ranks.values())
    assert_plain(tmp_path / "uniform")
    again = grown(copy.deepcopy(base), **{**METHOD, "component_seed": 9})
    again.load_adapter(str(tmp_path / "adapter"), "default")
    torch.testing.assert_close(outputs(again.base_model.model, net), expected)
    torch.testing.assert_close(outputs(model.merge_and_unload(), net), expected)


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    base = Net([*QUICK], rank=4)
    whole, first, second = (grown(copy.deepcopy(base), **METHOD) for _ in range(3))
    straight, _ = train(whole, 52)
    growth, optimizer = train(first, 31)
    first.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed, _ = train(second, 21, start=31, resume=tmp_path)
    ranks = [{module.name: module.rank for module in run.controller.summary()} for run in (straight, resumed, growth)]
    assert ranks[0] == ranks[1] != ranks[2]
    for one, other in zip(aroma_layers(whole).values(), aroma_layers(second).values(), strict=True):
        assert torch.equal(one.get_delta_weight("default"), other.get_delta_weight("default"))


def test_the_functions_of_peft() -> None:
    net = Net([*QUICK])
    base = copy.deepcopy(net)
    model = grown(net, **METHOD)
    train(model, 14)
    expected = outputs(model.base_model.model, net)
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model.base_model.model, net), outputs(base, net), rtol=0, atol=0)
    torch.testing.assert_close(outputs(model.base_model.model, net), expected, rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"^convert_to_lora: PEFT converts linear layers only, and a Conv2d"):
        convert_to_lora(model, rank=2)
    torch.testing.assert_close(outputs(model.unload(), net), outputs(base, net), rtol=0, atol=0)


def test_an_adapter_of_another_kernel_is_refused(tmp_path: Path) -> None:
    model = grown(Net(["conv2d"]), **METHOD)
    train(model, 8)
    model.save_pretrained(tmp_path)
    (update,) = read_adapter(tmp_path).updates.values()
    assert update.shape == (7, 36)
    net = Net(["conv2d"])
    net.layers["conv2d"] = nn.Conv2d(9, 7, 2).double()  # n = 36, too
    with pytest.raises(CheckpointError, match=r"layers\.conv2d: .*\(\d, 4, 3, 3\).*Conv2d"):
        grown(net, **METHOD).load_adapter(str(tmp_path), "default")


def test_a_form_that_no_run_writes_is_an_error(tmp_path: Path) -> None:
    model = grown(Net(["conv2d"]), **METHOD)
    train(model, 8)
    model.save_pretrained(tmp_path)
    file = tmp_path / "aroma_state.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    kernels: list[Any] = [[4, 3, 4], "4", [36, 1, 1, 1, 1], [-4, -9]]
    for form in (*({"kernel": kernel} for kernel in kernels), {"embedding": 1}, {}):
        state = copy.deepcopy(saved)
        del state["modules"]["layers.conv2d"]["kernel"]
        state["modules"]["layers.conv2d"].update(form)
        seal(file, state)
        with pytest.raises(CheckpointError, match="conv2d"):
            read_adapter(tmp_path)
    seal(file, saved)
    assert [*read_adapter(tmp_path).updates] == ["layers.conv2d"]


# Refused -------------------------------------------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), "a Conv2d, and groups=4 .depthwise,"),
        (nn.Conv2d(4, 8, 3, groups=2), "a Conv2d, and groups=2 .so its weight"),
        (nn.Conv2d(4, 4, 3, dilation=2), r"dilation=\(2, 2\)"),
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.ConvTranspose2d(4, 4, 3), "it is a ConvTranspose2d; AROMA grows"),
        (Standardised(4, 4, 3), "a Standardised, and its forward is its own"),
        (nn.Embedding(4, 4, max_norm=1.0), r"max_norm=1\.0"),
        (nn.Embedding(4, 4, scale_grad_by_freq=True), "scale_grad_by_freq=True"),
        (nn.EmbeddingBag(4, 4), "it is a EmbeddingBag; AROMA grows"),
    ],
)
def test_what_cannot_grow_is_refused_by_name(base: nn.Module, reason: str) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleDict({"it": base})})
    with pytest.raises(ConfigError, match=rf"^target_modules='layers\.it': .*{reason}.*exclude_modules$"):
        grown(model)
