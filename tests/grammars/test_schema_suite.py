"""JSON-Schema-Test-Suite (draft 2020-12) through the compiler: what a grammar takes is valid, or its schema is refused."""

import json
from collections import Counter
from pathlib import Path

import pytest

from cai_runtime.errors import GrammarError
from cai_runtime.grammars import expressions

SUITE = json.loads((Path(__file__).parent / "data/json_schema_test_suite.json").read_text())

# Valid values that a grammar does not take, by file: it allows less than the schema, never more.
TOO_STRICT = {
    "const": 4, "enum": 4, "type": 1,  # 1.0 in place of 1
    "format": 11,  # the suite's values that are no such format: it is asserted here
    "optional/ecmascript-regex": 4,  # what Python takes for space, digits and letters besides
    "optional/float-overflow": 1, "optional/bignum": 2,  # where there are bounds, none beyond 2^62
    "optional/format/date-time": 4, "optional/format/time": 7,  # leap seconds, lower case, 15 digits
    "optional/format/duration": 1, "optional/format/email": 5, "optional/format/hostname": 16,  # Punycode
    "optional/format/ipv6": 4,  # IPv4 inside
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(takes):
    found, strict, lax = Counter(), Counter(), []
    for file, groups in SUITE.items():
        for about, schema, cases in groups:
            try:
                expression = expressions.json_schema(schema)
            except GrammarError as error:
                assert "can't be enforced at" in str(error)
                found["refused"] += len(cases)
                continue
            for value, valid, case in cases:
                taken = takes(expression, value)
                found[f"{'taken' if taken else 'not taken'}, {'valid' if valid else 'invalid'}"] += 1
                if taken and not valid:
                    lax.append((file, about, case, value))
                if valid and not taken:
                    strict[file] += 1
    return found, strict, lax


def test_none_is_too_lax(outcomes):
    assert outcomes[2] == []


def test_what_is_too_strict_is_known(outcomes):
    assert dict(outcomes[1]) == TOO_STRICT


def test_half_of_the_suite_is_served(outcomes):
    """The rest has keywords that can't be enforced token by token, and is refused."""
    found = outcomes[0]
    assert found["taken, valid"] > 600 and found["not taken, invalid"] > 550, found
