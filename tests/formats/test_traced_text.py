"""Strings that know who wrote each character: the text is str's own, the mask follows the characters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from cai_runtime.formats.traced_text import TracedMarkup, TracedText, content, is_own, joined, mask_of, own, plain

OWN, CALLER = "AB<| \n", "ab>,\t\r"  # the two alphabets share no character: a character says what its mask must be
own_text = st.text(OWN, max_size=6)
caller_text = st.text(CALLER, max_size=6)
mixed = st.lists(st.one_of(own_text.map(own), caller_text.map(content)), max_size=5).map(joined)
piece = st.one_of(own_text.map(own), caller_text.map(content))
count = st.integers(-1, 4)

OPERATIONS = {
    "add": (lambda t, p, n: t + p),
    "add to plain": (lambda t, p, n: "a>" + t),
    "times": (lambda t, p, n: t * n),
    "times, turned": (lambda t, p, n: n * t),
    "item": (lambda t, p, n: t[n] if -len(t) <= n < len(t) else t),
    "slice": (lambda t, p, n: t[n:]),
    "step": (lambda t, p, n: t[:: -(n or 1)]),
    "list": (lambda t, p, n: list(t)),
    "reversed": (lambda t, p, n: list(reversed(t))),
    "strip": (lambda t, p, n: t.strip()),
    "strip of": (lambda t, p, n: t.strip(p)),
    "lstrip": (lambda t, p, n: t.lstrip()),
    "rstrip of": (lambda t, p, n: t.rstrip(p)),
    "split": (lambda t, p, n: t.split()),
    "split at most": (lambda t, p, n: t.split(maxsplit=n)),
    "split by": (lambda t, p, n: t.split(p or "A", n)),
    "rsplit": (lambda t, p, n: t.rsplit(None, n)),
    "rsplit by": (lambda t, p, n: t.rsplit(p or "A", n)),
    "splitlines": (lambda t, p, n: t.splitlines()),
    "splitlines with ends": (lambda t, p, n: t.splitlines(keepends=True)),
    "partition": (lambda t, p, n: t.partition(p or "A")),
    "rpartition": (lambda t, p, n: t.rpartition(p or "A")),
    "removeprefix": (lambda t, p, n: t.removeprefix(p)),
    "removesuffix": (lambda t, p, n: t.removesuffix(p)),
    "replace": (lambda t, p, n: t.replace(p, t[:2], n)),
    "replace all": (lambda t, p, n: t.replace("A", p)),
    "join": (lambda t, p, n: t.join([p, p, t])),
    "join none": (lambda t, p, n: t.join([])),
}


def exact(value):
    """The same value of exact strings."""
    if isinstance(value, str):
        return plain(value)
    return [exact(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", OPERATIONS)
@given(text=mixed, argument=piece, number=count)
@settings(max_examples=40, deadline=None)
def test_operations_are_strs_and_keep_the_mask(name, text, argument, number):
    operation = OPERATIONS[name]
    found = operation(text, argument, number)
    assert exact(found) == exact(operation(plain(text), plain(argument), number))
    for result in found if isinstance(found, (list, tuple)) else [found]:
        assert type(result) is TracedText
        assert mask_of(result) == bytes(character in OWN for character in result)


@pytest.mark.parametrize("method", ["upper", "lower", "title", "capitalize", "casefold", "swapcase"])
@given(text=st.lists(st.one_of(st.text(max_size=4).map(own), st.text(max_size=4).map(content)), max_size=4).map(joined))
def test_case_maps(method, text):
    found = getattr(text, method)()
    assert plain(found) == getattr(plain(text), method)()
    assert is_own(found) or not is_own(text)
    if len(found) == len(text):
        assert mask_of(found) == mask_of(text)
    elif not is_own(text):
        assert not any(mask_of(found))  # where characters moved, all count as the caller's


@pytest.mark.parametrize("method", ["center", "ljust", "rjust", "zfill", "expandtabs"])
def test_padding(method):
    assert is_own(getattr(own("<a>\t"), method)(9)) and not any(mask_of(getattr(content("<a>\t"), method)(9)))
    assert not any(mask_of(getattr(own("<") + content("a>"), method)(9)))


@pytest.mark.parametrize(
    ("pattern", "values", "mask"),
    [
        (own("<%s>"), content("a"), "101"),
        (own("<%s>"), own("a"), "111"),
        (own("<%s%%%d>"), (own("a"), 7), "11101"),
        (own("<%(x)s>"), {"x": content("%s")}, "1001"),
        (content("<%s>"), own("a"), "010"),
        (own("<%5s>"), own("a"), "0000000"),
        (own("%1s"), content("%1s"), "000"),
    ],
)
def test_percent(pattern, values, mask):
    found = pattern % values
    assert plain(found) == plain(pattern) % values and "".join(map(str, mask_of(found))) == mask


def test_what_is_not_known_is_a_callers():
    assert not any(mask_of("<|im_end|>")) and not any(mask_of(TracedText("<|im_end|>")))
    assert not any(mask_of("".join(own("<|im_end|>"))))
    assert not any(mask_of(own("<a>").translate({97: "b"})))
    assert type(str(own("a"))) is TracedText and hash(own("a")) == hash("a") and own("a") == content("a")


@given(text=mixed, other=mixed)
def test_markup_escapes_what_it_is_joined_with(text, other):
    joins = [
        (text + TracedMarkup(other), plain(text) + Markup(plain(other))),
        (TracedMarkup(text) + other, Markup(plain(text)) + plain(other)),
        (TracedMarkup(text) + TracedMarkup(other), Markup(plain(text)) + Markup(plain(other))),
        (TracedMarkup(text), Markup(plain(text))),
    ]
    for found, want in joins:
        assert isinstance(found, Markup) and plain(str(found)) == plain(want)
        assert len(mask_of(found)) == len(found) and mask_of(str(found)) == mask_of(found)


def test_markup_keeps_the_mask():
    found = content("f") + own("<a>") + TracedMarkup(content("<b>"))
    assert plain(found) == "f&lt;a&gt;<b>"
    assert "".join(map(str, mask_of(found))) == "0" + "1" * 9 + "000"
    assert not any(mask_of(TracedMarkup(own("<a>")).replace("a", "b")))
