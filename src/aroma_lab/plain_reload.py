"""A program of its own: base model and adapter in plain PEFT, in a process that cannot import aroma.

It is run by path, never imported: `python -P plain_reload.py < JOB.json`. The job has the keys `base_model`,
`adapter`, `texts`, `topics` and `max_length`. It prints how many texts get their topic; labels are the sorted topics.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Predict the texts of the job, and print how many are right."""
    sys.modules["aroma"] = None  # type: ignore[assignment]  # any import of it fails from here on
    job = json.load(sys.stdin)

    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    labels = sorted({*job["topics"]})
    tokenizer = AutoTokenizer.from_pretrained(job["adapter"])
    base = AutoModelForSequenceClassification.from_pretrained(job["base_model"], num_labels=len(labels))
    model = PeftModel.from_pretrained(base, job["adapter"]).eval()
    right = 0
    for start in range(0, len(job["texts"]), 16):
        texts, topics = job["texts"][start : start + 16], job["topics"][start : start + 16]
        batch = tokenizer(texts, truncation=True, max_length=job["max_length"], padding=True, return_tensors="pt")
        with torch.no_grad():
            answers = model(**batch).logits.argmax(-1).tolist()
        right += sum(labels[answer] == topic for answer, topic in zip(answers, topics, strict=True))
    print(right)


if __name__ == "__main__":
    main()
