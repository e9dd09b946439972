"""Bottleneck adapters: where they sit, what they do at the start, and how many parameters they have."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaForSequenceClassification

from aroma.errors import ConfigError
from aroma_lab.methods import Houlsby, Pfeiffer
from aroma_lab.methods.plain import Adapted
from models import base

WIDTH, LAYERS = 32, 2
"""Of the encoders in `models`."""


def batch():
    tokens = torch.randint(2, 40, (4, 8), generator=torch.Generator().manual_seed(3))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 3}


def hidden(model):
    with torch.no_grad():
        return model.eval()(**batch(), output_hidden_states=True).hidden_states


def adapted(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


@pytest.mark.parametrize("encoder", ["bert", "roberta"])
@pytest.mark.parametrize("method", [Houlsby(), Pfeiffer()], ids=str)
def test_the_model_is_nearly_unchanged_at_the_start_and_exactly_so_without_the_adapters_part(encoder, method):
    plain = hidden(base(encoder))
    model = method.build(base(encoder), 10)
    started = hidden(model)
    for before, after in zip(plain, started, strict=True):
        assert (after - before).abs().max() < 2e-2 * before.abs().max()
    assert not torch.equal(started[-1], plain[-1])
    for one in adapted(model).values():
        nn.init.zeros_(one.adapter.up.weight)
    assert all(map(torch.equal, hidden(model), plain))


def test_each_computes_what_its_paper_draws():
    torch.manual_seed(1)
    x, skip = torch.randn(3, 5, 48), torch.randn(3, 5, WIDTH)
    plain = base("bert").eval().bert.encoder.layer[1].output
    for method, activation in ((Houlsby, F.gelu), (Pfeiffer, F.relu)):
        block = method(size=4).build(base("bert"), 10).eval().bert.encoder.layer[1].output
        block.dense.load_state_dict(plain.dense.state_dict())
        adapter = (block.dropout if method is Houlsby else block.LayerNorm).adapter
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
        h = x @ plain.dense.weight.T + plain.dense.bias
        read = h if method is Houlsby else plain.LayerNorm(h + skip)
        inner = activation(read @ adapter.down.weight.T + adapter.down.bias)
        expected = plain.LayerNorm(h + inner @ adapter.up.weight.T + adapter.up.bias + skip)
        torch.testing.assert_close(block(x, skip), expected)
        assert not torch.allclose(expected, plain(x, skip), atol=0.1)


def test_the_default_sizes_are_those_of_table_2_on_roberta_base():
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    counts = {}
    for method in (Houlsby(), Pfeiffer()):
        with torch.device("meta"):
            model = RobertaForSequenceClassification(config)
        counts[type(method)] = method.active_parameters(method.build(model, 10))
    assert counts == {Houlsby: 24 * (2 * 768 * 8 + 8 + 768), Pfeiffer: 12 * (2 * 768 * 16 + 16 + 768)}
    assert [f"{count / 1e6:.2f}M" for count in counts.values()] == ["0.31M", "0.30M"]


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_encoders_of_another_build_are_refused_untouched(name):
    model = base(name)
    before = {key for key, _ in model.named_modules()}
    with pytest.raises(ConfigError, match=rf"model='{type(model).__name__}': bottleneck adapters go into encoders"):
        Pfeiffer().build(model, 10)
    assert {key for key, _ in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
