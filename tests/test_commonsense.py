"""Commonsense questions: files, likelihoods against plain forward passes and `lm_eval`, answers, `aroma eval`."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from aroma.cli import main
from aroma.errors import DataError, NonFiniteError
from aroma_lab.language import evaluate
from aroma_lab.language.data import Question, questions_of
from aroma_lab.language.encode import NOT_LEARNED, encode_chat, encode_rows
from aroma_lab.language.evaluate import evaluate_questions
from aroma_lab.language.model import load_for_inference
from aroma_lab.specs import ModelSpec
from aroma_lab.tasks.sources import read_located
from aroma_lab.tasks.task import Task, save_task
from tiny_lm import learn, questions, save_tiny_lm, write_json_lines

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data" / "commonsense"
TASKS = ROOT / "examples" / "lm-eval"
LEAD = "the correct answer is "


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_lm(root / kind, kind, chat_template=kind == "llama") for kind in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def llama(folders):
    return load_for_inference(folders["llama"])


def asked_questions(path, count=5, seed=1):
    return questions_of(read_located("data", str(write_json_lines(path / "asked.jsonl", questions(count, seed)))))


# Files ---------------------------------------------------------------------------------------------------------------


def row_of(labels, right=0):
    instruction = f"Which one fits?\n\nAnswer format: {'/'.join(labels)}"
    return {"instruction": instruction, "input": "", "output": LEAD + labels[right], "answer": labels[right]}


def test_a_question_is_read_with_the_labels_that_it_lists(tmp_path):
    labels = [("true", "false"), tuple(f"ending{number}" for number in range(1, 5)), ("answer1", "answer2", "answer3")]
    rows = [row_of(some, right=1) for some in labels]
    loaded = questions_of(read_located("data", str(write_json_lines(tmp_path / "rows.jsonl", rows))))
    assert [question.candidates for question in loaded] == labels
    for question, row in zip(loaded, rows, strict=True):
        assert [one["content"] for one in question.example.content] == [row["instruction"], row["output"]]
        assert (question.lead, question.answer) == (LEAD, row["answer"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "answer7"}, r"row 2\), answer='answer7': it must be one of answer1, answer2"),
        ({"answer": ""}, r"row 2\), answer=''"),
        ({"output": "answer1 or answer2 or so"}, r"row 2\), answer='answer1': .* end the output 'answer1 or answer2"),
        ({"instruction": "Which?"}, r"row 2\), instruction='Which\?': end it with a line such as"),
        ({"instruction": "Which?\nAnswer format: answer1/answer1"}, r"each once"),
        ({"instruction": ["x"]}, r"row 2\)=\['x'\]: a list, not a text"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    rows = [row_of(("answer1", "answer2")), {**row_of(("answer1", "answer2")), **change}]
    with pytest.raises(DataError, match=message):
        questions_of(read_located("data", str(write_json_lines(tmp_path / "rows.jsonl", rows))))


# Likelihood ----------------------------------------------------------------------------------------------------------


def mixed_questions():
    """Questions of 2 to 5 candidates, labels of 1 to 3 words, prompts of unequal lengths, with and without a lead."""
    words = ["apple", "bird", "cloud", "door", "eagle", "fish", "grass", "house", "iron", "juice", "king", "lamp"]
    asked = []
    for number in range(7):
        candidates = tuple(" ".join(words[(number + place) % 12 :][: 1 + (number + place) % 3]) for place in range(5))
        lead = LEAD if number % 3 else ""
        text = " ".join(["Please choose a word", *words[: 1 + 3 * (number % 4)], "?"])
        messages = [{"role": "user", "content": text}]
        asked.append(Question(messages, lead + candidates[1], candidates[1], candidates[: 2 + number % 4]))
    return asked


def plain_log_prob(loaded, question, label, max_length):
    """ln p of a label by one forward pass over the training example that gives it, without its end."""
    chat = [*question.prompt, {"role": "assistant", "content": question.lead + label}]
    ids, labels = encode_chat(loaded.tokenizer, chat, "row")
    begun = sum(label != NOT_LEARNED for label in labels) - 1 - len(loaded.tokenizer.tokenize(label))
    first = labels.index(next(one for one in labels if one != NOT_LEARNED)) + begun
    assert loaded.tokenizer.decode(ids[first:-1]) == label
    cut = max(0, len(ids) - 1 - ((max_length or 128) + 1))  # of so many inputs, and the token that they predict
    with torch.no_grad():
        log_probs = loaded.model(torch.tensor([ids[cut:-1]])).logits[0].log_softmax(-1)
    return sum(log_probs[place - cut - 1, ids[place]].item() for place in range(first, len(ids) - 1))


@pytest.mark.parametrize("max_length", [None, 20])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # the first with a chat template, the second with the plain one
def test_likelihoods_are_those_of_what_was_trained_on(folders, kind, max_length):
    loaded, asked = load_for_inference(folders[kind]), mixed_questions()
    expected = [{label: plain_log_prob(loaded, q, label, max_length) for label in q.candidates} for q in asked]
    for batch_size in (1, 7):
        found = evaluate_questions(loaded, asked, batch_size=batch_size, max_length=max_length)
        rows = found.predictions
        assert [row["answer"] for row in rows] == [question.answer for question in asked]
        assert found.accuracy == sum(row["chosen"] == row["answer"] for row in rows) / len(asked)
        assert found.loss == pytest.approx(-sum(row["log_probs"][row["answer"]] for row in rows) / len(asked))
        for question, row, sums in zip(asked, rows, expected, strict=True):
            if question.lead:  # without one lm-eval counts the line end before the label too, the same for every label
                assert row["log_probs"] == pytest.approx(sums, abs=1e-5)
            assert row["chosen"] == max(sums, key=sums.get)


def test_what_cannot_be_scored_is_refused(folders, tmp_path):
    loaded, asked = load_for_inference(folders["llama"]), asked_questions(tmp_path)
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="logits are NaN"):
        evaluate_questions(loaded, asked)


def lm_eval_of(tmp_path, monkeypatch, task, loaded):
    """What `lm_eval` finds with a task file of examples/lm-eval, on the questions of the shared tiny set."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    found = simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4, add_bos_token=False),
        tasks=[task],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        log_samples=True,
    )
    return found["results"][task], sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_results_equal_those_of_lm_eval(folders, tmp_path, monkeypatch, kind):
    loaded = load_for_inference(folders[kind])
    (tmp_path / "openbookqa").mkdir()
    path = write_json_lines(tmp_path / "openbookqa" / "test.jsonl", questions(40, seed=3))
    asked = questions_of(read_located("data", str(path)))
    rows = encode_rows([question.example for question in asked], loaded.tokenizer, 128, "data").rows
    learn(loaded.model, rows, 25)
    ranked = evaluate_questions(loaded, asked, batch_size=7)
    result, samples = lm_eval_of(tmp_path, monkeypatch, "aroma_openbookqa", loaded)
    assert result["acc,none"] == pytest.approx(ranked.accuracy, abs=1e-12)
    for sample, row in zip(samples, ranked.predictions, strict=True):
        sums = [float(response[0]) for response in sample["filtered_resps"]]
        assert sums == pytest.approx(list(row["log_probs"].values()), abs=1e-4)
    result, _ = lm_eval_of(tmp_path, monkeypatch, "aroma_openbookqa_generated", loaded)
    assert 0.4 < result["exact_match,label"] < 1


def test_there_is_an_lm_eval_task_for_each_of_the_eight_sets():
    found = {path.stem: yaml.safe_load(path.read_text()) for path in TASKS.iterdir()}
    group = found.pop("aroma_commonsense")
    assert len(group["task"]) == 8
    for name in group["task"]:
        included = (TASKS / found[name]["include"]).resolve()
        assert included == Path(evaluate.__file__).with_name("commonsense.yaml")


# Whole sets ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(folders):
    """A tiny model that has learned the form of an answer, and some of the answers."""
    model, tokenizer = load_for_inference(folders["llama"])
    root = folders["llama"].parent
    asked = questions_of(read_located("data", str(write_json_lines(root / "train.jsonl", questions(64, seed=11)))))
    learn(model, encode_rows([question.example for question in asked], tokenizer, 128, "data").rows, 60)
    folder = root / "trained"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory):
    """An adapter that changes the answers of the trained model, as `aroma train` leaves it."""
    model, tokenizer = load_for_inference(trained)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_task(Task("causal_lm", max_length=40, model=ModelSpec(str(trained))), folder)
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return [write_json_lines(root / f"{name}.jsonl", questions(count, count)) for name, count in (("a", 13), ("b", 7))]


def test_the_command_evaluates_sets_and_their_average(adapter, sets, tmp_path, capsys):
    out, predictions = tmp_path / "out.json", tmp_path / "predictions.jsonl"
    one, two = sets
    arguments = ["eval", str(adapter), "--data", f"one={one}", "--data", str(two), "--batch-size", "4"]
    assert main([*arguments, "--json", str(out), "--predictions", str(predictions)]) == 0
    told = json.loads(out.read_text())
    assert [part["examples"] for part in told["sets"].values()] == [13, 7]
    loaded = load_for_inference(adapter)
    for name, path in (("one", one), (str(two), two)):
        asked = questions_of(read_located("data", str(path)))
        found = evaluate_questions(loaded, asked, max_length=40)
        assert told["sets"][name]["metrics"] == {"accuracy": found.accuracy}
    first, second = (part["metrics"]["accuracy"] for part in told["sets"].values())
    assert told["average"]["accuracy"] == pytest.approx((first + second) / 2)  # not of all questions
    printed = capsys.readouterr().out
    assert "average of sets" in printed
    assert f"{told['average']['accuracy']:.4f}" in printed
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [row["set"] for row in rows] == ["one"] * 13 + [str(two)] * 7
    assert sum(row["chosen"] == row["answer"] for row in rows[:13]) / 13 == pytest.approx(first)
    assert main([*arguments, "--predictions", str(predictions)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main([*arguments, "--data", f"one={two}"]) == 2
    assert "two files have one name" in capsys.readouterr().err
