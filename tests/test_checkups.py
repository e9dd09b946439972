"""Evidence on PEFT's own LoRA: what is measured, what goes, what stays, and that a checkup leaves no trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from aroma import AromaConfig
from aroma.errors import AromaWarning, CheckpointError, ConfigError, NonFiniteError
from aroma.evidence.checkups import Checkups, compress
from aroma.evidence.compact import compact
from aroma.evidence.updates import Updates

WIDTH, R = 12, 4


class Experts(nn.Module):
    """Three experts whose matrices are one parameter, each for every third example."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / math.sqrt(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,boi->bo", x, self.weight[torch.arange(len(x)) % 3])


class Net(nn.Module):
    """One layer of a kind, between two others: tokens or numbers in, numbers out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Embedding(20, WIDTH) if kind == "embedding" else nn.Linear(WIDTH, WIDTH)
        makers: dict[str, Callable[[], nn.Module]] = {
            "conv1d": lambda: Conv1D(WIDTH, WIDTH),
            "conv2d": lambda: nn.Conv2d(WIDTH, WIDTH, (1, 3), padding=(0, 1)),
            "experts": Experts,
        }
        self.middle = makers.get(kind, lambda: nn.Linear(WIDTH, WIDTH))()
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = self.middle(h[:, :, None, None])[..., 0, 0] if self.kind == "conv2d" else self.middle(h)
        return self.last(self.drop(h))


def targets(kind: str) -> dict[str, Any]:
    if kind == "experts":
        return {"target_modules": ["first"], "target_parameters": ["middle.weight"]}
    return {"target_modules": ["first", "middle"]}


KINDS = {
    "linear": {},
    "conv1d": {},
    "conv2d": {},
    "embedding": {},
    "experts": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"middle": 2}, "alpha_pattern": {"middle": 3}},
}


def adapted(kind: str = "linear", seed: int = 0, start: bool = False, **options: Any) -> Any:
    """A model whose updates are not zero, unless it is to be as LoRA starts it."""
    torch.manual_seed(seed)
    settings = {"r": R, "lora_alpha": 6, **targets(kind), **KINDS.get(kind, {}), **options}
    model = get_peft_model(Net(kind), LoraConfig(**settings)).double()
    if not start:
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "embedding_A" in name:
                nn.init.normal_(parameter, std=0.3)
    return model


def batches(kind: str = "linear", count: int = 9, size: int = 6, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def inputs() -> Tensor:
        if kind == "embedding":
            return torch.randint(0, 20, (size,), generator=generator)
        return torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)

    return [(inputs(), torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)) for _ in range(count)]


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def losses_of(model: nn.Module, given: list[Any]) -> list[Callable[[], Tensor]]:
    return [lambda batch=batch: squares(model, batch) for batch in given]


def all_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# What is measured ----------------------------------------------------------------------------------------------------


def test_losses_and_choice_are_those_of_dense_matrices() -> None:
    """The oracle: W + s B A as one matrix, its singular values by SVD, and the sum of those that a size keeps."""
    model = adapted()
    layers = {name: getattr(model.base_model.model, name) for name in ("first", "middle")}
    parts = [torch.linalg.svd(layer.get_delta_weight("default")) for layer in layers.values()]
    order = torch.cat([sigma[:R] for _, sigma, _ in parts]).argsort(descending=True)

    def dense(size: int) -> nn.Module:
        net = copy.deepcopy(model.base_model.model).eval()
        stays = torch.zeros(2 * R, dtype=torch.float64).index_fill(0, order[:size], 1.0).split(R)
        for (name, layer), (U, sigma, Vh), strength in zip(layers.items(), parts, stays, strict=True):
            plain = copy.deepcopy(layer.get_base_layer())
            plain.weight.data += (U[:, :R] * sigma[:R] * strength) @ Vh[:R]
            setattr(net, name, plain)
        return net

    given = [(x, dense(3)(x).detach() + 0.1 * y) for x, y in batches()]
    losses = [torch.stack([squares(dense(size), batch) for batch in given]).mean().item() for size in range(2 * R + 1)]
    found = compress(model, given, loss=squares)
    assert found.losses == pytest.approx(losses, rel=1e-9)
    assert found.kept == losses.index(min(losses)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_singular_directions_compute_the_same(kind: str) -> None:
    model, given = adapted(kind).eval(), batches(kind)
    before = [model(x) for x, _ in given]
    sigma = Updates(model).to_singular_directions()
    for (x, _), expected in zip(given, before, strict=True):
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-11)
    layer = model.base_model.model.first
    expected = torch.linalg.svdvals(layer.get_delta_weight("default"))[:R]
    torch.testing.assert_close(sigma[:R], expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_that_goes_stays_zero(kind: str) -> None:
    """Both its gradients are zero, so neither AdamW nor its decay moves it, and the others train on."""
    model, given = adapted(kind), batches(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    squares(model, given[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    updates = Updates(model, optimizer)
    alive = updates.to_singular_directions() > 0
    kept = alive.clone()
    kept[1::2] = False
    updates.cut(kept)
    assert not any(parameter in optimizer.state for update in updates.each for parameter in update.pair)
    gone = [(update.rows(update.pair[0]).any(2), update.columns(update.pair[1]).any(1)) for update in updates.each]
    assert all(torch.equal(A, B) for A, B in gone)
    before = all_parameters(model)
    for batch in given:
        squares(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [(update.rows(update.pair[0]).any(2), update.columns(update.pair[1]).any(1)) for update in updates.each]
    assert all(torch.equal(A, before_A) for (A, _), (before_A, _) in zip(after, gone, strict=True))
    assert all(torch.equal(B, before_B) for (_, B), (_, before_B) in zip(after, gone, strict=True))
    assert any(not torch.equal(value, before[name]) for name, value in all_parameters(model).items())


def test_a_checkup_leaves_no_trace() -> None:
    model, given = adapted(start=True), batches()
    for parameter in model.base_model.model.last.parameters():
        parameter.requires_grad_(True)
    squares(model, given[0]).backward()
    model.train()
    model.base_model.model.drop.eval()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    random, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    updates = Updates(model)
    updates.to_singular_directions()
    before = all_parameters(model)
    updates.losses(losses_of(model, given), torch.zeros(2 * R, dtype=torch.bool))
    assert {name: p.grad for name, p in model.named_parameters() if p.grad is not None}.keys() == gradients.keys()
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if n in gradients)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in all_parameters(model).items())


def test_a_checkup_that_fails_leaves_no_trace_either() -> None:
    model = adapted()
    updates = Updates(model)
    updates.to_singular_directions()
    before = all_parameters(model)

    def fails() -> Tensor:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        updates.losses([fails], torch.zeros(2 * R, dtype=torch.bool))
    assert all(torch.equal(value, before[name]) for name, value in all_parameters(model).items())


def test_dropout_of_the_training_is_off_in_a_checkup() -> None:
    model, given = adapted(lora_dropout=0.5).train(), batches()
    updates = Updates(model)
    updates.to_singular_directions()
    kept = updates.to_singular_directions() > 0
    one, other = (updates.losses(losses_of(model, given), kept) for _ in range(2))
    assert torch.equal(one, other)


def test_bf16_adapters_keep_their_dtype_and_almost_their_function() -> None:
    model = adapted().bfloat16().eval()
    given = [(x.bfloat16(), y.bfloat16()) for x, y in batches()]
    before = torch.cat([model(x) for x, _ in given]).float()
    updates = Updates(model)
    updates.to_singular_directions()
    assert {parameter.dtype for update in updates.each for parameter in update.pair} == {torch.bfloat16}
    after = torch.cat([model(x) for x, _ in given]).float()
    assert (after - before).norm() < 0.02 * before.norm()


def test_a_quantised_base_is_evaluated_and_cut(tmp_path: Path) -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4"))
    model = get_peft_model(net.to("cpu"), LoraConfig(r=R, target_modules=["1"], init_lora_weights=False))
    given = [(torch.randn(6, 64), torch.randn(6, 64)) for _ in range(9)]
    before = model(given[0][0])
    updates = Updates(model)
    kept = updates.to_singular_directions() > 0
    torch.testing.assert_close(model(given[0][0]), before, rtol=1e-4, atol=1e-4)
    with_all = updates.losses(losses_of(model, given), kept)
    assert not torch.equal(updates.losses(losses_of(model, given), kept & False), with_all)
    kept[1:] = False
    updates.cut(kept)
    expected = model(given[0][0])
    assert compact(model) == {"1": 1}
    torch.testing.assert_close(model(given[0][0]), expected, rtol=1e-4, atol=1e-4)


# What goes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_compact_computes_the_same_and_reloads_in_plain_peft(kind: str, tmp_path: Path) -> None:
    model, given = adapted(kind).eval(), batches(kind)
    updates = Updates(model, None)
    alive = updates.to_singular_directions() > 0
    kept = alive.clone()
    kept[: R - 1] = False  # of the first layer one direction stays
    updates.cut(kept)
    expected = [model(x) for x, _ in given]
    ranks = compact(model)
    assert ranks["first"] == 1
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(kind), tmp_path).double().eval()
    for (x, _), whole in zip(given, expected, strict=True):
        torch.testing.assert_close(model(x), whole, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(again(x), whole, rtol=1e-5, atol=1e-5)
    saved = again.peft_config["default"]
    assert saved.peft_type == "LORA"
    assert saved.r == saved.lora_alpha == min(ranks.values())
    assert not saved.use_rslora


def test_a_matrix_without_directions_is_adapted_no_more(tmp_path: Path) -> None:
    model, given = adapted().eval(), batches()
    updates = Updates(model)
    kept = updates.to_singular_directions() > 0
    kept[:R] = False
    updates.cut(kept)
    expected = model(given[0][0])
    assert compact(model) == {"middle": R}
    torch.testing.assert_close(model(given[0][0]), expected)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net("linear"), tmp_path)
    assert [name for name, _ in again.named_modules() if name.endswith("lora_A")] == ["base_model.model.middle.lora_A"]


def test_an_adapter_that_keeps_nothing_still_loads(tmp_path: Path) -> None:
    model, (x, _) = adapted().eval(), batches()[0]
    updates = Updates(model)
    updates.cut(updates.to_singular_directions() < 0)
    assert compact(model) == {"first": 1}
    with model.disable_adapter():
        expected = model(x)
    torch.testing.assert_close(model(x), expected)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    PeftModel.from_pretrained(Net("linear"), tmp_path)


def test_only_the_active_adapter_is_evaluated_and_cut() -> None:
    model = adapted()
    config = LoraConfig(r=3, target_modules=["middle"])
    model.add_adapter("other", config)
    model.set_adapter("other")
    nn.init.normal_(model.base_model.model.middle.lora_B["other"].weight)
    before = {name: value for name, value in all_parameters(model).items() if ".default." in name}
    updates = Updates(model)
    assert [update.name for update in updates.each] == ["middle"]
    updates.cut(torch.tensor([True, False, False]) & (updates.to_singular_directions() > 0))
    assert compact(model) == {"middle": 1}
    after = all_parameters(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (model.peft_config["default"].r, model.peft_config["other"].r) == (R, 1)
    assert config.r == 3, "a third adapter may be made with it"


def test_trained_heads_are_left_alone() -> None:
    model = adapted(modules_to_save=["last"])
    before = all_parameters(model)
    compress(model, batches(), loss=squares)
    head = [name for name in before if "modules_to_save" in name]
    assert head
    assert all(torch.equal(dict(model.named_parameters())[name], before[name]) for name in head)


# A run ---------------------------------------------------------------------------------------------------------------


def run(model: Any, steps: int = 30, until: int | None = None, state: Any = None, **options: Any) -> Any:
    """A loop; with `state`, of model, optimizer and checkups, it goes on from there."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    options = {"at": (0.2, 0.6), "loss": squares, **options}
    checkups = Checkups(model, optimizer, steps, batches(count=10), **options)
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        checkups.load_state_dict(state[2])
    torch.manual_seed(checkups._step)
    for step in range(checkups._step, steps if until is None else until):
        torch.manual_seed(step)
        squares(model, batches(seed=100 + step, count=1)[0]).backward()
        optimizer.step()
        checkups.step()
        optimizer.zero_grad()
    state = [copy.deepcopy(one.state_dict()) for one in (model, optimizer, checkups)]
    return checkups, state


@pytest.mark.parametrize("until", [3, 6, 12, 18, 25])
def test_a_resumed_run_ends_like_one_that_was_not(until: int) -> None:
    whole, ended = run(adapted(start=True))
    _, saved = run(adapted(start=True), until=until)
    resumed, again = run(adapted(seed=5, start=True), state=saved)
    assert [one.as_dict() for one in resumed.history] == [one.as_dict() for one in whole.history]
    assert all(torch.equal(value, ended[0][name]) for name, value in again[0].items())


def test_a_grad_scaler_changes_nothing() -> None:
    ends = []
    for scaled in (False, True):
        model, scaler = adapted(start=True), torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
        checkups = Checkups(model, optimizer, 12, batches(), loss=squares, at=(0.5,))
        for batch in batches(count=12, seed=2):
            scaler.scale(squares(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            checkups.step()
        ends.append((checkups.history[0].as_dict(), all_parameters(model)))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


def test_a_loss_may_take_labels_out_of_its_batch_and_a_loop_may_go_on_for_a_step() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]) - batch.pop("labels")).square().mean()

    model, held_out = adapted(), [{"x": x, "labels": y} for x, y in batches()]
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    checkups = Checkups(model, optimizer, 4, held_out, loss=loss, at=(0.5,))
    for batch in batches(count=6, seed=2):
        squares(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        checkups.step()
    assert len(checkups.history) == 1
    assert not checkups._updates._pairs, "a copy of the adapter"


def test_an_early_end_may_be_told_twice() -> None:
    model = adapted()
    checkups = Checkups(model, None, 4, batches(), loss=squares, at=(1.0,))
    nn.init.zeros_(model.get_submodule("base_model.model.first").lora_B["default"].weight)  # this one leaves
    for _ in range(2):
        checkups.finish()
        assert [name.split(".")[-4] for name in model.state_dict() if "lora_A" in name] == ["middle"]


def test_an_adapter_that_diverged_is_named() -> None:
    model = adapted()
    nn.init.constant_(model.get_submodule("base_model.model.middle").lora_A["default"].weight, math.nan)
    with pytest.raises(NonFiniteError, match="middle: its adapter is NaN"):
        compress(model, batches(), loss=squares)


def test_a_state_of_another_run_is_refused() -> None:
    _, (*_, state) = run(adapted(start=True), until=10)
    checkups, _ = run(adapted(start=True), until=0)
    with pytest.raises(CheckpointError, match="no state of Checkups"):
        checkups.load_state_dict({"step": 3})
    with pytest.raises(CheckpointError, match="the run began with 11 batches"):
        checkups.load_state_dict({**state, "batches": 11})


def test_a_checkup_tells() -> None:
    told: list[Any] = []
    model = adapted(start=True)
    checkups, _ = run(model, on_event=told.append)
    assert [one.step for one in told] == [6, 18]
    assert told == checkups.history
    last = told[-1]
    assert last.kept == sum(map(sum, last.ranks.values()))
    assert str(last.kept) in checkups.explanation()
    assert last.loss == min(last.losses)
    assert last.sizes[-1] == told[0].kept


def test_it_says_that_a_larger_r_would_be_used_and_what_cannot_be_told_from_noise() -> None:
    teacher = adapted()
    given = [(x, teacher.eval()(x).detach()) for x, _ in batches(count=20)]
    found = compress(teacher, given, loss=squares)
    assert "2 of 2 matrices kept all 4 directions: try a larger r" in str(found)
    noise = compress(adapted(start=True), batches(count=20), loss=squares)
    assert "the improvement is within noise" in str(noise)
    assert noise.kept == 0


def test_compress_leaves_the_base_of_a_loaded_adapter_frozen(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Net("linear"), tmp_path).double()
    compress(model, batches(), loss=squares)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match="standard_errors"):
        compress(model, batches(), loss=squares, standard_errors=-1)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "it changes the base weights"),
        ({"lora_bias": True}, "a bias is no direction"),
        ({"kasa_config": KasaConfig()}, "kasa_config=.*no products B A"),
    ],
)
def test_what_cannot_be_cut_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Updates(adapted(start=True, **options))


def test_a_model_without_one_active_lora_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="'absent'"):
        compact(adapted(), "absent")
    with pytest.raises(ConfigError, match=r"default \(PeftType.AROMA\)"):  # its components are no directions to cut
        compact(get_peft_model(Net("linear"), AromaConfig(target_modules=["middle"])), "default")
    with pytest.raises(ConfigError, match="needs one active LoRA adapter"):
        Updates(Net("linear"))


def test_a_layer_whose_update_is_no_product_is_left_alone_with_a_warning() -> None:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("plain", nn.Conv2d(4, 4, 1))
    net.add_module("grouped", nn.Conv2d(4, 4, 1, groups=2))
    with pytest.warns(UserWarning, match="groups"):
        model = get_peft_model(net, LoraConfig(r=2, target_modules=["plain", "grouped"]))
    with pytest.warns(AromaWarning, match="1 adapted layers are left alone.*: grouped"):
        assert [update.name for update in Updates(model).each] == ["plain"]


@pytest.mark.parametrize("loss", [lambda model, batch: 1.0, lambda model, batch: model(batch[0])])
def test_a_loss_that_is_no_number_is_refused(loss: Any) -> None:
    with pytest.raises(ConfigError, match="must return a tensor of one number"):
        compress(adapted(), batches(), loss=loss)


def test_a_model_that_returns_no_loss_asks_for_one() -> None:
    with pytest.raises(ConfigError, match="give labels, or a function"):
        compress(adapted(), [x for x, _ in batches()])
