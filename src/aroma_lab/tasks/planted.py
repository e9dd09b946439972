"""Planted ranks: a frozen base learns to be a teacher that is itself plus updates whose ranks are known.

A method that finds ranks can be held against the truth. Two kinds of tasks share one job: a small residual net on
random inputs, here, and a pretrained encoder on real sentences, in `planted_encoder`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from aroma.errors import bad_value

from ..specs import HELD_OUT, TaskSpec
from ..training.job import Job, Prediction

if TYPE_CHECKING:
    from datasets import Dataset

GRADED = (0, 0, 0, 0, 1, 1, 2, 2, 4, 4, 8, 8)
"""Ranks that are planted unless others are given."""
METRIC = "explained"
"""The score: 1 − error, so that 1 is perfect and 0 is the base."""
FRESH = "fresh"
"""The reported split: inputs that nothing trained on, with the teacher's outputs free of noise."""
Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
"""Makes a batch of rows."""
_EXAMPLES, _FRESH, _NOISE, _LAYERS, _WIDTH = 1500, 2000, 0.1, 12, 64


# The planted updates -------------------------------------------------------------------------------------------------


def deal_ranks(spec: TaskSpec, shapes: Mapping[str, Sequence[int]], generator: torch.Generator) -> dict[str, int]:
    """Return the planted rank of every matrix: the task's ranks in turn, shuffled.

    Args:
        shapes: Shape (m, n) by module name.
        generator: Draws the order.

    Raises:
        ConfigError: A rank is larger than the smallest side of a matrix.
    """
    ranks = list(GRADED if spec.ranks is None else spec.ranks)
    most = min(min(shape) for shape in shapes.values())
    if max(ranks) > most:
        remedy = f"no update of a matrix {most} wide has a rank of more than {most}; give smaller ranks"
        raise bad_value("data.ranks", ranks, remedy)
    order = torch.randperm(len(shapes), generator=generator).tolist()
    return {name: ranks[place % len(ranks)] for name, place in zip(shapes, order, strict=True)}


def planted_update(m: int, n: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return U diag(σ) Vᵀ, shape (m, n): random orthonormal U (m, rank), V (n, rank), and σ between 0.7 and 1.3."""
    U, V = (torch.linalg.qr(torch.randn(side, rank, generator=generator))[0] for side in (m, n))
    update: Tensor = (U * (0.7 + 0.6 * torch.rand(rank, generator=generator))) @ V.t()
    return update


# The net -------------------------------------------------------------------------------------------------------------


@dataclass
class Hidden(ModelOutput):
    """Hidden states and, with labels, the loss."""

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None


class PlantedNetConfig(PreTrainedConfig):
    """Size of a `PlantedNet`."""

    model_type = "planted_net"

    def __init__(self, layers: int = _LAYERS, width: int = _WIDTH, **kwargs: Any) -> None:
        self.layers, self.width = layers, width
        super().__init__(**kwargs)


class GivenModel(PreTrainedModel):
    """A model whose weights are given, not drawn."""

    def _init_weights(self, module: nn.Module) -> None:
        pass


class PlantedNet(GivenModel):
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

    def forward(self, inputs_embeds: Tensor, labels: Tensor | None = None, **_: Any) -> Hidden:
        """Map inputs (batch, width) to outputs of that shape; with labels, the loss is the mean squared error."""
        h = inputs_embeds
        for layer in self.layers:
            h = h + 0.5 * torch.tanh(layer["dense"](h))  # type: ignore[index]
        loss = None if labels is None else nn.functional.mse_loss(h, labels)
        return Hidden(loss, h)


class NetData(NamedTuple):
    """A planted net and its examples; inputs and outputs have the shape (examples, width).

    `base` are weights that do not train and `teacher` those to be found, both (layers, width, width); `ranks` has the
    planted rank by module. `inputs` and `targets` are of the training examples (noisy), the fresh and the held-out.
    """

    base: Tensor
    teacher: Tensor
    ranks: dict[str, int]
    inputs: tuple[Tensor, Tensor, Tensor]
    targets: tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def make_net(spec: TaskSpec, seed: int) -> NetData:
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
    outputs = [net(one).last_hidden_state for one in inputs]
    return NetData(base, teacher, ranks, inputs, (outputs[0] + noisy, outputs[1], outputs[2]))


# The job -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeJob(Job):
    """A made base model that learns a right answer; see `Job`.

    Args:
        load: Returns the base model, a new one at every call.
        measured: Called with model, rows and batch size, returns metrics and loss.
    """

    metric: str
    evaluated: tuple[str, ...]
    load: Callable[[], Any]
    collator: Collate
    rows: Mapping[str, Dataset]
    measured: Callable[[Any, Dataset, int], Prediction]
    planted: Mapping[str, int] | None = None
    tokenizer: Any = None
    counts_items: bool = False

    @property
    def examples(self) -> dict[str, int]:
        """Numbers of examples by split."""
        return {split: len(some) for split, some in self.rows.items()}

    def load_model(self) -> Any:
        """Return the base; a new one at every call."""
        return self.load()

    def measure(self, model: Any, rows: Dataset, batch_size: int) -> Prediction:
        """Return metrics and loss over rows."""
        return self.measured(model, rows, batch_size)


def planted_job(spec: TaskSpec, seed: int) -> MadeJob:
    """Return the job of a planted net; ConfigError for a rank that is larger than the net is wide."""
    data = make_net(spec, seed)
    inputs, targets = torch.cat(data.inputs), torch.cat(data.targets)
    with torch.no_grad():
        errors = (PlantedNet.of(data.base)(inputs).last_hidden_state - targets).double().square().sum(1).tolist()

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        chosen = [row["row"] for row in rows]
        return {"inputs_embeds": inputs[chosen], "labels": targets[chosen]}

    parts, start = {}, 0
    for split, some in zip(("train", FRESH, HELD_OUT), data.inputs, strict=True):
        parts[split] = rows_of(start, len(some), {"base_error": errors[start : start + len(some)]})
        start += len(some)
    load, measure = partial(PlantedNet.of, data.base), partial(evaluate, collate, any(data.ranks.values()))
    return MadeJob(METRIC, (HELD_OUT, FRESH), load, collate, parts, measure, data.ranks)


@torch.no_grad()
def evaluate(collate: Collate, is_planted: bool, model: Any, data: Dataset, batch_size: int) -> Prediction:
    """Return `error`, a share of the base's, and `explained`, 1 − error; the loss is the mean one of an output."""
    from torch.utils.data import DataLoader

    model.eval()
    squared, count = 0.0, 0
    for batch in DataLoader(data, batch_size=batch_size, collate_fn=collate):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        summed, items = squared_error(model(**batch).last_hidden_state, batch["labels"], batch.get("attention_mask"))
        squared, count = squared + float(summed), count + items
    of_base = math.fsum(data["base_error"]) if is_planted else 0.0
    error = squared / of_base if of_base else 1 + squared / count  # nothing is planted, and the base is right
    return Prediction({METRIC: 1 - error, "error": error}, squared / count)


def rows_of(start: int, count: int, columns: Mapping[str, Any]) -> Dataset:
    """Return rows that are numbered from `start`, with these columns."""
    from datasets import Dataset

    return Dataset.from_dict({"row": list(range(start, start + count)), **columns})


def squared_error(h: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """Return the summed squared error of hidden states (…, width), and how many numbers it is the sum of."""
    squared = (h - labels).square()
    if mask is None:
        return squared.sum(), squared.numel()
    return (squared * mask.unsqueeze(-1)).sum(), int(mask.sum()) * h.shape[-1]


# The ranks that were found -------------------------------------------------------------------------------------------


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
