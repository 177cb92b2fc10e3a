"""Where the fragments of references lead."""

import pytest

from cai_runtime.grammars.pointers import escaped, pointed

DOCUMENT = {"a": [{"b": 1}, 2], "x/y~": 3, "": 4, "0": 5, "per cent": 6, "%20": 7, "t": (8,)}


@pytest.mark.parametrize(
    ("fragment", "value"),
    [
        ("", DOCUMENT), ("/a/0/b", 1), ("/a/1", 2), ("/x~1y~0", 3), ("/", 4), ("/0", 5), ("/per%20cent", 6), ("/%2520", 7),
        ("/t/0", 8),
    ],
)  # fmt: skip
def test_found(fragment, value):
    assert pointed(fragment, DOCUMENT) == value


@pytest.mark.parametrize(
    "fragment", ["/b", "/a/2", "/a/-1", "/a/01", "/a/\u0661", "/a/" + "9" * 5000, "/a/b", "/a/1/c", "/x/y~"]
)
def test_not_found(fragment):
    with pytest.raises(LookupError):
        pointed(fragment, DOCUMENT)


def test_names_and_back():
    assert all(pointed("/" + escaped(name).replace("%", "%25"), DOCUMENT) == DOCUMENT[name] for name in DOCUMENT)
