"""A language model that learns from a recipe's examples, as a job for the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aroma.errors import DataError, bad_value

from ..specs import DataSpec, ModelSpec, Recipe
from ..tasks.sources import hub_splits
from ..training.job import Objective, Prediction
from .collate import make_collator
from .encode import EncodeReport, encode_conversations
from .examples import Conversation, load_conversations, load_hub_conversations
from .fingerprint import fingerprint_of
from .loss import token_loss
from .model import load_causal_lm, load_lm_tokenizer
from .packing import pack, require_packing_works
from .prompt import PromptBuilder
from .spec import LanguageSpec
from .task import LanguageTask, save_language_task

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class LanguageJob:
    """See `Job`, whose methods it has.

    Args:
        model: The pretrained model.
        language: How examples become tokens.
        max_length: Most tokens of an example, and of a packed row.
        batch_size: Rows of one forward pass in evaluation.
        parts: Conversations by split, `train` among them.
        tokenizer: The model's.
        builder: Makes prompts and responses.
    """

    model: ModelSpec
    language: LanguageSpec
    max_length: int
    batch_size: int
    parts: Mapping[str, Sequence[Conversation]]
    tokenizer: Any
    builder: PromptBuilder

    @classmethod
    def make(
        cls,
        model: ModelSpec,
        language: LanguageSpec,
        max_length: int,
        batch_size: int,
        parts: Mapping[str, Sequence[Conversation]],
    ) -> LanguageJob:
        """Return the job, with the model's tokenizer.

        Raises:
            ConfigError: There is no such tokenizer, or it lacks what the examples need.
        """
        tokenizer = load_lm_tokenizer(model, max_length)
        return cls(model, language, max_length, batch_size, parts, tokenizer, PromptBuilder(tokenizer, language))

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> LanguageJob:
        """Read the examples of a recipe.

        Raises:
            ConfigError: See `make`.
            DataError: Data that cannot be used as described.
        """
        parts = read_parts(recipe.data, recipe.language)
        return cls.make(recipe.model, recipe.language, recipe.data.max_length, recipe.training.batch_size, parts)

    @cached_property
    def objective(self) -> Objective:
        """What the Trainer makes of the encoded examples: the mean loss of the learned tokens of a step."""
        collator = make_collator(self.tokenizer)

        def evaluate(model: Any, data: Dataset, batch_size: int) -> dict[str, float]:
            found = token_loss(model, data, collator, batch_size)
            return {"loss": found.loss, "perplexity": found.perplexity}

        return Objective(
            collator,
            self.tokenizer,
            None,
            "loss",
            higher_is_better=False,
            counts_items=True,
            evaluate=evaluate,
        )

    @cached_property
    def train(self) -> Dataset:
        """The training rows."""
        return self._rows("train")

    @cached_property
    def eval_sets(self) -> dict[str, Dataset]:
        """The rows of all other splits."""
        return {split: self._rows(split) for split in self.evaluated}

    @property
    def evaluated(self) -> tuple[str, ...]:
        """All splits but that of training."""
        return tuple(split for split in self.parts if split != "train")

    @property
    def examples(self) -> dict[str, int]:
        """Numbers of examples by split, without what was left out."""
        return {split: report.kept for split, (_, report) in self._encoded.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What was cut or left out, by split."""
        return tuple(f"{split}: {report}" for split, (_, report) in self._encoded.items())

    def load_model(self) -> Any:
        """Return the pretrained model.

        Raises:
            ConfigError: It cannot be loaded, or it cannot keep packed examples apart.
        """
        model = load_causal_lm(self.model)
        if self.language.packing:
            require_packing_works(model)
        return model

    def predict(self, trainer: Any, split: str) -> Prediction:
        """Return loss and perplexity of the learned tokens of a split."""
        found = token_loss(trainer.model, self.eval_sets[split], self.objective.collator, self.batch_size)
        return Prediction({"loss": found.loss, "perplexity": found.perplexity}, found.loss)

    def describe(self, model: Any, adapter: Path) -> None:
        """Write tokenizer and task into the folder of an adapter."""
        self.tokenizer.save_pretrained(adapter)
        task = LanguageTask(self.language, self.max_length, self.model, fingerprint_of(model))
        save_language_task(task, adapter)

    @cached_property
    def _encoded(self) -> dict[str, tuple[Dataset, EncodeReport]]:
        return {
            split: encode_conversations(part, self.builder, self.max_length, f"data.{split}")
            for split, part in self.parts.items()
        }

    def _rows(self, split: str) -> Dataset:
        rows, _ = self._encoded[split]
        return pack(rows, self.max_length) if self.language.packing else rows


def read_parts(data: DataSpec, language: LanguageSpec) -> dict[str, list[Conversation]]:
    """Return the conversations of a recipe by split; without validation examples some of training's are held out.

    Raises:
        DataError: Data that cannot be used as described, or too few for a validation split.
    """
    sources = {"train": data.train, "validation": data.validation, "test": data.test}
    if data.name is not None:
        sources["train"] = data.train or "train"
        if data.validation is None and "validation" in hub_splits(data.name, data.config):
            sources["validation"] = "validation"
    parts = {
        split: _read(f"data.{split}", source, data, language)
        for split, source in sources.items()
        if source is not None
    }
    if "validation" not in parts:
        train, held_out = hold_out(
            parts["train"], data.validation_fraction, data.split_seed, "data.validation_fraction"
        )
        parts = {"train": train, "validation": held_out, **{k: part for k, part in parts.items() if k == "test"}}
    return parts


def _read(field: str, source: str, data: DataSpec, language: LanguageSpec) -> list[Conversation]:
    if data.name is not None:
        return load_hub_conversations(field, source, data.name, data.config, language)
    return load_joined(load_conversations, field, source, language)


def load_joined(
    load: Callable[[str, str, LanguageSpec], list[Any]], field: str, path: str, language: LanguageSpec
) -> list[Any]:
    """Return what `load` reads from a file, or from several that `+` joins, one behind the other."""
    paths = [path] if Path(path).exists() else path.split("+")
    return [example for one in paths for example in load(field, one, language)]


def hold_out(examples: Sequence[Any], fraction: float, seed: int, field: str) -> tuple[list[Any], list[Any]]:
    """Split examples in two: the same two for the same seed, each in the order of its source.

    Raises:
        DataError: There are too few.
    """
    from sklearn.model_selection import train_test_split

    try:
        kept, held_out = train_test_split(range(len(examples)), test_size=fraction, random_state=seed)
    except ValueError as error:
        raise bad_value(
            field, fraction, f"{len(examples)} training examples cannot be split so ({error}); give more", DataError
        ) from error
    return [examples[i] for i in sorted(kept)], [examples[i] for i in sorted(held_out)]
