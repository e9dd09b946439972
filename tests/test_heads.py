"""Heads of every build: they train whole with every method, nothing else does unasked, and PEFT reloads them."""

import json

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

from aroma.errors import ConfigError
from aroma.export import export_merged, load_with_adapter
from aroma.integrations.loop import attach
from aroma_lab.methods import METHODS, Aroma, Lora, make_method
from aroma_lab.methods.head import head_of
from aroma_lab.methods.lora import PeftAdapter
from aroma_lab.specs import ModelSpec, TrainSpec
from aroma_lab.tasks.model import count_trainable, load_classifier
from aroma_lab.training.trainer import make_optimizer
from quick import slow_but

VOCABULARY, STEPS, LABELS = 45, 5, ("a", "b", "c")
BART_PART = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}
SIZES = {
    "BertModel": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "DistilBertModel": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "T5ForConditionalGeneration": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    "XLNetModel": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    "GPT2LMHeadModel": {"n_positions": 34, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "BartModel": {
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in BART_PART.items()},
        **{"d_model": 16, "init_std": 0.2, "bos_token_id": 2, "forced_eos_token_id": 3},
    },
}
SIZES |= dict.fromkeys(("BertForMaskedLM", "BertForPreTraining", "DebertaV2Model"), SIZES["BertModel"])
BUILDS = {
    "distilbert": ("DistilBertModel", {"pre_classifier", "classifier"}),
    "bart": ("BartModel", {"classification_head"}),
    "t5": ("T5ForConditionalGeneration", {"classification_head"}),
    "deberta": ("DebertaV2Model", {"pooler", "classifier"}),
    "xlnet": ("XLNetModel", {"sequence_summary", "logits_proj"}),
    "bert without pooler": ("BertForMaskedLM", {"bert.pooler", "classifier"}),
    "bert with untrained pooler": ("BertModel", {"bert.pooler", "classifier"}),
    "bert": ("BertForPreTraining", {"classifier"}),
    "gpt2": ("GPT2LMHeadModel", {"score"}),
}
"""The pretrained models, and the modules of their heads."""
HEADS = {name: head for name, (_, head) in BUILDS.items()}


def pretrained(build):
    kind = getattr(transformers, BUILDS[build][0])
    ends = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 3} if build in ("bart", "t5") else {}
    own = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]} if build == "deberta" else {}
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.2}
    common |= {} if build in ("xlnet", "t5", "gpt2") else {"max_position_embeddings": 34}
    model = kind(kind.config_class(**common, **SIZES[kind.__name__], **ends, **own))
    if build == "bert":
        torch.nn.init.normal_(model.bert.pooler.dense.bias)  # its pretraining trained it
    return model


OTHERS = list(HEADS)[:7]
"""Builds whose head PEFT does not find for itself."""
TRAINING = [kind for kind, made in METHODS.items() if made.trains]
ADAPTERS = [kind for kind, made in METHODS.items() if issubclass(made, PeftAdapter)]
GROWS = {"max_inner_steps": 2, "inner_tolerance": None, "outer_tolerance": None, "rewarmup_steps": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The pretrained models, without heads."""
    root = tmp_path_factory.mktemp("backbones")
    for index, name in enumerate(BUILDS):
        torch.manual_seed(index)
        pretrained(name).save_pretrained(root / name)
    return root


def load(folders, name):
    torch.manual_seed(9)
    return load_classifier(ModelSpec(str(folders / name)), LABELS, 0)


def method_of(kind, **options):
    return make_method(kind, {**(GROWS if kind == "aroma" else {}), **options})


def batch():
    tokens = torch.randint(5, VOCABULARY, (6, 8), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 0] % len(LABELS)
    tokens[:, -1] = 3  # BART and T5 pool at the end of the sentence
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def train(method, model, steps=STEPS):
    optimizer = make_optimizer(model, TrainSpec(learning_rate=1e-2))
    hooks = method.hooks(model)
    if isinstance(method, Aroma):
        attach(model, optimizer, total_steps=steps)
    model.train()
    for step in range(1, steps + 1):
        model(**batch()).loss.backward()
        optimizer.step()
        hooks.after_step(step)
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model):
    inputs = batch()
    del inputs["labels"]
    return model.eval()(**inputs).logits


def plain_name(name):
    """The name that a parameter had before any method came; None for what an adapter brought along."""
    if "lora_" in name or ".adapter." in name or ".original_module." in name or ".ranknum." in name:
        return None
    for part in ("base_model.model.", ".modules_to_save.default", ".base_layer", ".inner"):
        name = name.replace(part, "")
    return name


def plain_parameters(model):
    named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    return {name: parameter.detach().clone() for name, parameter in named.items() if name is not None}


def in_head(build, name):
    return any(name.startswith(f"{module}.") for module in HEADS[build])


def takes(build, kind):
    """Whether the backbone has what the method needs: biases, or the sublayers of BERT."""
    if (build, kind) == ("t5", "bitfit"):
        return False
    return kind not in ("houlsby", "pfeiffer") or build == "deberta" or build.startswith("bert")


# The pooler ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved_by", "bias", "trains"),
    [
        ("BertModel", 0.0, True),
        ("BertForPreTraining", 0.0, True),
        ("BertForPreTraining", 0.1, False),
        ("BertForMaskedLM", 0.1, False),
        ("BertModel", 0.1, True),
    ],
)
def test_a_pooler_trains_unless_its_checkpoint_shows_that_pretraining_did(folders, tmp_path, saved_by, bias, trains):
    model = transformers.BertModel.from_pretrained(folders / "bert with untrained pooler")
    nn.init.constant_(model.pooler.dense.bias, bias)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [saved_by]}))
    for choice, expected in (("auto", trains), (True, True), (False, False)):
        head = head_of(load_classifier(ModelSpec(str(tmp_path)), LABELS, 0, choice))
        assert head.modules == (("bert.pooler",) if expected else ()) + ("classifier",)
        assert head.holds("bert.pooler.dense.weight") == expected


def test_a_pooler_that_cannot_be_left_is_refused(folders):
    with pytest.raises(ConfigError, match=r"parameter='bert\.pooler.*': the checkpoint lacks it"):
        load_classifier(ModelSpec(str(folders / "bert without pooler")), LABELS, 0, False)


def test_a_quantised_encoder_keeps_its_head_whole(folders):
    spec = ModelSpec(str(folders / "bert with untrained pooler"), quantization="nf4")
    model = load_classifier(spec, LABELS, 0)
    assert type(model.bert.pooler.dense) is type(model.classifier) is nn.Linear
    assert type(model.bert.encoder.layer[0].output.dense) is not nn.Linear
    before = plain_parameters(model)
    model = train(Lora(), Lora().build(model, STEPS))
    assert not torch.equal(plain_parameters(model)["bert.pooler.dense.weight"], before["bert.pooler.dense.weight"])


# What trains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "kind"),
    slow_but(
        [
            ("t5", "lora"),
            ("t5", "relora"),
            ("bert with untrained pooler", "aroma"),
            ("bert with untrained pooler", "full"),
        ],
        [
            (build, kind)
            for build in OTHERS
            for kind in TRAINING
            if kind in ("lora", "aroma") or build in ("t5", "bert with untrained pooler")
        ],
    ),
)
def test_the_whole_head_trains_and_the_backbone_only_where_it_must_and_plain_peft_reloads_it(
    folders, build, kind, tmp_path
):
    method, model = method_of(kind), load(folders, build)
    before = plain_parameters(model)
    size = sum(tensor.numel() for name, tensor in before.items() if in_head(build, name))
    if not takes(build, kind):
        with pytest.raises(ConfigError, match=r"model=.*; compare another method on it"):
            method.build(model, STEPS)
        return
    model = method.build(model, STEPS)
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_trainable(model) == {"adapter": total - size, "head": size}
    assert method.active_parameters(model) == total - size
    optimizer = make_optimizer(model, TrainSpec(learning_rate=0.1, head_learning_rate=0.02))
    sizes = {group["lr"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
    assert sizes == ({0.02: size} if kind == "head_only" else {0.1: total - size, 0.02: size})
    train(method, model)
    after = plain_parameters(model)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    head = {name for name in before if in_head(build, name)}
    trained = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad} - {None}
    assert head <= moved <= trained
    expected = {"full": set(before), "bitfit": {name for name in before if name.split(".")[-1] == "bias"}}
    assert trained == head | expected.get(kind, set())
    if kind not in ADAPTERS:
        return
    method.save(model, tmp_path)
    torch.manual_seed(77)  # the head that the base model starts with is another one
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folders / build, num_labels=len(LABELS))
    assert not torch.allclose(logits(base), logits(model), atol=1e-3)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model), atol=1e-5, rtol=1e-5)
    if kind != "adalora":
        loaded = load_with_adapter(tmp_path, str(folders / build))
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    if kind != "adalora" and build.startswith("bert"):
        export_merged(tmp_path, tmp_path / "merged", str(folders / build))
        merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)
