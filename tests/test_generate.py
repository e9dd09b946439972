"""Text from language models: batches, streams, saved models that are loaded, and the command generate."""

import io
import json
import shutil
import sys

import pytest
import torch
from aroma_lab.language.generate import Generation, generate_batch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from aroma import AromaConfig
from aroma.checkpoint import save_adapter
from aroma.cli import main
from aroma.errors import CheckpointError, ConfigError, DataError
from aroma_lab.language.encode import stop_ids
from aroma_lab.language.model import LanguageTask, load_for_inference
from aroma_lab.specs import ModelSpec
from models import METHOD, set_ranks
from tiny_lm import CHAT_TEMPLATE, save_tiny_lm, tiny_tokenizer

TEXTS = ["apple", "bird cloud door eagle fish", "grass house " * 9, "king a lamp", "iron"]
KINDS = ["llama", "gpt2"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    made = {kind: save_tiny_lm(folder / kind, kind) for kind in KINDS}
    model = AutoModelForCausalLM.from_pretrained(made["gpt2"])
    model.transformer.wpe.weight.data *= 6  # else it soon repeats itself, wherever it is
    model.save_pretrained(made["gpt2"])
    return made


@pytest.fixture(scope="module")
def opened(bases):
    return {kind: load_for_inference(base) for kind, base in bases.items()}


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory):
    """An adapter of the tiny Llama with a large effect, as a run leaves it."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    make_adapter(bases["llama"], folder)
    return folder


def make_adapter(base, folder, seed=7):
    config = AromaConfig(**METHOD, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "up_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    set_ranks(model, [2, 0, 1], seed=seed)
    save_adapter(model, folder)
    tiny_tokenizer().save_pretrained(folder)
    LanguageTask(64, ModelSpec(str(base))).save(folder)
    return model.eval()


def chats_of(texts=TEXTS):
    return [[{"role": "user", "content": text}] for text in texts]


def answers(opened, chats, **options):
    return generate_batch(opened, chats, **{"max_new_tokens": 12, "batch_size": 3, **options})


@torch.no_grad()
def likeliest(loaded, chat, count=12):
    """The greedy answer by whole forward passes over a single row, without a cache."""
    ids = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    start = len(ids)
    while len(ids) < start + count and ids[-1] not in stop_ids(loaded.tokenizer):
        ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    finished = ids[-1] in stop_ids(loaded.tokenizer)
    return Generation(loaded.tokenizer.decode(ids[start:], skip_special_tokens=True).strip(), finished)


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_says_what_each_prompt_says_alone(kind, opened):
    alone = [likeliest(opened[kind], chat) for chat in chats_of()]
    assert len(set(alone)) >= 4, "answers that are alike would prove nothing"
    for batch_size in (1, 2, 5):
        assert answers(opened[kind], chats_of(), batch_size=batch_size) == alone
    with pytest.raises(DataError, match=r"12 are to follow, and the model takes 128 in all"):
        answers(opened[kind], chats_of(["apple " * 115]))


def test_an_answer_ends_where_the_template_ends_a_turn(bases):
    loaded = load_for_inference(bases["gpt2"])
    whole = answers(loaded, chats_of())
    said = whole[3].text.split()
    stop = next(word for word in said[2:] if word not in said[:2])
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": [stop]})
    loaded.tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", f" {stop} ")
    assert loaded.tokenizer.decode(stop_ids(loaded.tokenizer)).split() == [stop, "</s>"]
    found = answers(loaded, chats_of())
    assert {answer.finished for answer in found} == {True, False}
    assert found == [likeliest(loaded, chat) for chat in chats_of()]


# Adapters ------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_opened_in_plain_peft(bases, tmp_path):
    trained = make_adapter(bases["llama"], tmp_path / "adapter")
    found = load_for_inference(tmp_path / "adapter")
    ids = torch.tensor([found.tokenizer.apply_chat_template(chats_of()[1])["input_ids"]])
    with torch.no_grad():
        logits = [model(ids).logits for model in (found.model, trained)]
        with found.model.disable_adapter():
            without = found.model(ids).logits
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert (logits[0] - without).abs().max() > 0.1
    assert type(found.model.base_model.model.model.layers[0].mlp.up_proj).__module__.startswith("peft.")
    assert not found.model.training


def test_another_base_model_is_refused(adapter, bases, tmp_path):
    with pytest.raises(ConfigError) as refused:
        load_for_inference(adapter, str(bases["gpt2"]))
    assert f"base_model={str(bases['gpt2'])!r}: not the model of the adapter {adapter}" in str(refused.value)
    assert f"trained on {bases['llama']}: it has no place for " in str(refused.value)
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    settings = {**model.config.to_dict(), "layer_types": None}
    tiny_tokenizer().save_pretrained(tmp_path)
    for change, reason in (
        ({"intermediate_size": 64}, "PEFT cannot put .*size mismatch"),
        ({"num_hidden_layers": 1}, r"it has no place for .*layers\.1\."),
    ):
        type(model)(type(model.config)(**{**settings, **change})).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=reason):
            load_for_inference(adapter, str(tmp_path))


def test_an_adapter_of_another_method_is_opened_or_refused_whole(bases, tmp_path):
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=4, target_r=2, total_step=10, init_lora_weights=False
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases["llama"]), config).eval()
    model.save_pretrained(tmp_path)
    found = load_for_inference(tmp_path)
    assert answers(found, chats_of()) == [likeliest(found._replace(model=model), chat) for chat in chats_of()]
    with pytest.raises(ConfigError, match=r"PEFT cannot put the one into the other: Target modules .* not found"):
        load_for_inference(tmp_path, str(bases["gpt2"]))


def test_what_is_no_language_models_adapter_is_refused(bases, adapter, tmp_path):
    def edited(name, **changes):
        shutil.copytree(adapter, tmp_path / name, ignore=shutil.ignore_patterns("aroma_task.json"))
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return tmp_path / name

    with pytest.raises(CheckpointError, match=r"adapter='.*absent': no such folder"):
        load_for_inference(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"its task_type is not CAUSAL_LM"):
        load_for_inference(edited("classifier", task_type="SEQ_CLS"))
    nameless = edited("nameless", base_model_name_or_path=None)
    with pytest.raises(ConfigError, match=r"the adapter does not name its base model; give its folder or name"):
        load_for_inference(nameless)
    assert isinstance(load_for_inference(nameless, str(bases["llama"])).model, PeftModel)


# Commands ------------------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    """Exit code and output of a command."""
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_generate_prints_the_answer(adapter, opened, capsys, monkeypatch):
    loaded = load_for_inference(adapter)
    (answer,) = answers(loaded, chats_of(["bird cloud door"]))
    assert [answer] != answers(opened["llama"], chats_of(["bird cloud door"]))
    arguments = ("generate", adapter, "--max-new-tokens", 12)
    capsys.readouterr()
    assert run(capsys, *arguments, "bird cloud door") == (0, f"{answer.text}\n", "")
    monkeypatch.setattr(sys, "stdin", io.StringIO("bird cloud door\n"))
    assert run(capsys, *arguments, "-")[1] == f"{answer.text}\n"
    (told,) = answers(loaded, [[{"role": "system", "content": "lamp king"}, *chats_of(["bird cloud door"])[0]]])
    assert told != answer
    assert run(capsys, *arguments, "bird cloud door", "--system", "lamp king")[1] == f"{told.text}\n"
    for arguments in (("absent", "apple"), (adapter, "a", "--max-new-tokens", 0)):
        code, _, error = run(capsys, "generate", *arguments)
        assert code == 2
        assert error.count("error: ") == error.count("\n") == 1
