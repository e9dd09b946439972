"""What cutting finished adapters costs, on whole test sets: every size, every rule, one change at a time.

    python tools/study.py run out/compress/runs --parts curve rule --workers 2
    python tools/study.py tables

`run` takes folders of finished runs of LoRA, or folders that hold such folders, and appends one row for each cut to
`results/compress/TASK.jsonl`; rows that are there are not measured again. `tables` writes README.md there.

Directions come from the library's pure functions, so that one calibration serves every size, and choices that
`aroma.compress` does not offer can be compared. What is measured is measured by plain code: the update B A is added to
the base weights, and outputs are compared here. tests/test_study.py shows that both agree with `aroma.compress`.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from aroma.compression.metric import Directions, Product, Spectrum, balanced, by_effect, by_size, cut, ladder, spectrum
from aroma.compression.predictions import Predictions, predictions_of, pull
from aroma.compression.weights import Adapter
from aroma.files import write_text
from aroma_lab.run.machine import provenance
from aroma_lab.run.run import job_of
from aroma_lab.run.trial import load_trial

ROOT = Path(__file__).parents[1] / "results" / "compress"
KEEPS = (0.99, 0.995, 0.998, 0.999)
_BATCH = 32
_MOST = 2**27
"""Most outputs of the whole adapter that are held: of large vocabularies a part of the test set at a time."""


# What is asked -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A cut: in which order directions stay, how many of them, and what they are calibrated on.

    Args:
        order: `"effect"`: in the metric of the predictions; `"size"`: singular values (PARA; with `rank` alone,
            LoRA-Squeeze).
        size, keep, rank: One of them is given; see `aroma.compress`.
        examples, split, labels, batch: Calibration: how many examples, `"train"` or `"held_out"`, whether gradients
            are normal `"noise"` as in the library, or those of labels `"drawn"` from the predictions or `"given"`, and
            how many examples share a gradient.
        per: What a direction's worth is divided by: `"number"` that it stores, or by nothing (`"direction"`).
        heal: Steps of Adam after the cut on the divergence from the whole adapter, on training texts.
    """

    order: Literal["effect", "size"] = "effect"
    size: float | None = None
    keep: float | None = None
    rank: int | None = None
    examples: int = 256
    split: str = "train"
    labels: Literal["noise", "drawn", "given"] = "noise"
    batch: int = 8
    per: Literal["number", "direction"] = "number"
    heal: int = 0

    def differs(self) -> dict[str, Any]:
        """Return the fields that are not as by default."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}

    @property
    def calibration(self) -> tuple[Any, ...]:
        """What decides the metric."""
        return self.examples, self.split, self.labels, self.batch


PARTS = ("curve", "squeeze", "rule", "unseen", "variants", "variants-rule", "healing")
VARIANTS: list[dict[str, Any]] = [
    *({"examples": count} for count in (64, 128, 512)),
    {"split": "held_out"},
    {"labels": "drawn"},
    {"labels": "given"},
    *({"batch": size} for size in (1, 16)),
    {"per": "direction"},
]
"""One change at a time."""


def asked(part: str, r: int, shares: Sequence[float]) -> list[Asked]:
    """Return the cuts of a part of the study, of adapters of rank r."""
    by_rank = sorted({max(1, round(share * r)) for share in shares})
    parts = {
        "curve": [Asked(order, size=share) for order in ("effect", "size") for share in shares],
        "squeeze": [Asked("size", rank=rank) for rank in by_rank],
        "rule": [Asked(keep=keep) for keep in KEEPS],
        "unseen": [
            *(Asked(size=size, split="held_out") for size in (0.1, 0.2)),
            Asked(keep=0.998, split="held_out"),
        ],
        "variants": [Asked(size=share, **one) for one in VARIANTS for share in (0.1, 0.2)],
        "variants-rule": [Asked(keep=0.998, **one) for one in VARIANTS],
        "healing": [Asked(size=share, heal=heal) for share in (0.03, 0.05, 0.1) for heal in (0, 60)],
    }
    return parts[part]


# A finished run ------------------------------------------------------------------------------------------------------


class Finished:
    """A finished run: its examples, its adapter, and the pretrained model with the head that was trained beside it."""

    def __init__(self, folder: Path) -> None:
        self.trial = load_trial(folder / "trial.json")
        self.job = job_of(self.trial)
        self.model: Any = PeftModel.from_pretrained(self.job.load_model(), str(folder / "adapter")).eval()
        self.weights = Adapter(self.model).weights
        self.found: list[Spectrum] = [spectrum(weight.product()) for weight in self.weights]
        self.costs = [weight.cost for weight in self.weights]
        self.total = sum(weight.r * weight.cost for weight in self.weights)
        self.plain: Any = copy.deepcopy(self.model).merge_and_unload()
        self.base = [weight.layer.get_base_layer().weight.detach() for weight in self.weights]
        self._metrics: dict[tuple[Any, ...], list[Directions]] = {}
        self._effects: dict[Asked, list[tuple[list[int], float]]] = {}

    @property
    def test(self) -> str:
        """Name of the split that is reported."""
        return "test" if "test" in self.job.evaluated else str(self.job.evaluated[-1])

    def batches(self, split: str, count: int | None = None, size: int = _BATCH) -> list[dict[str, Any]]:
        """Return batches of `count` random examples of a split, or of all of them, those of equal length together."""
        rows = self.job.rows[split]
        if count is not None:
            chosen = random.Random(0).sample(range(len(rows)), min(count, len(rows)))
        else:
            lengths = [len(ids) for ids in rows["input_ids"]] if "input_ids" in rows.column_names else [0] * len(rows)
            chosen = sorted(range(len(rows)), key=lambda number: lengths[number])
        return [
            dict(self.job.collator([rows[number] for number in chosen[start : start + size]]))
            for start in range(0, len(chosen), size)
        ]

    # Directions

    def balance(self) -> None:
        """Write the factors in whose coordinates G is measured into the model; it computes the same."""
        for weight, found in zip(self.weights, self.found, strict=True):
            self.write(weight, balanced(found))

    @staticmethod
    def write(weight: Any, product: Product) -> None:
        """Let a layer compute with a product, of any rank."""
        A, B = weight.parameters
        A.data, B.data = product.A[0].float().contiguous(), (product.B[0] / weight.scale).float().contiguous()

    def by_effect(self, asked: Asked) -> list[Directions]:
        """Return the directions in the metric of the predictions, as `aroma.compress` finds them.

        This is its loop again, because it has no option for labels that are given.
        """
        if asked.calibration not in self._metrics:
            self.balance()
            sums: list[Any] = [0.0] * len(self.weights)
            generator, batches = torch.Generator().manual_seed(0), self._calibration(asked)
            self.model.requires_grad_(False)
            for batch in batches:
                for weight in self.weights:
                    weight.parameters[0].requires_grad_(True).grad = None
                answers = predictions_of(self.model, batch)
                pulled = pull(answers, generator) if asked.labels == "noise" else of_labels(answers, asked, generator)
                answers.values.backward(pulled)
                for place, weight in enumerate(self.weights):
                    A: Any = weight.parameters[0]
                    G = A.grad.double() @ A.detach().double().T
                    sums[place] = sums[place] + torch.stack([G @ G.T, G.T @ G])
            means = [part[:, None] / len(batches) for part in sums]
            self._metrics[asked.calibration] = [by_effect(M, N) for M, N in means]
        return self._metrics[asked.calibration]

    def _calibration(self, asked: Asked) -> list[dict[str, Any]]:
        batches = self.batches(asked.split, asked.examples, asked.batch)
        for batch in batches:
            if asked.labels != "given" and "input_ids" in batch and batch["labels"].dim() == 1:
                del batch["labels"]  # those of a language model say which positions count
        return batches

    def directions(self, asked: Asked) -> list[Directions]:
        """Return the directions of every weight, those that stay longest first."""
        return self.by_effect(asked) if asked.order == "effect" else [by_size(one) for one in self.found]

    def ladder(self, asked: Asked) -> list[list[int]]:
        """Return the rank of every weight at each size of the ladder; `size` is one of them."""
        per_number = asked.order == "effect" and asked.per == "number"
        pairs = zip(self.directions(asked), self.costs, strict=True)
        values = [one.worth / (cost if per_number else 1) for one, cost in pairs]
        return ladder(values, self.costs, [weight.is_pinned for weight in self.weights], self.total, asked.size)

    def share(self, ranks: Sequence[int]) -> float:
        """Return the share of the adapter's numbers that ranks store."""
        return sum(rank * cost for rank, cost in zip(ranks, self.costs, strict=True)) / self.total

    def cut(self, asked: Asked) -> tuple[list[Product], dict[str, Any]]:
        """Return the updates that stay, and what is known of them before they are tested."""
        effect: float | None = None
        if asked.rank is not None:
            ranks = [min(asked.rank, one.sigma.shape[1]) for one in self.found]
        elif asked.size is not None:
            ranks = [one for one in self.ladder(asked) if self.share(one) <= asked.size * (1 + 1e-9)][-1]
        else:
            ranks, effect = self.chosen(asked)
        products = self.products(asked, ranks)
        if asked.heal:
            products = self.healed(products, asked.heal)
        facts = {"share": self.share(ranks), "directions": sum(ranks), "largest_rank": max(ranks)}
        return products, {**facts, "mean_rank": sum(ranks) / len(ranks), "effect": effect}

    def products(self, asked: Asked, ranks: Sequence[int]) -> list[Product]:
        """Return the updates of the first directions."""
        return [*map(cut, self.found, self.directions(asked), ranks)]

    def chosen(self, asked: Asked) -> tuple[list[int], float]:
        """Return the ranks of the smallest size of the ladder that keeps as much of the effect, and what it keeps.

        The larger half is measured first; the other one if all of that keep as much as any rule asks for.
        """
        key = Asked(**{**asdict(asked), "keep": None})
        if key not in self._effects:
            batches, rungs = self.batches(asked.split, asked.examples), self.ladder(asked)
            measured: list[tuple[list[int], float]] = []
            for some in (rungs[-6:], rungs[:-6]):
                versions = {str(place): self.products(asked, ranks) for place, ranks in enumerate(some)}
                found = self.outcomes(versions, batches, "float32")
                kept = [1 - found[name].divergence / found["none"].divergence for name in versions]
                measured = [*zip(some, kept, strict=True), *measured]
                if kept[0] < min(KEEPS):
                    break
            self._effects[key] = measured
        assert asked.keep is not None
        least = asked.keep
        return next(pair for pair in self._effects[key] if pair[1] >= least)

    def healed(self, products: Sequence[Product], steps: int) -> list[Product]:
        """Return updates after some steps of Adam on the divergence from the whole adapter, without labels."""
        batches = self.batches("train", 16 * steps, 16)
        self.balance()
        with torch.no_grad():
            targets = [predictions_of(self.model, batch).values.log_softmax(-1) for batch in batches]
        for weight, product in zip(self.weights, products, strict=True):
            self.write(weight, product)
        self.model.requires_grad_(False)
        trained = [parameter.requires_grad_(True) for weight in self.weights for parameter in weight.parameters]
        optimizer = torch.optim.Adam(trained, lr=1e-3)
        for step, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / len(batches))
            logs = predictions_of(self.model, batch).values.log_softmax(-1)
            loss = F.kl_div(logs, target, reduction="batchmean", log_target=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        pairs = [(weight.scale, *weight.parameters) for weight in self.weights]
        return [Product(B.detach()[None] * scale, A.detach()[None]) for scale, A, B in pairs]

    # Outcomes

    @cached_property
    def precision(self) -> str:
        """How test sets are read: as the laboratory did after the training, but small ones in float32.

        Rounding to bfloat16 alone is a divergence of some 4e-5 of what an adapter changes (BANKING77).
        """
        rows = self.job.rows[self.test]
        tokens = sum(map(len, rows["input_ids"])) if "input_ids" in rows.column_names else 0
        return "bfloat16" if self.trial.training.bf16 and tokens > 20_000 else "float32"

    def outcomes(
        self, versions: Mapping[str, Sequence[Product]], batches: Sequence[Any], precision: str
    ) -> dict[str, Outcome]:
        """Return what each version answers, compared with the `whole` adapter; `none` is added to them.

        Args:
            versions: The update of every weight.
            precision: `"float32"` or `"bfloat16"`, of the forward passes.
        """
        whole = [balanced(one) for one in self.found]
        none = [Product(B[..., :0], A[:, :0]) for B, A in whole]
        every = {"none": none, **versions}
        found = {name: Outcome() for name in ("whole", *every)}
        for some in self._parts(batches):
            self._compute_with(whole)
            right = [self._answers(batch, precision) for batch in some]
            for one in right:
                found["whole"].add(*one, one[0])
            for name, products in every.items():
                self._compute_with(products)
                for batch, one in zip(some, right, strict=True):
                    found[name].add(*one, self._answers(batch, precision)[0])
        return found

    def _parts(self, batches: Sequence[Any]) -> Iterator[list[Any]]:
        """Yield as many batches as have so many outputs that they can be held."""
        classes = getattr(self.plain.config, "vocab_size", 1) if self.is_language else 1
        some: list[Any] = []
        for batch in batches:
            some.append(batch)
            if sum(next(iter(one.values())).numel() for one in some) * classes > _MOST:
                yield some
                some = []
        if some:
            yield some

    @property
    def is_language(self) -> bool:
        """Whether it predicts tokens."""
        return type(self.plain).__name__.endswith("ForCausalLM")

    @torch.no_grad()
    def _compute_with(self, products: Sequence[Product]) -> None:
        """Write base weights + B A into the plain model."""
        for weight, base, product in zip(self.weights, self.base, products, strict=True):
            self.plain.get_submodule(weight.name).weight.copy_(base + product.B[0].to(base) @ product.A[0].to(base))

    @torch.no_grad()
    def _answers(self, batch: Mapping[str, Any], precision: str) -> tuple[Tensor, Tensor, bool]:
        """Return outputs at what counts, (items, outputs), their labels, and whether they are logits."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = self.plain(**inputs)
        labels, logits = batch["labels"], getattr(output, "logits", None)
        if logits is None:
            values, mask = output.last_hidden_state, batch.get("attention_mask")
            return (values, labels, False) if mask is None else (values[mask > 0], labels[mask > 0], False)
        if self.is_language:
            logits, labels = logits[:, :-1], labels[:, 1:]
            logits, labels = logits[labels != -100], labels[labels != -100]
        return logits.float(), labels, True

    def score(self, outcome: Outcome) -> tuple[str, float]:
        """Return the name of what the task is measured by, and its value; of language models less is better."""
        rows, loss = self.job.rows[self.test], outcome.loss / outcome.items
        if self.job.metric == "explained":
            return "explained", 1 - outcome.loss / math.fsum(rows["base_error"])
        if self.job.metric == "recalled":
            return "recalled", max(0.0, 1 - loss / math.log(self.plain.config.vocab_size))
        if self.is_language:
            return "loss", loss
        return "accuracy", outcome.right / outcome.items


@torch.no_grad()
def of_labels(found: Predictions, asked: Asked, generator: torch.Generator) -> Tensor:
    """Return the gradient of the negative log likelihood of labels, drawn from the predictions or given."""
    shares = found.values.detach().softmax(-1)
    flat = shares.flatten(0, -2)
    labels = torch.multinomial(flat, 1, generator=generator) if asked.labels == "drawn" else found.labels
    assert labels is not None
    right = F.one_hot(labels.flatten().clamp(min=0), flat.shape[-1]).view_as(shares)
    counts = 1 if found.counts is None else found.counts[..., None]
    gradient: Tensor = (shares - right) * counts / len(found) ** 0.5
    return gradient


@dataclass
class Outcome:
    """Sums over what counts of a set: divergence from the whole adapter in nats, loss, and answers.

    `flips` are answers that differ from the whole adapter's; `lost` of them were right, and `won` are right now.
    """

    divergence: float = 0.0
    loss: float = 0.0
    items: int = 0
    right: int = 0
    flips: int = 0
    lost: int = 0
    won: int = 0

    def add(self, whole: Tensor, labels: Tensor, is_logits: bool, other: Tensor) -> None:
        """Add a batch of answers (items, outputs); a regression's loss is its squared error."""
        self.items += len(labels)
        for one, two, right in zip(whole.split(1024), other.split(1024), labels.split(1024), strict=True):
            if not is_logits:
                self.divergence += float((one.double() - two.double()).square().sum()) / 2
                self.loss += float((two.double() - right.double()).square().sum())
                continue
            wide = torch.float32 if one.shape[1] > 256 else torch.float64  # of large vocabularies it takes the longest
            logs, others = one.to(wide).log_softmax(-1), two.to(wide).log_softmax(-1)
            self.divergence += float((logs.exp() * (logs - others)).sum(-1).double().sum())
            self.loss += float(F.nll_loss(others, right, reduction="none").double().sum())
            before, after = one.argmax(-1), two.argmax(-1)
            self.right += int((after == right).sum())
            self.flips += int((before != after).sum())
            self.lost += int(((before == right) & (after != right)).sum())
            self.won += int(((before != right) & (after == right)).sum())


# Rows ----------------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """The rows of a task, in a file that several processes append to.

    Args:
        root: Folder of the files.
        task: Its name.
    """

    root: Path
    task: str
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path = self.root / f"{self.task}.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def has(self, seed: int, asked: Asked) -> bool:
        """Return whether this cut of a seed is measured."""
        return any(row["seed"] == seed and row["asked"] == asked.differs() for row in self.rows())

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows, all or none."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lines = [json.dumps(_rounded(row)) for row in (*self.rows(), *rows)]
            write_text(self.path, "\n".join(lines) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items() if one is not None}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def measure(folder: Path, parts: Sequence[str], shares: Sequence[float], root: Path, every: int = 1) -> str:
    """Measure the cuts of a finished run that are not in its task's table yet.

    Args:
        shares: Sizes of the curve.
        root: Where the tables are.
        every: Batches of the test set that are read: 1 in so many.

    Returns:
        What was done, in words.
    """
    torch.set_num_threads(1)
    trial = load_trial(folder / "trial.json")
    task, seed, r = trial.task.name, trial.training.seed, int(trial.options["r"])
    table = Table(root, str(task))
    new = [one for part in parts for one in asked(part, r, shares) if not table.has(seed, one)]
    new = [*dict.fromkeys(new)]
    if not new:
        return f"{folder}: nothing new"
    run = Finished(folder)
    cuts = {str(place): run.cut(one) for place, one in enumerate(new)}
    by_ranks: dict[str, Any] = {name: products for name, (products, _) in cuts.items()}
    batches = run.batches(run.test)[::every]
    found = run.outcomes(by_ranks, batches, run.precision)
    none, whole, known = found["none"], found["whole"], provenance()
    common = {"task": task, "seed": seed, "precision": run.precision, "items": none.items, "part": 1 / every}
    common["none"] = none.divergence / none.items
    common["measure"], common["score_whole"] = run.score(whole)
    common["score_none"] = run.score(none)[1]
    versions = {name: known["versions"][name] for name in ("aroma-peft", "torch", "peft")}
    common |= {"versions": versions, "revision": (known["git_revision"] or "")[:8]}
    rows = []
    for place, one in enumerate(new):
        result = found[str(place)]
        row = {"asked": one.differs(), **cuts[str(place)][1], "divergence": result.divergence / none.divergence}
        row |= {"score": run.score(result)[1], "loss": result.loss / result.items}
        row |= {name: getattr(result, name) / result.items for name in ("flips", "lost", "won")}
        rows.append({**common, **row})
    table.append(rows)
    return f"{folder}: {len(rows)} rows"


# Tables --------------------------------------------------------------------------------------------------------------

TEXTS = ("trec", "sst2", "banking77", "bbc-news", "mrpc")
_HEAD = """# What compressing finished adapters costs

Written by `python tools/study.py tables` from the rows beside this page. Divergences are from the whole adapter's
answers to the test set, as a share of what the adapter changes; geometric means over tasks. ± is the standard error
over seeds, of paired differences; it is missing where a task has one seed. Of language models the change of the score
is that of the loss, in per cent, which is that of bits per byte; less than 0 is worse. The default calibrates on 256
training examples, in batches of 8, without labels.
"""
GROUPS = {"five texts": TEXTS, "the same with 30 % wrong labels": tuple(f"{name}-wrong" for name in TEXTS)}


def _read(root: Path) -> pd.DataFrame:
    """Return all rows; `cut` is what was asked for, as JSON, and `gain` the score minus the whole adapter's.

    Of language models it is minus the relative change of the loss, and so of bits per byte.
    """
    files = sorted(root.glob("*.jsonl"))
    table = pd.DataFrame([json.loads(line) for path in files for line in path.read_text().splitlines()])
    table["cut"] = [_key(**one) for one in table["asked"]]
    is_loss = table["measure"] == "loss"
    table["gain"] = (table["score"] - table["score_whole"]).where(~is_loss, 1 - table["score"] / table["score_whole"])
    return table


def _key(**given: Any) -> str:
    return json.dumps(given, sort_keys=True)


class Pairs:
    """Values of a cut, by task and seed, and their mean over tasks with its standard error over seeds."""

    def __init__(self, values: pd.Series) -> None:
        self.by_task = values.dropna().groupby(level="task")
        self.count = int(self.by_task.size().sum())
        self.mean = float(self.by_task.mean().mean())
        error = np.sqrt((self.by_task.sem() ** 2).sum(skipna=False)) / max(len(self.by_task), 1)
        self.error = None if np.isnan(error) else float(error)

    def points(self) -> str:
        """Return a difference of scores, in points."""
        spread = "" if self.error is None else f" ± {100 * self.error:.2f}"
        return f"{100 * self.mean:+.2f}".replace("-", "−") + spread

    def ratio(self) -> str:
        """Return the geometric mean of ratios, of which these are logarithms; ± is a factor's standard error."""
        middle = math.exp(self.mean)
        return f"{middle:.2f}" + ("" if self.error is None else f" ± {middle * self.error:.2f}")

    def share(self) -> str:
        """Return the mean of shares, in per cent."""
        return f"{100 * self.mean:.3g} %"

    def geometric(self) -> str:
        """Return the geometric mean."""
        return f"{math.exp(self.mean):.2g}"


def _tables(rows: pd.DataFrame) -> Iterator[str]:
    """Yield the parts of the page."""
    rows = rows.drop_duplicates(["task", "seed", "cut"], keep="last")

    def column(tasks: Sequence[str], cut: str, name: str) -> pd.Series:
        some = rows[rows["task"].isin(tasks) & (rows["cut"] == cut)]
        return some.set_index(["task", "seed"])[name].astype(float)

    def log(tasks: Sequence[str], cut: str) -> pd.Series:
        return np.log(column(tasks, cut, "divergence"))

    def sizes(title: str, tasks: Sequence[str]) -> Iterator[str]:
        yield f"\n### By size: {title}\n"
        yield "| size | divergence | of PARA | ratio | score − whole's | of PARA | flips | of PARA | runs |"
        yield "|--:|" + "--:|" * 8
        for size in (0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7):
            one, two = _key(size=size), _key(order="size", size=size)
            if (ratios := Pairs(log(tasks, one) - log(tasks, two))).count:
                both = column(tasks, two, "share").index
                pairs = [Pairs(log(tasks, cut).reindex(both)) for cut in (one, two)]
                cells = [f"{size:.0%}", *(pair.geometric() for pair in pairs), ratios.ratio()]
                cells += [Pairs(column(tasks, cut, "gain")).points() for cut in (one, two)]
                cells += [Pairs(column(tasks, cut, "flips")).share() for cut in (one, two)]
                yield f"| {' | '.join(cells)} | {ratios.count} |"

    def rule(title: str, tasks: Sequence[str]) -> Iterator[str]:
        yield f"\n### By rule: {title}\n"
        yield (
            "| keep | measured on | size | mean rank | kept there | divergence of the test set | score − whole's "
            "| flips | least of a run | 1 point less, and 2 standard errors of its flips | runs |"
        )
        yield "|--:|---" + "|--:" * 9 + "|"
        for split in ("train", "held_out"):
            for keep in KEEPS:
                cut = _key(keep=keep) if split == "train" else _key(keep=keep, split=split)
                if (gains := Pairs(column(tasks, cut, "gain"))).count:
                    facts = [Pairs(column(tasks, cut, name)) for name in ("share", "mean_rank", "effect", "flips")]
                    cells = [f"{keep:.1%}", split, facts[0].share(), f"{facts[1].mean:.1f}", f"{facts[2].mean:.4f}"]
                    cells += [Pairs(log(tasks, cut)).geometric(), gains.points(), facts[3].share()]
                    gain, lost, won, items = (column(tasks, cut, name) for name in ("gain", "lost", "won", "items"))
                    is_beyond = (gain < -0.01) & (lost - won > 2 * np.sqrt((lost + won) / items))
                    cells += [f"{100 * gain.min():+.1f}".replace("-", "−"), str(is_beyond.sum()), str(gains.count)]
                    yield f"| {' | '.join(cells)} |"

    def changes(title: str, tasks: Sequence[str]) -> Iterator[str]:
        yield f"\n### One change at a time: {title}\n"
        yield "| change | size | divergence, ratio to the default's | difference of scores | runs |"
        yield "|---|--:|--:|--:|--:|"
        for change in VARIANTS:
            for asked in ({"size": 0.1}, {"size": 0.2}, {"keep": 0.998}):
                one, two = _key(**asked, **change), _key(**asked)
                ratios = Pairs(log(tasks, one) - log(tasks, two))
                if ratios.count:
                    gains = Pairs(column(tasks, one, "gain") - column(tasks, two, "gain"))
                    words = ", ".join(f"{name} {value}" for name, value in change.items())
                    size = f"{asked['size']:.0%}" if "size" in asked else Pairs(column(tasks, one, "share")).share()
                    yield f"| {words} | {size} | {ratios.ratio()} | {gains.points()} | {ratios.count} |"

    def squeeze(title: str, tasks: Sequence[str]) -> Iterator[str]:
        yield f"\n### One rank for all (LoRA-Squeeze): {title}\n"
        yield "| rank | size | its divergence | ratio of ours, at its size | its score − whole's | runs |"
        yield "|--:|" + "--:|" * 5
        curves = {
            key: some.sort_values("share")
            for key, some in rows[rows["task"].isin(tasks) & ~rows["size"].isna() & rows["by_effect"]].groupby(
                ["task", "seed"]
            )
        }
        for rank in sorted(rows["rank"].dropna().unique()):
            cut = _key(order="size", rank=int(rank))
            theirs, shares = log(tasks, cut), column(tasks, cut, "share")
            ours = {
                key: float(
                    np.interp(np.log(shares[key]), np.log(curves[key]["share"]), np.log(curves[key]["divergence"]))
                )
                for key in theirs.index
                if key in curves and curves[key]["share"].min() <= shares[key] <= curves[key]["share"].max()
            }
            if ours:
                of_ours = pd.Series(ours.values(), pd.MultiIndex.from_tuples(ours, names=["task", "seed"]))
                ratios = Pairs(of_ours - theirs)
                cells = [str(int(rank)), Pairs(shares).share(), Pairs(theirs).geometric(), ratios.ratio()]
                yield f"| {' | '.join(cells)} | {Pairs(column(tasks, cut, 'gain')).points()} | {ratios.count} |"

    def trained(title: str, tasks: Sequence[str]) -> Iterator[str]:
        yield f"\n### LoRA trained at the nearest rank, with its own rate: {title}\n"
        yield "| task | whole | compressed | its mean rank | LoRA of rank | its score | compressed − it | runs |"
        yield "|---|" + "--:|" * 7
        fixed = _trained()
        differences = []
        for task in tasks:
            rank = Pairs(column([task], _key(keep=0.998), "mean_rank")).mean
            if task in fixed.index and rank > 0:
                nearest = min((1, 2, 4, 8), key=lambda one: abs(math.log(one / rank)))
                scores = column([task], _key(keep=0.998), "score")
                theirs = fixed.loc[[task]].query("method == @name", local_dict={"name": f"lora-r{nearest}"})
                theirs = theirs.groupby(["task", "seed"])["score"].mean()
                differences.append((scores - theirs).dropna())
                whole = column([task], _key(keep=0.998), "score_whole").mean()
                cells = [task, f"{100 * whole:.1f}", f"{100 * scores.mean():.1f}", f"{rank:.1f}", str(nearest)]
                cells += [f"{100 * theirs.mean():.1f}", Pairs(differences[-1]).points(), str(len(differences[-1]))]
                yield f"| {' | '.join(cells)} |"
        if len(differences) > 1:
            every = Pairs(pd.concat(differences))
            yield f"| mean | | | | | | {every.points()} | {every.count} |"

    rows["size"], rows["rank"] = ([one.get(name) for one in rows["asked"]] for name in ("size", "rank"))
    rows["by_effect"] = [{*one} == {"size"} for one in rows["asked"]]
    texts = [task for tasks in GROUPS.values() for task in tasks]
    alone = [*sorted({*rows["task"]} - {*texts}), *texts]
    groups = GROUPS | {f"{task} alone": (task,) for task in alone}
    for title, tasks in groups.items():
        for part in (sizes, squeeze, rule, changes, *((trained,) if len(tasks) > 1 else ())):
            lines = [*part(title, tasks)]
            if not lines[-1].startswith("|-"):
                yield from lines


def _trained() -> pd.DataFrame:
    """Return the reported runs of LoRA on the five texts, at ranks and rates of their own, by task."""
    lab = ROOT.parent / "lab"
    runs = pd.concat([pd.read_parquet(lab / grid / "runs.parquet") for grid in ("minilm-six", "mrpc")])
    is_reported = runs["selects"].isna() | ~runs["selects"].astype(bool)
    return runs[is_reported & (runs["kind"] == "lora")].set_index("task")


# The command ---------------------------------------------------------------------------------------------------------


def folders_of(paths: Sequence[str]) -> list[Path]:
    """Return the finished runs below some folders, by seed first."""
    found = {file.parent for path in paths for file in Path(path).rglob("result.json")}
    return sorted(found, key=lambda folder: (folder.name, folder))


def run_all(folders: Sequence[Path], parts: Sequence[str], shares: Sequence[float], workers: int, every: int) -> None:
    """Measure many runs, in processes of their own."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(measure, folder, parts, shares, ROOT, every) for folder in folders]
        for task in tasks:
            print(task.result(), flush=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure cuts of finished runs")
    run.add_argument("paths", nargs="+", help="folders of runs, or folders that hold such folders")
    run.add_argument("--parts", nargs="+", default=["curve", "rule"], help="; ".join(PARTS))
    run.add_argument("--shares", nargs="+", type=float, default=[0.03, 0.05, 0.1, 0.2, 0.3, 0.5])
    run.add_argument("--every", type=int, default=1, help="read 1 of so many batches of the test set")
    run.add_argument("--workers", type=int, default=1)
    commands.add_parser("tables", help="write the tables")
    given = parser.parse_args()
    if given.command == "run":
        run_all(folders_of(given.paths), given.parts, given.shares, given.workers, given.every)
    else:
        write_text(ROOT / "README.md", _HEAD + "\n".join(_tables(_read(ROOT))) + "\n")


if __name__ == "__main__":
    main()
