"""Compress: the metric against dense oracles, and what is measured against a plain script."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributions import kl_divergence

import aroma
from aroma.compression import metric, predictions
from aroma.compression.compress import _Examples, _measuring
from aroma.compression.weights import Adapter
from compressing import reloaded, transformer
from models import batch as batch_of
from random_lora import KINDS, adapted, answers, batches


def spectra(adapter: Adapter) -> list[metric.Spectrum]:
    return [metric.spectrum(weight.product()) for weight in adapter.weights]


def metric_of(model: Any, given: list[Any] | None = None) -> tuple[Adapter, list[metric.Spectrum], list[Any]]:
    """Return an adapter, the spectra of its updates, and M and N of each."""
    adapter = Adapter(model)
    found = spectra(adapter)
    with _measuring(adapter):
        return adapter, found, _Examples(adapter, given or batches(), answers, False).metric(found)


def divergences(whole: Any, other: Any, given: list[Any]) -> Tensor:
    """Return KL(whole ‖ other) of each example, as a plain script has it."""
    with torch.no_grad():
        parts = [kl_divergence(answers(whole, batch), answers(other, batch)) for batch in given]
    return torch.cat(parts)


def kept_by_script(before: Any, after: Any, given: list[Any], left_alone: list[str] | None = None) -> float:
    none = copy.deepcopy(before)
    for key, layer in none.named_modules():
        if isinstance(layer, LoraLayer) and not any(f".{name}" in key for name in left_alone or ()):
            for factors in (layer.lora_B, layer.lora_embedding_B):
                for name in factors:
                    getattr(factors[name], "weight", factors[name]).data.zero_()
    lost = divergences(before, after, given).sum() / divergences(before, none, given).sum()
    return 1 - float(lost)


# The metric ----------------------------------------------------------------------------------------------------------


def test_the_gradient_in_r_by_r_is_that_of_A_of_B_and_of_the_dense_weight() -> None:
    model = adapted(KINDS["linear"])
    layer = model.base_model.model.linear
    A, B, W = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.get_base_layer().weight
    W.requires_grad_()
    found = predictions.predictions_of(model, batches()[0], answers)
    pulled = predictions.pull(found, torch.Generator().manual_seed(0))
    of_A, of_B, of_W = torch.autograd.grad(found.values, [A, B, W], pulled)
    G = of_A @ A.T
    torch.testing.assert_close(B.T @ of_B, G)
    torch.testing.assert_close(layer.scaling["default"] * B.T @ of_W @ A.T, G)
    assert float(G.detach().abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_metric_is_that_of_gradients_of_each_batch(kind: str) -> None:
    """An oracle that knows no `fill` and no hooks: plain autograd on a model in balanced factors."""
    model = adapted(KINDS[kind])
    adapter, found, sums = metric_of(model)
    for weight, one in zip(adapter.weights, found, strict=True):
        A = weight.parameters[0]
        weight.layer.scaling["default"] = 1.0
        weight.fill(weight.shaped(metric.balanced(one), A.dtype))
        A.requires_grad_(True)
    generator, moments = torch.Generator().manual_seed(0), [[0.0, 0.0] for _ in found]
    for batch in batches():
        logits = answers(model, batch).logits
        noise, shares = torch.empty_like(logits).normal_(generator=generator), logits.softmax(-1).detach()
        # The root of diag(p) − p pᵀ, times noise.
        roots = shares.sqrt().diag_embed() - shares[:, :, None] * shares.sqrt()[:, None]
        loss = ((roots @ noise[..., None])[..., 0] * logits).sum() / len(logits) ** 0.5
        gradients = torch.autograd.grad(loss, [weight.parameters[0] for weight in adapter.weights])
        for moment, weight, gradient, one in zip(moments, adapter.weights, gradients, found, strict=True):
            G = (weight.rows(gradient) @ weight.rows(weight.parameters[0].detach()).mT)[
                :, : one.sigma.shape[1], : one.sigma.shape[1]
            ]
            moment[0], moment[1] = moment[0] + G @ G.mT / len(batches()), moment[1] + G.mT @ G / len(batches())
    for (M, N), moment in zip(sums, moments, strict=True):
        torch.testing.assert_close(M, moment[0])
        torch.testing.assert_close(N, moment[1])


def test_the_cut_of_every_rank_is_the_best_one_in_the_metric() -> None:
    """By a dense generalised SVD, and against a thousand random projections of each rank."""
    _, (found,), ((M, N),) = metric_of(adapted({"target_modules": ["gpt"]}), batches(16))
    directions = metric.by_effect(M, N)
    left, right = (scipy.linalg.sqrtm(part[0].numpy()).real for part in (M / M[0].trace(), N))
    expected = torch.linalg.svdvals(torch.from_numpy(left @ right))
    torch.testing.assert_close(directions.worth, expected.square())
    left, right = torch.from_numpy(left), torch.from_numpy(right)
    generator = torch.Generator().manual_seed(0)
    for rank in range(4):
        product, one = metric.cut(found, directions, rank), torch.eye(4, dtype=torch.float64)
        # The P with which U √σ P √σ Vᵀ is the update that is left.
        inner = found.U[0].mT @ product.B[0] @ product.A[0] @ found.Vh[0].mT
        P = inner / found.sigma[0].sqrt()[:, None] / found.sigma[0].sqrt()
        lost = (left @ (one - P) @ right).square().sum()
        torch.testing.assert_close(lost, expected[rank:].square().sum())
        for _ in range(1000):
            X = torch.randn(4, rank, generator=generator, dtype=torch.float64)
            Y = torch.linalg.lstsq(left @ X, left @ right).solution if rank else X.mT  # the best with these columns
            other = (left @ right - left @ X @ Y).square().sum()
            assert other >= lost - 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_all_directions_compute_the_same(kind: str) -> None:
    model = adapted(KINDS[kind])
    expected = [answers(model, batch).logits for batch in batches()]
    found = aroma.compress(model, batches(), outputs=answers, keep=1.0, size=1.0)
    assert found.size.share == 1.0
    for batch, before in zip(batches(), expected, strict=True):
        torch.testing.assert_close(answers(model, batch).logits, before)


@pytest.mark.parametrize("options", [{"size": 0.4}, {"keep": 0.5}, {"rank": 2}])
@pytest.mark.parametrize("has_examples", [True, False])
def test_nothing_depends_on_how_an_update_is_factored_or_scaled(options: dict[str, Any], has_examples: bool) -> None:
    if not has_examples and "keep" in options:
        options = {"size": 0.3}
    model, given = adapted({"target_modules": ["linear", "gpt", "conv"]}), batches() if has_examples else None
    other = adapted({"target_modules": ["linear", "gpt", "conv"], "lora_alpha": 3})
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(3)
    for layer in other.modules():
        if isinstance(layer, LoraLayer):
            R = torch.randn(4, 4, generator=generator, dtype=torch.float64)
            A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
            A.copy_((torch.linalg.inv(R) @ A.flatten(1)).view(A.shape))
            B.copy_((B.flatten(1) @ R * 2).view(B.shape))  # with half of the alpha
    first, second = (aroma.compress(one, given, outputs=answers, **options) for one in (model, other))
    assert (first.ranks, first.chosen) == (second.ranks, second.chosen)
    assert 0 < first.size.share < 0.8
    for batch in batches():
        torch.testing.assert_close(answers(model, batch).logits, answers(other, batch).logits, rtol=1e-6, atol=1e-6)


def test_nothing_depends_on_the_order_of_modules() -> None:
    """Values, costs and pins in another order give the same ranks."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(size, generator=generator).sort(descending=True).values for size in (4, 2, 5, 1)]
    costs, pinned = [16, 30, 8, 12], [False, True, False, False]
    order = [2, 0, 3, 1]
    first = metric.ladder(values, costs, pinned, 200)
    second = metric.ladder([values[i] for i in order], [costs[i] for i in order], [pinned[i] for i in order], 200)
    assert [[ranks[i] for i in order] for ranks in first] == second
    assert all(ranks[1] for ranks in first)
    stored = [sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) for ranks in first]
    assert stored == sorted(stored)


def test_the_order_is_worth_per_stored_number() -> None:
    values = [torch.tensor([9.0, 1.0]), torch.tensor([8.0, 3.0])]
    costs = [10, 2]
    ranks = metric.ladder([v / c for v, c in zip(values, costs, strict=True)], costs, [False, False], 24, size=4 / 24)
    assert [0, 2] in ranks  # 8/2 and 3/2 come before 9/10
    assert [1, 0] not in ranks


# What is measured ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_effect_is_what_a_plain_script_measures_from_the_saved_files(kind: str, tmp_path: Path) -> None:
    model = adapted(KINDS[kind], seed=2)
    before = copy.deepcopy(model)
    found = aroma.compress(model, batches(), outputs=answers, size=0.5)
    after = reloaded(model, tmp_path)
    for batch in batches():
        torch.testing.assert_close(answers(after, batch).logits, answers(model, batch).logits)
    assert found.size.effect == pytest.approx(kept_by_script(before, after, batches(), found.left_alone), abs=1e-9)
    assert found.size.share <= 0.5 + 1e-9 or kind in ("dora", "bias")
    factors = {
        name: value for name, value in model.state_dict().items() if "lora_" in name and "magnitude" not in name
    }
    alone = [name for name in factors if any(f".{left}." in name for left in found.left_alone)]
    assert found.size.bytes == sum(value.nbytes for name, value in factors.items() if name not in alone)


def test_the_standard_error_is_that_of_a_ratio_over_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    changed, none = (torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(2))
    share, error = metric.effect(metric.kept(changed, none), 50)
    lost = changed.sum() / none.sum()
    residuals = changed - lost * none
    assert share == pytest.approx(1 - float(lost))
    assert error == pytest.approx(float(residuals.std() * 50**0.5 / none.sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_few_bits_are_measured_as_they_are_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted({"target_modules": ["linear", "gpt"]})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    before = copy.deepcopy(model).double()
    found = aroma.compress(model, batches(), outputs=answers, size=0.5)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {dtype}
    after = reloaded(model, tmp_path)  # which computes in float32
    assert found.size.effect == pytest.approx(kept_by_script(before, after, batches()), abs=1e-4)


def test_labels_give_loss_and_score_at_every_size() -> None:
    model, given = transformer("bert"), [batch_of("bert", seed) for seed in range(6)]
    before = copy.deepcopy(model)
    found = aroma.compress(model, given, size=0.3)
    for size, one in ((found.size, model), (found.curve[-1], before)):
        with torch.no_grad():
            logits = torch.cat([one(**batch).logits for batch in given])
        labels = torch.cat([batch["labels"] for batch in given])
        assert size.score == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
        assert size.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert all(size.loss is not None for size in found.curve)
    assert f"right answers {found.size.score:.1%}" in str(found)


# What a person reads -------------------------------------------------------------------------------------------------


def test_it_says_what_stays_and_why_in_three_lines() -> None:
    found = aroma.compress(adapted(KINDS["gpt"]), batches(), outputs=answers, keep=0.9)
    lines = str(found).split("\n")
    assert len(lines) == 3
    assert f"{found.size.share:.1%} of the adapter keeps {found.size.effect:.2%} of its effect" in lines[0]
    assert "keeps 0.9" in lines[0]
    assert f"{found.size.directions} of {found.curve[-1].directions} directions" in lines[1]
    assert "24 examples" in lines[2]
    enough = [place for place, size in enumerate(found.curve) if (size.effect or 0) >= 0.9]
    assert found.chosen == enough[0]
    assert found.curve[0].effect == 0
    assert found.curve[-1].effect == 1
    shares = [size.share for size in found.curve]
    assert shares == sorted(shares)
    assert "without examples" in str(aroma.compress(adapted(KINDS["gpt"]), None, rank=1))


def test_limits_given_together_all_hold() -> None:
    free = aroma.compress(adapted(KINDS["gpt"]), batches(), outputs=answers, keep=0.95).size
    for options in ({"rank": 1}, {"size": 0.2}, {"rank": 2, "size": 0.3}):
        only = aroma.compress(adapted(KINDS["gpt"]), batches(), outputs=answers, **options).size
        both = aroma.compress(adapted(KINDS["gpt"]), batches(), outputs=answers, keep=0.95, **options).size
        assert both.share <= min(only.share, max(free.share, only.share))
        assert both.largest_rank <= options.get("rank", 4)
        assert both.share <= options.get("size", 1.0)
        assert only.effect >= both.effect
