"""Data: columns, labels, splits, and every way data can be wrong, each refused by name."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import BertConfig, RobertaConfig

from aroma.errors import ConfigError, DataError
from aroma_lab.specs import DataSpec
from aroma_lab.tasks.classification import check_positions, encode, load_tokenizer
from aroma_lab.tasks.data import Examples, load_examples, load_splits, split_validation
from aroma_lab.tasks.sources import read_file
from tiny_classifier import save_tiny_bert, sentences, write_json_lines

ROWS = "text,label\n" + "".join(f"t{i},{'yes' if i % 3 else 'no'}\n" for i in range(30))


@pytest.fixture
def train_csv(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(ROWS)
    return str(path)


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# Reading -------------------------------------------------------------------------------------------------------------


def test_four_formats_say_the_same(tmp_path):
    texts = ['a "quoted" word', "two\nlines", "comma, here", "ünïcödé"]
    labels = ["x", "y", "x", "y"]
    quoted = "\n".join(f'"{t}",{y}' for t, y in zip([t.replace('"', '""') for t in texts], labels, strict=True))
    csv = write(tmp_path, "d.csv", f"text,label\n{quoted}\n")
    json_lines = write_json_lines(
        tmp_path / "d.jsonl", [{"text": t, "label": y} for t, y in zip(texts, labels, strict=True)]
    )
    parquet = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": texts, "label": labels, "more": [1, 2, 3, 4]}), parquet)
    flat = [text.replace("\n", " ") for text in texts]
    tsv = write(tmp_path, "d.tsv", "label\ttext\n" + "".join(f"{y}\t{t}\n" for t, y in zip(flat, labels, strict=True)))
    expected = {"text": texts, "label": labels}
    for path in (csv, str(json_lines), str(parquet)):
        assert read_file("data.train", path, ["text", "label"]) == expected
    assert read_file("data.train", tsv, ["text", "label"]) == {"text": flat, "label": labels}


def test_an_unbalanced_quote_in_tsv_swallows_nothing(tmp_path):
    path = write(tmp_path, "d.tsv", 'text\tlabel\n"Open\tx\nnext\ty\n')
    assert read_file("data.train", path, ["text"])["text"] == ['"Open', "next"]


def test_words_that_other_readers_take_for_missing_are_kept(tmp_path):
    path = write(tmp_path, "d.csv", "text,label\nNA,null\nNone,nan\n")
    assert read_file("data.train", path, ["text", "label"]) == {"text": ["NA", "None"], "label": ["null", "nan"]}


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    path = write(tmp_path, "d.csv", b"\xef\xbb\xbftext,label\na,x\n")
    assert read_file("data.train", path, ["text"]) == {"text": ["a"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "text,label\na,x,surplus\n", "line 2: its number of fields is not that of the first line"),
        ("d.csv", "text,label\na,x\nb\n", "line 3: its number of fields is not that of the first line"),
        ("d.csv", 'text,label\n"a,x\n', "line 2: unexpected end of data"),
        ("d.csv", b"text,label\n\xa3,x\n", "not UTF-8 text"),
        ("d.csv", "", "it has no rows"),
        ("d.csv", "text,label\n", "it has no rows"),
        ("d.jsonl", "", "it has no rows"),
        ("d.jsonl", '{"text": "a", "label": "x"}\nnot json\n', "line 2: Expecting value"),
        ("d.jsonl", '["a", "x"]\n', "line 1: a list, not an object"),
        ("d.parquet", "no parquet", "not a whole Parquet file"),
        ("d.xlsx", "a", r"its name must end in \.csv, \.tsv, \.jsonl"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        read_file("data.train", path, ["text", "label"])
    assert str(caught.value).startswith(f"data.train={path!r}: ")


def test_a_missing_file_is_refused():
    with pytest.raises(DataError, match=r"data\.test='absent\.csv': no such file"):
        read_file("data.test", "absent.csv", ["text"])


def test_missing_columns_are_named_with_those_that_exist(train_csv):
    spec = DataSpec(train=train_csv, text="body", label="stars")
    with pytest.raises(DataError) as caught:
        load_splits(spec)
    assert "it has no column 'body', 'stars'; its columns are 'text', 'label'" in str(caught.value)


def test_an_empty_parquet_is_refused(tmp_path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="it has no rows"):
        read_file("data.train", str(path), ["text", "label"])


# Columns by place ----------------------------------------------------------------------------------------------------


def test_columns_without_a_header_are_called_by_their_places(tmp_path):
    rows = 'gj04\t1\t\tOur "friends\ngj04\t0\t*\tThey, it.\n'
    expected = {"#4": ['Our "friends', "They, it."], "#2": ["1", "0"]}
    for name in ("d.tsv", "d.txt"):
        assert read_file("data.train", write(tmp_path, name, rows), ["#4", "#2"]) == expected
    comma = write(tmp_path, "d.csv", 'a,"x, y"\nb,z\n')
    assert read_file("data.train", comma, ["#2"]) == {"#2": ["x, y", "z"]}
    splits = load_splits(
        DataSpec(train=write(tmp_path, "t.tsv", rows * 5), text="#4", label="#2", validation_fraction=0.2)
    )
    assert len(splits.train) + len(splits.validation) == 10


def test_a_place_beyond_the_columns_and_places_among_names_are_refused(tmp_path):
    path = write(tmp_path, "d.tsv", "a\tx\nb\ty\n")
    with pytest.raises(DataError, match=r"it has no column '#3'; its columns are 'a', 'x'"):
        read_file("data.train", path, ["#1", "#3"])
    with pytest.raises(DataError, match=r"it has no column '#1', 'label'"):
        read_file("data.train", path, ["#1", "label"])
    with pytest.raises(DataError, match=r"it has no column '#0'"):
        read_file("data.train", path, ["#0"])
    lines = write(tmp_path, "d.jsonl", '{"text": "a"}\n')
    with pytest.raises(DataError, match=r"it has no column '#1'; its columns are 'text'"):
        read_file("data.train", lines, ["#1"])


def test_the_first_set_of_columns_that_fits_is_read(tmp_path):
    choices = [["sentence", "label"], ["text", "gold"], ["#2", "#1"]]
    assert read_file("f", write(tmp_path, "a.tsv", "label\tsentence\n1\ta\n"), choices) == (
        0,
        {"sentence": ["a"], "label": ["1"]},
    )
    assert read_file("f", write(tmp_path, "b.jsonl", '{"gold": 1, "text": "a"}\n'), choices)[0] == 1
    assert read_file("f", write(tmp_path, "c.tsv", "1\ta\n0\tb\n"), choices) == (
        2,
        {"#2": ["a", "b"], "#1": ["1", "0"]},
    )
    with pytest.raises(DataError, match=r"it has no column 'gold'; its columns are 'text', 'x'"):  # the nearest
        read_file("f", write(tmp_path, "d.jsonl", '{"text": "a", "x": 1}\n'), choices)


def test_damaged_lines_are_left_out_only_where_asked_for_and_counted(tmp_path):
    path = write(tmp_path, "d.tsv", "id\ttext\tlabel\n1\ta\tx\n2\tcut\nhere\ty\n3\t\ty\n4\tb\ty\n")
    with pytest.raises(DataError, match=r"line 3: its number of fields is not that of the first line"):
        read_file("f", path, ["text", "label"])
    with pytest.warns(UserWarning, match=r"d\.tsv: 3 damaged lines are left out"):
        _, columns = read_file("f", path, [["text", "label"]], skip_damaged=True)
    assert columns == {"text": ["a", "b"], "label": ["x", "y"]}


# Labels --------------------------------------------------------------------------------------------------------------


def test_labels_are_numbered_in_sorted_order(train_csv):
    splits = load_splits(DataSpec(train=train_csv))
    assert splits.label_names == ("no", "yes")
    assert splits.train.labels == [int(int(text[1:]) % 3 > 0) for text in splits.train.texts]


def test_whole_numbers_are_sorted_by_value_and_equal_to_their_texts(tmp_path):
    train = write_json_lines(tmp_path / "train.jsonl", [{"text": "t", "label": i % 11} for i in range(44)])
    test = write(tmp_path, "test.csv", "text,label\na,10\nb,2\n")
    splits = load_splits(DataSpec(train=str(train), test=test, validation_fraction=0.5))
    assert splits.label_names == tuple(map(str, range(11)))
    assert splits.test is not None
    assert splits.test.labels == [10, 2]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_labels_that_training_lacks_are_named(tmp_path, train_csv, split):
    other = write(tmp_path, "other.csv", "text,label\na,yes\nb,perhaps\nc,maybe\n")
    with pytest.raises(DataError) as caught:
        load_splits(DataSpec(train=train_csv, **{split: other}))
    message = str(caught.value)
    assert message.startswith(
        f"data.{split} (column 'label')='maybe, perhaps': labels that the training examples lack"
    )
    assert "they have no, yes" in message


def test_one_class_is_refused(tmp_path):
    path = write(tmp_path, "one.csv", "text,label\na,yes\nb,yes\n")
    with pytest.raises(DataError, match=r"data\.train \(column 'label'\)='yes': all training examples bear one label"):
        load_splits(DataSpec(train=path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\n,x\nb,y\n", r"data\.train \(column 'text', row 1\)=None: a text is missing"),
        (
            "text,label\na,x\nb,\nc,y\nd,\n",
            r"data\.train \(column 'label', 2 rows \(2, 4\)\)=None: a label is missing",
        ),
    ],
)
def test_missing_values_are_refused_by_row(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        load_splits(DataSpec(train=write(tmp_path, "d.csv", content), validation_fraction=0.5))


# Regression ----------------------------------------------------------------------------------------------------------


def test_a_regression_reads_numbers(tmp_path):
    path = write(tmp_path, "d.csv", "text,score\n" + "".join(f"t{i},{i / 10}\n" for i in range(20)))
    splits = load_splits(DataSpec(task="regression", train=path, label="score", validation_fraction=0.25))
    assert splits.label_names is None
    assert (len(splits.train), len(splits.validation)) == (15, 5)
    assert sorted([*splits.train.labels, *splits.validation.labels]) == [i / 10 for i in range(20)]


@pytest.mark.parametrize("value", ["good", "nan", "inf", ""])
def test_a_regression_refuses_what_is_no_finite_number(tmp_path, value):
    path = write(tmp_path, "d.csv", f"text,score\na,1.5\nb,{value}\n")
    with pytest.raises(DataError) as caught:
        load_splits(DataSpec(task="regression", train=path, label="score"))
    assert str(caught.value).startswith(f"data.train (column 'score', row 2)={value or None!r}: a regression needs")


# Splitting -----------------------------------------------------------------------------------------------------------


def test_the_validation_split_is_stratified_whole_and_the_same_each_time(train_csv):
    first, again = (load_splits(DataSpec(train=train_csv, validation_fraction=0.2)) for _ in range(2))
    assert first == again
    assert (len(first.train), len(first.validation)) == (24, 6)
    assert sorted(first.validation.labels) == [0, 0, 1, 1, 1, 1]
    assert sorted(first.train.texts + first.validation.texts) == sorted(f"t{i}" for i in range(30))
    other = load_splits(DataSpec(train=train_csv, validation_fraction=0.2, split_seed=1))
    assert other.validation.texts != first.validation.texts


def test_a_given_validation_file_leaves_training_whole(tmp_path, train_csv):
    other = write(tmp_path, "other.csv", "text,label\na,yes\n")
    splits = load_splits(DataSpec(train=train_csv, validation=other))
    assert (len(splits.train), len(splits.validation)) == (30, 1)


def test_a_class_of_one_cannot_be_split(tmp_path):
    path = write(tmp_path, "d.csv", ROWS + "t,rare\n")
    with pytest.raises(DataError, match=r"data\.validation_fraction=0\.1: 'rare' has one training example"):
        load_splits(DataSpec(train=path))


def test_too_few_examples_cannot_be_split(tmp_path):
    path = write(tmp_path, "d.csv", "text,label\na,x\nb,y\nc,x\nd,y\n")
    with pytest.raises(DataError, match=r"data\.validation_fraction=0\.1: 4 training examples cannot be split so"):
        load_splits(DataSpec(train=path))


def test_pairs_stay_together():
    examples = Examples([f"a{i}" for i in range(10)], [f"b{i}" for i in range(10)], [0, 1] * 5)
    train, validation = split_validation(examples, 0.4, seed=3, label_names=("x", "y"))
    for part in (train, validation):
        assert part.pairs == [text.replace("a", "b") for text in part.texts]


def test_a_file_to_evaluate_on_is_checked_like_the_others(train_csv):
    spec = DataSpec()
    assert len(load_examples("data", train_csv, spec, ("no", "yes"))) == 30
    with pytest.raises(DataError, match=r"data \(column 'label'\)='no': labels that the training examples lack"):
        load_examples("data", train_csv, spec, ("perhaps", "yes"))


# Hub -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, count in (("train", 20), ("validation", 4), ("test", 6)):
        write_json_lines(folder / f"{split}.jsonl", sentences(count, seed=count))
    return str(folder)


def test_a_hub_data_set_has_its_splits(hub_folder):
    splits = load_splits(DataSpec(name=hub_folder, test="test"))
    assert splits.test is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 4, 6)
    assert load_splits(DataSpec(name=hub_folder)).test is None  # never looked at unless asked for


def test_class_labels_come_as_names_and_hidden_ones_are_missing(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    folder = tmp_path / "hub"
    folder.mkdir()
    Dataset.from_dict({"text": ["a", "b"] * 5, "label": [1, 0] * 5}, features=features).to_parquet(
        folder / "train.parquet"
    )
    Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features).to_parquet(folder / "test.parquet")
    splits = load_splits(DataSpec(name=str(folder), validation_fraction=0.2))
    assert splits.label_names == ("neg", "pos")
    with pytest.raises(DataError, match=r"data\.test \(column 'label', row 2\)=None: a label is missing"):
        load_splits(DataSpec(name=str(folder), validation_fraction=0.2, test="test"))


def test_a_missing_data_set_split_or_column_is_refused(hub_folder):
    with pytest.raises(DataError, match=r"data\.name='no/such-data': cannot be loaded"):
        load_splits(DataSpec(name="no/such-data"))
    with pytest.raises(DataError, match=r"data\.test='tset': .* no such split; it has train, validation, test"):
        load_splits(DataSpec(name=hub_folder, test="tset"))
    with pytest.raises(DataError, match=r"data\.train='train': it has no column 'body'; its columns are 'text'"):
        load_splits(DataSpec(name=hub_folder, text="body"))


# Tokens --------------------------------------------------------------------------------------------------------------


def test_examples_are_cut_and_not_padded(tmp_path):
    base = str(save_tiny_bert(tmp_path))
    tokenizer = load_tokenizer(base, 6)
    data = encode(Examples(["w1 w2", "w1 w2 w3 w4 w5 w6"], None, [1, 0]), tokenizer, 6)
    assert [len(ids) for ids in data["input_ids"]] == [4, 6]
    assert list(data["labels"]) == [1, 0]
    assert "text" not in data.column_names


def test_pairs_share_the_length(tmp_path):
    base = str(save_tiny_bert(tmp_path))
    tokenizer = load_tokenizer(base, 9)
    data = encode(Examples(["w1 w2 w3 w4 w5"], ["w7 w8 w9 w10 w11"], [0.5]), tokenizer, 9)
    assert len(data["input_ids"][0]) == 9
    assert set(data["token_type_ids"][0]) == {0, 1}
    assert np.isclose(data["labels"][0], 0.5)


def test_a_length_the_model_cannot_read_and_a_missing_model_are_refused(tmp_path):
    base = str(save_tiny_bert(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.max_length=64: .* takes at most 32 tokens"):
        load_tokenizer(base, 64)
    with pytest.raises(ConfigError, match=r"model\.name='no/such-model': its tokenizer cannot be loaded"):
        load_tokenizer("no/such-model", 8)


def test_examples_longer_than_the_positions_of_the_model_are_refused(tmp_path):
    # Neither tokenizer here knows a limit.
    for kind, positions, allowed in ((BertConfig, 32, 32), (RobertaConfig, 34, 32)):
        folder = tmp_path / kind.model_type
        kind(max_position_embeddings=positions, pad_token_id=1).save_pretrained(folder)
        check_positions(str(folder), allowed)
        with pytest.raises(ConfigError, match=rf"data\.max_length={allowed + 1}: .* takes at most {allowed} tokens"):
            check_positions(str(folder), allowed + 1)
