"""The README's example, whole: a real encoder learns to sort BBC News articles. `pip install -e '.[demo]'` first."""

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from aroma_lab.tasks.articles import TOPICS, load_articles, split_articles
from aroma_lab.tasks.model import packaged_encoder

set_seed(0)
name = str(packaged_encoder())  # or a hub name: "sentence-transformers/all-MiniLM-L6-v2"
tokenizer = AutoTokenizer.from_pretrained(name)
base = AutoModelForSequenceClassification.from_pretrained(
    name, id2label=dict(enumerate(TOPICS)), label2id={topic: label for label, topic in enumerate(TOPICS)}
)
train, test = (
    [
        {**tokenizer(article.text, truncation=True, max_length=16), "labels": TOPICS.index(article.topic)}
        for article in part
    ]
    for part in split_articles(load_articles())
)
args = TrainingArguments(
    "out/checkpoints",
    max_steps=220,  # each article twice
    per_device_train_batch_size=16,
    learning_rate=1e-3,
    warmup_steps=10,
    logging_steps=20,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
collate = DataCollatorWithPadding(tokenizer)


def accuracy(prediction):
    """Share of articles sorted right, over the whole test set."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


config = LoraConfig(r=16, lora_alpha=16, task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["pooler"])
model = get_peft_model(base, config)

# README: begin
from aroma import CompressCallback  # noqa: E402

compress = CompressCallback()
trainer = Trainer(model, args, collate, train, test, compute_metrics=accuracy, callbacks=[compress])
# README: end

trainer.train()
model.save_pretrained("out/adapter")
print(compress.compression)
print(trainer.evaluate())
