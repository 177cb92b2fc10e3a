"""truncation="auto": which turns are left out where a conversation does not fit."""

from functools import partial

import pytest

from cai_runtime import BadRequestError
from cai_runtime.api.responses.messages import droppable, longest
from cai_runtime.formats.messages import Message


def ask(**params):
    return {"input": "hi", "temperature": 0, **params}


def turn(role, text="x"):
    return Message(role, text)


def kept(roles, room):
    """Roles and positions of what stays where `room` messages fit."""
    messages = [Message(role, str(i)) for i, role in enumerate(roles)]
    left = longest(messages, lambda some: some if len(some) <= room else None)
    return None if left is None else [int(message.content) for message in left]


@pytest.mark.parametrize(
    ("roles", "room", "expected"),
    [
        ("s u a u a u", 6, [0, 1, 2, 3, 4, 5]),
        ("s u a u a u", 5, [0, 3, 4, 5]),  # a turn goes whole
        ("s u a u a u", 3, [0, 5]),
        ("s u a u a u", 2, [0, 5]),
        ("s u a u a u", 1, None),  # instructions and the last turn stay
        ("a u a u", 3, [1, 2, 3]),
        # Of the last turn, rounds of calls go with their outputs; the question and the last round stay.
        ("s u a t t a t a t", 8, [0, 1, 5, 6, 7, 8]),
        ("s u a t t a t a t", 4, [0, 1, 7, 8]),
        ("s u a t t a t a t", 3, None),
        ("u a s u a t", 5, [2, 3, 4, 5]),  # a system message in a turn that goes stays
        ("d u a d u", 3, [0, 3, 4]),  # the developer's stay, too
        ("s", 0, None),
    ],
)
def test_truncation(roles, room, expected):
    names = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}
    assert kept([names[role] for role in roles.split()], room) == expected


def test_a_long_conversation_is_tried_a_few_times():
    """1000 turns, of which the last 400 fit: 10 halvings after all of it and the least."""
    messages, tried = [turn(role) for _ in range(1000) for role in ("user", "assistant")], []

    def attempt(some):
        tried.append(len(some))
        return some if len(some) <= 800 else None

    assert longest(messages, attempt) == messages[-800:]
    assert len(tried) <= 12
    tried.clear()
    assert longest(messages[:10], attempt) == messages[:10] and tried == [10]


def test_nothing_is_dropped_twice():
    roles = ["system", "assistant", "user", "assistant", "tool", "user", "assistant", "tool", "assistant", "tool"]
    units = droppable([turn(role) for role in roles])
    assert units == [{1}, {2, 3, 4}, {6, 7}]


def conversation(turns, length=20):
    items = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{i}" + "x" * length} for i in range(turns)]
    return items


def test_truncation_leaves_out_the_oldest_turns(client, prompts):
    client.responses.create(**ask(max_output_tokens=1))
    prompts()
    items = conversation(9)  # 9 messages of 26 to 32 tokens, for a context of 200
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(input=items, instructions="i", temperature=0, max_output_tokens=20)
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")
    response = client.responses.create(
        input=items, instructions="i", temperature=0, max_output_tokens=20, truncation="auto"
    )
    (prompt,) = prompts()
    kept = [line[:6].split(":")[0] for line in prompt.splitlines()]
    assert kept == ["system", "user", "assist", "user", "assist", "user", "assist"]
    assert "user:4x" in prompt and "assistant:3x" not in prompt and response.usage.input_tokens <= 180
    # The next turn would have fit no more.
    assert response.usage.input_tokens + len("user:2" + "assistant:3" + 2 * ("x" * 20 + "\n")) > 180


def test_truncation_needs_room_for_the_last_turn(client):
    for options in [{"max_output_tokens": 199}, {"instructions": "i" * 200}]:
        with pytest.raises(BadRequestError) as caught:
            client.responses.create(**ask(truncation="auto", **options))
        assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")


def test_truncation_without_a_limit_keeps_room_for_an_answer(client):
    response = client.responses.create(input=conversation(9), temperature=0, truncation="auto", ignore_eos=True)
    assert response.usage.input_tokens <= 175 and response.usage.total_tokens == 200


def test_truncation_knows_what_the_models_name_adds(client, tokenizer, prompts):
    """With -r the template writes 60 characters more, for which a turn has to go."""
    extra = "{{ '" + "-" * 60 + "' if enable_thinking else '' }}"
    tokenizer.chat_template = extra + tokenizer.chat_template
    counts, rendered = {}, 0

    def counting(conversation, prepare):
        nonlocal rendered
        rendered += 1
        return prepare(conversation)

    client.responses.create(**ask(max_output_tokens=1))
    opened = client._host.open(client._host.resolve("abc"))
    opened.format.prepare = partial(counting, prepare=opened.format.prepare)
    prompts()
    for model in ("abc", "abc-r"):
        response = client.responses.create(
            model=model, input=conversation(5), temperature=0, max_output_tokens=20, truncation="auto"
        )
        counts[model], rendered = (prompts()[0].count("user:"), response.usage.input_tokens <= 180, rendered), 0
    assert counts == {"abc": (3, True, 1), "abc-r": (2, True, 3)}
