"""Tasks: the eight of GLUE, sets of one's own, splits that stay apart, and every error by name."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from aroma.errors import AromaError, DataError
from aroma_lab.tasks import data as task_data
from aroma_lab.tasks.data import find_source
from aroma_lab.tasks.glue import GLUE
from aroma_lab.tasks.spec import TaskSpec
from tiny_classifier import sentences, write_json_lines

COUNTS = {"train": 30, "validation": 9}
"""Examples of the little GLUE below; the training ones come out as 24 and 6."""


def rows_of(name, split):
    """Return rows (first text, second text or None, class index or number) of a little GLUE task."""
    labels = GLUE[name].label_names
    rows = []
    for i in range(COUNTS["train" if split == "train" else "validation"]):
        second = f'{split} "b {i}' if GLUE[name].layout.text_pair else None
        rows.append((f'{split} "a {i}', second, i / 8 if labels is None else i % len(labels)))
    return rows


def splits_of(name):
    return ["train", *GLUE[name].reported.values()]


def write_json_folder(root, name, as_words):
    """Write a task as JSONL with the hub's columns, its labels as words or numbers."""
    folder = root / name
    folder.mkdir(parents=True)
    layout, names = GLUE[name].layout, GLUE[name].label_names
    for split in splits_of(name):
        rows = []
        for first, second, label in rows_of(name, split):
            row = {layout.text: first, layout.label: names[label] if as_words and names else label}
            rows.append(row if second is None else {**row, layout.text_pair: second})
        write_json_lines(folder / f"{split}.jsonl", rows)
    return folder


class Loaded:
    def __init__(self, spec, **options):
        task, self.metric, self.parts = task_data.load_task(spec, **options)
        self.kind, self.label_names = task.kind, task.label_names
        (_, self.train), (_, self.held_out), *rest = self.parts.items()
        self.reported = dict(rest)


load_task = Loaded


def contents(data):
    """All that was read of a task; two data sets are compared by their rows."""
    return data.label_names, data.kind, data.metric, {name: part.to_dict() for name, part in data.parts.items()}


def load(*arguments, **options):
    return contents(load_task(TaskSpec(*arguments, **options)))


# The eight of GLUE ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GLUE)
def test_glue_in_words_or_numbers_is_as_on_the_hub(tmp_path, name):
    task = GLUE[name]
    source = find_source(TaskSpec(name), task)
    assert (source.name, source.config, source.reported) == ("nyu-mll/glue", name, task.reported)
    data, numbered = (
        load_task(TaskSpec(name, source=str(write_json_folder(tmp_path / str(words), name, words)), held_out=0.2))
        for words in (True, False)
    )
    assert contents(data) == contents(numbered)
    assert data.metric == {"cola": "mcc", "stsb": "pearson"}.get(name, "accuracy")  # as in Table 2
    assert data.label_names == task.label_names
    assert data.kind == ("regression" if name == "stsb" else "classification")
    assert (len(data.train), len(data.held_out)) == (24, 6)
    assert list(data.reported) == list(task.reported)
    for label, split in task.reported.items():
        firsts, seconds, labels = zip(*rows_of(name, split), strict=True)
        shown = data.reported[label].to_dict()
        assert shown.pop("pair", [None] * len(seconds)) == list(seconds)
        assert shown == {"text": list(firsts), "labels": list(labels)}


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
    assert {label: len(part) for label, part in data.reported.items()} == {"test": 11}
    assert (data.kind, data.metric, data.label_names) == ("classification", "accuracy", ("high", "low"))
    loose = load_task(TaskSpec("own", train=str(own / "train.jsonl"), reported={"test": str(own / "test.jsonl")}))
    assert contents(loose) == contents(data)
    (own / "test.jsonl").unlink()
    assert {label: len(part) for label, part in load_task(own_spec(own)).reported.items()} == {"validation": 7}


# Splits that stay apart ----------------------------------------------------------------------------------------------


def texts_of(examples):
    return sorted(zip(examples["text"], examples["labels"], strict=True))


def test_the_held_out_split_is_of_the_training_data_whole_stratified_and_always_the_same(own):
    spec = own_spec(own, held_out=0.3)
    data, again = load_task(spec), load_task(spec)
    assert contents(data) == contents(again)
    assert (len(data.train), len(data.held_out)) == (35, 15)
    rows = [json.loads(line) for line in (own / "train.jsonl").read_text().splitlines()]
    everything = sorted((row["text"], data.label_names.index(row["label"])) for row in rows)
    assert sorted(texts_of(data.train) + texts_of(data.held_out)) == everything
    share = Counter(label for _, label in everything)[0] / 50
    assert Counter(data.held_out["labels"])[0] == pytest.approx(15 * share, abs=1)
    other = load_task(replace(spec, split_seed=1))
    assert texts_of(other.held_out) != texts_of(data.held_out)
    assert texts_of(other.reported["test"]) == texts_of(data.reported["test"])


def test_a_selection_opens_no_reported_file(own):
    spec = own_spec(own)
    whole = load_task(spec)
    (own / "test.jsonl").write_text("not read at all")
    selected = load_task(spec, reported=False)
    assert selected.reported == {}
    assert texts_of(selected.train) == texts_of(whole.train)
    assert texts_of(selected.held_out) == texts_of(whole.held_out)
    with pytest.raises(DataError, match="line 1"):
        load_task(spec)


def test_fewer_training_examples_leave_the_held_out_ones_alone(own):
    whole, few, again, all_of_them = (load_task(own_spec(own, train_examples=count)) for count in (None, 12, 12, 45))
    assert len(few.train) == 12
    assert Counter(texts_of(few.train)) <= Counter(texts_of(whole.train))
    assert few.held_out.to_dict() == whole.held_out.to_dict()
    assert contents(again) == contents(few)
    assert contents(all_of_them) == contents(whole)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "./no/folder"}, r"source='\./no/folder': no such folder"),
        (
            {"train": "tarin.jsonl"},
            r"train='tarin\.jsonl': .* has no such file, .*; it holds test\.jsonl, train\.jsonl",
        ),
        ({"reported": {"x": "train"}}, r"reported\.x='train': every example of it is a training example too"),
        ({"text": "body"}, r"tasks\.own\.train=.*: it has no column 'body'; its columns are 'text', 'label'"),
        ({"text": "label"}, r"tasks\.own\.label='label': the label and a text cannot be the same column"),
        ({"metric": "pearson"}, r"metric='pearson': no metric of a classification; give one of accuracy, f1"),
        ({"kind": "regression"}, r"tasks\.own\.train \(column 'label'\)='.*': row 1: a regression needs"),
        ({"held_out": 0.01}, r"tasks\.own\.held_out=0\.01: 50 training examples cannot be split so"),
        ({"train_examples": 46}, r"tasks\.own\.train_examples=46: 45 are left"),
        ({"name": "mprc", "source": None}, r"tasks\.mprc\.source=None: 'mprc' is no GLUE task \(they are cola, sst2"),
        (
            {"name": "rte"},
            r"tasks\.rte\.train \(column 'label'\)='neutral': labels .* they have entailment, not_entail",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(own, monkeypatch, changes, message):
    monkeypatch.chdir(own.parent)
    if changes.get("name") == "rte":
        write_json_lines(own / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": "neutral"}])
    with pytest.raises(AromaError, match=message):
        load_task(own_spec(own, **changes))


# The articles that come with pip


def test_bbc_news_is_a_source_with_a_fixed_split():
    data = load_task(TaskSpec("bbc", source="bbc-news"))
    assert (len(data.train) + len(data.held_out), len(data.reported["test"])) == (1780, 445)
    assert data.label_names == ("business", "entertainment", "politics", "sports", "tech")
    assert not {*data.train["text"], *data.held_out["text"]} & {*data.reported["test"]["text"]}
    with pytest.raises(
        DataError, match=r"tasks\.bbc\.reported\.dev='dev': bbc-news has no such split; it has train and"
    ):
        load("bbc", source="bbc-news", reported={"dev": "dev"})
