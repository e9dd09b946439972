"""GRPO with a reward that can be verified: a tiny Llama learns to add. AROMA beside LoRA of rank 1, 8 and 32.

    python examples/trl_grpo.py results/rl                  # everything that is missing there, then the picture
    python examples/trl_grpo.py results/rl --method aroma   # one method

The base model is trained first, on sums of which two in three are wrong. Then GRPO rewards right sums. Each method
gets the best of three learning rates, chosen with another seed by the reward of its last 50 steps, and then three
seeds. A run takes about a minute of one CPU core. Each leaves a JSON file, and a second start of the same command does
what is missing. `table.md` and `reward.png` are made of these files.
"""

from __future__ import annotations

import argparse
import json
import random
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from aroma import AromaCallback, AromaConfig, aroma_layers
from aroma_lab.run.machine import provenance

SYMBOLS = ["<pad>", "<eos>", "+", "=", *"0123456789"]
LARGEST = 20
"""Numbers are below it."""
SEEDS = (0, 1, 2)
CHOOSING_SEED = 9
RATES = (1e-3, 3e-3, 1e-2)
METHODS: dict[str, Any] = {
    "aroma": AromaConfig(task_type="CAUSAL_LM"),
    **{
        f"lora-{r}": LoraConfig(r=r, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        for r in (1, 8, 32)
    },
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single symbols."""
    tokenizer = Tokenizer(WordLevel({symbol: index for index, symbol in enumerate(SYMBOLS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def problems() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return pairs of numbers to train on, and pairs to test."""
    pairs = [(a, b) for a in range(LARGEST) for b in range(LARGEST)]
    random.Random(0).shuffle(pairs)
    return pairs[80:], pairs[:80]


def train_base(folder: Path, tokenizer: PreTrainedTokenizerFast, steps: int = 1000) -> None:
    """Train the base model on sums of which two in three are wrong by up to 5, and save it."""
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SYMBOLS),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    draw = random.Random(0)
    for _ in range(steps):
        texts = []
        for a, b in draw.choices(problems()[0], k=64):
            wrong = max(a + b + draw.choice([-5, -4, -3, -2, -1, 1, 2, 3, 4, 5]), 0)
            texts.append(f"{a}+{b}={a + b if draw.random() < 1 / 3 else wrong}")
        rows = [[*row, 1] for row in tokenizer(texts)["input_ids"]]
        batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, 0)
        model(input_ids=batch, labels=batch.masked_fill(batch == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)


def is_right(completions: list[str], total: list[int], **_: Any) -> list[float]:
    """The reward: 1 for the right sum, else 0."""
    return [float(text.replace(" ", "") == str(right)) for text, right in zip(completions, total, strict=True)]


@torch.no_grad()
def share_right(model: Any, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[int, int]]) -> float:
    """Return the share of sums that are right when the model samples, as in the training."""
    model.eval()
    texts = [f"{a}+{b}=" for a, b in pairs for _ in range(4)]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    prompts.pop("token_type_ids", None)
    told = model.generate(**prompts, do_sample=True, max_new_tokens=3, pad_token_id=0)
    answers = tokenizer.batch_decode(told[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(is_right(answers, [a + b for a, b in pairs for _ in range(4)])) / len(texts)


def run(out: Path, method: str, seed: int, steps: int, learning_rate: float) -> dict[str, Any]:
    """Train one adapter, and return what there is to tell."""
    tokenizer = make_tokenizer()
    base = LlamaForCausalLM.from_pretrained(out / "base")
    train, test = problems()
    set_seed(seed)
    before = share_right(base, tokenizer, test)
    callback = AromaCallback()
    trainer = GRPOTrainer(
        base,
        reward_funcs=is_right,
        args=GRPOConfig(
            output_dir=str(out / "scratch"),
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=seed,
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [f"{a}+{b}=" for a, b in train], "total": [a + b for a, b in train]}
        ),
        processing_class=tokenizer,
        peft_config=METHODS[method],
        callbacks=[callback] if method == "aroma" else [],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    told: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "learning_rate": learning_rate,
        "before": before,
        "after": share_right(trainer.model, tokenizer, test),
        "reward": [round(entry["reward"], 4) for entry in history],
    }
    if method == "aroma":
        matrices = callback.controller.summary()
        told["ranks"] = {matrix.name: matrix.rank for matrix in matrices}
        told["total_rank"] = [entry["total_rank"] for entry in history]
        told["explanation"] = callback.controller.explanation()
        layers = aroma_layers(trainer.model)
        sizes = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
        trained = sum(rank * sizes[name] for name, rank in told["ranks"].items())
    made_with = provenance()
    made_with["versions"]["trl"] = version("trl")
    return {**told, "parameters": trained, **made_with}


def runs_of(out: Path, method: str) -> list[dict[str, Any]]:
    """Return what the runs of a method told, by seed."""
    return [json.loads(file.read_text()) for file in sorted(out.glob(f"{method}-[0-9].json"))]


def tabulate(out: Path) -> None:
    """Write a table: the mean reward of the last 50 steps by seed, what is right of sums never seen, and sizes."""
    import pandas as pd

    rows = [
        {
            "method": method,
            "learning rate": runs[0]["learning_rate"],
            "reward, by seed": ", ".join(f"{sum(run['reward'][-50:]) / 50:.2f}" for run in runs),
            "right of sums never seen": ", ".join(f"{run['after']:.2f}" for run in runs),
            "parameters": ", ".join(dict.fromkeys(f"{run['parameters']:,}" for run in runs)),
        }
        for method in METHODS
        if (runs := runs_of(out, method))
    ]
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")


def draw(out: Path) -> None:
    """Draw reward against steps: mean of the seeds, smoothed over 20 steps."""
    import matplotlib.pyplot as plt
    import numpy as np

    _, rewards = plt.subplots(figsize=(6, 3.6))
    for method in METHODS:
        runs = runs_of(out, method)
        if not runs:
            continue
        curves = np.array([np.convolve(run["reward"], np.ones(20) / 20, "valid") for run in runs])
        steps = np.arange(20, 20 + curves.shape[1])
        (line,) = rewards.plot(steps, curves.mean(0), label=f"{method}, {len(runs)} seeds", zorder=3)
        rewards.fill_between(steps, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15, lw=0)
    rewards.set(xlabel="optimizer step", ylabel="share of right sums", title="Reward (mean and range of the seeds)")
    rewards.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(out / "reward.png", dpi=80)


def once(file: Path, *arguments: Any) -> dict[str, Any]:
    """Return what a file tells of a run; do the run first where there is none."""
    if not file.exists():
        told = run(file.parent, *arguments)
        half = file.with_suffix(".part")
        half.write_text(json.dumps(told) + "\n")
        half.replace(file)
        print(f"{file.stem}: right {told['before']:.3f} before, {told['after']:.3f} after", flush=True)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def main() -> None:
    """Train what is missing in a folder; write the table, and draw."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--method", choices=[*METHODS], help="only this one")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "base").exists():
        train_base(options.out / "base", make_tokenizer())
    for method in [options.method] if options.method else METHODS:
        tried = {
            rate: once(options.out / f"choosing-{method}-{rate}.json", method, CHOOSING_SEED, options.steps, rate)
            for rate in RATES
        }
        best = max(tried, key=lambda rate: sum(tried[rate]["reward"][-50:]))
        for seed in SEEDS:
            once(options.out / f"{method}-{seed}.json", method, seed, options.steps, best)
    tabulate(options.out)
    draw(options.out)


if __name__ == "__main__":
    main()
