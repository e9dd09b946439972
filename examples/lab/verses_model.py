"""Pretrain a Llama of five million parameters on English verses, for `verses.yaml`, which adapts it to Spanish.

    python examples/lab/verses_model.py VERSES OUT

VERSES holds train.jsonl, validation.jsonl and test.jsonl with the columns `english` and `spanish`: the same verse. OUT
gets the model and its tokenizer, and beside them the texts of the grid: Spanish to learn, to choose by and to report,
the unseen English that shows what is forgotten, and pairs to translate. A quarter of an hour on one core.

One verse in fifty is Spanish, as a little of what English models read is. Without it, the tokens of Spanish have no
embeddings, and no adapter that leaves embeddings alone learns the language.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

SEED, VOCABULARY, LENGTH, BATCH, STEPS, RATE = 0, 1024, 128, 16, 1500, 2e-3
SPANISH = 50
SPLITS = ("train", "validation", "test")


def read_verses(folder: Path) -> dict[tuple[str, str], list[str]]:
    """Return the verses by language and split."""
    found = {}
    for split in SPLITS:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for language in ("english", "spanish"):
            found[language, split] = [row[language] for row in rows if row[language].strip()]
    return found


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE made from the training text of both languages, so that Spanish words are not bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def rows_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return the texts one after another as rows of tokens, (rows, LENGTH)."""
    tokens = [token for ids in tokenizer(texts)["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
    return torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Return the mean loss of a token, in nats."""
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(64)]
    return sum(losses) / len(rows)


def main(verses: Path, out: Path) -> None:
    """Write model, tokenizer and texts."""
    found = read_verses(verses)
    tokenizer = make_tokenizer(found["english", "train"] + found["spanish", "train"])
    tokenizer.save_pretrained(out)
    files = {f"spanish-{split}": [{"text": text} for text in found["spanish", split]] for split in SPLITS}
    files["english"] = [{"text": text} for text in found["english", "test"]]
    for split in SPLITS:
        pairs = zip(found["english", split], found["spanish", split], strict=True)
        files[f"translation-{split}"] = [{"prompt": one, "completion": other} for one, other in pairs]
    for name, rows in files.items():
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(content, encoding="utf-8")

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    pretraining = found["english", "train"] + found["spanish", "train"][::SPANISH]
    rows, unseen = rows_of(tokenizer, pretraining), rows_of(tokenizer, found["english", "validation"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 25, STEPS)
    bar = tqdm(range(STEPS), desc=f"{model.num_parameters() / 1e6:.1f} M parameters")
    for step in bar:
        batch = rows[torch.randint(len(rows), (BATCH,))]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == STEPS:
            bar.set_postfix_str(f"loss {loss.item():.3f}, of unseen books {mean_loss(model, unseen):.3f}")
    model.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
