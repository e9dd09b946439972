"""The task files of examples/lm-eval ask with the prompts of training, and `lm_eval` finds what `aroma eval` finds."""

import random
from pathlib import Path

import jinja2
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from aroma_lab.language.data import encode, load_examples, load_questions
from aroma_lab.language.evaluate import evaluate_questions
from aroma_lab.language.model import LoadedModel
from aroma_lab.language.template import QUESTION_FILE, Template
from aroma_lab.specs import LanguageSpec
from tiny_lm import learn, questions, save_tiny_lm, tiny_tokenizer, with_bos, write_json_lines

TASKS = Path(__file__).resolve().parents[1] / "examples" / "lm-eval"
KINDS = ("plain", "chat")
SETS = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"]
NAMES = {name: f"aroma_{name.lower().replace('-', '_')}" for name in SETS}


def test_there_is_a_task_for_each_of_the_eight_sets():
    found = {path.stem: yaml.safe_load(path.read_text()) for path in TASKS.iterdir()}
    group, generated = found.pop("aroma_commonsense"), found.pop("aroma_openbookqa_generated")
    assert group["task"] == list(NAMES.values()) == [found[name]["task"] for name in NAMES.values()]
    assert found.keys() == set(NAMES.values())
    assert generated["include"] == "aroma_openbookqa.yaml"
    for name, task in NAMES.items():
        assert (TASKS / found[task]["include"]).resolve() == QUESTION_FILE
        assert found[task]["dataset_kwargs"]["data_files"]["test"] == f"{name}/test.jsonl"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("given", ["", "bird cloud"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_task_files_ask_with_the_prompts_of_training(tmp_path, kind, given, bos):
    template = Template(with_bos(tiny_tokenizer()) if bos else tiny_tokenizer(), LanguageSpec(template=kind))
    row = {**questions(1, seed=1)[0], "input": given}
    path = str(write_json_lines(tmp_path / "rows.jsonl", [row]))
    trained, _ = encode(load_examples("data", path, LanguageSpec()), template, 128, "data")
    task = yaml.safe_load(QUESTION_FILE.read_text())
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    written = {name: environment.from_string(task[name]).render(**row) for name in ("doc_to_text", "gen_prefix")}
    messages = [
        {"role": "user", "content": written["doc_to_text"]},
        {"role": "assistant", "content": written["gen_prefix"]},
    ]
    text = template.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    ids = template.tokenizer(f"{text} {row['answer']}", add_special_tokens=False)["input_ids"]
    assert trained[0]["input_ids"] == [*ids, template.stop_ids[0]]
    assert environment.from_string(task["doc_to_choice"]).render(**row) == "['answer1', 'answer2']"


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


def lm_eval_of(tmp_path, monkeypatch, path, task, loaded):
    """Result and samples of `lm_eval` on a task file, with another file of questions."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "openbookqa").mkdir()
    (tmp_path / "openbookqa" / "test.jsonl").write_text(path.read_text())
    monkeypatch.chdir(tmp_path)
    known = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert known.all_tasks == sorted(["aroma_commonsense", "aroma_openbookqa_generated", *NAMES.values()])
    found = simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.template.tokenizer, batch_size=4, add_bos_token=False),
        tasks=[task],
        task_manager=known,
        apply_chat_template=True,
        bootstrap_iters=0,
        log_samples=True,
    )
    return found["results"][task], sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_accuracies_and_likelihoods_equal_those_of_lm_eval(tmp_path, monkeypatch, architecture, kind):
    folder = save_tiny_lm(tmp_path / "model", architecture, chat_template=True)
    path = write_json_lines(tmp_path / "test.jsonl", labelled(60, seed=2))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = LoadedModel(model, Template(AutoTokenizer.from_pretrained(folder), LanguageSpec(template=kind)))
    asked = load_questions("data", str(path), LanguageSpec())
    ours = evaluate_questions(loaded, asked, batch_size=7)
    result, samples = lm_eval_of(tmp_path, monkeypatch, path, "aroma_openbookqa", loaded)
    assert result["acc,none"] == pytest.approx(ours.metrics["accuracy"], abs=1e-12)
    assert result["acc_norm,none"] == pytest.approx(ours.metrics["accuracy_per_character"], abs=1e-12)
    # Not the same by chance: the normalisation decides some of them differently.
    assert any(prediction.chosen != prediction.chosen_per_character for prediction in ours.predictions)
    assert len(samples) == ours.examples == 60
    for sample, prediction in zip(samples, ours.predictions, strict=True):
        assert sample["doc"]["answer"] == prediction.answer
        sums = [float(response[0]) for response in sample["filtered_resps"]]
        assert sums == pytest.approx(list(prediction.log_probs.values()), abs=1e-4)


@pytest.mark.slow
def test_written_answers_equal_those_of_lm_eval(tmp_path, monkeypatch):
    folder = save_tiny_lm(tmp_path / "model", chat_template=False)
    path = write_json_lines(tmp_path / "test.jsonl", questions(40, seed=3))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = LoadedModel(model, Template(AutoTokenizer.from_pretrained(folder), LanguageSpec()))
    rows, _ = encode(load_examples("data", str(path), LanguageSpec()), loaded.template, 128, "data")
    learn(model, rows, 25)
    model.eval()
    ours = evaluate_questions(loaded, load_questions("data", str(path), LanguageSpec()), "generation")
    result, _ = lm_eval_of(tmp_path, monkeypatch, path, "aroma_openbookqa_generated", loaded)
    assert 0.4 < ours.metrics["generated"] < 1
    assert result["exact_match,label"] == pytest.approx(ours.metrics["generated"])
