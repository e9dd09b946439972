"""Make an experiment for PEFT's method comparison: LoRA that starts with the ranks that an adapter ended with.

    python method_comparison/make.py ADAPTER PEFT/method_comparison/MetaMathQA/experiments/lora/NAME

ADAPTER is an adapter that `aroma compress`, `CompressCallback` or `AromaConfig` made. The new folder gets
adapter_config.json, and with `--learning-rate`, `--model` or `--steps` also training_params.json.
"""

import argparse
import json
import re
from pathlib import Path

from peft import LoraConfig

from aroma.ranks import rank_table


def experiment_of(adapter: str, scale: float) -> LoraConfig:
    """Return plain LoRA with the ranks of a saved adapter, untrained; `scale` is lora_alpha / r of every matrix."""
    ranks = {row.name: row.rank for row in rank_table(adapter) if row.rank}
    r = max(ranks.values(), key=[*ranks.values()].count)
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    return LoraConfig(
        r=r,
        lora_alpha=r * scale,
        rank_pattern=others,
        alpha_pattern={name: rank * scale for name, rank in others.items()},
        target_modules=[*ranks],
        task_type="CAUSAL_LM",
    )


def main() -> None:
    """Parse the command line, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=2.0, help="lora_alpha / r; the comparison's LoRA has 2")
    parser.add_argument("--learning-rate", type=float, help="1e-4 without it, the comparison's default")
    parser.add_argument("--model", help="base model, as in the comparison's training parameters")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out}: it exists already, and nothing is overwritten; give a new folder")
    experiment_of(options.adapter, options.scale).save_pretrained(options.out)
    changed = {"model_id": options.model, "max_steps": options.steps}
    if options.learning_rate is not None:
        # The comparison takes all of `optimizer_kwargs` from here, so its weight decay has to be in it.
        changed["optimizer_kwargs"] = {"lr": options.learning_rate, "weight_decay": 0.1}
    if changed := {name: value for name, value in changed.items() if value is not None}:
        (options.out / "training_params.json").write_text(json.dumps(changed, indent=2) + "\n")
    print(f"{options.out}: run it with `python run.py -v experiments/lora/{options.out.name}`")


if __name__ == "__main__":
    main()
