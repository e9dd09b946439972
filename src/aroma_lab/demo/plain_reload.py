"""A program of its own: base model and adapter in plain PEFT, in a process that cannot import aroma.

It is run by path, never imported: `python -P plain_reload.py JOB.json OUT.safetensors`. The job has the keys
`base_model`, `adapter`, `num_labels`, `texts`, `max_length`, `batch_size` and `threads`; the output is one tensor,
`logits`, of shape (texts, num_labels).
"""

from __future__ import annotations

import json
import sys


def main(job_file: str, out_file: str) -> None:
    """Predict the texts of the job, and write the logits."""
    sys.modules["aroma"] = None  # type: ignore[assignment]  # any import of it fails from here on
    with open(job_file, encoding="utf-8") as stream:
        job = json.load(stream)

    import torch
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["adapter"])
    base = AutoModelForSequenceClassification.from_pretrained(job["base_model"], num_labels=job["num_labels"])
    model = PeftModel.from_pretrained(base, job["adapter"]).eval()
    logits = []
    with torch.no_grad():
        for start in range(0, len(job["texts"]), job["batch_size"]):
            texts = job["texts"][start : start + job["batch_size"]]
            batch = tokenizer(texts, truncation=True, max_length=job["max_length"], padding=True, return_tensors="pt")
            logits.append(model(**batch).logits)
    save_file({"logits": torch.cat(logits)}, out_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
