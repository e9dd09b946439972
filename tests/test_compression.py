"""Compress: the metric against dense oracles, what is measured against a plain script, and what must not change."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from pathlib import Path
from typing import Any

import accelerate
import pytest
import scipy.linalg
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

import aroma
from aroma.compression import metric, predictions
from aroma.compression.compress import _Examples, _measuring
from aroma.compression.files import compress_saved
from aroma.compression.predictions import Predictions
from aroma.compression.weights import Adapter
from aroma.errors import AromaError, ConfigError, NonFiniteError, OutputError
from models import base
from models import batch as batch_of
from random_lora import KINDS, adapted, answers, batches, randomize, zoo


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


def reloaded(model: Any, folder: Path, base: nn.Module | None = None) -> Any:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(base or zoo(), folder).double().eval()


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


def transformer(name: str, **options: Any) -> Any:
    """Return a tiny model of transformers with a LoRA adapter whose updates are drawn."""
    model = get_peft_model(
        base(name, ignore_mismatched_sizes=True, **options), LoraConfig(r=4, target_modules="all-linear", **PEFT[name])
    )
    randomize(model, 0)
    return model.eval()


PEFT = {"bert": {"task_type": "SEQ_CLS"}, "llama": {"task_type": "CAUSAL_LM"}, "t5": {}, "gpt2": {}, "vit": {}}


# What the outputs are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("bert", {}, "classes"),
        ("bert", {"num_labels": 1}, "values"),
        ("bert", {"problem_type": "regression"}, "values"),
        ("bert", {"problem_type": "multi_label_classification"}, "labels"),
        ("llama", {}, "classes"),
        ("gpt2", {}, "classes"),
        ("t5", {}, "classes"),
        ("vit", {}, "classes"),
    ],
)
@pytest.mark.parametrize("has_labels", [True, False])
def test_the_configuration_says_what_the_outputs_are(
    name: str, options: dict[str, Any], kind: str, has_labels: bool
) -> None:
    model, given = transformer(name, **options), [batch_of(name, seed) for seed in range(5)]
    for batch in given:
        if options:
            batch["labels"] = torch.rand(4, *([] if kind == "values" and "num_labels" in options else [3])).round()
        if not has_labels and name != "t5":  # whose decoder reads them
            del batch["labels"]
    before = copy.deepcopy(model)
    found = aroma.compress(model, given, size=0.5)
    assert found.outputs == kind
    assert (found.size.loss is not None) == (has_labels or name == "t5")
    assert found.size.effect == pytest.approx(effect_of(kind, before, model, given), abs=1e-4)


def several(name: str) -> list[dict[str, Tensor]]:
    return [batch_of(name, seed) for seed in range(4)]


def effect_of(kind: str, before: Any, after: Any, given: list[dict[str, Tensor]]) -> float:
    """Return the effect kept, by torch's own distributions."""
    none = copy.deepcopy(before)
    for name, parameter in none.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    lost, everything = (sum(apart(kind, before, one, batch) for batch in given) for one in (after, none))
    return 1 - float(lost / everything)


def apart(kind: str, whole: Any, other: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the divergence of a batch by torch's own distributions; of a language model at the next tokens."""
    with torch.no_grad():
        one, two = (model(**batch).logits.double() for model in (whole, other))
    if one.dim() == 3 and whole.config.model_type != "t5":
        one, two = one[:, :-1], two[:, :-1]
    if kind == "values":
        return kl_divergence(Normal(one, 1.0), Normal(two, 1.0)).sum()
    made = Bernoulli if kind == "labels" else Categorical
    return kl_divergence(made(logits=one), made(logits=two)).sum()


def test_positions_that_are_padding_or_not_learned_do_not_count() -> None:
    model, tokens = transformer("llama"), batch_of("llama")["input_ids"]
    mask = torch.ones_like(tokens)
    mask[:, 5:] = 0
    masked = predictions.predictions_of(model, {"input_ids": tokens, "attention_mask": mask})
    assert masked.counts is not None
    assert masked.counts.sum(1).tolist() == [4] * len(tokens)  # the fifth token is predicted by the fourth
    labels = torch.where(torch.arange(tokens.shape[1]) < 3, -100, tokens)
    learned = predictions.predictions_of(model, {"input_ids": tokens, "labels": labels})
    assert learned.counts is not None
    assert learned.counts.nonzero()[:, 1].unique().tolist() == [2, 3, 4, 5, 6]
    pulled = predictions.pull(learned, torch.Generator().manual_seed(0))
    assert (pulled.abs().sum(-1) > 0).equal(learned.counts)
    last = predictions.predictions_of(model, {"input_ids": tokens, "labels": labels, "logits_to_keep": 3})
    assert last.counts is not None
    assert last.counts.tolist() == learned.counts[:, -3:].tolist()


def test_hidden_states_and_functions_of_a_user() -> None:
    from transformers import BertModel

    encoder = get_peft_model(BertModel(base("bert").config).eval(), LoraConfig(r=4, target_modules=["query", "dense"]))
    randomize(encoder, 0)
    given = [{k: v for k, v in batch_of("bert", seed).items() if k != "labels"} for seed in range(5)]
    assert aroma.compress(copy.deepcopy(encoder), given, size=0.5).outputs == "values"

    def embedding(model: Any, batch: Any) -> Tensor:
        return model(**batch).last_hidden_state.mean(1)

    before = copy.deepcopy(encoder)
    found = aroma.compress(encoder, given, size=0.5, outputs=embedding)
    with torch.no_grad():
        lost = sum((embedding(before, b) - embedding(encoder, b)).square().sum() for b in given)
        with before.disable_adapter():
            none = [embedding(before, b) for b in given]
        whole = [embedding(before, b) for b in given]
    all_ = sum((one - two).square().sum() for one, two in zip(whole, none, strict=True))
    assert found.size.effect == pytest.approx(1 - float(lost / all_), abs=1e-4)


@pytest.mark.parametrize("kind", ["classes", "labels", "values"])
def test_the_pull_has_mean_and_covariance_of_the_score(kind: Any) -> None:
    """That of answers drawn from the predictions, by torch's distributions."""
    logits = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, generator = Predictions(kind, logits), torch.Generator().manual_seed(1)
    pulls = torch.stack([predictions.pull(found, generator) for _ in range(20_000)])
    torch.manual_seed(2)
    made = {"classes": Categorical, "labels": Bernoulli}.get(kind)
    spread = made(logits=logits) if made else Normal(logits, 1.0)
    drawn = spread.sample((20_000,))
    shares = logits.detach().softmax(-1) if kind == "classes" else logits.detach().sigmoid()
    scores = {
        "classes": lambda: nn.functional.one_hot(drawn, 3) - shares,
        "labels": lambda: drawn - shares,
        "values": lambda: drawn - logits.detach(),
    }[kind]()
    assert pulls.mean(0).abs().max() < 0.03
    pairs = [torch.einsum("ned,nef->edf", part.flatten(1, 2), part.flatten(1, 2)) / 20_000 for part in (pulls, scores)]
    torch.testing.assert_close(pairs[0] * 2, pairs[1], rtol=0.1, atol=0.03)  # two examples a batch


@pytest.mark.parametrize("kind", ["classes", "labels", "values"])
def test_divergences_are_those_of_torch_and_chunks_change_nothing(kind: Any, monkeypatch: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(5, 4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    counts = torch.rand(5, 4, generator=generator) > 0.3
    labels = torch.randint(0, 7, (5, 4), generator=generator)
    made = {"classes": Categorical, "labels": Bernoulli}.get(kind)
    pair = [made(logits=x) if made else Normal(x, 1.0) for x in (one, two)]
    expected = kl_divergence(*pair)
    expected = (expected if kind == "classes" else expected.sum(-1)) * counts
    pulls: list[Tensor] = []
    for chunk in (2**24, 7, 15):
        monkeypatch.setattr(predictions, "CHUNK", chunk)
        whole, other = (Predictions(kind, x, counts, labels if kind == "classes" else one.round()) for x in (one, two))
        torch.testing.assert_close(predictions.divergence(whole, other), expected.sum(1))
        if kind == "classes":
            loss, right, judged = predictions.against_labels(other).tolist()
            assert loss == pytest.approx(float(nn.functional.cross_entropy(two.flatten(0, 1), labels.flatten())) * 20)
            assert (right, judged) == (int((two.argmax(-1) == labels).sum()), 20)
            pulls.append(predictions.pull(whole, torch.Generator().manual_seed(1)))
            torch.testing.assert_close(pulls[-1], pulls[0])
            assert (pulls[-1].abs().sum(-1) > 0).equal(counts)


# What must not change ------------------------------------------------------------------------------------------------


def state_of(model: Any) -> tuple[Any, ...]:
    """Return tensors by name, and all else of a model that a caller may rely on."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tensors |= {f"{name} grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    tensors["random"] = torch.random.get_rng_state()
    trained = [(name, p.requires_grad, p.dtype, p.grad is None) for name, p in model.named_parameters()]
    layers = [dict(layer.scaling) for layer in model.modules() if isinstance(layer, LoraLayer)]
    return tensors, (trained, layers, [module.training for module in model.modules()], repr(model.peft_config))


def assert_unchanged(model: Any, before: tuple[Any, ...]) -> None:
    tensors, others = state_of(model)
    torch.testing.assert_close(tensors, before[0], rtol=0, atol=0, equal_nan=True)
    assert others == before[1]


@pytest.mark.parametrize("is_training", [True, False])
def test_measuring_leaves_no_trace_even_if_it_fails(is_training: bool) -> None:
    model = adapted(KINDS["experts"]).train(is_training)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    model.base_model.model.layers.eval()
    before, calls = state_of(model), 0

    def failing(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise RuntimeError("out of memory")
        return answers(model, batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        aroma.compress(model, batches(), outputs=failing)
    assert_unchanged(model, before)


def test_dropout_is_off_and_random_numbers_go_on_as_before() -> None:
    """Two models of one seed, of which one drops nothing: the same choice. Without `eval` they would differ."""
    found = []
    for probability in (0.5, 0.0):
        model = adapted(KINDS["linear"]).train()
        model.base_model.model.drop.p = probability
        torch.manual_seed(5)
        found.append(aroma.compress(model, batches(), outputs=answers))
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(5))
        assert model.training
    assert found[0] == found[1]


def test_only_the_active_adapter_is_cut(tmp_path: Path) -> None:
    model = adapted(KINDS["linear"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["gpt", "linear"]))
    randomize(model.double(), 7, adapter="other")
    model.set_adapter("default")
    other = {name: p.clone() for name, p in model.named_parameters() if ".other" in name}
    config = model.peft_config["other"].to_dict()
    found = aroma.compress(model, batches(), outputs=answers, size=0.3)
    assert found.size.share <= 0.3
    for name, value in other.items():
        assert model.get_parameter(name).equal(value)
    assert model.peft_config["other"].to_dict() == config
    model.set_adapter("other")
    assert answers(model, batches()[0]).logits.isfinite().all()


def test_the_callers_configuration_is_not_changed() -> None:
    config = LoraConfig(r=4, target_modules=["linear"], use_rslora=True)
    before = copy.deepcopy(config.to_dict())
    model = get_peft_model(zoo(), config).double()
    randomize(model, 0)
    aroma.compress(model, batches(), outputs=answers)
    assert config.to_dict() == before


def test_what_cannot_be_cut_is_still_there_after_a_reload(tmp_path: Path) -> None:
    options = {"target_modules": ["linear", "conv", "attention"], "use_rslora": True, "alpha_pattern": {"conv": 9}}
    model = adapted(options, groups=2)
    found = aroma.compress(model, batches(), outputs=answers, size=0.1)
    assert sorted(found.left_alone) == ["attention", "conv"]
    after = reloaded(model, tmp_path, zoo(2))
    for batch in batches():
        torch.testing.assert_close(answers(after, batch).logits, answers(model, batch).logits)


def test_a_name_that_ends_like_a_target_is_not_adapted_when_loaded(tmp_path: Path) -> None:
    """`linear` stays; PEFT would also match `layers.0.linear`, which has another rank or none."""
    model = adapted({"target_modules": r"linear|layers\.0\.linear"})
    found = aroma.compress(model, batches(), outputs=answers, size=1.0)
    assert {name for name, (_, after) in found.ranks.items() if after} == {"linear", "layers.0.linear"}
    after = reloaded(model, tmp_path)
    layers = {name for name, layer in after.named_modules() if isinstance(layer, LoraLayer)}
    assert layers == {"base_model.model.linear", "base_model.model.layers.0.linear"}


def test_a_zero_update_is_left_out_and_an_expert_that_no_example_reaches_costs_nothing() -> None:
    model = adapted({"target_modules": ["linear", "gpt"]}, zero=(0,))
    found = aroma.compress(model, batches(), outputs=answers, keep=1.0, size=1.0)
    assert found.ranks["linear"] == (4, 0)
    assert found.size.effect == pytest.approx(1)
    experts = adapted({"target_modules": [], "target_parameters": ["experts.up"]})
    aroma.compress(experts, batches(), outputs=answers, size=0.5)
    assert all(p.isfinite().all() for p in experts.parameters())


# Bases ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base(bits: int, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    def net() -> Any:
        torch.manual_seed(0)
        quantised = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
        layers = nn.Linear(64, 64), quantised if bits == 4 else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        return nn.Sequential(*layers, nn.Linear(64, 3)).to("cpu").eval()

    def output(model: Any, batch: Tensor) -> Categorical:
        return Categorical(logits=model(batch))

    model = get_peft_model(net(), LoraConfig(r=4, target_modules=["1"])).eval()
    randomize(model, 0)
    given = list(torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        whole = [output(model, batch) for batch in given]
        with model.disable_adapter():
            none = [output(model, batch) for batch in given]
    found = aroma.compress(model, given, rank=2, outputs=output)
    assert found.size.largest_rank == 2
    model.save_pretrained(tmp_path)
    after = PeftModel.from_pretrained(net(), tmp_path).eval()
    with torch.no_grad():
        kept = [output(after, batch) for batch in given]
    lost, everything = (
        sum(kl_divergence(*pair).sum() for pair in zip(whole, one, strict=True)) for one in (kept, none)
    )
    assert found.size.effect == pytest.approx(1 - float(lost / everything), abs=1e-3)


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_gradient_checkpointing_is_used_and_changes_nothing(is_reentrant: bool) -> None:
    import torch.utils.checkpoint as checkpoint

    plain, other, given = transformer("llama"), transformer("llama"), several("llama")
    other.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    other.enable_input_require_grads()
    calls: list[int] = []
    owner, name = (
        (checkpoint.CheckpointFunction, "forward")
        if is_reentrant
        else (checkpoint, "_checkpoint_without_reentrant_generator")
    )
    genuine = getattr(owner, name)

    def counted(*inputs: Any, **options: Any) -> Any:
        calls.append(1)
        return genuine(*inputs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, staticmethod(counted) if is_reentrant else counted)
        found = aroma.compress(other.train(), given, size=0.3)
    assert len(calls) == 2 * len(given)  # two layers, in the pass of the gradients alone
    expected = aroma.compress(plain, given, size=0.3)
    assert found.ranks == expected.ranks
    assert found.size.effect == pytest.approx(expected.size.effect, abs=1e-5)


def test_a_base_that_is_partly_offloaded() -> None:
    """Hooks bring in the weights of one of two layers; an adapter that lies elsewhere with its base is refused."""
    model, expected, given = transformer("llama"), transformer("llama"), several("llama")
    for layer in model.base_model.model.model.layers[0].modules():
        if isinstance(layer, LoraLayer):
            accelerate.cpu_offload(layer.base_layer, execution_device=torch.device("cpu"))
    found, whole = (aroma.compress(one, given, size=0.3) for one in (model, expected))
    assert found.ranks == whole.ranks
    assert found.size.effect == pytest.approx(whole.size.effect, abs=1e-5)
    offloaded = transformer("llama")
    offloaded.base_model.model.model.layers[0].to("meta")
    with pytest.raises(ConfigError, match=r"model='default on meta': .* load it into memory"):
        aroma.compress(offloaded, given)


def test_no_more_than_two_batches_of_logits_live_at_a_time(monkeypatch: Any) -> None:
    """The whole adapter's answers to a batch, and those of one size."""
    from aroma.compression import compress as module

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most, genuine = 0, module.predictions_of

    class Held:
        pass

    def watched(*inputs: Any) -> Predictions:
        nonlocal most
        found = genuine(*inputs)
        found.values.held = Held()
        alive.add(found.values.held)
        most = max(most, len(alive))
        return found

    monkeypatch.setattr(module, "predictions_of", watched)
    aroma.compress(transformer("llama"), several("llama"))
    assert most <= 2


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"keep=0: .* above 0 and at most 1"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": "0.9"}, "keep='0.9'"),
        ({"keep": True}, "keep=True"),
        ({"size": -0.1}, "size=-0.1"),
        ({"size": float("nan")}, "size=nan"),
        ({"rank": 0}, "rank=0: .* 1 or more"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"batches": None}, "batches=None: .* give size or rank"),
        ({"batches": None, "keep": 0.9}, "keep=0.9: .* give batches"),
        ({"batches": []}, r"batches=\[\]"),
        ({"batches": "texts"}, "batches='str'"),
        ({"batches": {"ids": torch.ones(20, 5)}}, "batches='dict'"),
        ({"batches": ["a text"], "outputs": None}, "batches='str': a batch is a mapping"),
        ({"batches": [{"ids": [[1, 2]]}], "outputs": None}, "its values must be tensors"),
        ({"batches": batches(2)}, "batches='12 examples': give 16 or more"),
        ({"outputs": None}, "outputs='Tensor': what it means is not known"),
        ({"outputs": lambda model, batch: 3}, "outputs='int': it must return a tensor"),
        ({"outputs": lambda model, batch: model(batch["ids"]).detach()}, "outputs='without gradient'"),
    ],
)
def test_bad_values_are_refused_before_any_change(options: dict[str, Any], message: str) -> None:
    model = adapted(KINDS["linear"])
    before = state_of(model)
    options = {"outputs": answers, "batches": batches(), **options}
    with pytest.raises(ConfigError, match=message):
        aroma.compress(model, options.pop("batches"), **options)
    assert_unchanged(model, before)


def merged(model: Any) -> None:
    model.merge_adapter()


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def untouched(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()


def endless(model: Any) -> None:
    model.base_model.model.linear.lora_A["default"].weight.data[0, 0] = float("inf")


def compiled(model: Any) -> None:
    model.base_model.model.layers[0] = torch.compile(model.base_model.model.layers[0])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (merged, ConfigError, r"model='default merged': .* unmerge_adapter"),
        (disabled, ConfigError, r"model='default disabled': .* outside disable_adapter"),
        (untouched, ConfigError, r"model='default': all its updates are zero"),
        (endless, NonFiniteError, r"linear: its adapter is NaN or infinite"),
        (compiled, ConfigError, r"use module.compile\(\)"),
    ],
)
@pytest.mark.parametrize("has_examples", [True, False])
def test_an_adapter_that_gives_no_answers_is_refused(
    change: Any, kind: type[AromaError], message: str, has_examples: bool
) -> None:
    model = adapted(KINDS["linear"])
    change(model)
    before = state_of(model)
    with pytest.raises(kind, match=message):
        aroma.compress(model, batches() if has_examples else None, size=0.5, outputs=answers)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_updates_that_are_no_products_are_refused(options: dict[str, Any], message: str) -> None:
    model = get_peft_model(zoo().float(), LoraConfig(r=4, target_modules=["linear"], **options))
    with pytest.raises(ConfigError, match=message):
        aroma.compress(model, batches(), outputs=answers)


def test_a_model_without_one_active_lora_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="model='Zoo': give a PeftModel with one active LoRA adapter"):
        aroma.compress(zoo(), batches(), outputs=answers)
    model = adapted(KINDS["linear"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["linear"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match=r"default \(.*other"):
        aroma.compress(model, batches(), outputs=answers)


def test_examples_that_the_adapter_does_not_touch_are_refused() -> None:
    model = adapted({"target_modules": ["linear"]})
    with pytest.raises(ConfigError, match="changes no prediction"):
        aroma.compress(model, batches(), outputs=lambda model, batch: 0 * model(batch["ids"]))


# Without examples, from files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "experts"])
@pytest.mark.parametrize("options", [{"size": 0.4}, {"rank": 2}])
def test_files_are_cut_as_a_model_is(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(KINDS[kind])
    model.save_pretrained(tmp_path / "whole")
    in_memory = aroma.compress(model, None, **options)
    from_files = compress_saved(tmp_path / "whole", tmp_path / "small", **options)
    assert dataclasses.replace(from_files, left_alone=in_memory.left_alone) == in_memory
    assert set(from_files.left_alone) == set(in_memory.left_alone)
    after = PeftModel.from_pretrained(zoo(), tmp_path / "small").double().eval()
    for batch in batches():
        torch.testing.assert_close(answers(after, batch).logits, answers(model, batch).logits)


def test_by_size_is_the_threshold_of_para_and_rank_the_truncation_of_squeeze() -> None:
    model = adapted({"target_modules": ["linear", "gpt"]})
    layers = [
        model.base_model.model.linear,
        model.base_model.model.gpt,
        *(b.linear for b in model.base_model.model.layers),
    ]
    deltas = {id(layer): layer.get_delta_weight("default") for layer in layers}
    sigma = torch.cat([torch.linalg.svdvals(delta)[:4] for delta in deltas.values()]).sort(descending=True).values
    found = aroma.compress(model, None, size=0.5)
    threshold = sigma[found.size.directions - 1]
    for layer in layers:
        if "default" in layer.lora_A:
            U, S, Vh = torch.linalg.svd(deltas[id(layer)])
            expected = U * torch.where(threshold - 1e-12 <= S, S, 0) @ Vh
            torch.testing.assert_close(layer.get_delta_weight("default"), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"target_parameters": ["experts.up"]}, "target_parameters="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 3}, "rank 4, and 3 in adapter_config.json"),
    ],
)
def test_files_that_cannot_be_cut_are_refused_and_nothing_is_written(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    import json

    adapted(KINDS["linear"]).save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(AromaError, match=message):
        compress_saved(tmp_path / "whole", tmp_path / "small", size=0.5)
    assert not (tmp_path / "small").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        compress_saved(tmp_path / "whole", tmp_path / "full", size=0.5)


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
