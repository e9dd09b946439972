"""Three tasks on one encoder, one after another: PEFT's several adapters, each of the size that its task needs.

    python examples/tasks_in_a_row.py runs/tasks --data ../shared/data

The frozen weights are held once. Each task has an adapter and a head of its own, so no task is forgotten, and each
adapter is saved, loaded and served by itself. The table says what each task scores when all have been learnt,
and what is left of its adapter of rank 16.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from aroma import CompressCallback
from aroma_lab.tasks.model import packaged_encoder

TASKS = ("trec", "sst2", "banking77")


def read(folder, split, tokenizer):
    """Return a task's examples, and the names of its labels."""
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    names = sorted({row["label"] for row in rows})
    encoded = [tokenizer(row["text"], truncation=True, max_length=64) for row in rows]
    return [{**one, "labels": names.index(row["label"])} for one, row in zip(encoded, rows, strict=True)], names


def accuracy(prediction):
    """Share of right answers, over the whole test set."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main():
    """Learn the tasks, then ask all of them again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of adapters and table")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {', '.join(TASKS)}")
    parser.add_argument("--model", default=None, help="encoder: a folder or hub name (the packaged MiniLM)")
    parser.add_argument("--steps", type=int, default=320, help="optimizer steps of a task")
    options = parser.parse_args()
    set_seed(0)
    name = options.model or str(packaged_encoder())
    tokenizer = AutoTokenizer.from_pretrained(name)
    read_task = {task: [read(options.data / task, split, tokenizer) for split in ("train", "test")] for task in TASKS}
    # PEFT copies the head for each adapter, so it has as many outputs as the largest task needs.
    outputs = max(len(names) for (_, names), _ in read_task.values())
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=outputs)
    # This encoder's pooler was never trained, so LoRA alone would learn nothing.
    train_too = {"modules_to_save": ["classifier", "pooler"]}
    config = LoraConfig(r=16, lora_alpha=16, task_type="SEQ_CLS", target_modules="all-linear", **train_too)
    model = get_peft_model(base, config, adapter_name=TASKS[0])
    arguments = TrainingArguments(
        str(options.out / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=1e-3,
        warmup_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    def trainer_of(task, train=None, callbacks=()):
        model.set_adapter(task)
        test = read_task[task][1][0]
        collate = DataCollatorWithPadding(tokenizer)
        return Trainer(model, arguments, collate, train, test, compute_metrics=accuracy, callbacks=[*callbacks])

    sizes = {}
    for task in TASKS:
        if task not in model.peft_config:
            model.add_adapter(task, config)
        compress = CompressCallback()
        trainer_of(task, read_task[task][0][0], [compress]).train()
        print(f"{task}: {compress.compression}", flush=True)
        sizes[task] = compress.compression.size
    model.save_pretrained(str(options.out / "adapters"))
    rows = {
        task: {
            "accuracy": f"{trainer_of(task).evaluate()['eval_accuracy']:.1%}",
            "size": f"{size.share:.1%}",
            "effect kept": f"{size.effect:.2%}",
            "directions": size.directions,
            "largest rank": size.largest_rank,
        }
        for task, size in sizes.items()
    }
    table = pd.DataFrame(rows).T.to_markdown()
    print(table)
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
