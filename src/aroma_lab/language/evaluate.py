"""Language models against whole sets: commonsense questions, by lm-evaluation-harness, and responses, by chrF."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from aroma.errors import NonFiniteError, bad_value

from .data import Messages, Question
from .encode import encode_chat
from .model import LoadedModel, positions_of

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model it is given is a model


class QuestionEvaluation(NamedTuple):
    """The result on one set."""

    accuracy: float
    """Share of all questions whose likeliest label is the right one."""
    loss: float
    """Mean negative log-likelihood of the right label, in nats a question."""
    predictions: list[dict[str, Any]]
    """For every question the right `answer`, the `chosen` one, and `log_probs` by label."""


def evaluate_questions(
    loaded: LoadedModel,
    questions: Sequence[Question],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = False,
) -> QuestionEvaluation:
    """Rank the labels of every question by their likelihood, with the prompts of training.

    Args:
        loaded: A causal language model; it runs where it is, in evaluation mode, and is left in its own.
        batch_size: Sequences of one forward pass.
        max_length: Most tokens of prompt and label, the left of longer ones is cut; None: what the model takes.
        progress: Whether lm-evaluation-harness shows its bars.

    Raises:
        DataError: A question that cannot be asked.
        NonFiniteError: A log-probability that is not a number.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    training = loaded.model.training
    scorer = HFLM(
        pretrained=loaded.model,
        backend="causal",
        tokenizer=loaded.tokenizer,
        batch_size=batch_size,
        max_length=max_length or positions_of(loaded.model.config) or 2**31,
        softmax_dtype="float32",
        add_bos_token=False,  # a chat template writes it
    )
    requests = []
    for question in questions:
        lead = question.lead.rstrip()
        begun = [{"role": "assistant", "content": lead}] if lead else []
        context = scorer.apply_chat_template([*question.prompt, *begun], add_generation_prompt=not lead)
        texts = [f"{question.lead[len(lead) :]}{label}" for label in question.candidates]
        requests += [Instance("loglikelihood", {}, (context, text), 0) for text in texts]
    try:
        scores = iter(scorer.loglikelihood(requests, disable_tqdm=not progress))
    finally:
        loaded.model.train(training)
    rows: list[dict[str, Any]] = []
    for question in questions:
        log_probs = {label: next(scores)[0] for label in question.candidates}
        if any(map(math.isnan, log_probs.values())):
            raise bad_value("log_probs", math.nan, "the model's logits are NaN; try another dtype", NonFiniteError)
        chosen = max(log_probs, key=lambda label: log_probs[label])
        rows.append({"answer": question.answer, "chosen": chosen, "log_probs": log_probs})
    accuracy = sum(row["chosen"] == row["answer"] for row in rows) / len(rows)
    return QuestionEvaluation(accuracy, -sum(row["log_probs"][row["answer"]] for row in rows) / len(rows), rows)


@torch.no_grad()
def chrf_of(loaded: LoadedModel, chats: Sequence[Messages], *, batch_size: int, max_length: int) -> float:
    """Return chrF of the generated responses against those of the chats, in [0, 1].

    chrF is the F-score of character n-grams (Popović, 2015), as sacrebleu computes it by default. Each chat's last
    response is generated greedily, after the prompt of training.

    Args:
        loaded: A causal language model; it runs where it is, in evaluation mode, and is left in its own.
        batch_size: Responses that are generated at once.
        max_length: Most tokens of prompt and response together, as in training; the left of longer prompts is cut.
    """
    from sacrebleu import corpus_chrf

    model, tokenizer = loaded
    prompts = [encode_chat(tokenizer, chat[:-1], "prompt")[0][1 - max_length :] for chat in chats]
    padding = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    greedy = GenerationConfig(do_sample=False, max_length=max_length, **padding)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    responses = [""] * len(prompts)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            given = {"input_ids": [prompts[index] for index in batch]}
            inputs = tokenizer.pad(given, padding_side="left", return_tensors="pt").to(model.device)
            made = model.generate(**inputs, generation_config=greedy)[:, inputs["input_ids"].shape[1] :]
            for index, text in zip(batch, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
                responses[index] = text.strip()
    finally:
        model.train(training)
    return float(corpus_chrf(responses, [[chat[-1]["content"].strip() for chat in chats]]).score / 100)
