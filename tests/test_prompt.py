"""The prompt builder: what is trained on is the prompt of evaluation and a response after it, under every template."""

import datetime

import pytest

from aroma.errors import ConfigError, DataError
from aroma_lab.language.examples import Conversation, Turn, instruction_turns
from aroma_lab.language.prompt import PromptBuilder
from aroma_lab.language.spec import LanguageSpec
from aroma_lab.language.template import _DAY, Lead, make_render
from tiny_lm import CHAT_TEMPLATE, questions, tiny_tokenizer, with_bos

USER = Turn("user", "Please choose a word")
REPLY = Turn("assistant", "the answer is apple")
CHAT = (Turn("system", "choose"), USER, REPLY, Turn("user", "a question"), Turn("assistant", "bird"))

BRACKETS = (  # as Llama 2: no heading of a response, a space before it, the end of the text after it
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}/ {{ m['content'] }} /"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_HEADING = CHAT_TEMPLATE.partition("{% if add_generation_prompt %}")[0]  # never says that a response is to follow
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


def make(template="auto", chat_template=CHAT_TEMPLATE, **options):
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = chat_template
    return PromptBuilder(tokenizer, LanguageSpec(template=template, **options)), tokenizer


def ids_of(segments, response=None):
    return [token for s in segments if response in (None, s.response) for token in s.ids]


def rendered(tokenizer, turns, **options):
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


# One builder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, None, BRACKETS, NO_HEADING])
@pytest.mark.parametrize("row", questions(3, seed=0), ids=["first", "second", "third"])
def test_an_example_is_the_prompt_and_the_response(chat_template, row):
    builder, _ = make(chat_template=chat_template)
    turns = instruction_turns(row["instruction"], row["input"])

    prompt, response = builder.segments(Conversation((*turns, Turn("assistant", row["output"]))))

    assert prompt.ids == builder.prompt(turns)
    assert response.ids == builder.response(row["output"])
    assert (prompt.learned, response.learned) == (False, True)
    assert response.ids[-1] == builder.stop_ids[0]


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, None, BRACKETS])
def test_a_continuation_is_the_response_without_its_end(chat_template):
    builder, _ = make(chat_template=chat_template)

    assert [*builder.continuation("the answer is bird"), builder.stop_ids[0]] == builder.response("the answer is bird")


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, None, NO_HEADING])
def test_the_history_of_a_chat_is_what_was_trained_on(chat_template):
    builder, _ = make(chat_template=chat_template)
    segments = builder.segments(Conversation(CHAT))

    assert [segment.response for segment in segments] == [False, True, False, True]
    assert builder.prompt(CHAT[:2]) == segments[0].ids
    assert builder.prompt(CHAT[:4]) == ids_of(segments[:3])


@pytest.mark.parametrize("chat_template", [FORGETFUL, THOUGHTS])
def test_of_a_chat_with_a_rewritten_history_the_last_response_is_learned(chat_template):
    builder, tokenizer = make(chat_template=chat_template)
    prompt, response = builder.segments(Conversation(CHAT))

    assert prompt.ids == builder.prompt(CHAT[:4]) == rendered(tokenizer, CHAT[:4], add_generation_prompt=True)
    assert response.ids == builder.response("bird")
    assert (prompt.learned, response.learned) == (False, True)
    assert prompt.ids + response.ids == rendered(tokenizer, CHAT)[:-1]


def test_white_space_around_a_response_is_no_part_of_it():
    builder, _ = make()
    padded = (*CHAT[:2], Turn("assistant", f"\n {REPLY.text}\n"), *CHAT[3:])

    assert builder.segments(Conversation(padded)) == builder.segments(Conversation(CHAT))
    assert builder.response(" bird\n") == builder.response("bird")


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, None, BRACKETS, NO_HEADING, THOUGHTS])
@pytest.mark.parametrize("text", ["the answer is bird", "a bird , \n a fish"])
def test_a_response_is_read_as_it_was_written(chat_template, text):
    builder, _ = make(chat_template=chat_template)

    assert builder.read(builder.response(text)) == text
    assert builder.read(builder.continuation(text)) == text


@pytest.mark.parametrize(
    ("written", "said", "undecided"),
    [
        ("", "", True),
        (" \n", "", True),
        ("<think>", "<think>", True),
        ("<think>\n\n</thi", "<think>\n\n</thi", True),
        ("<think>\n\n</think>\n\n", "", True),
        ("<think></think> bird", "bird", False),
        ("\n<think>\n\n</think>\n\n<think>", "<think>", False),
        ("<think>\nbird", "<think>\nbird", False),
        ("  bird <think></think>", "bird <think></think>", False),
    ],
)
def test_the_lead_is_known_by_its_words(written, said, undecided):
    lead = Lead("<think>\n\n</think>\n\n")

    assert (lead.removed_from(written), lead.may_go_on(written)) == (said, undecided)
    assert Lead(" ").removed_from(written) == written.lstrip()


# The chat template ---------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_chat_template():
    builder, tokenizer = make()

    assert builder.template == "chat"
    assert builder.prompt(CHAT[:4]) == rendered(tokenizer, CHAT[:4], add_generation_prompt=True)
    # Behind the end of the last turn the template writes a line end, at which nothing is left to say.
    assert ids_of(builder.segments(Conversation(CHAT))) == rendered(tokenizer, CHAT)[:-1]


def test_only_responses_and_their_ends_are_learned():
    builder, tokenizer = make()
    learned = [segment for segment in builder.segments(Conversation(CHAT)) if segment.learned]

    assert [tokenizer.decode(segment.ids) for segment in learned] == ["the answer is apple <|end|>", "bird <|end|>"]


def test_everything_is_learned_if_asked_for():
    builder, _ = make(learn="all")

    assert all(segment.learned for segment in builder.segments(Conversation(CHAT)))


def test_generation_stops_at_the_end_of_a_turn_and_of_the_text():
    builder, tokenizer = make()

    assert tokenizer.convert_ids_to_tokens(builder.stop_ids) == ["<|end|>", "</s>"]


def test_a_template_without_headings_of_responses():
    builder, tokenizer = make(chat_template=BRACKETS)

    assert tokenizer.decode(builder.prompt([USER])) == "<s> / Please choose a word /"
    assert tokenizer.decode(builder.response("bird")) == "bird </s>"
    assert builder.stop_ids == (tokenizer.eos_token_id,)


def test_the_heading_of_a_response_is_no_part_of_it():
    told, _ = make()
    untold, _ = make(chat_template=NO_HEADING)

    assert untold.prompt([USER]) == told.prompt([USER])
    assert untold.response("bird") == told.response("bird")


def test_a_chat_template_writes_the_beginning_of_the_text_itself():
    builder, tokenizer = make(chat_template=BRACKETS)
    again = PromptBuilder(with_bos(tokenizer), LanguageSpec())

    assert again.prompt([USER]) == builder.prompt([USER])
    assert again.prompt([USER]).count(tokenizer.bos_token_id) == 1


def test_what_comes_before_every_response_is_learned():
    builder, tokenizer = make(chat_template=THOUGHTS)
    prompt, response = builder.segments(Conversation((USER, REPLY)))

    assert prompt.ids == builder.prompt([USER]) == rendered(tokenizer, [USER], add_generation_prompt=True)
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
        written[day] = own, make_render(tokenizer, "chat")([USER], True, "prompt")

    assert "26 Jul 2024 : Friday, July 26\n" in written[26][1]
    assert written[26][1] == written[26][0] == written[27][1] != written[27][0]


def test_the_date_is_written_in_every_form():
    day = datetime.datetime(2024, 7, 26)

    assert {code: day.strftime(code) for code in _DAY} == _DAY
    _, tokenizer = make(chat_template="{{ strftime_now('" + "|".join(_DAY) + "') }}\n" + CHAT_TEMPLATE)
    written = make_render(tokenizer, "chat")([USER], True, "prompt")
    assert written.partition("\n")[0] == day.strftime("|".join(_DAY))


# The plain template --------------------------------------------------------------------------------------------------


def test_the_plain_template():
    builder, tokenizer = make(chat_template=None)

    assert builder.template == "plain"
    assert tokenizer.decode(builder.prompt(CHAT[:2])).replace(" ", "") == (
        "Context:\nchoose\n\nRequest:\nPleasechooseaword\n\nReply:\n"
    )
    assert tokenizer.decode(builder.response("bird")) == "bird </s>"
    assert builder.stop_ids == (tokenizer.eos_token_id,)


def test_the_plain_template_instead_of_the_tokenizers():
    assert make("plain")[0].prompt([USER]) == make(chat_template=None)[0].prompt([USER])
    assert make("plain")[0].prompt([USER]) != make("chat")[0].prompt([USER])


def test_the_plain_template_begins_a_text_as_the_tokenizer_does():
    bare, tokenizer = make("plain")
    builder = PromptBuilder(with_bos(tokenizer), LanguageSpec(template="plain"))

    assert (bare.bos_ids, builder.bos_ids) == ([], [tokenizer.bos_token_id])
    assert builder.prompt(CHAT[:4]) == [tokenizer.bos_token_id, *bare.prompt(CHAT[:4])]
    assert builder.response("bird") == bare.response("bird")


def test_plain_text_is_learned_whole():
    builder, tokenizer = make()
    builder = PromptBuilder(with_bos(tokenizer), LanguageSpec())
    front, text = builder.segments(Conversation((), "a bird , a fish"))

    assert (front.ids, front.learned) == ([tokenizer.bos_token_id], False)
    assert tokenizer.decode(text.ids) == "a bird , a fish </s>"
    assert text.learned


# System turns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, None])
def test_a_system_turn_is_put_before_conversations_without_one(chat_template):
    builder, _ = make(chat_template=chat_template, system="choose")
    bare, _ = make(chat_template=chat_template)

    assert builder.prompt([USER]) == bare.prompt(CHAT[:2])
    own = [Turn("system", "apple"), USER]
    assert builder.prompt(own) == bare.prompt(own)


@pytest.mark.parametrize(("chat_template", "words"), [(NO_SYSTEM, "no system"), (DEAF, "leaves out system turns")])
def test_a_template_without_system_turns_is_told_at_the_start(chat_template, words):
    with pytest.raises((ConfigError, DataError), match=f"language.system.*{words}"):
        make(chat_template=chat_template, system="choose")


def test_a_template_that_refuses_a_conversation_names_it():
    builder, _ = make(chat_template=NO_SYSTEM)

    with pytest.raises(DataError, match=r"row 7.*no system"):
        builder.segments(Conversation(CHAT), "row 7")


@pytest.mark.parametrize("turns", [CHAT, CHAT[:2]])
def test_a_system_turn_that_the_template_leaves_out_names_its_conversation(turns):
    builder, _ = make(chat_template=DEAF)
    assert CHAT[0].text in USER.text  # so that it is not enough to look for the words

    for _ in range(2):
        with pytest.raises(DataError, match=r"row 7='choose'.*leaves out system turns.*plain"):
            builder.segments(Conversation(turns), "row 7") if turns == CHAT else builder.prompt(turns, "row 7")
    assert builder.prompt([Turn("system", " "), USER]) == builder.prompt([USER])  # nothing is lost


# Cutting -------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_shortened_from_the_left():
    builder, tokenizer = make("plain")
    prompt = builder.prompt([USER])
    begun = PromptBuilder(with_bos(tokenizer), LanguageSpec(template="plain"))

    assert builder.shorten(prompt, 5) == prompt[-5:]
    assert builder.shorten(prompt, len(prompt)) == prompt
    assert begun.shorten([tokenizer.bos_token_id, *prompt], 5) == [tokenizer.bos_token_id, *prompt[-4:]]
    assert begun.shorten([tokenizer.bos_token_id, *prompt], 1) == [tokenizer.bos_token_id]


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, NO_HEADING])
def test_a_token_that_begins_every_turn_does_not_begin_a_text(chat_template):
    tokenizer = tiny_tokenizer(bos_token="<|turn|>")
    tokenizer.chat_template = chat_template
    builder = PromptBuilder(tokenizer, LanguageSpec())
    prompt = builder.prompt([USER])

    assert prompt[0] == tokenizer.bos_token_id
    assert builder.kept_at_front(prompt) == 0
    assert builder.shorten(prompt, 5) == prompt[-5:]
    begun, _ = make(chat_template="{{ bos_token }}" + CHAT_TEMPLATE)
    assert begun.kept_at_front(begun.prompt([USER])) == 1


# What cannot work ----------------------------------------------------------------------------------------------------


def test_a_chat_template_that_is_not_there():
    with pytest.raises(ConfigError, match=r"language.template='chat'.*no chat template"):
        make("chat", chat_template=None)


def test_a_tokenizer_without_an_end_of_text():
    with pytest.raises(ConfigError, match="no eos token"):
        PromptBuilder(tiny_tokenizer(eos_token=None), LanguageSpec())


def test_a_template_in_which_no_prompt_leads_to_a_response():
    with pytest.raises(ConfigError, match="not the beginning of prompt and response"):
        make(chat_template=BACKWARDS)


def test_a_response_that_the_template_changes():
    builder, _ = make(chat_template=OTHER_WORDS)

    assert builder.segments(Conversation((USER, REPLY)))
    with pytest.raises(DataError, match=r"row 2='bird'.*writes this response otherwise"):
        builder.segments(Conversation(CHAT), "row 2")


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
