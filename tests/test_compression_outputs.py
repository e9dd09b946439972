"""What a model's outputs are, how they are compared, and what bases an adapter may lie on."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

import aroma
from aroma.compression import predictions
from aroma.compression.predictions import Predictions
from aroma.errors import ConfigError
from compressing import effect_of, several, transformer
from models import base
from models import batch as batch_of
from random_lora import randomize

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
