"""Held-out examples as the Trainer's callback takes them: their columns, and whether they are trained on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer, TrainerCallback

from aroma import AromaCallback, AromaConfig, Event, hold_out
from aroma.errors import AromaWarning, ConfigError
from aroma.integrations.held_out import HeldOutDataset
from aroma.integrations.overlap import without_trained
from evidence_runs import METHOD, bert, bert_trainer, growth_dataset
from trainer_runs import adapted, arguments, examples, tiny_bert, trainer_for


def tokenized(count: int = 160, **changes: Any) -> Dataset:
    """Examples with a column that no model reads, which the Trainer drops."""
    rows = examples(count, **changes)
    columns = {name: [row[name].tolist() for row in rows] for name in rows[0]}
    return Dataset.from_dict({**columns, "text": [f"text {row}" for row in range(count)]})


def train(out: Path, training: Any, growth: Any, steps: int = 60, **options: Any) -> AromaCallback:
    model = get_peft_model(tiny_bert(), AromaConfig(task_type="SEQ_CLS", **METHOD))
    callback = AromaCallback(growth_dataset=growth, **options)
    settings = arguments(out, max_steps=steps, save_strategy="no")
    Trainer(model, settings, train_dataset=training, callbacks=[callback]).train()
    return callback


def test_columns_that_no_model_reads_are_dropped_as_the_trainer_drops_them(tmp_path: Path) -> None:
    training, growth = hold_out(tokenized(), share=0.2)
    controller = train(tmp_path, training, growth).controller
    assert controller is not None
    assert controller.rule.phase not in ("start", "trial", "questions")
    assert controller.global_step == 60


def test_a_batch_is_what_an_optimizer_step_takes(tmp_path: Path) -> None:
    """So accumulated gradients are decided on as many examples as a large batch."""
    settled: list[dict[str, tuple[int, float | None]]] = []
    for accumulated in (1, 2, 4):
        events: list[Event] = []
        model = bert(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double())
        sizes = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
        bert_trainer(tmp_path, events, model, {"growth_dataset": growth_dataset()}, **sizes).train()
        settled.append({event.module: (event.rank, event.value) for event in events if event.kind == "settled"})
    whole, *others = settled
    assert whole
    assert any(rank for rank, _ in whole.values())
    for parts in others:
        assert {name: rank for name, (rank, _) in parts.items()} == {name: rank for name, (rank, _) in whole.items()}
        assert [value for _, value in parts.values()] == pytest.approx([value for _, value in whole.values()])


def seen(batch_size: int, accumulated: int, number: int, questions: int = 8) -> list[list[int]]:
    """Return the rows of 40 in each micro-batch of a held-out batch."""
    found: list[list[int]] = []

    def note(model: nn.Module, batch: list[int]) -> Tensor:
        found.append(batch)
        return torch.zeros(())

    held_out = HeldOutDataset(range(40), batch_size, accumulated, questions, list, 0, 0, note, 0.7)
    for _ in held_out.losses(nn.Linear(1, 1), number):
        pass
    return found


def test_micro_batches_are_parts_of_a_batch() -> None:
    for number in (0, 3, 11):
        (whole,) = seen(4, 1, number)
        parts = seen(2, 2, number)
        assert [len(part) for part in parts] == [2, 2]
        assert [*parts[0], *parts[1]] == whole


def test_few_examples_make_more_batches_rather_than_large_ones() -> None:
    assert [len(seen(2, 8, 0, questions)) for questions in (2, 4, 8, 16, 40)] == [8, 5, 2, 1, 1]


@pytest.mark.parametrize("text", ["as there", "another"])
def test_a_row_that_is_trained_on_is_found_whatever_the_dropped_columns_say(tmp_path: Path, text: str) -> None:
    training, growth = hold_out(tokenized())
    rows = [{**growth[row], **({"text": text} if text == "another" else {})} for row in range(len(growth))]
    with pytest.raises(ConfigError, match=r"growth_dataset='160 examples': its row \d+ is row 0 of the training set"):
        train(tmp_path, training, Dataset.from_list([*rows, *training]))


def test_examples_that_the_data_have_twice_are_left_out_with_a_warning() -> None:
    rows = tokenized(200)
    training, growth = hold_out(rows)
    both = Dataset.from_list([*growth, training[3]])
    said = r"1 of 21 examples are trained on, too \(its row 20 is row 3 of the training"
    with pytest.warns(UserWarning, match=said):
        assert without_trained(both, training)["input_ids"] == growth["input_ids"]
    assert without_trained(growth, training) is growth


class Blurred(TorchDataset[Any]):
    """Examples that are never the same twice, as pictures that are cropped at random."""

    def __init__(self, count: int) -> None:
        self.rows = examples(count)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return {**self.rows[index], "noise": torch.randn(3)}


def test_parts_of_a_data_set_are_compared_by_their_indices() -> None:
    source = Blurred(60)
    training, growth = hold_out(source)
    assert without_trained(growth, training) is growth
    shared = Subset(source, [*growth.indices, training.indices[4]])
    with pytest.warns(UserWarning, match=r"1 of 7 examples .* \(its row 6 is row 4 of the training set\)"):
        left = without_trained(shared, training)
    assert len(left) == 6
    with pytest.raises(ConfigError, match=r"growth_dataset='6 examples': its row 0 is row \d+ of the training set"):
        without_trained(growth, source)
    inner = Subset(Subset(source, range(20, 60)), range(10))
    assert len(without_trained(inner, Subset(source, range(25)))) == 5


def images(count: int, seed: int) -> Dataset:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    rows = {"image": [Image.fromarray(one) for one in pixels], "label": [row % 2 for row in range(count)]}
    return Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_images_are_compared_by_their_pixels() -> None:
    training, growth = hold_out(images(200, seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert without_trained(growth, training) is growth
    with pytest.raises(ConfigError, match=r"growth_dataset='40 examples': its row 0 is row 7 of the training set"):
        without_trained(images(200, seed=0).select(range(7, 47)), images(200, seed=0))


def test_examples_are_compared_before_a_transform_that_augments() -> None:
    source = Dataset.from_dict({"x": [*range(60)]}).with_transform(lambda rows: {"x": torch.rand(len(rows["x"]))})
    with pytest.raises(ConfigError, match=r"growth_dataset='40 examples': its row 0 is row 0 of the training set"):
        without_trained(source.select(range(40)), source)


def test_rows_beyond_the_first_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aroma.integrations.overlap._MOST_ROWS", 12)
    training, growth = (Dataset.from_dict({"x": rows}) for rows in ([*range(20)], [*range(40, 60), 15, 3]))
    assert without_trained(growth, training) is growth
    with pytest.warns(UserWarning, match=r"1 of 3 examples are trained on, too \(its row 2 is row 3"):
        assert len(without_trained(growth.select([0, 20, 21]), training)) == 2


def test_examples_without_content_are_not_compared() -> None:
    rows = [{"x": object()} for _ in range(20)]
    with pytest.warns(UserWarning, match="objects of type object, which have no content to compare"):
        assert without_trained(rows[15:], rows[:15]) == rows[15:]
    source = [*rows]
    with (
        pytest.warns(UserWarning, match="no content to compare"),
        pytest.raises(ConfigError, match=r"its row 0 is row 3 of the training set"),
    ):
        without_trained(Subset(source, [3, 4]), Subset(source, range(10)))


def test_a_long_comparison_shows_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    training, growth = (Dataset.from_dict({"x": [*rows]}) for rows in (range(300), range(300, 310)))
    without_trained(growth, training)
    assert capsys.readouterr().err == "", "it is over at once"
    monkeypatch.setattr("aroma.integrations.overlap._PATIENCE", 0.0)
    without_trained(growth, training)
    assert "comparing the training set with held-out examples" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "batches", "size"), [(90, 8, 11), (8, 8, 1), (256, 8, 32), (300, 9, 32)])
def test_few_held_out_examples_make_smaller_batches(count: int, batches: int, size: int) -> None:
    """Else a thousand rows could not decide growth in batches of 32."""
    held = HeldOutDataset([*range(count)], 32, 1, 16, len, 0, 0, lambda _, batch: torch.tensor(batch), 0.05)
    assert held.count == batches
    assert [int(loss) for loss in held.losses(nn.Linear(1, 1), 0)] == [size]


class Stream(IterableDataset[Any]):
    """A stream that knows how long it is."""

    def __iter__(self) -> Iterator[Any]:
        return iter(examples(40))

    def __len__(self) -> int:
        return 40


@pytest.mark.parametrize(
    ("growth", "said"),
    [
        (
            [{"text": "abc", "labels": 1}] * 40,
            r"^growth_dataset='dict': PeftModel.*\(ValueError: .*prepare them as the",
        ),
        (
            [{**row, "labels": 7} for row in examples(40, seed=11)],
            r"PeftModel.* fails on a batch of them \(IndexError: ",
        ),
        (
            [
                {**row, "input_ids": row["input_ids"][: 3 + place % 2]}
                for place, row in enumerate(examples(40, seed=11))
            ],
            r"^growth_dataset='40 examples': no batch can be made of them \(.*\); prepare them as the training set",
        ),
        ([], r"^growth_dataset='empty': hold out some"),
        (examples(6, seed=11), r"^growth_dataset='6 examples': it takes 7 batches .*; hold out more, or raise signif"),
        (iter(examples(6)), r"^growth_dataset='list_iterator': it has no length, or no items by index"),
        (0.1, r"^growth_dataset=0\.1: it takes examples, and no share; train, growth = aroma\.hold_out\(dataset, 0"),
        ("rows.jsonl", r"^growth_dataset='rows\.jsonl': it takes the examples themselves; load them"),
        ({"train": examples(6)}, r"^growth_dataset='dict': it has splits \(train\)"),
        (DataLoader(examples(6)), r"^growth_dataset='DataLoader': .* give a datasets\.Dataset, a list"),
        (Stream(), r"^growth_dataset='Stream': it has no length, or no items by index"),
        (pd.DataFrame({"labels": [1] * 40}), r"^growth_dataset='DataFrame': .* give datasets\.Dataset\.from_pandas"),
    ],
)
def test_examples_that_cannot_decide_are_refused_before_training(tmp_path: Path, growth: Any, said: str) -> None:
    model = get_peft_model(tiny_bert(), AromaConfig(task_type="SEQ_CLS", **{**METHOD, "significance": 0.05}))
    trainer = bert_trainer(tmp_path, model=model, growth={"growth_dataset": growth})
    with pytest.raises(ConfigError, match=said):
        trainer.train()
    assert trainer.state.global_step == 0


class WeightsClasses(Trainer):
    """Makes the loss itself; counts how often."""

    made = 0

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        self.made += 1
        labels = inputs.pop("labels")
        loss = nn.functional.cross_entropy(model(**inputs).logits, labels, torch.tensor([0.1, 1.0, 3.0]))
        return (loss, None) if return_outputs else loss


def smooth(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.5)


@pytest.mark.parametrize("own", ["compute_loss", "label_smoothing_factor", "compute_loss_func", "growth_loss", None])
def test_held_out_examples_are_asked_by_the_loss_of_the_training(tmp_path: Path, own: str | None) -> None:
    """Or by another that is given; so what it answers is what that loss answers by itself."""
    training, growth = hold_out(tokenized(), share=0.2)

    def settled(own: str | None, loss: Any = None) -> tuple[list[float | None], Any]:
        events: list[Event] = []
        model = get_peft_model(tiny_bert(), AromaConfig(task_type="SEQ_CLS", **METHOD))
        callback = AromaCallback(growth_dataset=growth, on_event=events.append, growth_loss=loss)
        smoothing = 0.5 if own == "label_smoothing_factor" else 0.0
        settings = arguments(tmp_path, max_steps=60, save_strategy="no", label_smoothing_factor=smoothing)
        kind = WeightsClasses if own in ("compute_loss", "growth_loss") else Trainer
        given = {"compute_loss_func": smooth} if own == "compute_loss_func" else {}
        trainer = kind(model, settings, train_dataset=training, callbacks=[callback], **given)
        trainer.train()
        return [event.value for event in events if event.kind == "settled"], trainer

    def of_model(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    def by_hand(model: nn.Module, batch: Any) -> Tensor:
        labels = batch.pop("labels")
        if own == "compute_loss":
            return nn.functional.cross_entropy(model(**batch).logits, labels, torch.tensor([0.1, 1.0, 3.0]))
        return smooth(model(**batch), labels)

    found, trainer = settled(own, of_model if own == "growth_loss" else None)
    assert found
    assert found == pytest.approx(settled(own, of_model if own in ("growth_loss", None) else by_hand)[0], rel=1e-4)
    if own not in ("growth_loss", None):
        assert found != pytest.approx(settled(own, of_model)[0], rel=0.1)
    if own in ("compute_loss", "growth_loss"):
        assert (trainer.made > 60) == (own == "compute_loss")


@pytest.mark.parametrize(
    "odd",
    [
        (1, {"input_ids": [5, 6]}),
        (1, torch.ones(8)),
        {"y": [1.0, None]},
        {"y": [1, [2, 3]]},
        {"y": [2**70, 1], "z": 2**70},
        {"a": 1, 2: 3},
        np.array([None, {"a": 1}], dtype=object),
        {"y": [], "z": "", "bytes": b"12"},
    ],
)
def test_examples_of_any_content_are_compared(odd: Any) -> None:
    others: list[Any] = [(place, "another") for place in range(6)]
    with pytest.warns(UserWarning, match=r"1 of 7 examples are trained on, too \(its row 6 is row 0"):
        assert len(without_trained([*others, odd], [copy.deepcopy(odd), "one more"])) == 6


def test_a_stream_is_not_compared_though_it_has_a_length() -> None:
    growth = examples(40)
    assert without_trained(growth, Stream()) is growth
    with pytest.raises(ConfigError, match=r"^dataset='Stream': it has no length, or no items by index"):
        hold_out(Stream())
    frame = pd.DataFrame({"labels": [0, 1] * 20})
    with pytest.raises(ConfigError, match=r"^dataset='DataFrame': .* give datasets\.Dataset\.from_pandas"):
        hold_out(frame)
    parts = hold_out(torch.arange(40))
    assert sorted(int(number) for part in parts for number in part) == [*range(40)]


@pytest.mark.parametrize(("steps", "warns"), [(38, False), (60, True)])
def test_a_stream_that_begins_anew_is_warned_of(tmp_path: Path, steps: int, warns: bool) -> None:
    stream = datasets.IterableDataset.from_generator(lambda: iter(examples(40 * 8)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, stream, growth_dataset(), steps)
    said = [str(warning.message) for warning in caught if "a stream, begins anew" in str(warning.message)]
    assert len(said) == warns
    assert all("at optimizer step 40, and growth still takes" in text for text in said)


def test_a_loss_that_fails_is_told_before_training(tmp_path: Path) -> None:
    def wrong(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(**batch).los
        return loss

    training, growth = hold_out(tokenized(), share=0.2)
    with pytest.raises(
        ConfigError, match=r"^growth_loss='wrong': it fails on a held-out batch \(AttributeError: .*los"
    ):
        train(tmp_path, training, growth, growth_loss=wrong)
    with pytest.raises(ConfigError, match=r"^growth_loss='float': it must return one number"):
        train(tmp_path, training, growth, growth_loss=lambda model, batch: float(model(**batch).loss))
    with pytest.raises(ConfigError, match=r"^growth_loss='given': it is that of growth_dataset, which is missing"):
        train(tmp_path, training, None, growth_loss=wrong)
    paper = AromaCallback(growth_loss=wrong)
    with pytest.raises(ConfigError, match=r"^growth_loss='given': only growth='evidence' reads it"):
        trainer_for(adapted(tiny_bert()), tmp_path, paper).train()


def test_memory_that_runs_out_is_no_fault_of_the_examples(tmp_path: Path) -> None:
    """`auto_find_batch_size` makes smaller batches of them, too."""
    sizes = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        sizes.append(len(batch["labels"]))
        if sizes[-1] > 6:
            raise RuntimeError("CUDA out of memory. Tried to allocate a test.")
        found: Tensor = model(**batch).loss
        return found

    training, growth = hold_out(tokenized(), share=0.4)
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory"):
        train(tmp_path, training, growth, growth_loss=loss)
    assert {*sizes} == {8}
    callback = AromaCallback(growth_dataset=growth, growth_loss=loss)
    settings = arguments(tmp_path, max_steps=60, save_strategy="no", auto_find_batch_size=True)
    Trainer(bert(), settings, train_dataset=training, callbacks=[callback]).train()
    assert callback.controller is not None
    assert callback.controller.global_step == 60
    assert 8 > sizes[-1] == min(sizes)


def test_numbers_of_numpy_are_numbers() -> None:
    rows = tokenized(50)
    parts = [hold_out(rows, share, seed) for share, seed in ((0.25, 3), (np.float32(0.25), np.int64(3)))]
    assert parts[0][1]["text"] == parts[1][1]["text"]


def test_examples_that_are_not_prepared_are_refused(tmp_path: Path) -> None:
    training, growth = hold_out(tokenized())
    with pytest.raises(ConfigError, match=r"columns text, labels.*training set has input_ids; prepare both") as error:
        train(tmp_path, training, growth.remove_columns("input_ids").select_columns(["text", "labels"]))
    assert "callback.growth_dataset = trainer.eval_dataset" in str(error.value)


def test_the_split_depends_on_its_seed_alone_and_loses_nothing() -> None:
    rows = tokenized(50)
    parts = [hold_out(rows, share=0.2, seed=seed) for seed in (0, 0, 1)]
    texts = [[list(part["text"]) for part in pair] for pair in parts]
    assert texts[0] == texts[1] != texts[2]
    assert all(len(growth) == 10 and sorted(train + growth) == sorted(rows["text"]) for train, growth in texts)
    for share in (0, 1, -0.1, 0.001, "0.1", None):
        with pytest.raises(ConfigError, match=f"share={share!r}: of 50 examples it leaves one part empty"):
            hold_out(rows, share=share)
    with pytest.raises(ConfigError, match=r"share=0\.1: of 4 examples it leaves one part empty; there are too few"):
        hold_out(tokenized(4))
    for seed in (-1, 1.5, "x", None, True):
        with pytest.raises(ConfigError, match=rf"^seed={seed!r}: give a whole number"):
            hold_out(rows, seed=seed)
    with pytest.raises(ConfigError, match=r"^dataset='list_iterator': it has no length"):
        hold_out(iter(examples(6)))
    splits = datasets.DatasetDict(train=rows, test=rows)
    with pytest.raises(
        ConfigError, match=r"^dataset='DatasetDict': it has splits \(train, test\), .* dataset\['train'\]"
    ):
        hold_out(splits)


class StopsEarly(TrainerCallback):
    """Ends the training after so many optimizer steps, as a person or a limit of time may."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def test_a_training_that_ends_within_its_trial_says_so(tmp_path: Path) -> None:
    callback = AromaCallback(growth_dataset=growth_dataset())
    trainer = trainer_for(bert(), tmp_path, callback, StopsEarly(10), max_steps=60, save_strategy="no")
    with pytest.warns(AromaWarning, match=r"trial is not over at step 10: .* has all 3 components of the trial"):
        trainer.train()


def test_a_training_after_one_that_ended_within_its_trial_is_warned_of(tmp_path: Path) -> None:
    """It keeps what was never judged. One that ended before there was anything leaves nothing."""
    stop = StopsEarly(10)
    trainer = trainer_for(
        bert(), tmp_path, AromaCallback(growth_dataset=growth_dataset()), stop, max_steps=60, save_steps=10
    )
    with pytest.warns(AromaWarning, match=r"trial is not over at step 10"):
        trainer.train()
    trainer.remove_callback(stop)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the training before was stopped")
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
        trainer.train()
    trainer.add_callback(stop)
    with pytest.warns(AromaWarning, match=r"trial is not over at step 10"):
        trainer.train()
    with pytest.warns(AromaWarning, match=r"^the training before was stopped in its trial, so its \d+ comp"):
        trainer.train()
    early = trainer_for(
        bert(), tmp_path / "early", AromaCallback(growth_dataset=growth_dataset()), StopsEarly(3), max_steps=60
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(trial is not over|the training before was stopped)")
        early.train()
        early.train()
