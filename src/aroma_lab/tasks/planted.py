"""Planted ranks: a frozen base learns to be a teacher that is itself plus updates whose ranks are known.

A method that finds ranks can be held against the truth. Two kinds of tasks share one job: a small residual net on
random inputs, and a pretrained encoder on real sentences.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from aroma.errors import DataError, bad_value

from ..methods.head import encoder_linears
from ..specs import MadeTask
from ..training.job import Objective, Prediction, TrainerKind
from .classification import check_positions, load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

GRADED = (0, 0, 0, 0, 1, 1, 2, 2, 4, 4, 8, 8)
"""Ranks that are planted unless others are given."""
METRIC = "explained"
"""The score: 1 − error, so that 1 is perfect and 0 is the base."""
FRESH = "fresh"
"""The reported split: inputs that nothing trained on, with the teacher's outputs free of noise."""
_EXAMPLES, _FRESH, _NOISE, _LAYERS, _WIDTH = 1500, 2000, 0.1, 12, 64
_STRENGTH = 0.5


# What is planted -----------------------------------------------------------------------------------------------------


def deal_ranks(spec: MadeTask, shapes: Mapping[str, Sequence[int]], generator: torch.Generator) -> dict[str, int]:
    """Return the planted rank of every matrix: the task's ranks in turn, shuffled.

    Args:
        shapes: Shape (m, n) by module name.
        generator: Draws the order.

    Raises:
        ConfigError: No matrices, or a rank that is larger than the smallest side of a matrix.
    """
    if not shapes:
        remedy = "it has no linear module in numbered layers to plant updates in; take an encoder that has"
        raise bad_value("model", "encoder", remedy)
    ranks = list(GRADED if spec.ranks is None else spec.ranks)
    most = min(min(shape) for shape in shapes.values())
    if max(ranks) > most:
        remedy = f"no update of a matrix {most} wide has a rank of more than {most}; give smaller ranks"
        raise spec.bad("ranks", ranks, remedy)
    order = torch.randperm(len(shapes), generator=generator).tolist()
    return {name: ranks[place % len(ranks)] for name, place in zip(shapes, order, strict=True)}


def planted_update(m: int, n: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return U diag(σ) Vᵀ, shape (m, n): random orthonormal U (m, rank), V (n, rank), and σ between 0.7 and 1.3."""
    U, V = (torch.linalg.qr(torch.randn(side, rank, generator=generator))[0] for side in (m, n))
    update: Tensor = (U * (0.7 + 0.6 * torch.rand(rank, generator=generator))) @ V.t()
    return update


# The net -------------------------------------------------------------------------------------------------------------


class PlantedNetConfig(PreTrainedConfig):
    """Size of a `PlantedNet`."""

    model_type = "planted_net"

    def __init__(self, layers: int = _LAYERS, width: int = _WIDTH, **kwargs: Any) -> None:
        self.layers, self.width = layers, width
        super().__init__(**kwargs)


class _Given(PreTrainedModel):
    """A model whose weights are given, not drawn."""

    def _init_weights(self, module: nn.Module) -> None:
        pass


class PlantedNet(_Given):
    """The residual net h ← h + tanh(h Wᵀ) / 2, layer by layer; its weights W have the shape (width, width)."""

    config_class = PlantedNetConfig

    def __init__(self, config: PlantedNetConfig) -> None:
        super().__init__(config)
        shape = (config.width, config.width)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"dense": nn.Linear(*shape, bias=False)}) for _ in range(config.layers)
        )
        self.post_init()

    @classmethod
    def of(cls, weights: Tensor) -> PlantedNet:
        """Return the net with these weights, shape (layers, width, width)."""
        net = cls(PlantedNetConfig(weights.shape[0], weights.shape[1]))
        with torch.no_grad():
            for layer, weight in zip(net.layers, weights, strict=True):
                layer["dense"].weight.copy_(weight)  # type: ignore[index]
        return net

    def forward(self, inputs_embeds: Tensor, labels: Tensor | None = None, **_: Any) -> SequenceClassifierOutput:
        """Map inputs (batch, width) to outputs of that shape; with labels, the loss is the mean squared error."""
        h = inputs_embeds
        for layer in self.layers:
            h = h + 0.5 * torch.tanh(layer["dense"](h))  # type: ignore[index]
        return SequenceClassifierOutput(loss=_loss(h, labels), logits=h)


class NetData(NamedTuple):
    """A planted net and its examples; inputs and outputs have the shape (examples, width).

    Args:
        base: Weights that do not train, (layers, width, width).
        teacher: Weights to be found, of that shape.
        ranks: Planted rank by module.
        inputs: Of the training examples, of the fresh ones, and of the held-out ones.
        targets: The teacher's outputs for these, noisy for the training examples.
    """

    base: Tensor
    teacher: Tensor
    ranks: dict[str, int]
    inputs: tuple[Tensor, Tensor, Tensor]
    targets: tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def make_net(spec: MadeTask, seed: int) -> NetData:
    """Return net, teacher and examples of a task: the same for the same seed, on every machine with this PyTorch."""
    layers, width = spec.layers or _LAYERS, spec.width or _WIDTH
    noise, examples = _NOISE if spec.noise is None else spec.noise, spec.examples or _EXAMPLES
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base = torch.stack([draw(width, width) / math.sqrt(width) for _ in range(layers)])
    ranks = deal_ranks(spec, {f"layers.{layer}.dense": (width, width) for layer in range(layers)}, generator)
    teacher = base.clone()
    for weight, rank in zip(teacher, ranks.values(), strict=True):
        if rank:
            weight += planted_update(width, width, rank, generator)
    train, fresh = draw(examples, width), draw(_FRESH, width)
    noisy = noise * draw(examples, width)
    inputs, net = (train, fresh, draw(_FRESH, width)), PlantedNet.of(teacher)
    outputs = [net(one).logits for one in inputs]
    return NetData(base, teacher, ranks, inputs, (outputs[0] + noisy, outputs[1], outputs[2]))


# The encoder ---------------------------------------------------------------------------------------------------------


class HiddenStates(_Given):
    """An encoder that is trained on its last hidden states.

    Args:
        unit: Mean squared error that is a loss of 1.
    """

    _supports_sdpa = True  # whatever attention the encoder has chosen
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, encoder: Any, unit: float = 1.0) -> None:
        super().__init__(encoder.config)
        self.unit = unit
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # nothing of it reaches the hidden states
        self.encoder = encoder
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Return hidden states (batch, tokens, width); the loss is the mean squared error over `unit`."""
        h = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        loss = _loss(h, labels, attention_mask)
        return SequenceClassifierOutput(loss=None if loss is None else loss / self.unit, logits=h)


def load_encoder(name: str, unit: float = 1.0, *, meta: bool = False) -> HiddenStates:
    """Return a pretrained encoder in float32 without dropout, whose loss is in this unit; `meta`: its shapes alone.

    Dropout would move the hidden states further than the planted updates do.

    Raises:
        ConfigError: There is no such model.
    """
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(name)
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        if not meta:
            return HiddenStates(AutoModel.from_pretrained(name, config=config, dtype=torch.float32), unit)
        with torch.device("meta"):
            return HiddenStates(AutoModel.from_config(config))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise bad_value("model.name", name, f"cannot be loaded as an encoder ({reason}); check the name") from error


@torch.no_grad()
def plant(model: nn.Module, ranks: Mapping[str, int], strength: float, generator: torch.Generator) -> nn.Module:
    """Return a copy of `model` with updates of these ranks, by module name.

    The singular values of an update are `strength` times 0.7 to 1.3, in units of ‖W0‖_F / √min(m, n), the root mean
    square of the singular values of its matrix.
    """
    teacher = copy.deepcopy(model)
    for name, rank in ranks.items():
        if rank:
            weight = teacher.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            size = strength * float(weight.detach().norm()) / math.sqrt(min(weight.shape))
            m, n = weight.shape
            weight += size * planted_update(m, n, rank, generator)
    return teacher


# The job -------------------------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """What a planted task trains and is measured on.

    Args:
        load: Returns the base model.
        collate: Makes a batch of rows.
        parts: By split, rows with `row`, their number, and those that are evaluated with `base_error`, the base's
            squared error.
    """

    load: Callable[[], PreTrainedModel]
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
    parts: Mapping[str, Dataset]


@dataclass(frozen=True)
class PlantedJob:
    """A base that learns to be its teacher; it implements `Job`.

    Args:
        planted: Planted rank by module.
        examples: Numbers of examples by split.
        held_out: Name of the held-out split.
        make: Makes models and examples; called once, when they are needed.
        tokenizer: The encoder's; None for a net.
    """

    planted: Mapping[str, int]
    examples: dict[str, int]
    held_out: str
    make: Callable[[], Made]
    tokenizer: Any = None

    @classmethod
    def of_net(cls, spec: MadeTask, held_out: str, seed: int) -> PlantedJob:
        """Return the job of a planted net.

        Raises:
            ConfigError: A rank that is larger than the net is wide.
        """
        data = make_net(spec, seed)
        splits = ("train", FRESH, held_out)
        counts = {split: len(one) for split, one in zip(splits, data.inputs, strict=True)}
        return cls(data.ranks, counts, held_out, partial(_made_net, data, splits))

    @classmethod
    def of_encoder(
        cls, spec: MadeTask, held_out: str, seed: int, model: str, texts: Mapping[str, list[str]], max_length: int
    ) -> PlantedJob:
        """Return the job of a planted encoder.

        Args:
            held_out: Name of the held-out split.
            seed: Of what is planted.
            model: Hub name or folder of the encoder.
            texts: Texts of the splits `train`, `held_out` and `FRESH`.
            max_length: Most tokens of a text; the rest is cut off.

        Raises:
            ConfigError: No such encoder, a text longer than it takes, or a rank that is larger than its matrices.
        """
        tokenizer = load_tokenizer(model, max_length)
        tokenizer.padding_side = "right"  # as the hidden states are padded
        check_positions(model, max_length)
        generator = torch.Generator().manual_seed(seed)
        empty = load_encoder(model, meta=True)
        shapes = {name: empty.get_submodule(name).weight.shape for name in encoder_linears(empty)}
        ranks = deal_ranks(spec, shapes, generator)
        make = partial(_made_encoder, spec, model, ranks, generator, texts, tokenizer, max_length)
        return cls(ranks, {split: len(some) for split, some in texts.items()}, held_out, make, tokenizer)

    @cached_property
    def _made(self) -> Made:
        return self.make()

    @cached_property
    def objective(self) -> Objective:
        """Batches and metrics for the Trainer."""
        # The rows' numbers are no argument of a model, and make the batch.
        kind = TrainerKind(None, partial(TrainingArguments, remove_unused_columns=False))
        return Objective(self._made.collate, self.tokenizer, None, METRIC, evaluate=self._evaluate, trainer=kind)

    @property
    def train(self) -> Dataset:
        """The training rows."""
        return self._made.parts["train"]

    @property
    def eval_sets(self) -> dict[str, Dataset]:
        """The held-out rows and the fresh ones."""
        return {split: self._made.parts[split] for split in self.evaluated}

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The held-out split and the fresh one."""
        return self.held_out, FRESH

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def load_model(self) -> Any:
        """Return the base; a new one at every call."""
        return self._made.load()

    def predict(self, trainer: Any, split: str) -> Prediction:
        """Return error and loss over a whole split; see `_evaluate`."""
        measured = self._evaluate(trainer.model, self.eval_sets[split], trainer.args.per_device_eval_batch_size)
        return Prediction({name: measured[name] for name in (METRIC, "error")}, measured["loss"])

    def describe(self, model: Any, adapter: Path) -> None:
        """Write nothing: what the adapter is an update of is made from the seed."""

    @torch.no_grad()
    def _evaluate(self, model: Any, data: Dataset, batch_size: int) -> dict[str, float]:
        """Return `error`, see `relative_error`, `explained`, 1 − error, and the mean loss of an output."""
        from torch.utils.data import DataLoader

        model.eval()
        squared, count = 0.0, 0
        for batch in DataLoader(data, batch_size=batch_size, collate_fn=self._made.collate):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            summed, items = _squared_error(model(**batch).logits, batch["labels"], batch.get("attention_mask"))
            squared, count = squared + float(summed), count + items
        of_base = math.fsum(data["base_error"]) if any(self.planted.values()) else 0.0
        error, loss = relative_error(squared, of_base, count), squared / count
        return {METRIC: 1 - error, "error": error, "loss": loss}


def relative_error(squared: float, of_base: float, count: int) -> float:
    """Return a squared error over that of the base: 1 where nothing was learnt, 0 where everything was.

    Where nothing is planted there is nothing to divide by: the error is then 1 plus the mean of `count` squares.
    """
    return squared / of_base if of_base else 1 + squared / count


def _made_net(data: NetData, splits: Sequence[str]) -> Made:
    inputs, targets = torch.cat(data.inputs), torch.cat(data.targets)
    with torch.no_grad():
        errors = (PlantedNet.of(data.base)(inputs).logits - targets).double().square().sum(1).tolist()

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        chosen = [row["row"] for row in rows]
        return {"inputs_embeds": inputs[chosen], "labels": targets[chosen]}

    parts, start = {}, 0
    for split, some in zip(splits, data.inputs, strict=True):
        parts[split] = _rows(start, len(some), {"base_error": errors[start : start + len(some)]})
        start += len(some)
    return Made(partial(PlantedNet.of, data.base), collate, parts)


def _made_encoder(
    spec: MadeTask,
    name: str,
    ranks: Mapping[str, int],
    generator: torch.Generator,
    texts: Mapping[str, list[str]],
    tokenizer: Any,
    max_length: int,
) -> Made:
    base = load_encoder(name).eval()
    teacher = plant(base, ranks, _STRENGTH if spec.strength is None else spec.strength, generator).eval()
    targets: list[Tensor] = []
    parts, squared, count = {}, 0.0, 0
    for split, some in texts.items():
        encoded = tokenizer(some, truncation=True, max_length=max_length)
        inputs = [torch.tensor(ids) for ids in encoded["input_ids"]]
        start, goals = len(targets), _hidden_states(teacher, inputs)
        columns = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        if split == "train":
            targets += [goal + (spec.noise or 0.0) * torch.randn(goal.shape, generator=generator) for goal in goals]
            parts[split] = _rows(start, len(goals), columns)
        else:
            own = _hidden_states(base, inputs)
            errors = [float((h - goal).double().square().sum()) for h, goal in zip(own, goals, strict=True)]
            targets += goals
            squared, count = squared + math.fsum(errors), count + sum(goal.numel() for goal in goals)
            parts[split] = _rows(start, len(goals), {**columns, "base_error": errors})
    # A loss of 1 is the base's, whatever the size of the hidden states.
    unit = squared / count if any(ranks.values()) else 1.0

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = tokenizer.pad(
            [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows], return_tensors="pt"
        )
        return {**batch, "labels": pad_sequence([targets[row["row"]] for row in rows], batch_first=True)}

    return Made(partial(load_encoder, name, unit), collate, parts)


@torch.no_grad()
def _hidden_states(model: nn.Module, inputs: Sequence[Tensor], batch_size: int = 64) -> list[Tensor]:
    """Return the hidden states (tokens, width) of every text, in batches of like lengths."""
    order = sorted(range(len(inputs)), key=lambda place: len(inputs[place]))
    found: dict[int, Tensor] = {}
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        padded = pad_sequence([inputs[place] for place in chosen], batch_first=True)
        mask = pad_sequence([torch.ones_like(inputs[place]) for place in chosen], batch_first=True)
        states = model(padded, mask).logits
        found |= {place: row[: len(inputs[place])].clone() for place, row in zip(chosen, states, strict=True)}
    return [found[place] for place in range(len(inputs))]


def _rows(start: int, count: int, columns: Mapping[str, Any]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({"row": list(range(start, start + count)), **columns})


def _loss(h: Tensor, labels: Tensor | None, mask: Tensor | None = None) -> Tensor | None:
    if labels is None:
        return None
    squared, count = _squared_error(h, labels, mask)
    return squared / count


def _squared_error(h: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """Return the summed squared error of hidden states (…, width), and how many numbers it is the sum of."""
    squared = (h - labels).square()
    if mask is None:
        return squared.sum(), squared.numel()
    return (squared * mask.unsqueeze(-1)).sum(), int(mask.sum()) * h.shape[-1]


# Texts of an encoder -------------------------------------------------------------------------------------------------


def split_texts(
    texts: Sequence[str | None], share: float, seed: int, held_out: str, where: str
) -> dict[str, list[str]]:
    """Return different texts by split: `train`, `held_out`, and `FRESH`; the last two have a `share` of them each.

    Raises:
        DataError: There are too few.
    """
    different = list(dict.fromkeys(text for text in texts if text and text.strip()))
    size = int(share * len(different))
    if size < 1 or len(different) - 2 * size < 1:
        remedy = f"{len(different)} different texts cannot be split so; give more, or another share"
        raise bad_value(where, share, remedy, DataError)
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [different[place] for place in order]
    return {"train": shuffled[2 * size :], held_out: shuffled[:size], FRESH: shuffled[size : 2 * size]}


# What was found ------------------------------------------------------------------------------------------------------


def compare_ranks(planted: Mapping[str, int], found: Mapping[str, int], began: Mapping[str, int]) -> dict[str, Any]:
    """Return found ranks against planted ones, JSON-able.

    Args:
        planted: Planted rank by module.
        found: Rank at the end by module; modules that it lacks count as 0. Empty for a method without ranks.
        began: Rank at step 0 by module.

    Returns:
        `ranks`: planted rank by module; `mean_planted` and `mean_found`; `spearman` and `pearson`
        between planted and found, None where either is the same everywhere; `grew`: share of the matrices whose rank
        at the end is above that at step 0; `nonzero`: share whose rank at the end is not 0.
    """
    from scipy.stats import pearsonr, spearmanr

    result: dict[str, Any] = {"ranks": dict(planted), "mean_planted": sum(planted.values()) / len(planted)}
    if not found:
        return result | dict.fromkeys(("mean_found", "spearman", "pearson", "grew", "nonzero"))
    truth, ranks = list(planted.values()), [found.get(name, 0) for name in planted]
    varied = len(set(truth)) > 1 and len(set(ranks)) > 1
    return result | {
        "mean_found": sum(ranks) / len(ranks),
        "spearman": float(spearmanr(truth, ranks).statistic) if varied else None,
        "pearson": float(pearsonr(truth, ranks).statistic) if varied else None,
        "grew": sum(rank > began.get(name, 0) for name, rank in zip(planted, ranks, strict=True)) / len(ranks),
        "nonzero": sum(rank > 0 for rank in ranks) / len(ranks),
    }
