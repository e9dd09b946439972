"""A small vision transformer learns five digits, and is adapted to the other five. `pip install 'aroma-peft[lab]'`.

    python examples/vision.py

The base is trained here on scikit-learn's real digits of 8×8 grey values. Then LoRA of rank 8 adapts attention, MLP
and the convolution that cuts images into patches to the other digits, and each matrix keeps the rank that it needs.
"""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from aroma import CompressCallback

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "projection"]
CONFIG = ViTConfig(
    image_size=8,
    patch_size=4,
    num_channels=1,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    num_labels=5,
)


def images(digits):
    """Return training and test examples of these digits; the label is the place of a digit among them."""
    pixels, names = load_digits(return_X_y=True)
    chosen = np.isin(names, digits)
    examples = [
        {"pixel_values": torch.tensor(image / 8 - 1).float().view(1, 8, 8), "labels": digits.index(name)}
        for image, name in zip(pixels[chosen], names[chosen], strict=True)
    ]
    return train_test_split(examples, test_size=0.3, random_state=0)


def train(model, examples, rate, callbacks=()):
    """Train in place."""
    args = TrainingArguments(
        "out/vision",
        max_steps=800,
        per_device_train_batch_size=16,
        learning_rate=rate,
        warmup_steps=10,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model, args, train_dataset=examples, callbacks=[*callbacks]).train()


@torch.no_grad()
def accuracy(model, examples):
    """Return the share of examples whose digit is named."""
    found = model.eval()(pixel_values=torch.stack([example["pixel_values"] for example in examples])).logits.argmax(-1)
    return float((found == torch.tensor([example["labels"] for example in examples])).float().mean())


set_seed(0)
known, test = images([0, 1, 2, 3, 4])
base = ViTForImageClassification(CONFIG)
train(base, known, 2e-3)
print(f"the base names {accuracy(base, test):.1%} of {len(test)} images of its five digits")

others, test = images([5, 6, 7, 8, 9])
base.classifier.reset_parameters()
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=32, target_modules=TARGETS, modules_to_save=["classifier"]))
compress = CompressCallback()
train(model, others, 3e-3, [compress])
model.save_pretrained("out/vision/adapter")
print(compress.compression)
print(f"adapted, it names {accuracy(model, test):.1%} of {len(test)} images of the others")
