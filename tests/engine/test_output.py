"""From tokens to events: however the tokens are grouped, whatever is held back, and wherever the text ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cai_runtime.engine.detokenizer import TokenDecoder
from cai_runtime.engine.output import OutputSpec, TextOutput, TokenOutput
from cai_runtime.engine.request import EndEvent, TextEvent
from cai_runtime.errors import InvalidRequestError

LETTERS = "abcdefgh"


def make_decoder():
    """Letters, all bytes, and two special tokens; byte-level, so that characters are split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|im_end|>"])
    return tokenizer, TokenDecoder(tokenizer)


TOKENIZER, DECODER = make_decoder()
END = TOKENIZER.token_to_id("<|end|>")


def ids(text):
    return TOKENIZER.encode(text).ids


def spec(stop=(), min_tokens=0, ends=None):
    return OutputSpec(DECODER, ids("x"), {END: None} if ends is None else ends, tuple(stop), min_tokens)


def run(output, groups):
    """Feed groups of tokens up to the end, then finish: (events, tokens of the text, finish reason, stop string)."""
    events, tokens = [], []
    for group in groups:
        delta = output.feed(group)
        events += delta.events
        tokens += delta.token_ids
        if delta.finish_reason is not None:
            return events, tokens, delta.finish_reason, delta.stop_string
    delta = output.finish()
    return events + list(delta.events), tokens, delta.finish_reason, delta.stop_string


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, TextEvent))


TEXTS = st.text("abcé日🙂\n", max_size=12)


@given(
    text=TEXTS,
    tail=st.sampled_from([[], [END], [END, *ids("more")], ids("🙂")[:2]]),
    stops=st.lists(st.text("abc日\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 4), max_size=30),
    min_tokens=st.integers(0, 6),
)
@settings(max_examples=300, deadline=None)
def test_events_do_not_depend_on_how_tokens_were_grouped(text, tail, stops, cuts, min_tokens):
    tokens = [*ids(text), *tail]
    groups, at = [], 0
    for size in cuts:
        groups.append(tokens[at : at + size])
        at += size
    groups.append(tokens[at:])
    one_by_one = run(TextOutput(spec(stops, min_tokens)), [[token] for token in tokens])
    assert run(TextOutput(spec(stops, min_tokens)), groups) == one_by_one
    events, taken, reason, _ = one_by_one
    assert events[-1] == EndEvent(reason) and sum(isinstance(event, EndEvent) for event in events) == 1
    assert all(event.text for event in events[:-1]), "no empty piece"
    assert taken == tokens[: len(taken)]
    shown = [token for event in events[:-1] for token in event.token_ids]
    assert shown == taken[: len(shown)], "each token is in one event at most, in order"


@given(text=st.text(LETTERS, min_size=1, max_size=20), data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_stop_string_cuts_wherever_it_is(text, data):
    begin = data.draw(st.integers(0, len(text) - 1))
    stop = text[begin : data.draw(st.integers(begin + 1, len(text)))]
    events, taken, reason, found = run(TextOutput(spec([stop])), [ids(text)])
    assert text_of(events) == text[: text.index(stop)]
    assert (reason, found) == ("stop", stop)
    assert len(taken) == text.index(stop) + len(stop), "nothing after the stop string belongs to the text"


@given(text=st.text(LETTERS, max_size=20), stops=st.lists(st.text("xyab", min_size=2, max_size=5), max_size=3))
@settings(max_examples=200, deadline=None)
def test_what_was_held_back_is_flushed(text, stops):
    if any(stop in text for stop in stops):
        return
    for groups, reason in (([ids(text)], "length"), ([[*ids(text), END]], "stop")):
        events, _, found, _ = run(TextOutput(spec(stops)), groups)
        assert (text_of(events), found) == (text, reason)


def test_an_unfinished_character_is_flushed_and_may_complete_a_stop_string():
    half = ids("🙂")[:2]
    assert text_of(run(TextOutput(spec()), [half])[0]) == "\ufffd"
    assert run(TextOutput(spec(["\ufffd"])), [half])[2:] == ("stop", "\ufffd")


def test_a_stop_string_that_is_a_special_token_ends_the_text():
    im_end = DECODER.special_id("<|im_end|>")
    output = TextOutput(spec(ends={im_end: "<|im_end|>"}))
    assert run(output, [[*ids("ab"), im_end, *ids("c")]])[1:] == ([*ids("ab"), im_end], "stop", "<|im_end|>")


def test_min_tokens():
    for stops, end in (([], END), (["b"], ids("b")[0])):
        tokens = [end, end, *ids("a"), end]
        assert len(run(TextOutput(spec(stops, min_tokens=4)), [tokens])[1]) == 4


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_engine_stops_at_special_tokens_by_name(make_engine, greedy, expected, ignore_eos):
    """FakeTokenizer has no special tokens to name; the real path is the API's `stop`."""
    engine = make_engine()
    token = expected([3, 1], 20)[4]
    engine.decoder._special_id = {"<|x|>": token}
    done = engine.submit(greedy([3, 1], stop=("<|x|>",), ignore_eos=ignore_eos)).result()
    first = expected([3, 1], 20).index(token)
    assert done.token_ids == expected([3, 1], 20)[: first + 1]
    assert (done.finish_reason, done.stop_string) == ("stop", "<|x|>")


def test_an_output_of_ones_own(make_engine, greedy, expected):
    """The engine passes events through, whatever they are."""

    class Shouting(TextOutput):
        def _emit(self, text, events):
            events += [text.upper()] if text else []

    request = greedy([1, 2])
    request.output = Shouting
    handle = make_engine().submit(request)
    events = [event for delta in handle for event in delta.events]
    assert events == list(handle.result().events) and events[-1] == EndEvent(handle.result().finish_reason)
    assert handle.result().token_ids == expected([1, 2], 20)


def test_several_tokens_at_once_keep_to_max_tokens(make_engine, greedy):
    from cai_runtime.engine.outbox import TokenLog
    from cai_runtime.engine.sampling import SequenceSampler
    from cai_runtime.engine.segments import Prompt
    from cai_runtime.engine.sequence import Sequence

    request = greedy([1], 3)
    sequence = Sequence(
        arrival=0,
        request=request,
        prompt=Prompt([1]),
        sampler=SequenceSampler(request.sampling, [1], [], seed=0),
        output=TextOutput(spec()),
        log=TokenLog(),
    )
    for token_id in ids("abcdef"):
        sequence.append(token_id)
    delta = sequence.put_out()
    assert delta.text == "abc" and delta.finish_reason == "length" and sequence.token_ids == [1, *ids("abc")]


@pytest.mark.parametrize("size", [1, 2, 9])
def test_tokens_alone(size):
    def feed(tokens, **options):
        return run(TokenOutput(spec(**options)), [tokens[at : at + size] for at in range(0, len(tokens), size)])

    (end,), tokens, reason, stop = feed([3, END, 4, END, 5], min_tokens=3)
    assert (end, tokens, reason, stop) == (EndEvent("stop"), [3, END, 4, END], "stop", None)
    assert end.token_ids == (3, END, 4, END)
    (end,), tokens, reason, _ = feed([3, 4, 5])
    assert (tokens, reason, end.token_ids) == ([3, 4, 5], "length", (3, 4, 5))
    assert feed([3, END], stop=["<|end|>"], ends={END: "<|end|>"})[3] == "<|end|>"


def test_tokens_alone_find_no_stop_string():
    with pytest.raises(InvalidRequestError, match="stop string such as 'ab'.*stop_token_ids"):
        TokenOutput(spec(stop=["<|end|>", "ab"], ends={END: "<|end|>"}))
