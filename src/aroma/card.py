"""The model card beside a saved or exported adapter: what it is, how it was trained, and how to load it.

It is written from what is saved, with huggingface_hub's `ModelCard`, so a save costs a few milliseconds more. Of a
base model in a local folder it tells the name and not the path. A card that a person wrote is never touched.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import peft
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from . import __version__
from .about import About, Fact
from .files import write_text
from .pictures import positions_of

CARD_FILE = "README.md"
PICTURE_FILE = "aroma_ranks.png"
"""A picture of ranks, which a card shows if it is there."""
MARK = "<!-- Written by AROMA, and again at every save. Remove this line to keep what you write here. -->"
PAPER = "https://arxiv.org/abs/2504.05343"

Kind = Literal["adapter", "uniform", "gguf", "merged"]

_HERE = "path/to/this-folder"
"""Stands for the folder of the card in code to copy."""
_GAP = "[More Information Needed]"
_GAPS_OF_TEMPLATE = 39
"""How often the empty template of huggingface_hub says so, which PEFT writes."""
_CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")
"""In the path of a model in the hub's cache: its name."""

SERVING_RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks that vLLM, TGI and SGLang all serve."""

MODEL_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Class of transformers that loads the base model, by PEFT's task type."""
_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "text-generation",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""Pipeline of transformers and of the hub, by PEFT's task type."""


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Args:
        config: Content of `adapter_config.json`.
        ranks: Rank of every module that could grow, by its name in the base model.
        about: What else is known of it.
        method: The fields of `AromaConfig` that decided the run; empty for an adapter of another method.
        steps: Optimizer steps of its run; None if unknown.
        kind: In which form it was written.
        rank: Of a uniform export, the one rank.
        licence: Licence that its owner gave it, as the hub names licences; None if none was given.
        files: Names of the files beside the card.
        parts: Names of the modules whose parts are the matrices.
    """

    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    about: About = field(default_factory=About)
    method: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    kind: Kind = "adapter"
    rank: int | None = None
    licence: str | None = None
    files: frozenset[str] = frozenset()
    parts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: Mapping[str, Any], state: Mapping[str, Any], files: frozenset[str]) -> Subject:
        """Return what the files of a saved adapter say.

        Args:
            config: Content of `adapter_config.json`.
            state: Content of `aroma_state.json`.
            files: Names of the files beside the card.
        """
        run = state.get("controller") or {}
        return cls(
            config=config,
            ranks={name: entry["rank"] for name, entry in state["modules"].items()},
            about=About.from_json(state["about"]) if "about" in state else About(),
            method=state["config"],
            steps=run.get("global_step"),
            files=files,
            parts=frozenset(state.get("parts", {})),
        )

    @property
    def largest_rank(self) -> int:
        """The largest rank of a module; those of its parts add up."""
        together: Counter[str] = Counter()
        for name, rank in self.ranks.items():
            module = name.rpartition(".")[0]
            together[module if module in self.parts else name] += rank
        return max(together.values(), default=0)

    @property
    def task_type(self) -> str | None:
        """PEFT's task type."""
        return self.config.get("task_type")

    @property
    def model_class(self) -> str | None:
        """Name of the class of transformers that loads the base model; None if unknown."""
        named: str | None = (self.config.get("auto_mapping") or {}).get("base_model_class")
        found = MODEL_CLASSES.get(self.task_type, named) if self.task_type is not None else named
        return found if found is not None and found.isidentifier() else None


def write_card(folder: str | os.PathLike[str], subject: Subject, name: str = CARD_FILE) -> None:
    """Write the card of `subject` into `folder`, unless a person wrote the one that is there."""
    path = Path(folder) / name
    if not is_by_hand(path):
        write_text(path, make_card(subject))


def files_beside(folder: str | os.PathLike[str]) -> frozenset[str]:
    """Return the names of the files in `folder`; none if it is not there yet."""
    return frozenset(os.listdir(folder)) - {PICTURE_FILE} if os.path.isdir(folder) else frozenset()


def is_by_hand(path: Path) -> bool:
    """Whether a person wrote the card at `path`: it is neither ours nor the empty template that PEFT leaves."""
    if not os.path.lexists(path):
        return False
    if not path.is_file():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    return MARK not in text and text.count(_GAP) != _GAPS_OF_TEMPLATE


def make_card(subject: Subject, where: str | None = None) -> str:
    """Return a card: metadata for the hub, and Markdown.

    Args:
        subject: What it is about.
        where: The repository that it is for; None for a folder.
    """
    base, is_hub_id = shown_base(subject.config.get("base_model_name_or_path"))
    base = _plain(base)  # the name of a stranger's folder may hold anything
    title = f"{'Merged model' if subject.kind == 'merged' else 'LoRA adapter'} of {base}"
    sections = [
        f"# {title}\n\n{MARK}",
        _summary(subject, base, is_hub_id),
        _loading(subject, base if is_hub_id else f"path/to/{base}", where or _HERE),
        _training(subject),
        _scores(subject),
        _ranks(subject),
        _CITATION,
    ]
    data = _metadata(subject, base if is_hub_id else None, where or title)
    body = "\n\n".join(filter(None, sections))
    # Of names that were edited, what UTF-8 does not hold.
    body = body.encode("utf-8", "replace").decode("utf-8")
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def shown_base(name: str | None) -> tuple[str, bool]:
    """Return how a base model is called where its path says nothing to anybody, and whether that is its hub name."""
    if not name:
        return "an unnamed model", False
    cached = _CACHED.search(name)
    named = name if cached is None else cached[1].replace("--", "/", 1)
    try:
        validate_repo_id(named)
    except HFValidationError:
        return _last_part(name), False
    if cached is not None:
        return named, True
    is_local = name.startswith(".") or os.path.isdir(name)
    return (_last_part(name), False) if is_local else (name, True)


def _last_part(path: str) -> str:
    parts = re.split(r"[/\\]", path.rstrip("/\\"))
    says_nothing = re.fullmatch(r"model|base|final|merged|checkpoint-\d+", parts[-1])
    return "/".join(parts[-2 if says_nothing else -1 :]).lstrip("./~") or "a local model"


# Metadata ------------------------------------------------------------------------------------------------------------


def _metadata(subject: Subject, base: str | None, name: str) -> ModelCardData:
    """Return what the hub reads; `base` is the base model's hub name, or None."""
    merged = subject.kind == "merged"
    pipeline = _PIPELINES.get(subject.task_type or "")
    tags = ["aroma", *(["merged"] if merged else ["peft"]), "lora", *(["gguf"] if subject.kind == "gguf" else [])]
    results = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=str(subject.about.data.get("data set", "unknown")),
            dataset_name=str(subject.about.data.get("data set", "unknown")),
            dataset_split=score.set,
            metric_type=metric,
            metric_value=value,
        )
        for score in subject.about.scores
        for metric, value in score.values.items()
    ]
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "finetune" if merged else "adapter",
        library_name="transformers" if merged else "peft",
        license=subject.licence,
        pipeline_tag=pipeline,
        tags=[*dict.fromkeys([*tags, *subject.about.tags])],
        model_name=name if results else None,
        eval_results=results or None,
    )


# Sections ------------------------------------------------------------------------------------------------------------

_WHAT = {
    "adapter": "A LoRA adapter",
    "uniform": "A LoRA adapter of one rank, zero-padded for serving engines,",
    "gguf": "A LoRA adapter for llama.cpp",
    "merged": "A whole model with its LoRA adapter merged in,",
}


def _summary(subject: Subject, base: str, is_hub_id: bool) -> str:
    grown = [rank for rank in subject.ranks.values() if rank]
    lines = [f"{_WHAT[subject.kind]} trained in plain PEFT."]
    if subject.method:
        lines = [f"{_WHAT[subject.kind]} trained with [AROMA]({PAPER}): every weight matrix grew its own rank."]
    if subject.ranks:
        lines.append(
            f"{len(grown)} of {len(subject.ranks)} matrices have an update"
            + (f", of rank {_span(grown)}; {sum(grown)} in all." if grown else ".")
        )
    rows: dict[str, str] = {"base model": f"[{base}](https://huggingface.co/{base})" if is_hub_id else f"`{base}`"}
    if subject.task_type is not None:
        rows["task"] = _PIPELINES.get(subject.task_type, subject.task_type)
    if subject.about.labels is not None:
        rows["labels"] = ", ".join(f"`{_plain(label)}`" for label in subject.about.labels)
    elif subject.about.num_labels is not None:
        rows["outputs"] = f"{subject.about.num_labels}, without names"
    if subject.about.architecture is not None:
        rows["architecture"] = subject.about.architecture
    rows["licence"] = subject.licence or "none was given yet"
    if subject.about.base_licence is not None:
        rows["licence of the base model"] = subject.about.base_licence
    return f"{' '.join(lines)}\n\n{_table(rows)}"


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


def _loading(subject: Subject, base: str, where: str) -> str:
    parts = [*_code(subject, base, where)]
    return "\n\n".join(["## How to load it", *parts]) if parts else ""


def served_rank(largest: int) -> int | None:
    """Return the smallest rank that engines serve and that holds the rank `largest`; None above all."""
    return next((rank for rank in SERVING_RANKS if rank >= largest), None)


def _code(subject: Subject, base: str, where: str) -> Iterator[str]:
    base_gguf = quote(f"{_last_part(base)}.gguf")
    if subject.kind == "gguf":
        own = next((name for name in sorted(subject.files) if name.endswith(".gguf")), "adapter.gguf")
        yield f"{_LLAMA_CPP}```bash\nllama-cli -m {base_gguf} --lora {quote(own)} -p Hello\n```"
        return
    if subject.model_class is not None:
        library = "transformers" if subject.kind == "merged" else "PEFT"
        yield f"{library}:\n\n```python\n{_python(subject, base, where)}\n```"
    if subject.task_type != "CAUSAL_LM" or subject.kind == "merged" or subject.config.get("modules_to_save"):
        return
    is_uniform = subject.kind == "uniform"
    folder, largest = where if is_uniform else "served", subject.largest_rank
    rank = subject.rank or served_rank(largest)
    if rank is not None:
        first = "" if is_uniform else f"aroma export {quote(where)} served --uniform\n"
        options = f"--enable-lora --max-lora-rank {rank} --lora-modules adapter={quote(folder)}"
        yield f"vLLM:\n\n```bash\n{first}vllm serve {quote(base)} {options}\n```"
    if subject.about.architecture == "llama" and not is_uniform:
        convert = f"aroma export {quote(where)} adapter.gguf --gguf"
        yield f"{_LLAMA_CPP}```bash\n{convert}\nllama-cli -m {base_gguf} --lora adapter.gguf -p Hello\n```"


_LLAMA_CPP = "llama.cpp, with the base model as GGUF:\n\n"


def _python(subject: Subject, base: str, where: str) -> str:
    name, labels = subject.model_class, subject.about.labels
    merged = subject.kind == "merged"
    pipeline = _PIPELINES.get(subject.task_type or "")
    tokenizer = where if merged or "tokenizer_config.json" in subject.files else base
    classes = sorted([str(name), *(["AutoTokenizer", "pipeline"] if pipeline else [])])
    lines = [*([] if merged else ["from peft import PeftModel"]), f"from transformers import {', '.join(classes)}", ""]
    options = []
    if labels is not None and not merged:
        # The base model does not know them, and may have another number of outputs.
        lines += _labels_in_code(labels)
        options = ["id2label=dict(enumerate(labels))", "label2id={name: index for index, name in enumerate(labels)}"]
    elif subject.about.num_labels is not None and not merged:
        options = [f"num_labels={subject.about.num_labels}"]
    if subject.about.problem_type in ("regression", "multi_label_classification") and not merged:
        options.append(f'problem_type="{subject.about.problem_type}"')
    if merged:
        lines.append(f"model = {name}.from_pretrained({json.dumps(where)})")
    else:
        given = "".join(f"\n    {option}," for option in [json.dumps(base), *options])
        lines.append(f"base = {name}.from_pretrained({f'{given}{chr(10)}' if options else json.dumps(base)})")
        lines.append(f"model = PeftModel.from_pretrained(base, {json.dumps(where)})")
    if pipeline:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(tokenizer)})")
        lines.append(f'run = pipeline("{pipeline}", model=model, tokenizer=tokenizer)')
    return "\n".join(lines)


def _labels_in_code(labels: Sequence[str]) -> list[str]:
    texts = [json.dumps(label, ensure_ascii=False) for label in labels]
    if len(whole := f"labels = [{', '.join(texts)}]") <= 100:
        return [whole]
    lines = [""]
    for text in texts:
        if len(lines[-1]) + len(text) > 96:
            lines.append("")
        lines[-1] += f" {text},"
    return ["labels = [", *(f"   {line}" for line in lines), "]"]


def _training(subject: Subject) -> str:
    told = {**subject.about.data, **subject.about.settings}
    rows = {_plain(name): _plain(value) if isinstance(value, str) else value for name, value in told.items()}
    if subject.steps is not None:
        rows["optimizer steps"] = subject.steps
    if subject.method:
        given = ", ".join(f"{key}={value!r}" for key, value in subject.method.items() if value is not None)
        rows["growth"] = f"`AromaConfig({given})`"
    if not rows:
        return ""
    versions = {"aroma": __version__, "peft": peft.__version__, "transformers": transformers.__version__}
    rows["written with"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"## Data and training\n\n{_table(rows)}"


def _scores(subject: Subject) -> str:
    scores = subject.about.scores
    if not scores:
        return ""
    names = [*dict.fromkeys(name for score in scores for name in score.values)]
    rows = [
        [
            _plain(score.set) + ("" if score.step in (None, subject.steps) else f", at step {score.step:,}"),
            "unknown" if score.examples is None else f"{score.examples:,}",
            *(f"{score.values[name]:.4g}" if name in score.values else "" for name in names),
        ]
        for score in scores
    ]
    return "## Metrics\n\n" + _grid(["set", "examples", *map(_plain, names)], rows)


def _ranks(subject: Subject) -> str:
    if not subject.ranks:
        return ""
    places = positions_of([*subject.ranks])
    by_kind: dict[str, list[tuple[int, int]]] = {}
    for place, rank in zip(places, subject.ranks.values(), strict=True):
        by_kind.setdefault(place.kind, []).append((-1 if place.layer is None else place.layer, rank))
    rows = [
        [f"`{kind}`", " ".join(str(rank) for _, rank in sorted(found)), str(sum(rank for _, rank in found))]
        for kind, found in by_kind.items()
    ]
    told = "## Ranks\n\nThe rank of every matrix, layer by layer.\n\n" + _grid(["matrix", "rank", "sum"], rows)
    return f"{told}\n\n![Ranks by layer and kind of matrix]({PICTURE_FILE})" if PICTURE_FILE in subject.files else told


_CITATION = """## Citation

```bibtex
@misc{aroma,
  title = {AROMA: Autonomous Rank-one Matrix Adaptation},
  year = {2025},
  eprint = {2504.05343},
  archivePrefix = {arXiv}
}
```"""


def _table(rows: Mapping[str, Fact]) -> str:
    return _grid(["", ""], [[name, _said(value)] for name, value in rows.items()])


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _said(value: Fact) -> str:
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
