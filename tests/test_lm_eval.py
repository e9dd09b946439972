"""Our likelihood against lm-evaluation-harness, through the task files of examples/lm-eval."""

import random
from pathlib import Path

import jinja2
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from aroma_lab.language.commonsense import load_questions
from aroma_lab.language.evaluate import evaluate_questions
from aroma_lab.language.examples import instruction_turns
from aroma_lab.language.prompt import PromptBuilder
from aroma_lab.language.spec import LanguageSpec
from tiny_lm import questions, save_tiny_lm, tiny_tokenizer, write_json_lines

TASKS = Path(__file__).resolve().parents[1] / "examples" / "lm-eval"
KINDS = ("plain", "chat")


def task_file(kind):
    return yaml.safe_load((TASKS / f"openbookqa_{kind}.yaml").read_text())


def test_every_task_file_is_looked_at():
    assert sorted(path.name for path in TASKS.iterdir()) == sorted(f"openbookqa_{kind}.yaml" for kind in KINDS)


@pytest.mark.parametrize("given", ["", "bird cloud"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_task_files_ask_with_our_prompts(kind, given):
    tokenizer = tiny_tokenizer(chat_template=True)
    builder = PromptBuilder(tokenizer, LanguageSpec(template=kind))
    row = {**questions(1, seed=1)[0], "input": given}
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(task_file(kind)["doc_to_text"]).render(**row)
    if kind == "chat":
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    turns = instruction_turns(row["instruction"], row["input"])
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == builder.prompt(turns)
    choices = environment.from_string(task_file(kind)["doc_to_choice"]).render(**row)
    assert choices == "['answer1', 'answer2']"


def labelled(count, seed):
    """Rows whose labels differ in length, so that the normalisation by characters matters."""
    generator = random.Random(seed)
    rows = []
    for row in questions(count, seed):
        # Of one character, four, five and seven: all words of the tiny tokenizer.
        labels = generator.sample(["b", "true", "false", "answer1", "question"], generator.randrange(2, 6))
        answer = generator.choice(labels)
        asked = row["instruction"].partition("\n")[0]
        rows.append(
            {
                "instruction": f"{asked}\n\nAnswer format: {'/'.join(labels)}",
                "input": "",
                "output": f"the correct answer is {answer}",
                "answer": answer,
            }
        )
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_accuracies_and_likelihoods_equal_those_of_lm_eval(tmp_path, monkeypatch, architecture, kind):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = save_tiny_lm(tmp_path / "model", architecture, chat_template=True)
    path = write_json_lines(tmp_path / "test.jsonl", labelled(60, seed=2))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    language = LanguageSpec(template=kind)
    asked = load_questions("data", str(path), language)
    ours = evaluate_questions(model, PromptBuilder(tokenizer, language), tokenizer, asked, batch_size=7)

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    known = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert known.all_tasks == ["aroma_openbookqa_chat", "aroma_openbookqa_plain"]
    task = {**task_file(kind), "dataset_kwargs": {"data_files": {"test": str(path)}}}
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[task],
        task_manager=known,
        apply_chat_template=kind == "chat",
        bootstrap_iters=0,
        log_samples=True,
    )
    result = theirs["results"][task["task"]]
    assert result["acc,none"] == pytest.approx(ours.metrics["accuracy"], abs=1e-12)
    assert result["acc_norm,none"] == pytest.approx(ours.metrics["accuracy_per_character"], abs=1e-12)
    # Not the same by chance: the normalisation decides some of them otherwise.
    assert any(prediction.chosen != prediction.chosen_per_character for prediction in ours.predictions)

    samples = sorted(theirs["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    assert len(samples) == ours.examples == 60
    for sample, prediction in zip(samples, ours.predictions, strict=True):
        assert sample["doc"]["answer"] == prediction.answer
        sums = [float(response[0]) for response in sample["filtered_resps"]]
        assert sums == pytest.approx(list(prediction.log_probs.values()), abs=1e-4)
