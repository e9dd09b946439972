"""Templates: what is trained on is the prompt of evaluation and a response after it, under every chat template."""

import datetime

import pytest

from aroma.errors import ConfigError, DataError
from aroma_lab.language.template import Template, Turn, instruction_turns
from aroma_lab.specs import LanguageSpec
from tiny_lm import CHAT_TEMPLATE, questions, tiny_tokenizer, with_bos

USER = Turn("user", "Please choose a word")
REPLY = Turn("assistant", "the answer is apple")
CHAT = (Turn("system", "choose"), USER, REPLY, Turn("user", "a question"), Turn("assistant", "bird"))

BRACKETS = (  # as Llama 2: no heading of a response, a space before it, the end of the text after it
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}/ {{ m['content'] }} /"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_HEADING = CHAT_TEMPLATE.partition("{% if add_generation_prompt %}")[0]  # never says that a response is to follow
NO_STOP = CHAT_TEMPLATE.replace("<|end|>", "")  # no token of its own ends a response
FORGETFUL = (  # as templates that take thoughts out of earlier responses
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}"
    "{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
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
    "{% set date = strftime_now('%A, %B %-d') %}{% endif %}{{ today() }} : {{ date }}\n"
) + CHAT_TEMPLATE
OTHER_WORDS = CHAT_TEMPLATE.replace("message['content']", "message['content'] | replace('bird', 'fish')")
BACKWARDS = CHAT_TEMPLATE.replace("in messages %}", "in messages | reverse %}")


def make(name="auto", chat_template=CHAT_TEMPLATE, **options):
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = chat_template
    made = Template(tokenizer, LanguageSpec(template=name, **options))
    return made, tokenizer


def ids_of(segments, response=None):
    return [token for s in segments if response in (None, s.response) for token in s.ids]


def rendered(tokenizer, turns, **options):
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


# One template --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, None, BRACKETS, NO_HEADING, NO_STOP])
@pytest.mark.parametrize("row", questions(2, seed=0), ids=["first", "second"])
def test_an_example_is_the_prompt_and_the_response(chat_template, row):
    template, _ = make(chat_template=chat_template)
    turns = instruction_turns(row["instruction"], row["input"])

    prompt, response = template.segments((*turns, Turn("assistant", row["output"])))

    assert prompt.ids == template.prompt(turns)
    assert response.ids == template.response(row["output"])
    assert (prompt.response, response.response) == (False, True)
    assert response.ids[-1] == template.stop_ids[0]
    # What other programs do with the tokenizer that is saved beside an adapter.
    assert prompt.ids == rendered(template.tokenizer, turns, add_generation_prompt=True)
    whole = rendered(template.tokenizer, [*turns, Turn("assistant", row["output"])])
    assert whole[: len(prompt.ids + response.ids)] == prompt.ids + response.ids


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


def test_white_space_around_a_response_is_no_part_of_it():
    template, _ = make()
    padded = (*CHAT[:2], Turn("assistant", f"\n {REPLY.text}\n"), *CHAT[3:])

    assert template.segments(padded) == template.segments(CHAT)
    assert template.response(" bird\n") == template.response("bird")


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, None, BRACKETS, NO_HEADING, THOUGHTS])
@pytest.mark.parametrize("text", ["the answer is bird", "a bird , \n a fish"])
def test_a_response_is_read_as_it_was_written(chat_template, text):
    template, _ = make(chat_template=chat_template)

    assert template.read(template.response(text)) == text
    assert template.read(template.continuation(text)) == text


# The chat template ---------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_chat_template():
    template, tokenizer = make()

    assert template.name == "chat"
    assert template.prompt(CHAT[:4]) == rendered(tokenizer, CHAT[:4], add_generation_prompt=True)
    # Behind the end of the last turn the template writes a line end, at which nothing is left to say.
    assert ids_of(template.segments(CHAT)) == rendered(tokenizer, CHAT)[:-1]


def test_generation_stops_at_the_end_of_a_turn_and_of_the_text():
    template, tokenizer = make()

    assert tokenizer.convert_ids_to_tokens(template.stop_ids) == ["<|end|>", "</s>"]


def test_a_template_without_headings_of_responses():
    template, tokenizer = make(chat_template=BRACKETS)

    assert tokenizer.decode(template.prompt([USER])) == "<s> / Please choose a word /"
    assert tokenizer.decode(template.response("bird")) == "bird </s>"
    assert template.stop_ids == (tokenizer.eos_token_id,)


def test_a_chat_template_writes_the_beginning_of_the_text_itself():
    template, tokenizer = make(chat_template=BRACKETS)
    again = Template(with_bos(tokenizer), LanguageSpec())

    assert again.prompt([USER]) == template.prompt([USER])
    assert again.prompt([USER]).count(tokenizer.bos_token_id) == 1


def test_what_comes_before_every_response_is_learned():
    template, tokenizer = make(chat_template=THOUGHTS)
    prompt, response = template.segments((USER, REPLY))

    assert prompt.ids == template.prompt([USER]) == rendered(tokenizer, [USER], add_generation_prompt=True)
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == [
        t for t in response.ids if t >= len(tokenizer) - 2
    ]
    assert prompt.ids + response.ids == rendered(tokenizer, [USER, REPLY])[:-1]


def at(day):
    """Return a clock for transformers' templates."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, day)

    return Clock


@pytest.mark.parametrize("before", ["", "\n", "  {% if true %}\n  x{% endif %}"])
def test_a_template_writes_the_same_date_every_day(before, monkeypatch):
    _, tokenizer = make(chat_template=before + CLOCK)
    messages, clock = [{"role": "user", "content": USER.text}], "transformers.utils.chat_template_utils.datetime"
    written = {}
    for day in (26, 27):
        monkeypatch.setattr(clock, at(day))
        own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ours = Template(tokenizer, LanguageSpec()).tokenizer
        written[day] = own, ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert "26 Jul 2024 : Friday, July 26\n" in written[26][1]
    assert written[26][1] == written[26][0] == written[27][1] != written[27][0]


# The plain template --------------------------------------------------------------------------------------------------


def test_the_plain_template():
    template, tokenizer = make(chat_template=None)

    assert template.name == "plain"
    assert tokenizer.decode(template.prompt(CHAT[:2])).replace(" ", "") == (
        "Context:\nchoose\n\nRequest:\nPleasechooseaword\n\nReply:\n"
    )
    assert tokenizer.decode(template.response("bird")) == "bird </s>"
    assert template.stop_ids == (tokenizer.eos_token_id,)


def test_the_plain_template_begins_a_text_as_the_tokenizer_does():
    bare, tokenizer = make("plain")
    template = Template(with_bos(tokenizer), LanguageSpec(template="plain"))

    assert (bare.bos_ids, template.bos_ids) == ([], [tokenizer.bos_token_id])
    assert template.prompt(CHAT[:4]) == [tokenizer.bos_token_id, *bare.prompt(CHAT[:4])]
    assert template.response("bird") == bare.response("bird")


# System turns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, None])
def test_a_system_turn_is_put_before_conversations_without_one(chat_template):
    template, _ = make(chat_template=chat_template, system="choose")
    bare, _ = make(chat_template=chat_template)

    assert template.prompt([USER]) == bare.prompt(CHAT[:2])
    own = [Turn("system", "apple"), USER]
    assert template.prompt(own) == bare.prompt(own)


@pytest.mark.parametrize(("chat_template", "words"), [(NO_SYSTEM, "no system"), (DEAF, "leaves out system turns")])
def test_a_template_without_system_turns_is_told_at_the_start(chat_template, words):
    with pytest.raises((ConfigError, DataError), match=f"language.system.*{words}"):
        make(chat_template=chat_template, system="choose")


def test_a_template_that_refuses_a_conversation_names_it():
    template, _ = make(chat_template=NO_SYSTEM)

    with pytest.raises(DataError, match=r"row 7.*no system"):
        template.segments(CHAT, "row 7")


@pytest.mark.parametrize("turns", [CHAT, CHAT[:2]])
def test_a_system_turn_that_the_template_leaves_out_names_its_conversation(turns):
    template, _ = make(chat_template=DEAF)
    assert CHAT[0].text in USER.text  # so that it is not enough to look for the words

    for _ in range(2):
        with pytest.raises(DataError, match=r"row 7='choose'.*leaves out system turns.*plain"):
            template.segments(turns, "row 7") if turns == CHAT else template.prompt(turns, "row 7")
    assert template.prompt([Turn("system", " "), USER]) == template.prompt([USER])  # nothing is lost


# Cutting -------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_shortened_from_the_left():
    template, tokenizer = make("plain")
    prompt = template.prompt([USER])
    begun = Template(with_bos(tokenizer), LanguageSpec(template="plain"))

    assert template.shorten(prompt, 5) == prompt[-5:]
    assert template.shorten(prompt, len(prompt)) == prompt
    assert begun.shorten([tokenizer.bos_token_id, *prompt], 5) == [tokenizer.bos_token_id, *prompt[-4:]]
    assert begun.shorten([tokenizer.bos_token_id, *prompt], 1) == [tokenizer.bos_token_id]


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, NO_HEADING])
def test_a_token_that_begins_every_turn_does_not_begin_a_text(chat_template):
    tokenizer = tiny_tokenizer(bos_token="<|turn|>")
    tokenizer.chat_template = chat_template
    template = Template(tokenizer, LanguageSpec())
    prompt = template.prompt([USER])

    assert prompt[0] == tokenizer.bos_token_id
    assert template.kept_at_front(prompt) == 0
    assert template.shorten(prompt, 5) == prompt[-5:]
    begun, _ = make(chat_template="{{ bos_token }}" + CHAT_TEMPLATE)
    assert begun.kept_at_front(begun.prompt([USER])) == 1


# What cannot work ----------------------------------------------------------------------------------------------------


def test_a_chat_template_that_is_not_there():
    with pytest.raises(ConfigError, match=r"language.template='chat'.*no chat template"):
        make("chat", chat_template=None)


def test_a_tokenizer_without_an_end_of_text():
    with pytest.raises(ConfigError, match="no eos token"):
        Template(tiny_tokenizer(eos_token=None), LanguageSpec())


def test_a_template_in_which_no_prompt_leads_to_a_response():
    with pytest.raises(ConfigError, match="not the beginning of prompt and response"):
        make(chat_template=BACKWARDS)


def test_a_response_that_the_template_changes():
    template, _ = make(chat_template=OTHER_WORDS)

    assert template.segments((USER, REPLY))
    with pytest.raises(DataError, match=r"row 2='bird'.*does not write this response as it would be learned"):
        template.segments(CHAT, "row 2")


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "speaks first"),
        ([Turn("system", "choose")], "speaks first"),
        ([REPLY, USER], "speaks first"),
        ([USER, Turn("system", "choose"), USER], "only be the first"),
        ([USER, USER], "twice in a row"),
        ([USER, REPLY], "must be the user's"),
    ],
)
def test_turns_in_an_order_that_no_chat_has(turns, words):
    with pytest.raises(DataError, match=words):
        make()[0].prompt(turns)
