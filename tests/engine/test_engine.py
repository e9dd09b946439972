"""A GGUF adapter in llama.cpp against the same adapter in PEFT, on SmolLM2-135M-Instruct: next-token logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import node_llama
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from aroma import AromaConfig, aroma_layers
from aroma.export import export_uniform
from aroma.gguf import export_gguf
from aroma.tuner import live_adapter
from aroma_lab.language.gguf_source import packaged_gguf, resolve_gguf
from models import METHOD

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is",
    "Question: What do plants need for photosynthesis?\nAnswer:",
    "def fibonacci(n):\n    if n < 2:",
    "1, 2, 3, 4, 5,",
    "Once upon a time there was a little girl who",
]
QUESTION = "Which gas do we breathe in?"


@dataclass(frozen=True)
class Base:
    """One model in three forms.

    Args:
        gguf: The package's file, Q4_1.
        exact: The same weights unpacked to float32, as a GGUF file.
        folder: The same for transformers.
        prompts: Token ids.
    """

    gguf: Path
    exact: Path
    folder: Path
    prompts: list[list[int]]

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """Logits after every token of every prompt, (all tokens, vocabulary)."""
        return torch.cat([model(torch.tensor([ids])).logits[0] for ids in self.prompts])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    file = packaged_gguf()
    exact = tmp_path_factory.mktemp("smollm2") / "float32.gguf"
    unpack(file, exact)
    folder = resolve_gguf(str(file.parent), file.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )
    yield Base(file, exact, folder, [*(tokenizer(text)["input_ids"] for text in PROMPTS), chat])
    exact.unlink()


def unpack(source: Path, target: Path) -> None:
    """Write a GGUF file's weights in float32, all else as it is."""
    reader, writer = GGUFReader(source), GGUFWriter(target, "llama")
    own = {"general.architecture", "general.file_type", "general.quantization_version"}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in own:
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def adapter(smollm2: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose ranks go from 0 to 8, random and large: most of what the model says next it says otherwise."""
    model = get_peft_model(smollm2.load(), AromaConfig(task_type="CAUSAL_LM", **METHOD))
    generator = torch.Generator().manual_seed(7)
    for index, layer in enumerate(aroma_layers(model).values()):
        rank = [0, 1, 5, 8, 3][index % 5]
        B = 0.1 * torch.randn(layer.out_features, rank, generator=generator)
        A = 0.1 * torch.randn(rank, layer.in_features, generator=generator)
        if rank:
            layer.finished("default").append(B, A)
    live_adapter(model).ever_controlled = True
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(smollm2: Base, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Logits of PEFT and of the engine."""
    folder = tmp_path_factory.mktemp("answers")
    export_uniform(adapter, folder / "uniform")
    base = str(smollm2.folder)
    files = {"adapter": folder / "adapter.gguf", "uniform": folder / "uniform.gguf", "unordered": folder / "u.gguf"}
    export_gguf(adapter, files["adapter"], base)
    export_gguf(folder / "uniform", files["uniform"], base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aroma.gguf.rotary_rows", lambda rows, heads: rows)
        export_gguf(adapter, files["unordered"], base)
    model = smollm2.load()
    vocabulary = model.config.vocab_size

    def ask(file: Path, *names: str) -> list[Tensor]:
        given = [None, *(files[name] for name in names)]
        return node_llama.logits(file, smollm2.prompts, vocabulary, folder, given)

    result = {"peft base": smollm2.logits(model)}
    result["peft adapter"] = smollm2.logits(PeftModel.from_pretrained(model, adapter).eval())
    names = ("adapter", "uniform", "unordered")
    result |= zip(("base", *names), ask(smollm2.exact, *names), strict=True)
    result |= zip(("packed base", "packed adapter"), ask(smollm2.gguf, "adapter"), strict=True)
    return result


def distance(one: Tensor, other: Tensor) -> tuple[float, float, float]:
    """Largest and mean difference of the logits, and the share of tokens after which both say the same next."""
    difference = (one - other).abs()
    same = (one.argmax(1) == other.argmax(1)).float().mean()
    return float(difference.max()), float(difference.mean()), float(same)


@pytest.mark.parametrize(("engine", "peft"), [("base", "base"), ("adapter", "adapter"), ("uniform", "adapter")])
def test_llama_cpp_says_what_peft_says(answers: dict[str, Tensor], engine: str, peft: str) -> None:
    largest, _, same = distance(answers[engine], answers[f"peft {peft}"])
    assert same == 1
    assert largest < 1e-3  # of logits up to 30: float32, summed in another order


def test_that_agreement_is_no_accident(answers: dict[str, Tensor]) -> None:
    """The adapter moves the logits thousands of times further, and without the order of rows it is another adapter."""
    largest, mean, same = distance(answers["peft adapter"], answers["peft base"])
    assert largest > 10
    assert mean > 1
    assert same < 0.7
    largest, mean, same = distance(answers["unordered"], answers["peft adapter"])
    assert largest > 5
    assert mean > 0.3
    assert same < 0.95


def test_over_the_quantized_file_the_adapter_adds_no_error_of_its_own(answers: dict[str, Tensor]) -> None:
    """Over Q4_1 llama.cpp rounds the activations too: the base alone differs from float32, and no more with it."""
    _, without, _ = distance(answers["packed base"], answers["peft base"])
    _, with_adapter, same = distance(answers["packed adapter"], answers["peft adapter"])
    assert 0.05 < without < 0.5
    assert with_adapter < 1.5 * without
    assert same >= 0.9
