"""The data of recipes and grids: files, the eight of GLUE, splits that stay apart, and every error by name."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import BertConfig, RobertaConfig

from aroma.errors import AromaError, ConfigError, DataError
from aroma_lab.specs import TaskSpec
from aroma_lab.tasks.classification import check_positions, load_tokenizer
from aroma_lab.tasks.data import Source, held_apart, load_task, source_of
from aroma_lab.tasks.sources import read_located
from aroma_lab.tasks.task import GLUE
from tiny_classifier import save_tiny_bert, sentences, write_json_lines

EARLIER, EARLIER_STRATIFIED = [0, 2, 16, 18, 30, 37, 41, 59, 79], [8, 38, 39, 42, 46, 51, 54, 66, 76]
"""What was held out of 83 examples with seed 2023, before scikit-learn was asked directly."""


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def contents(data):
    """All that was read of a task; two data sets are compared by their rows."""
    return data.task, data.metric, {name: part.to_dict() for name, part in data.parts.items()}


def counts_of(data):
    return {split: len(part) for split, part in data.parts.items()}


# Reading -------------------------------------------------------------------------------------------------------------


def test_four_formats_have_the_same_content_and_values_are_kept_as_they_are_written(tmp_path):
    texts = ['a "quoted" word', "two\nlines", "comma, here", "ünïcödé", '"Open', "NA", "007"]
    labels = ["x", "y", "null", "y", "nan", "01", "None"]
    rows = list(zip(texts, labels, strict=True))
    quoted = "".join('"{}",{}\n'.format(text.replace('"', '""'), label) for text, label in rows)
    csv = write(tmp_path, "d.csv", f"\ufefftext,label\n{quoted}")  # the byte order mark is no part of the first name
    lines = write_json_lines(tmp_path / "d.jsonl", [{"text": text, "label": label} for text, label in rows])
    parquet = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": texts, "label": labels, "more": range(7)}), parquet)
    flat = [text.replace("\n", " ") for text in texts]
    pairs = zip(flat, labels, strict=True)
    tsv = write(tmp_path, "d.tsv", "label\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in pairs))
    for path in (csv, str(lines), str(parquet)):
        assert [(row["text"], row["label"]) for _, row in read_located("data.train", path)] == rows
    read = [row for _, row in read_located("data.train", tsv)]
    assert read == [{"label": b, "text": a} for a, b in zip(flat, labels, strict=True)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "text,label\na,x,surplus\n", "line 2: its number of fields is not that of the first line"),
        ("d.csv", 'text,label\n"a,x\n', "unexpected end of data"),
        ("d.csv", b"text,label\n\xa3,x\n", "not UTF-8 text"),
        ("d.jsonl", "", "it has no rows"),
        ("d.jsonl", '{"text": "a", "label": "x"}\nnot json\n', "line 2: Expecting value"),
        ("d.jsonl", '["a", "x"]\n', "line 1: a list, not an object"),
        ("d.xlsx", "a", r"its name must end in \.csv, \.tsv, \.jsonl"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        read_located("data.train", path)
    assert str(caught.value).startswith(f"data.train={path!r}: ")


# The eight of GLUE ---------------------------------------------------------------------------------------------------


def rows_of(name, split):
    """Return rows (first text, second text or None, class index or number) of a little GLUE task."""
    labels = GLUE[name].label_names
    rows = []
    for i in range(30 if split == "train" else 9):
        second = f'{split} "b {i}' if GLUE[name].layout.text_pair else None
        rows.append((f'{split} "a {i}', second, i / 8 if labels is None else i % len(labels)))
    return rows


def write_json_folder(folder, name, as_words):
    """Write a task as JSONL with the hub's columns, its labels as words or numbers."""
    folder.mkdir(parents=True)
    layout, names = GLUE[name].layout, GLUE[name].label_names
    for split in ("train", *GLUE[name].reported.values()):
        rows = []
        for first, second, label in rows_of(name, split):
            row = {layout.text: first, layout.label: names[label] if as_words and names else label}
            rows.append(row if second is None else {**row, layout.text_pair: second})
        write_json_lines(folder / f"{split}.jsonl", rows)
    return str(folder)


@pytest.mark.parametrize("name", GLUE)
def test_glue_in_words_or_numbers_is_as_on_the_hub(tmp_path, name):
    glue = GLUE[name]
    assert source_of(TaskSpec(name=name)) == (None, "nyu-mll/glue", name)
    data, numbered = (
        load_task(TaskSpec(name=name, source=write_json_folder(tmp_path / str(words), name, words), held_out=0.2))
        for words in (True, False)
    )
    assert contents(data) == contents(numbered)
    assert data.metric == {"cola": "mcc", "stsb": "pearson"}.get(name, "accuracy")  # as in Table 2
    assert data.task.label_names == glue.label_names
    assert data.task.kind == ("regression" if name == "stsb" else "classification")
    assert counts_of(data) == {"train": 24, "held_out": 6} | dict.fromkeys(glue.reported, 9)
    for label, split in glue.reported.items():
        firsts, seconds, labels = map(list, zip(*rows_of(name, split), strict=True))
        shown = data.parts[label].to_dict()
        assert shown.pop("pair", [None] * len(seconds)) == seconds
        assert shown == {"text": firsts, "labels": labels}


# Sets of one's own ---------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for split, count in (("train", 50), ("validation", 7), ("test", 11)):
        write_json_lines(folder / f"{split}.jsonl", sentences(count, seed=count))
    return folder


def own_spec(own, **changes):
    return TaskSpec(**{"name": "own", "source": str(own), **changes})


def test_what_is_reported_and_files_without_a_folder(own):
    data = load_task(own_spec(own))
    assert counts_of(data) == {"train": 45, "held_out": 5, "test": 11}
    assert (data.task.kind, data.metric, data.task.label_names) == ("classification", "accuracy", ("high", "low"))
    loose = load_task(TaskSpec(train=str(own / "train.jsonl"), reported={"test": str(own / "test.jsonl")}))
    assert contents(loose) == contents(data)
    given = load_task(own_spec(own, validation="validation.jsonl", reported={}))
    assert counts_of(given) == {"train": 50, "held_out": 7}
    joined = load_task(own_spec(own, train="train.jsonl+validation", reported={}))
    assert sum(counts_of(joined).values()) == 57
    (own / "test.jsonl").unlink()
    assert counts_of(load_task(own_spec(own)))["validation"] == 7


def test_labels_are_numbered_in_sorted_order_and_whole_numbers_by_value(tmp_path):
    write_json_lines(tmp_path / "train.jsonl", [{"text": "t", "label": i % 11} for i in range(44)])
    write(tmp_path, "test.csv", "text,label\na,10\nb,2\n")
    data = load_task(TaskSpec(source=str(tmp_path), held_out=0.5))
    assert data.task.label_names == tuple(map(str, range(11)))
    assert list(data.parts["test"]["labels"]) == [10, 2]


def test_class_labels_of_the_hub_become_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = {"text": ["a", "b", "c"], "label": [1, -1, None]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    hub = Source(None, str(tmp_path))
    assert [row for _, row in hub.read("train", "test")] == [
        {"text": text, "label": label} for text, label in (("a", "pos"), ("b", None), ("c", None))
    ]
    assert [where for where, _ in hub.read("train", "test[:1]")] == [f"data.train ({tmp_path}, row 1)"]
    assert (hub.has("test"), hub.has("train")) == (True, False)
    with pytest.raises(DataError, match=r"data\.train='tarin': cannot be loaded from"):
        hub.read("train", "tarin")


# Splits that stay apart ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stratified", [True, False])
def test_the_held_out_share_is_stratified_and_that_of_earlier_results(stratified):
    classes = [int(label) for label in np.random.default_rng(5).choice(3, size=83, p=[0.6, 0.3, 0.1])]
    parts = held_apart(TaskSpec(split_seed=2023), {"train": [*range(83)]}, classes if stratified else None)
    assert parts["held_out"] == (EARLIER_STRATIFIED if stratified else EARLIER)
    assert sorted([*parts["train"], *parts["held_out"]]) == [*range(83)]


def test_a_selection_opens_no_reported_file(own):
    whole = load_task(own_spec(own))
    (own / "test.jsonl").write_text("not read at all")
    selected = load_task(own_spec(own), reported=False)
    assert contents(selected)[2].items() < contents(whole)[2].items()
    assert [*selected.parts] == ["train", "held_out"]
    with pytest.raises(DataError, match="line 1"):
        load_task(own_spec(own))


def test_fewer_training_examples_leave_the_held_out_ones_alone(own):
    whole, few, again = (load_task(own_spec(own, train_examples=count)) for count in (None, 12, 12))
    assert len(few.parts["train"]) == 12
    assert {*few.parts["train"]["text"]} <= {*whole.parts["train"]["text"]}
    assert few.parts["held_out"].to_dict() == whole.parts["held_out"].to_dict()
    assert contents(again) == contents(few)
    assert len(load_task(own_spec(own, held_out_examples=2)).parts["held_out"]) == 2


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "./no/folder"}, r"data\.source='\./no/folder': no such folder"),
        ({"source": "no/such-data"}, r"data\.source='no/such-data': cannot be loaded with"),
        ({"train": "tarin.jsonl"}, r"train='tarin\.jsonl': no such file in .*; it holds test\.jsonl, train\.jsonl"),
        ({"reported": {"x": "train"}}, r"reported\.x='train': every example of it is a training example too"),
        ({"text": "body"}, r"data\.train \(.*, row 1\): it has no column 'body'; its columns are 'text', 'label'"),
        ({"metric": "pearson"}, r"metric='pearson': no metric of a classification; give one of accuracy, f1"),
        ({"kind": "regression"}, r"data\.train \(.*, row 1\)='.*': a regression needs finite numbers"),
        ({"held_out": 0.01}, r"data\.held_out=0\.01: 50 training examples cannot be split that way"),
        ({"train_examples": 46}, r"data\.train_examples=46: 45 are left"),
        ({"name": "mprc", "source": None}, r"data\.source=None: 'mprc' is no GLUE task \(they are cola, sst2"),
        ({"name": "sst2"}, r"\(.*train\.jsonl, row 1\): it has no column 'sentence'"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(own, changes, message):
    with pytest.raises(AromaError, match=message):
        load_task(own_spec(own, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,yes\nb,yes\n", r"data\.train \(column 'label'\)='yes': all training examples have the same label"),
        (",x\nb,y\n", r"data\.train \(.*d\.csv, row 1\)=None: nothing is in column 'text'"),
        ("a,x\nb,\nc,y\nd,\n", r"data\.train \(.*d\.csv, row 2\)=None: nothing is in column 'label'"),
    ],
)
def test_training_examples_that_cannot_be_used_are_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        load_task(TaskSpec(train=write(tmp_path, "d.csv", f"text,label\n{content}"), reported={}))


def test_one_message_names_the_problems_of_several_rows_and_the_nearest_column(tmp_path):
    rows = ["text, label ", *(f"a {number},{'xy'[number % 2]}" for number in range(20))]
    whole = write(tmp_path, "whole.csv", "\n".join(rows))
    assert len(load_task(TaskSpec(train=whole, reported={})).parts["train"]) == 18
    rows[3:10:2] = [",x", "b,", "c,", "d,"]
    damaged = write(tmp_path, "damaged.csv", "\n".join(rows))
    said = r"row 3.*column 'text'; fill .*row 5.*column 'label'; fill .*row 7.*; and 1 more$"
    with pytest.raises(DataError, match=said):
        load_task(TaskSpec(train=damaged, reported={}))
    with pytest.raises(DataError, match="no column 'lable'; its columns are 'text', 'label'; did you mean 'label'"):
        load_task(TaskSpec(train=whole, label="lable", reported={}))
    with pytest.raises(DataError, match=r"data.train .*row 3.*; data.reported.test .*row 3"):
        load_task(TaskSpec(train=damaged, reported={"test": damaged}))
    broken = write(tmp_path, "broken.jsonl", '{"text": "a", "label": "x"}\n{\n[]\n')
    said = r"broken.jsonl.*line 2: Expecting.*; line 3: a list, .*; data.reported.test.*whole.csv.*no column 'lable'"
    with pytest.raises(DataError, match=said):
        load_task(TaskSpec(train=broken, label="lable", reported={"test": whole}))


def test_an_unseen_label_is_refused(own):
    other = write(own, "other.csv", "text,label\na,high\nb,maybe\n")
    with pytest.raises(DataError, match=r"row 2\)='maybe': no training example has this label; they have high, low"):
        load_task(own_spec(own, reported={"test": other}))


def test_bbc_news_is_a_source_with_a_fixed_split():
    data = load_task(TaskSpec(name="bbc", source="bbc-news"))
    assert counts_of(data) == {"train": 1602, "held_out": 178, "test": 445}
    assert data.task.label_names == ("business", "entertainment", "politics", "sports", "tech")
    with pytest.raises(DataError, match=r"data\.reported\.dev='dev': bbc-news has no such split; it has train and"):
        load_task(TaskSpec(source="bbc-news", reported={"dev": "dev"}))


# Tokens --------------------------------------------------------------------------------------------------------------


def test_a_length_beyond_the_model_and_a_missing_model_are_refused(tmp_path):
    base = str(save_tiny_bert(tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"data\.max_length=64: .* takes at most 32 tokens"):
        load_tokenizer(base, 64)
    with pytest.raises(ConfigError, match=r"model\.name='no/such-model': its tokenizer cannot be loaded"):
        load_tokenizer("no/such-model", 8)
    # Neither tokenizer here knows a limit.
    for kind, positions, allowed in ((BertConfig, 32, 32), (RobertaConfig, 34, 32)):
        folder = tmp_path / kind.model_type
        kind(max_position_embeddings=positions, pad_token_id=1).save_pretrained(folder)
        check_positions(str(folder), allowed)
        with pytest.raises(ConfigError, match=rf"data\.max_length={allowed + 1}: .* takes at most {allowed} tokens"):
            check_positions(str(folder), allowed + 1)
