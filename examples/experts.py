"""A mixture of experts that has read the news learns Python, and its adapter is compressed.

    pip install -e '.[demo]'
    python examples/experts.py

A small Qwen3-MoE reads BBC articles byte by byte, all its weights trained. Then LoRA adapts the 16 experts
of its two layers to the source of Python's standard library, and 256 blocks of it say what stays. PEFT has one rank
for all experts of a parameter. About two minutes on a CPU.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments, set_seed

from aroma import CompressCallback
from aroma_lab.tasks.articles import load_articles

LENGTH, BATCH, STEPS, UNSEEN = 128, 16, 300, 20
OUT = Path("out/experts")
CONFIG = Qwen3MoeConfig(
    vocab_size=256,  # bytes
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    max_position_embeddings=LENGTH,
    output_router_logits=True,  # the loss keeps experts equally busy
)


class Blocks(Dataset):
    """Bytes of a text in blocks of LENGTH."""

    def __init__(self, data: bytes, count: int) -> None:
        numbers = torch.frombuffer(bytearray(data[: count * LENGTH]), dtype=torch.uint8).long()
        self.blocks = numbers.view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def source_files() -> Iterator[bytes]:
    """Yield the modules of Python's standard library."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield file.read_bytes()


def train(model: Any, blocks: Dataset, rate: float, *callbacks: Any) -> None:
    """Train for STEPS steps, every block once."""
    args = TrainingArguments(
        str(OUT / "checkpoints"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        warmup_steps=10,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, args, train_dataset=blocks, callbacks=[*callbacks]).train()


@torch.no_grad()
def loss(model: Any, blocks: Blocks) -> float:
    """Return the loss of a model on all blocks, in nats a byte."""
    model.eval()
    return float(model(input_ids=blocks.blocks, labels=blocks.blocks, output_router_logits=False).loss)


def main() -> None:
    """Train the base, adapt it, and show ranks."""
    set_seed(0)
    news = "\n\n".join(article.text for article in load_articles()).encode()
    python = b"\n\n".join(source_files())
    needed = BATCH * STEPS
    unseen = Blocks(python[needed * LENGTH :], UNSEEN)
    base = Qwen3MoeForCausalLM(CONFIG)
    train(base, Blocks(news, needed), 3e-3)
    base.save_pretrained(OUT / "base")
    start = loss(base, unseen)

    config = LoraConfig(
        r=16,
        lora_alpha=64,
        task_type="CAUSAL_LM",
        target_modules=[],  # attention stays as it is
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = get_peft_model(base, config)
    compress = CompressCallback(keep=0.99)
    train(model, Blocks(python, needed), 5e-3, compress)
    model.save_pretrained(OUT / "adapter")

    print(f"loss on Python code: {start:.3f} before, {loss(model, unseen):.3f} after")
    print(compress.compression)
    for name, (before, after) in compress.compression.ranks.items():
        print(f"{name}: rank {before} before, {after} after")
    plain = PeftModel.from_pretrained(Qwen3MoeForCausalLM.from_pretrained(OUT / "base"), OUT / "adapter")
    print(f"loaded again: {loss(plain, unseen):.3f}")


if __name__ == "__main__":
    main()
