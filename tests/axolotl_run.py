"""python axolotl_run.py CONFIG FOLDER: what `axolotl train` does with AROMA's plugin, on a tiny model and a CPU.

Its own code reads and checks the configuration, loads the adapter and asks for callbacks. Its data and its Trainer
need more of its dependencies, so a plain Trainer trains.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import yaml
from axolotl.integrations.base import PluginManager
from axolotl.loaders.adapter import load_adapter
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from transformers import Trainer, TrainingArguments

from aroma import aroma_layers
from models import base, batch


def main(config: str, folder: str) -> None:
    """Train, save into `folder`, and print what happened as JSON."""
    cfg = DictDefault(yaml.safe_load(Path(config).read_text(encoding="utf-8")))
    prepare_plugins(cfg)
    capabilities = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 0, "n_node": 1, "compute_capability": "none"}
    cfg = validate_config(cfg, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})
    model, _ = load_adapter(base("llama"), cfg, cfg.adapter)
    args = TrainingArguments(
        f"{folder}/out",
        max_steps=40,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    ids = [batch("llama", seed)["input_ids"][0] for seed in range(96)]
    rows = [{"input_ids": one, "labels": torch.full_like(one, 5)} for one in ids]  # one answer to everything
    manager = PluginManager.get_instance()
    trainer = Trainer(model, args, train_dataset=rows, callbacks=manager.add_callbacks_pre_trainer(cfg, model))
    trainer.train()
    model.save_pretrained(f"{folder}/adapter")
    controller = next(one.controller for one in trainer.callback_handler.callbacks if hasattr(one, "controller"))
    saved = DictDefault({**cfg, "lora_model_dir": f"{folder}/adapter"})
    plain, _ = load_adapter(base("llama"), saved, cfg.adapter, inference=True)
    grown, _ = load_adapter(base("llama"), saved, cfg.adapter)
    models = {"trained": model, "plain": plain, "grown": grown}
    with torch.no_grad():
        logits = {name: one.eval()(**batch("llama")).logits for name, one in models.items()}
    assert not aroma_layers(plain)
    assert sum(layer.rank("default") for layer in aroma_layers(grown).values()) == controller.total_rank
    difference = {name: float((one - logits["trained"]).abs().max()) for name, one in logits.items()}
    print(json.dumps({"total_rank": controller.total_rank, "difference": difference}))


if __name__ == "__main__":
    main(*sys.argv[1:])
