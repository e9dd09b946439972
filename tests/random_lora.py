"""A model with a layer of every kind that PEFT's LoRA adapts, and random adapters of it in random states."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributions import Categorical
from transformers.pytorch_utils import Conv1D

WIDTH, TOKENS, CLASSES, LENGTH = 8, 20, 3, 5


class Experts(nn.Module):
    """Experts whose matrices are two parameters; the last one is never asked."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, WIDTH, WIDTH) / math.sqrt(WIDTH))
        self.down = nn.Parameter(torch.randn(experts, WIDTH, WIDTH) / math.sqrt(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.arange(x.shape[-2], device=x.device) % (len(self.up) - 1)
        hidden = torch.tanh(torch.einsum("...ti,toi->...to", x, self.up[chosen]))
        return torch.einsum("...ti,toi->...to", hidden, self.down[chosen])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.tanh(self.linear(x)))


class Zoo(nn.Module):
    """Tokens (examples, LENGTH) in, logits (examples, CLASSES) out. `linear` is also the end of other names."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.gpt = Conv1D(WIDTH, WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, (1, 3), padding=(0, 1), groups=groups)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.experts = Experts()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + torch.tanh(self.linear(x))
        for block in self.layers:
            x = block(x)
        x = x + torch.tanh(self.gpt(x))
        x = x + torch.tanh(self.conv(x.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.drop(x + self.experts(x))
        return self.head(x.mean(1))


def zoo(groups: int = 1) -> Zoo:
    """Return the base model, always the same."""
    torch.manual_seed(0)
    return Zoo(groups).double().eval()


def answers(model: nn.Module, batch: dict[str, Tensor]) -> Categorical:
    """What the model answers, for `aroma.compress(outputs=)`."""
    return Categorical(logits=model(batch["ids"]))


def batches(count: int = 4, size: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"ids": torch.randint(0, TOKENS, (size, LENGTH), generator=generator)} for _ in range(count)]


KINDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["linear"]},
    "embedding": {"target_modules": ["embed", "gpt"]},
    "gpt": {"target_modules": ["gpt", "linear"]},
    "conv": {"target_modules": ["conv", "linear"]},
    "experts": {"target_modules": ["linear"], "target_parameters": ["experts.up", "experts.down"]},
    "attention": {"target_modules": ["attention", "linear"]},
    "rslora": {"target_modules": ["linear", "conv"], "use_rslora": True},
    "dora": {"target_modules": ["linear", "embed", "conv"], "use_dora": True},
    "rank_pattern": {
        "target_modules": ["linear", "gpt"],
        "rank_pattern": {"layers.1.linear": 2, "gpt": 1},
        "alpha_pattern": {"layers.0.linear": 3},
    },
    "bias": {"target_modules": ["linear"], "bias": "lora_only"},
    "head": {"target_modules": ["linear"], "modules_to_save": ["head"]},
}
"""One configuration for each kind of layer and option."""


def adapted(options: dict[str, Any], groups: int = 1, seed: int = 0, zero: tuple[int, ...] = ()) -> Any:
    """Return the base with a LoRA adapter whose updates are not zero, but for those of the layers `zero` names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of grouped convolutions and of layers that it may not know
        model = get_peft_model(zoo(groups), LoraConfig(**{"r": 4, "lora_alpha": 6, **options})).double()
    randomize(model, seed, zero)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int, zero: tuple[int, ...] = (), adapter: str = "default") -> None:
    """Draw everything that the adapter trains; B of the layers with the numbers `zero` is zero."""
    generator, number = torch.Generator().manual_seed(seed), 0
    for name, parameter in model.named_parameters():
        is_last = "lora_B" in name or "lora_embedding_B" in name
        if f".{adapter}" not in name and not name.endswith(".bias"):  # PEFT does not save in_proj_bias
            continue
        if "bias" in name and not parameter.requires_grad:
            continue
        values = torch.randn(parameter.shape, generator=generator).to(parameter)
        scale = 0.5 if "lora_" in name else 0.3
        parameter.copy_(parameter * 1.1 + 0.05 if "magnitude" in name else values * scale)
        if is_last:
            if number in zero:
                parameter.zero_()
            number += 1


@dataclass(frozen=True)
class Case:
    """A random adapter, its state, and how it is compressed."""

    options: dict[str, Any]
    groups: int
    zero: tuple[int, ...]
    state: str
    dtype: torch.dtype
    limits: dict[str, Any]
    has_examples: bool
    second: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a case."""
    groups = draw(st.sampled_from([1, 1, 2]))
    r = draw(st.integers(1, 4)) * groups
    names = ["embed", "linear", "layers.0.linear", "layers.1.linear", "gpt", "conv", "attention"]
    targets = draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
    if "gpt" in targets:  # a Conv1D makes PEFT transpose an attention that it adapts later
        targets = [name for name in targets if name != "attention"]
    parameters = draw(st.lists(st.sampled_from(["experts.up", "experts.down"]), max_size=2, unique=True))
    form = draw(st.sampled_from(["names", "names", "pattern", "all"]))
    options: dict[str, Any] = {
        "r": r,
        "lora_alpha": draw(st.sampled_from([1, 4, 16])),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.sampled_from([False, False, True])),
        "bias": draw(st.sampled_from(["none", "none", "all", "lora_only"])),
        "modules_to_save": draw(st.sampled_from([None, ["head"]])),
        "target_modules": {"names": targets, "pattern": r".*(linear|gpt)", "all": "all-linear"}[form],
    }
    # PEFT refuses experts where the last layer before them is a Conv1D.
    if parameters and form == "names" and "gpt" not in targets and draw(st.booleans()):
        options["target_parameters"] = parameters
    if draw(st.booleans()):
        options["rank_pattern"] = {draw(st.sampled_from(names)): draw(st.integers(1, 3)) * groups}
    if draw(st.booleans()):
        options["alpha_pattern"] = {draw(st.sampled_from(names)): draw(st.integers(1, 9))}
    if form == "names" and "linear" in targets and draw(st.booleans()):
        options["layers_to_transform"] = [draw(st.integers(0, 1))]
    if form != "names" and draw(st.booleans()):
        options["exclude_modules"] = ["layers.0.linear"]
    if draw(st.integers(0, 9)) == 0:
        options |= draw(st.sampled_from([{"lora_bias": True}, {"init_lora_weights": "pissa"}, {"lora_dropout": 0.3}]))
    has_examples = draw(st.booleans())
    limit = draw(st.sampled_from(["size", "rank", "both", *(["keep", "default"] if has_examples else [])]))
    limits: dict[str, Any] = {}
    if limit in ("size", "both"):
        limits["size"] = draw(st.sampled_from([0.01, 0.1, 0.3, 0.7, 1.0]))
    if limit in ("rank", "both"):
        limits["rank"] = draw(st.integers(1, 5))
    if limit == "keep":
        limits["keep"] = draw(st.sampled_from([0.5, 0.9, 0.99, 1.0]))
    return Case(
        options=options,
        groups=groups,
        zero=tuple(draw(st.lists(st.integers(0, 8), max_size=3))),
        state=draw(st.sampled_from(["trained"] * 6 + ["untouched", "merged", "disabled", "nan"])),
        dtype=draw(st.sampled_from([torch.float64] * 3 + [torch.float32, torch.bfloat16])),
        limits=limits,
        has_examples=has_examples,
        second=draw(st.sampled_from([False, False, True])),
    )
