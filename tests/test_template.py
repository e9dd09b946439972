"""Templates: what is trained on is the prompt of evaluation and a response after it, under every chat template."""

import datetime

import pytest

from aroma.errors import ConfigError, DataError
from aroma_lab.language.template import Template, Turn, instruction_turns
from aroma_lab.specs import LanguageSpec
from tiny_lm import CHAT_TEMPLATE, FORGETFUL, questions, tiny_tokenizer, with_bos

USER = Turn("user", "Please choose a word")
REPLY = Turn("assistant", "the answer is apple")
CHAT = (Turn("system", "choose"), USER, REPLY, Turn("user", "a question"), Turn("assistant", "bird"))

BRACKETS = (  # as Llama 2: no heading of a response, a space before it, the end of the text after it
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}/ {{ m['content'] }} /"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_HEADING = CHAT_TEMPLATE.partition("{% if add_generation_prompt %}")[0]  # never says that a response is to follow
NO_STOP = CHAT_TEMPLATE.replace("<|end|>", "")  # no token of its own ends a response
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
DEAF = CHAT_TEMPLATE.replace(
    "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
)
THOUGHTS = (  # as Qwen 3: empty thoughts before the last response, and none before earlier ones
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
CLOCK = (  # as Llama 3.2 and others that write the date
    "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{% if strftime_now is defined %}"
    '{% set date = strftime_now("%A, %B %-d") %}{% endif %}{{ today() }} : {{ date }}\n'
) + CHAT_TEMPLATE
OTHER_WORDS = CHAT_TEMPLATE.replace("message['content']", "message['content'] | replace('bird', 'fish')")
BACKWARDS = CHAT_TEMPLATE.replace("in messages %}", "in messages | reverse %}")


def make(name="auto", chat_template=CHAT_TEMPLATE, **options):
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = chat_template
    return Template(tokenizer, LanguageSpec(template=name, **options)), tokenizer


def ids_of(segments):
    return [token for segment in segments for token in segment.ids]


def rendered(tokenizer, turns, **options):
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, None, BRACKETS, NO_HEADING, NO_STOP, THOUGHTS])
def test_an_example_is_the_prompt_and_the_response(chat_template):
    template, tokenizer = make(chat_template=chat_template)
    row = questions(1, seed=0)[0]
    turns = instruction_turns(row["instruction"], row["input"])
    prompt, response = template.segments((*turns, Turn("assistant", row["output"])))
    assert prompt.ids == template.prompt(turns)
    assert response.ids == template.response(row["output"]) == template.response(f"\n {row['output']} ")
    assert response.ids[: len(template.lead)] == template.lead
    assert (prompt.response, response.response) == (False, True)
    assert response.ids[-1] == template.stop_ids[0]
    # What other programs do with the tokenizer that is saved beside an adapter.
    assert prompt.ids == rendered(template.tokenizer, turns, add_generation_prompt=True)
    whole = rendered(template.tokenizer, [*turns, Turn("assistant", row["output"])])
    assert whole[: len(prompt.ids + response.ids)] == prompt.ids + response.ids
    if chat_template not in (None, NO_STOP):  # and what the model's own template writes
        assert rendered(tokenizer, [*turns, Turn("assistant", row["output"])]) == whole


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, None, NO_HEADING])
def test_the_history_of_a_chat_is_what_was_trained_on(chat_template):
    template, _ = make(chat_template=chat_template)
    segments = template.segments(CHAT)
    assert [segment.response for segment in segments] == [False, True, False, True]
    assert template.prompt(CHAT[:2]) == segments[0].ids
    assert template.prompt(CHAT[:4]) == ids_of(segments[:3])


@pytest.mark.parametrize("chat_template", [FORGETFUL, THOUGHTS])
def test_of_a_chat_with_a_rewritten_history_the_last_response_is_learned(chat_template):
    template, tokenizer = make(chat_template=chat_template)
    prompt, response = template.segments(CHAT)
    assert prompt.ids == template.prompt(CHAT[:4]) == rendered(tokenizer, CHAT[:4], add_generation_prompt=True)
    assert response.ids == template.response("bird")
    assert (prompt.response, response.response) == (False, True)
    assert prompt.ids + response.ids == rendered(tokenizer, CHAT)[:-1]


def test_what_ends_and_what_leads_a_response():
    template, tokenizer = make()
    assert tokenizer.convert_ids_to_tokens(template.stop_ids) == ["<|end|>", "</s>"]
    assert template.lead == []
    thoughtful, tokenizer = make(chat_template=THOUGHTS)
    assert tokenizer.decode(thoughtful.lead).split() == ["<think>", "</think>"]
    brackets, tokenizer = make(chat_template=BRACKETS)
    assert (brackets.lead, brackets.stop_ids) == ([], (tokenizer.eos_token_id,))


def test_a_text_begins_as_the_tokenizer_begins_it_and_once():
    bare, tokenizer = make("plain")
    template = Template(with_bos(tokenizer), LanguageSpec(template="plain"))
    assert (bare.bos_ids, template.bos_ids) == ([], [tokenizer.bos_token_id])
    assert template.prompt(CHAT[:4]) == [tokenizer.bos_token_id, *bare.prompt(CHAT[:4])]
    assert template.response("bird") == bare.response("bird")
    brackets, tokenizer = make(chat_template=BRACKETS)  # writes it itself
    assert Template(with_bos(tokenizer), LanguageSpec()).prompt([USER]) == brackets.prompt([USER])


def at(day):
    """Return a clock for transformers' templates."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, day)

    return Clock


def test_a_template_writes_the_same_date_every_day(monkeypatch):
    _, tokenizer = make(chat_template=CLOCK)
    messages, clock = [{"role": "user", "content": USER.text}], "transformers.utils.chat_template_utils.datetime"
    written = {}
    for day in (26, 27):
        monkeypatch.setattr(clock, at(day))
        own = tokenizer.apply_chat_template(messages, tokenize=False)
        written[day] = own, Template(tokenizer, LanguageSpec()).tokenizer.apply_chat_template(messages, tokenize=False)
    assert "26 Jul 2024 : Friday, July 26\n" in written[26][1]
    assert written[26][1] == written[26][0] == written[27][1] != written[27][0]


def test_the_plain_template():
    template, tokenizer = make(chat_template=None)
    assert template.name == "plain"
    assert tokenizer.decode(template.prompt(CHAT[:2])).replace(" ", "") == (
        "Context:\nchoose\n\nRequest:\nPleasechooseaword\n\nReply:\n"
    )
    assert tokenizer.decode(template.response("bird")) == "bird </s>"


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, None])
def test_a_system_turn_is_put_before_conversations_without_one(chat_template):
    template, _ = make(chat_template=chat_template, system="choose")
    bare, _ = make(chat_template=chat_template)
    assert template.prompt([USER]) == bare.prompt(CHAT[:2])
    own = [Turn("system", "apple"), USER]
    assert template.prompt(own) == bare.prompt(own)


def test_a_prompt_is_shortened_from_the_left():
    template, tokenizer = make("plain")
    prompt = template.prompt([USER])
    begun = Template(with_bos(tokenizer), LanguageSpec(template="plain"))
    assert template.shorten(prompt, 5) == prompt[-5:]
    assert template.shorten(prompt, len(prompt)) == prompt
    assert begun.shorten([tokenizer.bos_token_id, *prompt], 5) == [tokenizer.bos_token_id, *prompt[-4:]]
    assert begun.shorten([tokenizer.bos_token_id, *prompt], 1) == [tokenizer.bos_token_id]


def test_a_token_that_begins_every_turn_does_not_begin_a_text():
    template = Template(tiny_tokenizer(bos_token="<|turn|>"), LanguageSpec())
    prompt = template.prompt([USER])
    assert prompt[0] == template.tokenizer.bos_token_id
    assert template.shorten(prompt, 5) == prompt[-5:]


# What cannot work ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chat_template", "options", "words"),
    [
        (NO_SYSTEM, {"system": "choose"}, "language.system.*no system"),
        (DEAF, {"system": "choose"}, "language.system.*leaves out system turns"),
        (None, {"name": "chat"}, r"language.template='chat'.*no chat template"),
        (BACKWARDS, {}, "not the beginning of prompt and response"),
    ],
)
def test_a_template_that_cannot_work_is_refused_at_the_start(chat_template, options, words):
    with pytest.raises((ConfigError, DataError), match=words):
        make(chat_template=chat_template, **options)


def test_a_tokenizer_without_an_end_of_text_is_refused():
    with pytest.raises(ConfigError, match="no eos token"):
        Template(tiny_tokenizer(eos_token=None), LanguageSpec())


@pytest.mark.parametrize(
    ("chat_template", "turns", "words"),
    [
        (NO_SYSTEM, CHAT, "row 7.*no system"),
        (DEAF, CHAT, r"row 7='choose'.*leaves out system turns.*plain"),
        (OTHER_WORDS, CHAT, r"row 7='bird'.*does not write this response as it would be learned"),
        (CHAT_TEMPLATE, [], "speaks first"),
        (CHAT_TEMPLATE, [Turn("system", "choose")], "speaks first"),
        (CHAT_TEMPLATE, [REPLY, USER], "speaks first"),
        (CHAT_TEMPLATE, [USER, Turn("system", "choose"), REPLY], "only be the first"),
        (CHAT_TEMPLATE, [USER, USER, REPLY], "twice in a row"),
        (CHAT_TEMPLATE, [USER], "must be the assistant's"),
    ],
)
def test_a_conversation_that_cannot_be_written_is_named(chat_template, turns, words):
    with pytest.raises(DataError, match=words):
        make(chat_template=chat_template)[0].segments(turns, "row 7")


def test_a_prompt_ends_with_the_user():
    with pytest.raises(DataError, match="must be the user's"):
        make()[0].prompt([USER, REPLY])
