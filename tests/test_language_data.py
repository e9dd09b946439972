"""Language data: rows, cuts with their account, packing, batches, and a loss that batches do not change."""

import json
import math
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from aroma.errors import ConfigError, DataError
from aroma_lab.language.data import (
    CUT_PROMPTS,
    CUT_RESPONSES,
    EMPTY_RESPONSES,
    LONG_RESPONSES,
    NOT_LEARNED,
    REWRITTEN,
    SPLIT_TEXTS,
    Example,
    encode,
    load_examples,
)
from aroma_lab.language.sft import make_collator, pack, require_packing_works, token_loss
from aroma_lab.language.template import Template, Turn
from aroma_lab.specs import LanguageSpec
from tiny_lm import FORGETFUL, WORDS, questions, save_tiny_lm, tiny_tokenizer, with_bos, write_json_lines

ASK, ANSWER = Turn("user", "choose a word"), Turn("assistant", "bird")
MESSAGES = [{"role": "user", "content": "choose a word"}, {"role": "assistant", "content": "bird"}]


def load(path, **options):
    return load_examples("data.train", str(path), LanguageSpec(**options))


def lines(folder, *rows, name="train.jsonl"):
    return write_json_lines(folder / name, list(rows))


# Reading -------------------------------------------------------------------------------------------------------------


def test_three_kinds_of_examples_and_columns_by_name(tmp_path):
    rows = [{"instruction": "to", "input": "go", "output": "a"}, {"instruction": "to", "input": None, "output": 7}]
    loaded = load(lines(tmp_path, *rows))
    assert [example.turns[0].text for example in loaded] == ["to\n\ngo", "to"]
    assert loaded[1].turns[1] == Turn("assistant", "7")
    assert [example.source for example in loaded] == [f"{tmp_path}/train.jsonl, row {row}" for row in (1, 2)]
    assert load(lines(tmp_path, {"messages": MESSAGES})) == [Example((ASK, ANSWER))]
    assert load(lines(tmp_path, {"text": "a bird"})) == [Example((), "a bird")]
    row = {"instruction": "choose", "output": "bird", "text": "a fish", "q": "to", "r": "is"}
    assert load(lines(tmp_path, row), format="text") == [Example((), "a fish")]
    named = load(lines(tmp_path, row), instruction="q", output="r")
    assert [turn.text for turn in named[0].turns] == ["to", "is"]


def test_every_file_format_gives_the_same(tmp_path):
    rows = [{key: row[key] for key in ("instruction", "input", "output")} for row in questions(4, seed=1)]
    wanted = load(lines(tmp_path, *rows))
    (tmp_path / "train.json").write_text(json.dumps(rows, indent=1))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    cells = [",".join(f'"{value}"' for value in row.values()) for row in rows]
    (tmp_path / "train.csv").write_text("\n".join(["instruction,input,output", *cells]) + "\n")
    for name in ("train.json", "train.parquet", "train.csv"):
        assert load(tmp_path / name) == wanted, name


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("absent.jsonl", None, "no such file"),
        ("a.yaml", "text: a", "unknown format"),
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2"),
        ("a.jsonl", '{"text": "a"}\n\n[1]\n', "line 3: a list, not an object"),
        ("a.json", "[]", "no rows"),
        ("a.json", '{"text": "a"}', "a dict, not a list"),
        ("a.json", "[", "not JSON"),
        ("a.json", '[{"text": "\xff"}]', r"not UTF-8 text \(byte 11\)"),
        ("a.json", '[{"question": "x"}]', "instruction and output or messages or text.*'question'"),
        ("a.json", '[{"instruction": "", "input": " ", "output": "b"}]', "'instruction', row 1.*fill it in"),
        ("a.json", '[{"text": "a"}, {"text": ["x"]}]', "'text', row 2.*a list, not a text"),
        ("a.json", '[{"messages": "x"}]', "'messages', row 1.*a list of messages"),
        ("a.json", '[{"messages": [{"from": "human", "value": "x"}]}]', "row 1.*a role and a content"),
        ("a.json", '[{"messages": [{"role": "tool", "content": "x"}]}]', "'tool'.*one of system, user, assistant"),
        ("a.json", '[{"messages": [{"role": "user", "content": [1]}]}]', "row 1.*a list, not a text"),
    ],
)
def test_bad_data_is_named(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=f"data.train.*{words}"):
        load(tmp_path / name)


# Encoding ------------------------------------------------------------------------------------------------------------


def template_of(name="chat", bos=False, **options):
    tokenizer = tiny_tokenizer()
    return Template(with_bos(tokenizer) if bos else tokenizer, LanguageSpec(template=name, **options))


def rows_of(examples, max_length=100, template=None):
    data, report = encode(examples, template or template_of(), max_length, "data.train")
    return list(data), report


def words_of(ids):
    return tiny_tokenizer().decode([token for token in ids if token != NOT_LEARNED])


def chat_by_hand(turns, name, learn):
    """Tokens and labels of a chat, one turn after the other, from the letter of the two templates."""
    tokenizer, ids, learned = tiny_tokenizer(), [], []
    headings = {"system": "Context", "user": "Request", "assistant": "Reply"}
    for turn in turns:
        before = f"<|turn|>{turn.role}\n" if name == "chat" else f"{headings[turn.role]}:\n"
        end, after = ("<|end|>", "\n") if name == "chat" else ("</s>" if turn.role == "assistant" else "", "\n\n")
        answers = turn.role == "assistant"
        for text, counts in ((before, False), (turn.text + end, answers), (after, False)):
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            learned += [counts or learn == "all"] * len(tokens)
    behind = len(tokenizer("\n" if name == "chat" else "\n\n", add_special_tokens=False)["input_ids"])
    labels = [token if counts else NOT_LEARNED for token, counts in zip(ids, learned, strict=True)]
    return ids[:-behind], [NOT_LEARNED, *labels[1:-behind]]


@pytest.mark.parametrize("learn", ["response", "all"])
@pytest.mark.parametrize("name", ["chat", "plain"])
def test_every_response_is_learned_and_nothing_else(name, learn):
    draw = random.Random(3)
    template = template_of(name, learn=learn)
    for _ in range(30):
        turns = [Turn("system", "choose")] if draw.random() < 0.3 else []
        for role in ("user", "assistant") * draw.randrange(1, 4):
            turns.append(Turn(role, " ".join(draw.choices(WORDS[:40], k=draw.randrange(1, 6)))))
        whole, labels = chat_by_hand(turns, name, learn)
        (row,), report = rows_of([Example(tuple(turns))], 500, template)
        assert (row["input_ids"], row["labels"]) == (whole, labels)
        assert report.learned_tokens == sum(label != NOT_LEARNED for label in labels)
        # Cut, it is the end of the whole, and the first token that is left predicts nothing.
        last = len(template.response(turns[-1].text))
        (row,), report = rows_of([Example(tuple(turns))], draw.randrange(last + 1, len(whole) + 1), template)
        kept = len(row["input_ids"])
        assert last < kept <= len(whole)
        assert row["input_ids"] == whole[-kept:]
        assert row["labels"][1:] == labels[-kept:][1:]
        assert report.counts[CUT_PROMPTS] == (kept < len(whole))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("over", [1, 5])
def test_long_prompts_lose_their_left_and_keep_their_first_token(bos, over):
    template = template_of("plain", bos)
    whole = template.prompt([ASK]) + template.response("bird")
    (row,), report = rows_of([Example((ASK, ANSWER))], len(whole) - over, template)
    assert row["input_ids"] == whole[:bos] + whole[bos + over :]
    assert row["labels"][-2:] == template.response("bird")
    assert "1 prompts cut from the left" in str(report)


def test_what_cannot_be_learned_is_left_out_and_counted():
    long = Example((ASK, Turn("assistant", "bird fish bird fish")))  # 5 tokens with the end
    empty = [Example((ASK, Turn("assistant", text))) for text in ("", " \n")]
    within = Example((ASK, Turn("assistant", ""), ASK, ANSWER))
    (row,), report = rows_of([long, *empty, Example((ASK, ANSWER)), within, Example((), " ")], 5)
    assert words_of(row["labels"]) == "bird <|end|>"
    assert (report.examples, report.kept, report.counts[LONG_RESPONSES], report.counts[EMPTY_RESPONSES]) == (
        6,
        1,
        1,
        4,
    )
    assert "1 left out for a response over the limit, 4 left out for an empty response" in str(report)
    with pytest.raises(DataError, match=r"data.train.*1 left out.*no example is left"):
        rows_of([long], 5)
    with pytest.raises(ConfigError, match=r"data\.max_length=2"):
        rows_of([long], 2)
    with pytest.raises(DataError, match=r"data.train \(b\.jsonl, row 4\)="):
        rows_of([Example((ASK, ANSWER)), Example((ASK,), source="b.jsonl, row 4")])


def test_a_long_chat_loses_earlier_responses_as_a_whole():
    chat = Example((ASK, Turn("assistant", "bird fish"), Turn("user", "a question"), Turn("assistant", "fish")))
    _, reply, second, last = (segment.ids for segment in template_of().segments(chat.turns))
    for within in (1, len(reply)):  # into the first response, and just behind it
        (row,), report = rows_of([chat], len(reply + second + last) - within)
        assert row["input_ids"] == second + last
        assert words_of(row["labels"]) == "fish <|end|>"
        assert report.counts[CUT_RESPONSES] == 1


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("words", [3, 4, 10, 11])
def test_long_texts_are_split_and_every_token_is_predicted_once(bos, words):
    template = template_of(bos=bos)
    rows, report = rows_of([Example((), " ".join(WORDS[:words]))], 5, template)
    wanted = template.plain_text(" ".join(WORDS[:words]))
    assert [token for row in rows for token in row["labels"] if token != NOT_LEARNED] == wanted[1 - bos :]
    assert max(len(row["input_ids"]) for row in rows) <= 5
    assert report.counts[SPLIT_TEXTS] == (len(wanted) + bos > 5)
    for row in rows:  # what is learned is predicted from the token that stood before it
        assert all(label in (NOT_LEARNED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_earlier_responses_that_the_template_rewrites_are_counted():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = FORGETFUL
    template = Template(tokenizer, LanguageSpec())
    chat = Example((ASK, ANSWER, Turn("user", "a question"), Turn("assistant", "fish")))
    (row, single), report = rows_of([chat, Example((ASK, ANSWER))], template=template)
    assert (report.counts[REWRITTEN], report.kept, report.rows) == (1, 2, 2)
    assert row["input_ids"] == template.prompt(chat.turns[:3]) + template.response("fish")
    assert words_of(row["labels"] + single["labels"]) == "fish <|end|> bird <|end|>"


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp(request.param), request.param)


def examples():
    """Return encoded examples of clearly different lengths."""
    texts = ["bird", "the correct answer is answer1", "fish king lamp house door iron grass", "a", "bird " * 20]
    turns = [(Turn("user", f"choose {text}"), Turn("assistant", text)) for text in texts]
    return encode([Example(pair) for pair in turns], template_of(), 60, "data")[0]


def loss_by_hand(model, data):
    """Sum -ln p token by token, an example at a time."""
    total, count = 0.0, 0
    for row in data:
        with torch.no_grad():
            scores = log_softmax(model(torch.tensor([row["input_ids"]])).logits[0].double(), dim=-1)
        for place, label in enumerate(row["labels"]):
            if label != NOT_LEARNED:
                total -= float(scores[place - 1, label])
                count += 1
    return total / count


def test_the_loss_is_the_mean_over_all_tokens_whatever_the_batches(folder):
    model, data = AutoModelForCausalLM.from_pretrained(folder).eval(), examples()
    wanted = loss_by_hand(model, data)
    of_examples = sum(loss_by_hand(model, [row]) for row in data) / len(data)
    assert abs(of_examples - wanted) > 1e-3  # the mean of means is another number
    model.train()  # GPT-2 has dropout in training
    for packing, rows in ((False, data), (True, pack(data, 60))):
        for batch_size in (1, 3, 16):
            found = token_loss(model, rows, make_collator(tiny_tokenizer(), packing), batch_size)
            assert found["loss"] == pytest.approx(wanted, rel=1e-6)
            assert found["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-5)
    assert model.training
    unlearned = data.map(lambda row: {"labels": [NOT_LEARNED] * len(row["labels"])})
    with pytest.raises(DataError, match="none of their tokens is learned"):
        token_loss(model, unlearned, make_collator(tiny_tokenizer(), False), 2)


# Packing -------------------------------------------------------------------------------------------------------------


def test_every_example_is_packed_once_and_whole():
    data = examples()
    packed = pack(data, 60)
    assert len(packed) < len(data)
    found = []
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 60
        start = 0
        for length in row["seq_lengths"]:
            assert row["labels"][start] == NOT_LEARNED  # else the neighbour's last token would predict it
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in data)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_and_gradients_are_the_unpacked_ones(folder, attention):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    model.config.use_cache = False  # as the Trainer has it
    data, tokenizer = examples(), tiny_tokenizer()
    one = loss_and_gradients(model, make_collator(tokenizer, False)(list(data)))
    batch = make_collator(tokenizer, True)(list(pack(data, 60)))
    other = loss_and_gradients(model, batch)
    assert other[0] == pytest.approx(one[0], rel=1e-6)
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    mixed = loss_and_gradients(model, {name: batch[name] for name in ("input_ids", "labels")})
    assert abs(mixed[0] - one[0]) > 1e-3  # without positions the examples do see each other
    for dtype in (torch.float32, torch.bfloat16):
        require_packing_works(model.to(dtype))


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), {name: value.grad.clone() for name, value in model.named_parameters()}


class Blind(LlamaForCausalLM):
    """Takes positions and does nothing with them."""

    def forward(self, input_ids=None, position_ids=None, **options):
        return super().forward(input_ids=input_ids, **options)


class Restarting(LlamaForCausalLM):
    """Restarts positions and lets examples see each other all the same."""

    def forward(self, input_ids=None, **options):
        return super().forward(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)


@pytest.mark.parametrize("kind", [Blind, Restarting])
def test_a_model_that_mixes_packed_examples_is_refused(tmp_path, kind):
    model = kind.from_pretrained(save_tiny_lm(tmp_path))
    with pytest.raises(ConfigError, match=rf"language.packing=True: {kind.__name__} lets examples .* see each other"):
        require_packing_works(model)
