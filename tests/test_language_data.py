"""Language data: rows, cuts with their account, packing, batches, and a loss that batches do not change."""

import json
import math
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from aroma.errors import ConfigError, DataError
from aroma_lab.language.collate import LanguageCollator, make_collator
from aroma_lab.language.encode import NOT_LEARNED, encode_conversations
from aroma_lab.language.examples import Conversation, Turn, load_conversations
from aroma_lab.language.loss import TokenLoss, token_loss
from aroma_lab.language.packing import pack, pack_lengths, require_packing_works
from aroma_lab.language.prompt import PromptBuilder
from aroma_lab.language.spec import LanguageSpec
from tiny_lm import WORDS, questions, save_tiny_lm, tiny_tokenizer, with_bos, write_json_lines

SPEC = LanguageSpec()
FORGETFUL = (  # takes the words out of earlier responses
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}"
    "{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
ASK, ANSWER = Turn("user", "choose a word"), Turn("assistant", "bird")
MESSAGES = [{"role": "user", "content": "choose a word"}, {"role": "assistant", "content": "bird"}]


def load(path, spec=SPEC):
    return load_conversations("data.train", str(path), spec)


def lines(folder, *rows, name="train.jsonl"):
    return write_json_lines(folder / name, list(rows))


# Reading -------------------------------------------------------------------------------------------------------------


def test_instructions(tmp_path):
    rows = [
        {"instruction": "choose", "input": "apple", "output": "bird"},
        {"instruction": "choose", "input": "", "output": "bird"},
        {"instruction": "choose", "output": "bird"},
        {"instruction": "choose", "input": None, "output": 7},
    ]
    asked = [conversation.turns[0].text for conversation in load(lines(tmp_path, *rows))]

    assert asked == ["choose\n\napple", "choose", "choose", "choose"]
    assert load(lines(tmp_path, *rows))[3].turns[1] == Turn("assistant", "7")


def test_every_file_format_gives_the_same(tmp_path):
    rows = [{key: row[key] for key in ("instruction", "input", "output")} for row in questions(4, seed=1)]
    wanted = load(lines(tmp_path, *rows))
    (tmp_path / "train.json").write_text(json.dumps(rows, indent=1))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    cells = [",".join(f'"{value}"' for value in row.values()) for row in rows]
    (tmp_path / "train.csv").write_text("\n".join(["instruction,input,output", *cells]) + "\n")

    for name in ("train.json", "train.parquet", "train.csv"):
        assert load(tmp_path / name) == wanted, name


def test_messages_and_text(tmp_path):
    assert load(lines(tmp_path, {"messages": MESSAGES})) == [Conversation((ASK, ANSWER))]
    assert load(lines(tmp_path, {"text": "a bird"})) == [Conversation((), "a bird")]
    pq.write_table(pa.Table.from_pylist([{"messages": MESSAGES}]), tmp_path / "train.parquet")
    assert load(tmp_path / "train.parquet") == [Conversation((ASK, ANSWER))]


def test_the_format_can_be_chosen_and_columns_be_named(tmp_path):
    row = {"instruction": "choose", "output": "bird", "text": "a fish", "q": "to", "r": "is"}

    assert load(lines(tmp_path, row))[0].text is None
    assert load(lines(tmp_path, row), LanguageSpec(format="text")) == [Conversation((), "a fish")]
    named = load(lines(tmp_path, row), LanguageSpec(instruction="q", output="r"))
    assert [turn.text for turn in named[0].turns] == ["to", "is"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "x"}, "instruction and output or messages or text.*'question'"),
        ({"instruction": "", "input": " ", "output": "bird"}, "'instruction', row 2.*fill it in"),
        ({"instruction": ["x"], "output": "bird"}, "'instruction', row 2.*a list, not a text"),
        ({"instruction": "x", "output": {"a": 1}}, "'output', row 2.*a dict, not a text"),
        ({"messages": "choose"}, "'messages', row 2.*a list of messages"),
        ({"messages": [{"from": "human", "value": "x"}]}, "row 2.*a role and a content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "row 2.*'tool'.*one of system, user, assistant"),
        ({"messages": MESSAGES[:1]}, "row 2.*must be the assistant's"),
        ({"messages": MESSAGES[1:]}, "row 2.*the user speaks first"),
        ({"messages": [*MESSAGES, MESSAGES[1]]}, "row 2.*twice in a row"),
        ({"messages": []}, "row 2.*the user speaks first"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, MESSAGES[1]]}, "row 2.*a list, not a text"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, words):
    good = {"instruction": "choose", "output": "bird"}
    if "messages" in row:
        good = {"messages": MESSAGES}
    if "question" in row:
        good = row

    with pytest.raises(DataError, match=f"data.train.*{words}"):
        load(lines(tmp_path, good, row))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("train.jsonl", "", "no rows"),
        ("train.jsonl", '{"text": "a"}\n{"text": ', "line 2"),
        ("train.jsonl", '{"text": "a"}\n\n[1]\n', "line 3: a list, not an object"),
        ("train.json", "[]", "no rows"),
        ("train.json", '{"text": "a"}', "a dict, not a list"),
        ("train.json", '[{"text": "a"}, 3]', "row 2: a int, not an object"),
        ("train.json", "[", "not JSON"),
        ("train.yaml", "text: a", "unknown format"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)

    with pytest.raises(DataError, match=words):
        load(tmp_path / name)


def test_files_that_are_not_there_or_no_text(tmp_path):
    (tmp_path / "train.json").write_bytes(b'[{"text": "\xff"}]')

    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "other.jsonl")
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 11\)"):
        load(tmp_path / "train.json")


def test_a_row_says_where_it_is_from(tmp_path):
    rows = [{"instruction": f"choose {number}", "output": "bird"} for number in range(3)]
    one, other = (load(lines(tmp_path, *rows, name=name)) for name in ("a.jsonl", "b.jsonl"))

    assert one == other
    assert [conversation.source for conversation in other] == [f"{tmp_path}/b.jsonl, row {row}" for row in (1, 2, 3)]


# Encoding ------------------------------------------------------------------------------------------------------------


def builder_of(template="chat", bos=False, **options):
    tokenizer = tiny_tokenizer()
    return PromptBuilder(with_bos(tokenizer) if bos else tokenizer, LanguageSpec(template=template, **options))


def encode(conversations, max_length=100, builder=None):
    data, report = encode_conversations(conversations, builder or builder_of(), max_length, "data.train")
    return list(data), report


def words_of(ids):
    return tiny_tokenizer().decode([token for token in ids if token != NOT_LEARNED])


def test_labels_are_the_response():
    (row,), report = encode([Conversation((ASK, ANSWER))])
    builder = builder_of()
    prompt, response = builder.prompt([ASK]), builder.response("bird")

    assert row["input_ids"] == prompt + response
    assert row["labels"] == [NOT_LEARNED] * len(prompt) + response
    assert row["length"] == len(row["input_ids"])
    assert (report.examples, report.kept, report.rows, report.tokens) == (1, 1, 1, row["length"])
    assert report.learned_tokens == len(response)
    assert "none cut, none left out" in str(report)


def test_the_first_token_is_learned_from_nothing_and_so_not_at_all():
    (row,), report = encode([Conversation((ASK, ANSWER))], builder=builder_of(learn="all"))

    assert row["labels"] == [NOT_LEARNED, *row["input_ids"][1:]]
    assert report.learned_tokens == row["length"] - 1


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("over", [1, 5])
def test_long_prompts_lose_their_left(bos, over):
    builder = builder_of("plain", bos)
    whole = builder.prompt([ASK]) + builder.response("bird")
    (row,), report = encode([Conversation((ASK, ANSWER))], len(whole) - over, builder)

    assert row["input_ids"] == whole[:bos] + whole[bos + over :]
    assert row["labels"][-2:] == builder.response("bird")
    assert (report.cut_prompts, report.cut_tokens, report.kept) == (1, over, 1)
    assert "1 prompts cut from the left" in str(report)


@pytest.mark.parametrize("bos", [False, True])
def test_a_response_is_never_cut(bos):
    long = Conversation((ASK, Turn("assistant", "bird fish bird fish")))  # 5 tokens with the end
    builder = builder_of("plain", bos)
    (row,), report = encode([long], 6, builder)

    assert words_of(row["labels"]) == "bird fish bird fish </s>"
    assert (row["length"], report.cut_prompts) == (6, 1)
    (row,), report = encode([long, Conversation((ASK, ANSWER))], 5, builder)
    assert words_of(row["labels"]) == "bird </s>"
    assert (report.examples, report.kept, report.dropped_long_responses) == (2, 1, 1)
    assert "1 left out for a response over the limit" in str(report)


def test_empty_responses_are_left_out_and_counted():
    empty = [Conversation((ASK, Turn("assistant", text))) for text in ("", " \n")]
    within = Conversation((ASK, Turn("assistant", ""), ASK, ANSWER))
    rows, report = encode([*empty, Conversation((ASK, ANSWER)), within, Conversation((), " ")])

    assert len(rows) == 1
    assert (report.dropped_empty, report.kept) == (4, 1)
    assert "4 left out for an empty response" in str(report)


@pytest.mark.parametrize(("answer", "length"), [("", 50), ("bird fish bird fish", 5)])
def test_nothing_left_is_an_error(answer, length):
    with pytest.raises(DataError, match=r"data.train.*1 left out.*no example is left"):
        encode([Conversation((ASK, Turn("assistant", answer)))], length)


def test_a_limit_under_which_nothing_fits():
    with pytest.raises(ConfigError, match=r"data\.max_length=2"):
        encode([Conversation((ASK, ANSWER))], 2)


def test_a_chat_learns_every_response():
    chat = Conversation((ASK, ANSWER, Turn("user", "a question"), Turn("assistant", "fish")))
    (row,), _ = encode([chat])

    assert words_of(row["labels"]) == "bird <|end|> fish <|end|>"


def test_a_long_chat_loses_earlier_responses_as_a_whole():
    chat = Conversation((ASK, Turn("assistant", "bird fish"), Turn("user", "a question"), Turn("assistant", "fish")))
    builder = builder_of()
    first, reply, second, last = (segment.ids for segment in builder.segments(chat))

    (row,), report = encode([chat], len(reply + second + last) + 1)  # the cut falls into the first prompt
    assert row["input_ids"] == first[-1:] + reply + second + last
    assert report.cut_responses == 0
    for within in (1, len(reply)):  # into the first response, and just behind it
        (row,), report = encode([chat], len(reply + second + last) - within)
        assert row["input_ids"] == second + last
        assert words_of(row["labels"]) == "fish <|end|>"
        assert (report.cut_responses, report.cut_tokens) == (1, len(first + reply))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("words", [3, 4, 9, 10, 11])
def test_long_texts_are_split_and_every_token_is_predicted_once(bos, words):
    text = " ".join(WORDS[:words])
    builder = builder_of(bos=bos)
    rows, report = encode([Conversation((), text)], 5, builder)
    wanted = builder.segments(Conversation((), text))[-1].ids

    learned = [token for row in rows for token in row["labels"] if token != NOT_LEARNED]
    assert learned == (wanted if bos else wanted[1:])
    assert max(row["length"] for row in rows) <= 5
    assert report.split_texts == (len(wanted) + bos > 5)
    for row in rows:  # what is learned is predicted from the token that stood before it
        for place, label in enumerate(row["labels"]):
            assert label in (NOT_LEARNED, row["input_ids"][place])


def test_the_row_of_an_untrainable_conversation_is_named():
    bad = Conversation((ASK,))

    with pytest.raises(DataError, match=r"data.train \(row 2\)"):
        encode([Conversation((ASK, ANSWER)), bad])


def test_the_row_is_the_files_whatever_was_held_out_or_joined(tmp_path):
    loaded = [
        *load(lines(tmp_path, *[{"messages": MESSAGES}] * 2, name="a.jsonl")),
        *load(lines(tmp_path, *[{"messages": MESSAGES}] * 5, name="b.jsonl")),
    ]
    bad = replace(loaded[5], turns=(ASK,))

    with pytest.raises(DataError, match=r"data.train \(.*/b\.jsonl, row 4\)="):
        encode([loaded[0], loaded[3], bad])


@pytest.mark.parametrize("learn", ["response", "all"])
def test_earlier_responses_that_the_template_rewrites_are_counted(learn):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = FORGETFUL
    builder = PromptBuilder(tokenizer, LanguageSpec(learn=learn))
    chat = Conversation((ASK, ANSWER, Turn("user", "a question"), Turn("assistant", "fish")))
    (row, single), report = encode([chat, Conversation((ASK, ANSWER))], builder=builder)

    assert (report.rewritten_responses, report.kept, report.rows) == (1, 2, 2)
    assert "1 earlier responses not learned, for the chat template rewrites them" in str(report)
    assert row["input_ids"] == builder.prompt(chat.turns[:3]) + builder.response("fish")
    assert row["labels"][-2:] == builder.response("fish")
    if learn == "response":
        assert words_of(row["labels"] + single["labels"]) == "fish <|end|> bird <|end|>"


# Batches -------------------------------------------------------------------------------------------------------------


def test_batches_are_padded_on_the_right_and_masked():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [NOT_LEARNED, 6, 7], "length": 3},
        {"input_ids": [8], "labels": [NOT_LEARNED], "length": 1},
    ]
    batch = LanguageCollator(pad_token_id=9)(rows)

    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "labels": [[NOT_LEARNED, 6, 7], [NOT_LEARNED] * 3],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


def test_packed_batches_have_positions_and_no_mask():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [1, 1, 1], "position_ids": [0, 1, 0], "length": 3},
        {"input_ids": [8], "labels": [1], "position_ids": [0], "length": 1},
    ]
    batch = LanguageCollator(pad_token_id=9)(rows)

    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 0, 0]]


def test_a_tokenizer_without_padding_pads_with_its_end_of_text():
    assert make_collator(tiny_tokenizer()).pad_token_id == 0
    assert make_collator(tiny_tokenizer(pad_token=None)).pad_token_id == 3
    with pytest.raises(ConfigError, match="neither a pad nor an eos"):
        make_collator(tiny_tokenizer(pad_token=None, eos_token=None))


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_tiny_lm(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "gpt2")}


@pytest.fixture(params=["llama", "gpt2"])
def folder(request, folders):
    return folders[request.param]


def examples():
    """Return encoded examples of clearly different lengths."""
    texts = ["bird", "the correct answer is answer1", "fish king lamp house door iron grass", "a", "bird " * 20]
    turns = [(Turn("user", f"choose {text}"), Turn("assistant", text)) for text in texts]
    return encode_conversations([Conversation(pair) for pair in turns], builder_of(), 60, "data")[0]


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
    return total / count, count


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_the_loss_is_the_mean_over_all_tokens_whatever_the_batches(folder, batch_size):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    data, seen = examples(), []
    wanted, count = loss_by_hand(model, data)

    found = token_loss(model, data, make_collator(tiny_tokenizer()), batch_size, seen.append)

    assert found.tokens == count
    assert found.loss == pytest.approx(wanted, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(wanted), rel=1e-5)
    assert sum(seen) == len(data)
    of_examples = sum(loss_by_hand(model, [row])[0] for row in data) / len(data)
    assert abs(of_examples - wanted) > 1e-3  # the mean of means is another number


def test_the_loss_leaves_the_model_in_its_mode(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["gpt2"]).train()

    one, other = (token_loss(model, examples(), make_collator(tiny_tokenizer()), 2) for _ in range(2))

    assert one == other  # GPT-2 has dropout in training
    assert model.training


def test_a_perplexity_beyond_all_floats():
    assert TokenLoss(1e4, 1).perplexity == math.inf


def test_a_loss_of_nothing(folders):
    data = examples().map(lambda row: {"labels": [NOT_LEARNED] * len(row["labels"])})

    with pytest.raises(DataError, match="none of their tokens is learned"):
        token_loss(AutoModelForCausalLM.from_pretrained(folders["llama"]), data, make_collator(tiny_tokenizer()), 2)


# Packing -------------------------------------------------------------------------------------------------------------


def test_rows_are_filled_by_best_fit():
    assert pack_lengths([3, 5, 2, 4], 7) == [[1, 2], [3, 0]]
    assert pack_lengths([7, 1, 7], 7) == [[0], [2], [1]]


def test_every_example_is_packed_once_and_whole():
    data = examples()
    packed = pack(data, 60)

    assert len(packed) < len(data)
    found = []
    for row in packed:
        assert row["length"] == len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= 60
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], row["length"]], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            assert row["labels"][start] == NOT_LEARNED  # else the neighbour's last token would predict it
            found.append((row["input_ids"][start:end], row["labels"][start:end]))
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in data)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_and_gradients_are_the_unpacked_ones(folder, attention):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    model.config.use_cache = False  # as the Trainer has it
    collator, data = make_collator(tiny_tokenizer()), examples()
    packed = pack(data, 60)
    assert len({row["length"] for row in packed}) > 1  # so that there is padding

    one, other = (_loss_and_gradients(model, collator(list(rows))) for rows in (data, packed))

    assert other[0] == pytest.approx(one[0], rel=1e-6)
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    mixed = _loss_and_gradients(model, {k: v for k, v in collator(list(packed)).items() if k != "position_ids"})
    assert abs(mixed[0] - one[0]) > 1e-3  # without positions the examples do see each other


def test_the_loss_of_packed_rows(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    collator, data = make_collator(tiny_tokenizer()), examples()

    one, other = token_loss(model, data, collator, 3), token_loss(model, pack(data, 60), collator, 2)

    assert other.tokens == one.tokens
    assert other.loss == pytest.approx(one.loss, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_that_can_pack_pass_the_probe(folder, attention, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=dtype).train()

    require_packing_works(model)

    assert model.training


class Blind(LlamaForCausalLM):
    """Takes positions and does nothing with them."""

    def forward(self, input_ids=None, position_ids=None, **options):
        return super().forward(input_ids=input_ids, **options)


class Restarting(LlamaForCausalLM):
    """Restarts positions and lets examples see each other all the same."""

    def forward(self, input_ids=None, **options):
        return super().forward(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)


@pytest.mark.parametrize("kind", [Blind, Restarting])
def test_a_model_that_mixes_packed_examples_is_refused(folders, kind):
    model = kind.from_pretrained(folders["llama"])

    with pytest.raises(ConfigError, match=rf"language.packing=True: {kind.__name__} lets examples .* see each other"):
        require_packing_works(model)


def _loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), {name: value.grad.clone() for name, value in model.named_parameters()}
