"""Language data: rows of every form, what is learned of them, cuts, packing, and a loss that batches do not change."""

import math

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM
from trl import pack_dataset

from aroma.errors import DataError
from aroma_lab.language.data import Example, examples_of
from aroma_lab.language.encode import NOT_LEARNED, PLAIN_TEMPLATE, encode_chat, encode_rows
from aroma_lab.language.sft import make_collator, token_loss
from aroma_lab.tasks.sources import read_located
from tiny_lm import (
    CHAT_TEMPLATE,
    FORGETFUL,
    WORDS,
    save_tiny_lm,
    tiny_tokenizer,
    with_bos,
    write_json_lines,
)

ASK, ANSWER = {"role": "user", "content": "choose a word"}, {"role": "assistant", "content": "bird"}
CHAT = [{"role": "system", "content": "choose"}, ASK, ANSWER, {"role": "user", "content": "a question"}, ANSWER]

# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"instruction": "choose a", "input": "word", "output": 7}, ["choose a\n\nword", "7"]),
        ({"instruction": "choose a word", "input": None, "output": None}, ["choose a word", ""]),
        ({"prompt": "choose a word", "completion": "bird", "text": "no"}, ["choose a word", "bird"]),
        ({"prompt": [ASK], "completion": [ANSWER]}, ["choose a word", "bird"]),
        ({"messages": [ASK, ANSWER]}, ["choose a word", "bird"]),
        ({"text": "a bird"}, "a bird"),
    ],
)
def test_rows_of_every_form(tmp_path, row, content):
    (found,) = examples_of(read_located("data.train", str(write_json_lines(tmp_path / "rows.jsonl", [row]))))
    assert content == (found.content if isinstance(content, str) else [one["content"] for one in found.content])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '{"text": "a"}', "no list of objects"),
        ("a.json", '[{"text": "a"}, {"question": "x"}]', "row 2.*name its columns messages, or prompt"),
        ("a.json", '[{"instruction": "", "input": " ", "output": "b"}]', "row 1.*the prompt is empty"),
        ("a.json", '[{"text": "a"}, {"text": ["x"]}]', "row 2.*a list, not a text"),
        ("a.json", '[{"messages": "x"}]', "row 1.*a list of messages"),
        ("a.json", '[{"messages": [{"from": "human", "value": "x"}]}]', "row 1.*a role and a content"),
        ("a.json", '[{"messages": [{"role": "user", "content": "x"}]}]', "row 1.*must be the assistant's"),
    ],
)
def test_bad_data_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"data.train.*{words}"):
        examples_of(read_located("data.train", str(tmp_path / name)))


# Encoding ------------------------------------------------------------------------------------------------------------

BRACKETS = (  # as Llama 2: no heading of a response, a space before it, the end of the text after it
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}/ {{ m['content'] }} /"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_STOP = CHAT_TEMPLATE.replace("<|end|>", "")  # no token of its own ends a response
THOUGHTS = (  # as Qwen 3: empty thoughts before the last response, and none before earlier ones
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def tokenizer_of(chat_template=CHAT_TEMPLATE):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = chat_template
    return tokenizer


def rows_of(examples, max_length=100, tokenizer=None):
    rows, kept, note = encode_rows(examples, tokenizer or tokenizer_of(), max_length, "data.train")
    return list(zip(rows["input_ids"], rows["labels"], strict=True)), kept, note


def words_of(labels):
    return tiny_tokenizer().decode([token for token in labels if token != NOT_LEARNED])


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN_TEMPLATE, BRACKETS, NO_STOP, FORGETFUL, THOUGHTS])
def test_an_example_is_the_prompt_of_evaluation_and_a_response(template):
    tokenizer = tokenizer_of(template)
    for chat in (CHAT[1:3], CHAT):
        ids, labels = encode_chat(tokenizer, chat, "row")
        prompt, _ = encode_chat(tokenizer, chat[:-1], "row")
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt) :] == ids[len(prompt) :], "the whole response is learned"
        if template is not NO_STOP:
            asked = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"]
            assert prompt == asked, "as other programs ask with the saved tokenizer"
            assert tokenizer.apply_chat_template(chat)["input_ids"][: len(ids)] == ids
        rewritten = template in (FORGETFUL, THOUGHTS)
        learned = words_of(labels).replace("<think>", "").replace("</think>", "").split()
        assert learned.count("bird") == (1 if rewritten else len(chat) // 2)


def test_a_chat_that_the_template_cannot_write_is_named():
    refusing = "{% if messages|length > 1 %}{{ raise_exception('too many') }}{% endif %}" + CHAT_TEMPLATE
    other = CHAT_TEMPLATE.replace("message['content']", "message['content'] | replace('bird', 'fish')")
    for template, words in ((refusing, "refuses these messages .too many"), (other, "does not write this response")):
        with pytest.raises(DataError, match=f"b.jsonl, row 4.*{words}"):
            rows_of([Example([ASK, ANSWER], "b.jsonl, row 4")], tokenizer=tokenizer_of(template))


def test_long_chats_lose_their_left_and_what_cannot_be_learned_is_left_out():
    tokenizer = tokenizer_of()
    ids, labels = encode_chat(tokenizer, CHAT, "row")
    for most in range(3, len(ids) + 1):
        ((cut, learned),), kept, note = rows_of([Example(CHAT)], most)
        assert cut == ids[-most:]
        assert learned[1:] == labels[-most:][1:] or NOT_LEARNED in learned[1:3], (
            "a response that is cut is not learned"
        )
        assert learned[0] == NOT_LEARNED
        assert kept == 1
        assert ("1 prompts cut from the left" in note) == (most < len(ids))
    long = Example([ASK, {"role": "assistant", "content": "bird fish bird fish"}])  # 5 tokens with the end
    empty = [Example([ASK, {"role": "assistant", "content": " \n"}]), Example(" ")]
    ((_, learned),), kept, note = rows_of([long, *empty, Example([ASK, ANSWER])], 5)
    assert words_of(learned) == "bird <|end|>"
    assert kept == 1
    assert "1 left out for a response over the limit" in note
    assert "2 left out for an empty response" in note
    with pytest.raises(DataError, match=r"data.train.*1 left out.*no example is left"):
        rows_of([long], 5)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("words", [3, 4, 11])
def test_long_texts_are_split_and_every_token_is_predicted_once(bos, words):
    tokenizer = with_bos(tokenizer_of()) if bos else tokenizer_of()
    text = " ".join(WORDS[:words])
    rows, _, note = rows_of([Example(text)], 5, tokenizer)
    wanted = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert [token for _, labels in rows for token in labels if token != NOT_LEARNED] == wanted[1 - bos :]
    assert max(len(ids) for ids, _ in rows) <= 5
    assert ("texts split" in note) == (len(wanted) + bos > 5)
    for ids, labels in rows:
        assert all(label in (NOT_LEARNED, token) for token, label in zip(ids, labels, strict=True))


# The loss ------------------------------------------------------------------------------------------------------------


def loss_by_hand(model, data):
    """Sum -ln p token by token, an example at a time."""
    total, count = 0.0, 0
    for row in data:
        with torch.no_grad():
            scores = log_softmax(model(torch.tensor([row["input_ids"]])).logits[0].double(), dim=-1)
        for place, label in enumerate(row["labels"]):
            if label != NOT_LEARNED:
                total, count = total - float(scores[place - 1, label]), count + 1
    return total / count


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_the_mean_over_all_tokens_whatever_the_batches(kind, tmp_path):
    texts = ["bird", "the correct answer is answer1", "fish king lamp house door iron grass", "a", "bird " * 20]
    chats = [[{**ASK, "content": f"choose {text}"}, {**ANSWER, "content": text}] for text in texts]
    data = Dataset.from_dict(encode_rows([Example(chat) for chat in chats], tokenizer_of(), 60, "data").rows)
    model = AutoModelForCausalLM.from_pretrained(save_tiny_lm(tmp_path, kind)).eval()
    wanted = loss_by_hand(model, data)
    assert abs(sum(loss_by_hand(model, [row]) for row in data) / len(data) - wanted) > 1e-3, "no mean of means"
    model.train()  # GPT-2 has dropout in training
    packed = pack_dataset(data, 60, "bfd")
    assert len(packed) < len(data)
    for packing, rows in ((False, data), (True, packed)):
        for batch_size in (1, 3, 16):
            found = token_loss(model, rows, make_collator(tiny_tokenizer(), packing), batch_size)
            assert found["loss"] == pytest.approx(wanted, rel=1e-6)
            assert found["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-5)
    assert model.training
