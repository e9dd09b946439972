"""Commonsense questions: files, likelihood against a plain forward pass, answers out of texts, and `aroma eval`."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from aroma.cli import main
from aroma.errors import ConfigError, DataError, NonFiniteError
from aroma_lab.language import evaluate
from aroma_lab.language.data import CUT_PROMPTS, Question, encode, load_examples, load_questions
from aroma_lab.language.evaluate import evaluate_questions, over_limit, read_answer, tokens_of
from aroma_lab.language.generate import Generation
from aroma_lab.language.model import LanguageTask, LoadedModel, load_for_inference
from aroma_lab.language.template import Template, Turn
from aroma_lab.specs import LanguageSpec, ModelSpec
from tiny_lm import learn, questions, save_tiny_lm, write_json_lines

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "commonsense"
LANGUAGE = LanguageSpec()
LEAD = "the correct answer is "


def load_lm(folder, attention="sdpa"):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": save_tiny_lm(root / "llama", "llama", chat_template=True),
        "gpt2": save_tiny_lm(root / "gpt2", "gpt2", chat_template=False),
    }


@pytest.fixture(scope="module")
def llama(folders):
    model, tokenizer = load_lm(folders["llama"])
    return LoadedModel(model, Template(tokenizer, LANGUAGE))


def asked_questions(path, count=5, seed=1):
    return load_questions("data", str(write_json_lines(path / "asked.jsonl", questions(count, seed))), LANGUAGE)


# Files ---------------------------------------------------------------------------------------------------------------


def row_of(labels, right=0):
    instruction = f"Which one fits?\n\nAnswer format: {'/'.join(labels)}"
    return {"instruction": instruction, "input": "", "output": LEAD + labels[right], "answer": labels[right]}


def test_a_question_is_read_with_the_labels_that_it_lists(tmp_path):
    labels = [("true", "false"), tuple(f"ending{number}" for number in range(1, 5)), ("answer1", "answer2", "answer3")]
    rows = [row_of(some, right=1) for some in labels]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for path in (tmp_path / "rows.json", write_json_lines(tmp_path / "rows.jsonl", rows)):
        loaded = load_questions("data", str(path), LANGUAGE)
        assert [question.candidates for question in loaded] == labels
        for question, row in zip(loaded, rows, strict=True):
            assert question.turns == (Turn("user", row["instruction"]),)
            assert (question.lead, question.answer) == (LEAD, row["answer"])
            assert question.response_of(question.answer) == row["output"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "answer7"}, r"'answer', row 2\)='answer7': it is none of the candidates answer1, answer2"),
        ({"answer": ""}, r"'answer', row 2\)='': give a text that is not empty"),
        ({"output": "answer1 or answer2 or so"}, r"'output', row 2\)=.*does not end with the answer"),
        ({"instruction": "Which?"}, r"'instruction', row 2\)='Which\?': end it with a line such as"),
        ({"instruction": "Which?\nAnswer format: answer1/answer1"}, r"each once"),
        ({"instruction": 5}, r"'instruction', row 2\)=5: give a text"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    rows = [row_of(("answer1", "answer2")), {**row_of(("answer1", "answer2")), **change}]
    with pytest.raises(DataError, match=message):
        load_questions("data", str(write_json_lines(tmp_path / "rows.jsonl", rows)), LANGUAGE)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "train", "test"), [("ARC-Easy", 2251, 2376), ("ARC-Challenge", 1119, 1172), ("openbookqa", 4957, 500)]
)
def test_the_shared_sets_are_read_whole(name, train, test):
    counts = {}
    for part in ("train", "test"):
        loaded = load_questions("data", str(SHARED / name / f"{part}.jsonl"), LANGUAGE)
        assert {question.lead for question in loaded} == {LEAD}
        assert {len(question.candidates) for question in loaded} <= {3, 4, 5}
        counts[part] = len(loaded)
    assert counts == {"train": train, "test": test}


# Likelihood ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # the first with a chat template, the second with the plain one
@pytest.mark.parametrize("max_length", [None, 30])
def test_what_is_scored_is_what_was_trained_on(folders, tmp_path, kind, max_length):
    model, tokenizer = load_lm(folders[kind])
    template = Template(tokenizer, LanguageSpec(system="Please answer ."))
    path = str(write_json_lines(tmp_path / "rows.jsonl", questions(6, seed=5)))
    trained, report = encode(load_examples("data", path, LANGUAGE), template, max_length or 128, "data")
    assert report.counts[CUT_PROMPTS] == (0 if max_length is None else 6)
    asked = load_questions("data", path, LANGUAGE)
    found = evaluate_questions(LoadedModel(model, template), asked, max_length=max_length)
    assert found.cut_prompts == report.counts[CUT_PROMPTS]
    for question, row in zip(asked, trained, strict=True):
        context, labels = tokens_of(template, question)
        context = template.shorten(context, len(context) - over_limit(template, question, max_length))
        label = labels[question.candidates.index(question.answer)]
        assert row["input_ids"] == [*context, *label, *row["input_ids"][-1:]]
        assert tokenizer.decode(label) == question.answer


def mixed_questions():
    """Questions of 2 to 5 candidates, labels of 1 to 3 words, prompts of unequal lengths, with and without a lead."""
    words = ["apple", "bird", "cloud", "door", "eagle", "fish", "grass", "house", "iron", "juice", "king", "lamp"]
    asked = []
    for number in range(7):
        candidates = tuple(" ".join(words[(number + place) % 12 :][: 1 + (number + place) % 3]) for place in range(5))
        lead = LEAD if number % 3 else ""
        instruction = " ".join(["Please choose a word", *words[: 1 + 3 * (number % 4)], "?"])
        asked.append(Question(instruction, "", lead + candidates[1], candidates[1], candidates[: 2 + number % 4]))
    return asked


def plain_log_prob(loaded, question, label):
    """One candidate by one forward pass over all its tokens: no batch, no padding, no cache."""
    model, template = loaded
    prompt = template.prompt(question.turns)
    lead = template.continuation(question.lead)
    response = template.continuation(question.response_of(label))
    assert response[: len(lead)] == lead
    ids = [*prompt, *response]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_probs[place - 1, ids[place]].item() for place in range(len(prompt) + len(lead), len(ids)))


@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("gpt2", "eager")])
def test_likelihoods_equal_those_of_plain_forward_passes(folders, kind, attention):
    model, tokenizer = load_lm(folders[kind], attention)
    loaded, asked = LoadedModel(model, Template(tokenizer, LANGUAGE)), mixed_questions()
    expected = [{label: plain_log_prob(loaded, q, label) for label in q.candidates} for q in asked]
    for batch_size in (1, 3, 7):
        found = evaluate_questions(loaded, asked, batch_size=batch_size)
        predictions = found.predictions
        assert [prediction.answer for prediction in predictions] == [question.answer for question in asked]
        assert found.metrics["accuracy"] == sum(one.chosen == one.answer for one in predictions) / len(asked)
        assert found.loss == pytest.approx(-sum(one.log_probs[one.answer] for one in predictions) / len(asked))
        assert {count for prediction in predictions for count in prediction.tokens.values()} == {1, 2, 3}
        for prediction, sums in zip(predictions, expected, strict=True):
            assert prediction.log_probs == pytest.approx(sums, abs=1e-5)
            assert prediction.chosen == max(sums, key=sums.get)
            for chosen, lengths in (
                (prediction.chosen_normalised, prediction.tokens),
                (prediction.chosen_per_character, {label: len(label) for label in sums}),
            ):
                assert chosen == max(sums, key=lambda label: sums[label] / lengths[label])


def test_what_cannot_be_scored_is_refused(folders, llama, tmp_path):
    for candidates in (("qqq", "zzz"), ("apple", "apple bird")):  # both unknown; one begins the other
        question = Question("Please choose", "", LEAD + candidates[0], candidates[0], candidates)
        with pytest.raises(DataError, match=r"beginning of another.*use generation"):
            evaluate_questions(llama, [question])
    asked = asked_questions(tmp_path)
    with pytest.raises(DataError, match="max_length=7: a response alone has 6 tokens"):
        evaluate_questions(llama, asked, max_length=7)
    with pytest.raises(ConfigError, match="batch_size=0"):
        evaluate_questions(llama, asked, batch_size=0)
    with pytest.raises(DataError, match="nothing to ask"):
        evaluate_questions(llama, [])
    model, tokenizer = load_lm(folders["llama"])
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="logits are not numbers"):
        evaluate_questions(LoadedModel(model, Template(tokenizer, LANGUAGE)), asked)


# Answers out of texts ------------------------------------------------------------------------------------------------

FOUR = ("answer1", "answer2", "answer3", "answer4")
BOTH = ("true", "false")


@pytest.mark.parametrize(
    ("text", "answer", "candidates", "lead"),
    [
        ("the correct answer is answer2", "answer2", FOUR, LEAD),
        ("  The correct answer is: answer3.\nBecause answer1 is wrong.", "answer3", FOUR, LEAD),
        ('The correct answer is "answer4"', "answer4", FOUR, LEAD),
        ("The correct answer is answer2: quit eating lunch out", "answer2", FOUR, LEAD),
        ("Answer4.", "answer4", FOUR, LEAD),
        ("The correct answer is False", "false", BOTH, LEAD),
        ("true", "true", BOTH, ""),
        ("answer10", "answer10", ("answer1", "answer10"), LEAD),
        # The first label anywhere does not count.
        ("answer1 is wrong, so the correct answer is answer2", None, FOUR, LEAD),
        ("I think that answer3 is right", None, FOUR, LEAD),
        ("answer2 answer3", None, FOUR, LEAD),
        ("true or false", None, BOTH, ""),
        # Neither does a choice of several, nor a longer word.
        ("the correct answer is answer1 or answer2", None, FOUR, LEAD),
        ("the correct answer is answer1/answer2/answer3/answer4", None, FOUR, LEAD),
        ("the correct answer is answer10", None, FOUR, LEAD),
        ("It is untrue", None, BOTH, "It is "),
        ("the correct answer is", None, FOUR, LEAD),
        ("", None, FOUR, LEAD),
    ],
)
def test_only_an_answer_in_the_form_asked_for_counts(text, answer, candidates, lead):
    assert read_answer(text, candidates, lead) == answer


# Whole sets ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(folders):
    """A tiny model that has learned the form of an answer, and some of the answers."""
    model, tokenizer = load_lm(folders["llama"])
    root = folders["llama"].parent
    path = str(write_json_lines(root / "train.jsonl", questions(64, seed=11)))
    learn(model, encode(load_examples("data", path, LANGUAGE), Template(tokenizer, LANGUAGE), 128, "data")[0], 60)
    folder = root / "trained"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_ranked_and_written_answers_of_a_trained_model_agree(trained, tmp_path):
    loaded = load_for_inference(trained)
    asked = asked_questions(tmp_path, count=30, seed=12)
    ranked = evaluate_questions(loaded, asked, "likelihood", batch_size=7)
    written = evaluate_questions(loaded, asked, "generation", batch_size=7, max_new_tokens=12)
    assert written.unparseable == written.unfinished == 0
    # The greedy text says the lead, and then what is most likely after it.
    assert [prediction.chosen for prediction in written.predictions] == [p.chosen for p in ranked.predictions]
    assert written.metrics == {"generated": ranked.metrics["accuracy"]}
    assert {prediction.chosen for prediction in ranked.predictions} == {"answer1", "answer2"}


@pytest.mark.parametrize(("max_length", "room"), [(None, 96), (128, 96), (70, 64)])
def test_generation_asks_what_likelihood_asks_in_the_room_that_is_left(llama, max_length, room, monkeypatch):
    asked = [Question("apple " * words, "", LEAD + FOUR[0], FOUR[0], FOUR[:2]) for words in (8, 9, 10, 100)]
    texts = [LEAD + "answer1", LEAD + "answer2", "who knows", f"no, {LEAD}answer1"]
    given = []

    def write(loaded, prompts, **options):
        given.extend(prompts)
        return [Generation(text, [], text != "who knows") for text in texts]

    monkeypatch.setattr(evaluate, "generate_batch", write)
    found = evaluate_questions(llama, asked, "generation", max_length=max_length, max_new_tokens=32)
    wanted = [llama.template.prompt(question.turns) for question in asked]
    assert given == [*wanted[:3], llama.template.shorten(wanted[3], room)]
    assert found.metrics == {"generated": 0.25}  # what cannot be read is wrong
    assert (found.cut_prompts, found.unparseable, found.unfinished, found.loss) == (1, 2, 1, None)
    assert [prediction.chosen for prediction in found.predictions] == ["answer1", "answer2", None, None]
    with pytest.raises(ConfigError, match="max_new_tokens=127: the model takes 128 tokens in all; give fewer"):
        evaluate_questions(llama, asked, "generation", max_new_tokens=127)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory):
    """An adapter that changes the answers of the trained model, as `aroma train` leaves it."""
    model, tokenizer = load_lm(trained)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    LanguageTask(LANGUAGE, 40, ModelSpec(str(trained))).save(folder)
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
        asked = load_questions("data", str(path), LANGUAGE)
        found = evaluate_questions(loaded, asked, max_length=40)
        assert told["sets"][name]["metrics"] == found.metrics
        assert told["sets"][name]["cut_prompts"] == found.cut_prompts
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


def test_the_command_generates_and_a_model_needs_no_adapter(trained, adapter, sets, tmp_path, capsys):
    told = {}
    for name, folder in (("base", trained), ("adapter", adapter)):
        out = tmp_path / f"{name}.json"
        arguments = ["--method", "generation", "--max-new-tokens", "10", "--max-length", "60", "--json", str(out)]
        assert main(["eval", str(folder), "--data", f"a={sets[0]}", *arguments, "--limit", "5"]) == 0
        told[name] = json.loads(out.read_text())
    assert told["base"]["sets"]["a"]["examples"] == 5
    assert told["base"]["sets"]["a"]["unparseable"] == 0
    assert told["base"] != told["adapter"]  # the adapter spoils what the model has learned
    printed = capsys.readouterr().out
    assert "no result of a whole set" in printed
    assert "answers not in the form asked for, counted as wrong" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent.jsonl"], "data='absent.jsonl': no such file"),
        (["--data", "{a}", "--text", "sentence"], "--text='sentence': only classifiers and regressions have it"),
        (["--data", "x={a}", "--data", "x={b}"], "the name 'x' is given twice"),
        (["--data", "={a}"], "write FILE or NAME=FILE"),
        (["--data", "{a}", "--max-length", "500"], "max_length=500: the model takes at most 128 tokens"),
        (["--data", "{a}", "--max-length", "0"], "max_length=0: a response alone has 6 tokens; give more"),
        (["--data", "{a}", "--limit", "0"], "limit=0: give 1 or more"),
        (["--data", "{a}", "--batch-size", "0"], "--batch-size=0"),
        (["--data", "{a}", "--base-model", "{nowhere}"], "cannot be loaded as a causal language model"),
    ],
)
def test_bad_arguments_of_the_command(adapter, sets, tmp_path, capsys, arguments, message):
    names = {"a": sets[0], "b": sets[1], "nowhere": tmp_path / "nowhere"}
    assert main(["eval", str(adapter), *(text.format(**names) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
