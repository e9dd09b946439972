"""Text from language models: batches, streams, saved models that are loaded, and the command generate."""

import io
import json
import shutil
import sys
from dataclasses import replace
from itertools import takewhile

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from aroma import AromaConfig
from aroma.checkpoint import save_adapter
from aroma.cli import main
from aroma.errors import AromaWarning, CheckpointError, ConfigError, DataError
from aroma_lab.language.generate import generate_batch, stream
from aroma_lab.language.model import LanguageTask, LoadedModel, load_for_inference
from aroma_lab.language.template import Template, Turn
from aroma_lab.specs import LanguageSpec, ModelSpec
from models import METHOD, set_ranks
from tiny_lm import CHAT_TEMPLATE, save_tiny_lm, tiny_tokenizer, write_json_lines

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


def make_adapter(base, folder, language=LanguageSpec(), seed=7):  # noqa: B008
    config = AromaConfig(**METHOD, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "up_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    set_ranks(model, [2, 0, 1], seed=seed)
    save_adapter(model, folder)
    tiny_tokenizer().save_pretrained(folder)
    LanguageTask(language, 64, ModelSpec(str(base))).save(folder)
    return model.eval()


def prompts_of(opened, texts=TEXTS):
    return [opened.template.prompt([Turn("user", text)]) for text in texts]


def answers(opened, prompts, template=None, **options):
    options = {"max_new_tokens": 12, "batch_size": 3, **options}
    return generate_batch(LoadedModel(opened.model, template or opened.template), prompts, **options)


@torch.no_grad()
def likeliest(model, prompt, count, stops=()):
    """The greedy continuation by whole forward passes over a single row, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def stopping_at(template, *tokens):
    """The template with other tokens that end a response."""
    made = Template(tiny_tokenizer(), template.spec)
    made.stop_ids = tokens
    return made


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_says_what_each_prompt_says_alone(kind, opened):
    prompts = prompts_of(opened[kind])
    assert len({len(prompt) for prompt in prompts}) == 4
    alone = [likeliest(opened[kind].model, prompt, 12) for prompt in prompts]
    assert len({tuple(ids) for ids in alone}) >= 4, "answers that are alike would prove nothing"
    never = stopping_at(opened[kind].template, min(set(range(40)).difference(*alone)))
    for batch_size in (1, 2, 5):
        found = answers(opened[kind], prompts, never, batch_size=batch_size)
        assert [answer.ids for answer in found] == alone
        assert not any(answer.finished for answer in found)
    # Another stop ends some of the responses, not all of them, and not at once.
    stop = next(
        token for token in alone[3][4:] if token not in alone[3][:4] and not all(token in ids for ids in alone)
    )
    found = answers(opened[kind], prompts, stopping_at(opened[kind].template, stop), batch_size=5)
    for answer, ids in zip(found, alone, strict=True):
        assert answer.ids == list(takewhile(lambda token: token != stop, ids))
        assert answer.finished == (stop in ids)
        assert answer.text == never.tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
    assert {answer.finished for answer in found} == {True, False}


def test_the_models_own_settings_do_not_count(opened):
    model, prompts = opened["llama"].model, prompts_of(opened["llama"])
    plain = answers(opened["llama"], prompts)
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, suppress_tokens=plain[0].ids[:1])
    before, model.generation_config = model.generation_config, own
    try:
        inputs = torch.tensor([prompts[0]])
        assert model.generate(inputs, max_new_tokens=12)[0, len(prompts[0]) :].tolist() != plain[0].ids
        assert answers(opened["llama"], prompts) == plain
        assert model.generation_config is own
    finally:
        model.generation_config = before


def test_a_model_in_training_answers_without_dropout_and_goes_on_training(bases):
    model = AutoModelForCausalLM.from_pretrained(bases["gpt2"]).train()
    assert model.config.resid_pdrop > 0
    other = load_for_inference(bases["gpt2"])
    prompts = prompts_of(other)
    assert answers(other._replace(model=model), prompts) == answers(other, prompts)
    assert model.training


@pytest.mark.parametrize(
    ("options", "prompts", "kind", "message"),
    [
        ({"max_new_tokens": 0}, [[7]], ConfigError, r"max_new_tokens=0: give 1 or more"),
        ({"batch_size": 0}, [[7]], ConfigError, r"batch_size=0: give 1 or more"),
        ({"max_new_tokens": 30}, [[7], [7] * 99], DataError, r"prompt 2=.* has 99 tokens, the model takes 128 in all"),
    ],
)
def test_what_cannot_be_answered_is_refused(options, prompts, kind, message, opened):
    with pytest.raises(kind, match=message):
        answers(opened["gpt2"], prompts, **options)


# Streams -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def streamed(capsys):
    def streamed(opened, text="bird cloud door", **options):
        stream(opened, [Turn("user", text)], **{"max_new_tokens": 12, **options})
        return capsys.readouterr().out

    return streamed


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_greedy_answer(kind, opened, streamed):
    for text, answer in zip(TEXTS, answers(opened[kind], prompts_of(opened[kind])), strict=True):
        assert streamed(opened[kind], text).strip() == answer.text
    text = "apple " * 110  # it gets the room that there is
    (prompt,) = prompts_of(opened[kind], [text])
    (found,) = answers(opened[kind], [prompt], max_new_tokens=128 - len(prompt))
    assert streamed(opened[kind], text, max_new_tokens=500).strip() == found.text
    with pytest.raises(DataError, match=r"prompt=.*the model takes 128 in all"):
        streamed(opened[kind], "apple " * 128)


def test_a_seed_draws_the_same_answer_again_and_leaves_other_random_numbers_alone(opened, streamed):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = [streamed(opened["llama"], temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({streamed(opened["llama"], temperature=3.0) for _ in range(8)}) > 1


def test_a_response_begins_after_what_the_template_leads_it_with(bases, streamed):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(  # as Qwen 3, which begins a response with empty thoughts
        "{{ message['content'] }}", "{{ 'Context :\n' if message['role'] == 'assistant' }}{{ message['content'] }}"
    )
    loaded = LoadedModel(load_for_inference(bases["llama"]).model, Template(tokenizer, LanguageSpec()))
    prompt, lead = prompts_of(loaded)[1], loaded.template.lead
    assert tokenizer.decode(lead).split() == ["Context", ":"]
    (found,) = answers(loaded, [prompt])
    expected = likeliest(loaded.model, prompt + lead, 12, loaded.template.stop_ids)
    assert found.ids == [token for token in expected if token not in loaded.template.stop_ids]
    assert streamed(loaded, TEXTS[1]).strip() == found.text


# Adapters ------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_opened_in_plain_peft_and_asked_as_in_training(bases, tmp_path):
    language = LanguageSpec(template="plain", system="lamp")
    trained = make_adapter(bases["llama"], tmp_path / "adapter", language)
    found = load_for_inference(tmp_path / "adapter")
    prompt = prompts_of(found)[1]
    assert prompt == Template(tiny_tokenizer(), language).prompt([Turn("user", TEXTS[1])])
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits for model in (found.model, trained)]
        with found.model.disable_adapter():
            without = found.model(torch.tensor([prompt])).logits
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert (logits[0] - without).abs().max() > 0.1
    assert type(found.model.base_model.model.model.layers[0].mlp.up_proj).__module__.startswith("peft.")
    assert not found.model.training


def test_another_base_model_is_refused(adapter, bases, tmp_path):
    with pytest.raises(ConfigError) as refused:
        load_for_inference(adapter, str(bases["gpt2"]))
    assert f"base_model={str(bases['gpt2'])!r}: not the model of the adapter {adapter}" in str(refused.value)
    assert f"trained on {bases['llama']}: PEFT cannot put the one into the other" in str(refused.value)
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
    shutil.copytree(bases["llama"], tmp_path / "other")
    vocabulary = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["apple"], words["bird"] = words["bird"], words["apple"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ConfigError, match=r"not the model of the adapter .*: its vocabulary is another"):
        load_for_inference(adapter, str(tmp_path / "other"))


def test_an_adapter_of_another_method_is_opened_or_refused_whole(bases, tmp_path):
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=4, target_r=2, total_step=10, init_lora_weights=False
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases["llama"]), config).eval()
    model.save_pretrained(tmp_path)
    found = load_for_inference(tmp_path)
    prompt = prompts_of(found)[0]
    written = likeliest(model, prompt, 12, found.template.stop_ids)
    assert answers(found, [prompt])[0].ids == [token for token in written if token not in found.template.stop_ids]
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
    with pytest.raises(ConfigError, match=r"its task_type is SEQ_CLS, not CAUSAL_LM"):
        load_for_inference(edited("classifier", task_type="SEQ_CLS"))
    with pytest.raises(ConfigError, match=r"base_model='x': .* is a whole model and no adapter; leave it out"):
        load_for_inference(bases["llama"], "x")
    nameless = edited("nameless", base_model_name_or_path=None)
    with pytest.raises(ConfigError, match=r"the adapter does not name its base model; give its folder or name"):
        load_for_inference(nameless)
    with pytest.warns(AromaWarning, match=r"base_model_name_or_path=None: edited since the adapter was saved"):
        assert isinstance(load_for_inference(nameless, str(bases["llama"])).model, PeftModel)


# Commands ------------------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    """Exit code and output of a command."""
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def first_answer(found, text, **options):
    return answers(found, prompts_of(found, [text]), **options)[0].text


def test_generate_prints_the_answer(adapter, opened, capsys, monkeypatch):
    loaded = load_for_inference(adapter)
    answer = first_answer(loaded, "bird cloud door")
    capsys.readouterr()
    assert answer != first_answer(opened["llama"], "bird cloud door")
    arguments = ("generate", adapter, "--max-new-tokens", 12)
    assert run(capsys, *arguments, "bird cloud door") == (0, f"{answer}\n", "")
    monkeypatch.setattr(sys, "stdin", io.StringIO("bird cloud door\n"))
    assert run(capsys, *arguments, "-")[1] == f"{answer}\n"
    template = Template(loaded.template.tokenizer, replace(loaded.template.spec, system="lamp king"))
    told = first_answer(loaded._replace(template=template), "bird cloud door")
    assert told != answer
    assert run(capsys, *arguments, "bird cloud door", "--system", "lamp king")[1] == f"{told}\n"


def test_a_file_of_prompts_becomes_a_file_of_answers(adapter, capsys, tmp_path):
    rows = [
        {"prompt": "apple", "id": 7},
        {"instruction": "bird cloud", "input": "door", "output": "fish"},
        {"messages": [{"role": "system", "content": "lamp"}, {"role": "user", "content": "king"}]},
        {"instruction": "iron"},
    ]
    turns = [
        (Turn("user", "apple"),),
        (Turn("user", "bird cloud\n\ndoor"),),
        (Turn("system", "lamp"), Turn("user", "king")),
        (Turn("user", "iron"),),
    ]
    write_json_lines(tmp_path / "prompts.jsonl", rows)
    out = tmp_path / "answers.jsonl"
    arguments = ("generate", adapter, tmp_path / "prompts.jsonl", "--out", out, "--max-new-tokens", 12)
    code, said, _ = run(capsys, *arguments, "--batch-size", 2)
    found = load_for_inference(adapter)
    expected = answers(found, [found.template.prompt(one) for one in turns])
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0
    assert written == [
        {**row, "response": answer.text, "finished": answer.finished}
        for row, answer in zip(rows, expected, strict=True)
    ]
    cut = sum(not answer.finished for answer in expected)
    assert said.splitlines()[-1] == f"4 answers, {cut} of them cut after 12 tokens: {out}"
    assert run(capsys, *arguments)[2].startswith(f"error: --out='{out}': it exists, and nothing is overwritten")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "apple"}, "prompts (row 2)=['text']: give a text as prompt or instruction, or a list as messages"),
        ({"prompt": 3}, "prompts (row 2)=['prompt']: give a text"),
        ({"prompt": "apple", "response": "bird"}, "prompts (row 2)='bird': it has a response, which the answer would"),
        ({"messages": "apple"}, "prompts (row 2)='apple': give a list of messages"),
        ({"messages": []}, "prompts (row 2)=[]: the user speaks first"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_a_row_that_asks_nothing_is_refused(row, message, bases, capsys, tmp_path):
    write_json_lines(tmp_path / "prompts.jsonl", [{"prompt": "apple"}, row])
    out = tmp_path / "answers.jsonl"
    code, _, error = run(capsys, "generate", bases["llama"], tmp_path / "prompts.jsonl", "--out", out)
    assert code == 2
    assert error.startswith(f"error: {message}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "absent", "apple"], "adapter='absent': no such folder"),
        (["generate", "absent", "  "], "PROMPT='  ': it is empty; write something"),
        (["generate", "absent", "a", "--seed", "1"], "--seed=1: it needs a --temperature above 0"),
        (["generate", "absent", "a", "--max-new-tokens", "0"], "--max-new-tokens=0: give 1 or more"),
        (["generate", "absent", "a", "--temperature", "-1"], "--temperature=-1.0: give 0 (greedy) or more"),
        (
            ["generate", "absent", "a", "--temperature", "1", "--top-p", "1.5"],
            "--top-p=1.5: give a probability above 0",
        ),
        (["generate", "absent", "a", "--batch-size", "2"], "--batch-size=2: it needs --out"),
        (["generate", "a", "b", "--out", "c", "--temperature", "1"], "--temperature=1.0: files are answered greedily"),
        (["generate", "a", "b", "--out", "c", "--batch-size", "0"], "--batch-size=0: give 1 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line_and_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
