"""A vocabulary of single bytes, and texts held against grammars."""

import itertools
import json

import pytest

from cai_runtime.grammars import Grammars


def byte_tokenizer(**more):
    """Bytes as tokens, then <bos> and <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", **more)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(**more): one of bytes; more: arguments of PreTrainedTokenizerFast."""
    return byte_tokenizer


@pytest.fixture(scope="session")
def grammars(tokenizer):
    """Of a model whose logits have 30 tokens more than the tokenizer."""
    return Grammars(tokenizer, len(tokenizer) + 30, [tokenizer.eos_token_id])


@pytest.fixture(scope="session")
def accepts(grammars, tokenizer):
    """accepts(expression, text): whether the text is one of the grammar's, whole."""
    tokens = grammars.vocabulary.tokenizer
    of_byte = {tokens.decode_bytes([i]): i for i in range(256)}

    def check(expression, text):
        matcher = grammars.mask(f"start: {expression}").matcher.deep_copy()
        ids = [of_byte[bytes([byte])] for byte in text.encode()]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting() and not matcher.is_error()

    return check


def spellings(value, most=24):
    """JSON texts of a value: compact, in several orders of the keys, since a grammar takes them in one."""
    if isinstance(value, dict):
        texts = []
        for items in itertools.islice(itertools.permutations(value.items()), most):
            for parts in itertools.islice(itertools.product(*[spellings(child, 3) for _, child in items]), 4):
                keys = [json.dumps(key, ensure_ascii=False) for key, _ in items]
                texts.append("{" + ",".join(map(":".join, zip(keys, parts, strict=True))) + "}")
        return texts[:most]
    if isinstance(value, list):
        parts = itertools.islice(itertools.product(*[spellings(child, 3) for child in value]), 4)
        return ["[" + ",".join(texts) + "]" for texts in parts]
    return [json.dumps(value, ensure_ascii=False)]


@pytest.fixture(scope="session")
def takes(accepts):
    """takes(expression, value): whether the grammar takes one of the value's spellings."""
    return lambda expression, value: any(accepts(expression, text) for text in spellings(value))


NAMES = ["a", "b", "name", "é", 'q"', "x/y", "long_name_of_a_property"]
PATTERNS = ["^[a-c]+$", "x", "^\\d{2,3}-\\w$", "^(foo|bar)*$", "[^x]y$", "^.$", "^\\s*$", "(ab){2}", "^\\S{1,3}$"]
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "json-pointer"]


def random_schema(rng, depth=0):
    """A schema of every keyword that can be enforced, and a few that can't; often one that nothing fits."""
    kinds = ["string", "integer", "number", "enum", "boolean", "null"]
    if depth < 3:
        kinds += ["object", "object", "array", "anyOf", "allOf", "oneOf", "any", "types", "$ref"]
    kind = rng.choice(kinds)
    child = lambda: random_schema(rng, depth + 1)  # noqa: E731
    some = lambda p, **keys: {key: make() for key, make in keys.items() if rng.random() < p}  # noqa: E731
    whole, real = (
        (lambda: rng.randint(-50, 50)),
        (lambda: rng.choice([rng.randint(-9, 9), round(rng.uniform(-99, 99), 2)])),
    )
    if kind == "string":
        return {"type": "string"} | some(
            0.25, minLength=lambda: rng.randint(0, 4), maxLength=lambda: rng.randint(2, 9),
            pattern=lambda: rng.choice(PATTERNS), format=lambda: rng.choice(FORMATS),
        )  # fmt: skip
    if kind in ("integer", "number"):
        bound = whole if kind == "integer" else real
        return {"type": kind} | some(
            0.25, minimum=bound, maximum=lambda: bound() + 60, exclusiveMinimum=bound, exclusiveMaximum=lambda: bound() + 70,
            multipleOf=lambda: rng.choice([1, 2, 3, 7, 10] + [0.5, 0.25, 0.1, 1.5] * (kind == "number")),
        )  # fmt: skip
    if kind == "enum":
        values = [1, -2, 0.5, "a", "é\n", None, True, {"a": 1, "b": [2]}, [], [1, "x"], ""]
        return rng.choice([{"enum": rng.sample(values, 3)}, {"const": rng.choice(values)}])
    if kind == "object":
        names = rng.sample(NAMES, rng.randint(0, 4))
        schema = {"type": "object", "properties": {name: child() for name in names}}
        schema |= some(
            0.4, additionalProperties=lambda: rng.choice([False, False, child()]),
            required=lambda: rng.sample(NAMES, rng.randint(0, 3)), minProperties=lambda: rng.randint(0, 3),
            maxProperties=lambda: rng.randint(0, 4),
        )  # fmt: skip
        return schema | some(0.2, patternProperties=lambda: {rng.choice(["^p", "_$", "^z[0-9]$"]): child()})
    if kind == "array":
        return {"type": "array"} | some(
            0.5, items=lambda: rng.choice([False, child(), child()]), minItems=lambda: rng.randint(0, 3),
            maxItems=lambda: rng.randint(0, 4), prefixItems=lambda: [child() for _ in range(rng.randint(1, 3))],
        )  # fmt: skip
    if kind in ("anyOf", "allOf", "oneOf"):
        return {kind: [child() for _ in range(rng.randint(1, 3))]} | (child() if rng.random() < 0.2 else {})
    if kind == "types":
        return {"type": rng.sample(["string", "integer", "number", "object", "array", "null", "boolean"], 2)} | some(
            0.2, minLength=lambda: 1, maxItems=lambda: 2, minimum=lambda: 3, pattern=lambda: rng.choice(PATTERNS)
        )
    return {"any": {}, "$ref": {"$ref": "#/$defs/d"}}.get(kind, {"type": kind})


@pytest.fixture(scope="session")
def schema_of():
    """schema_of(random.Random) -> a schema."""

    def make(rng):
        schema = random_schema(rng)
        if "$ref" in json.dumps(schema):
            schema["$defs"] = {"d": random_schema(rng, 2)}
        return schema

    return make


@pytest.fixture(scope="session")
def write(grammars, tokenizer):
    """write(expression, rng, most=2000): a random text of a grammar, of bytes; None if it did not end by itself. Whatever
    may come is likely to come: this writes what no model would."""
    import numpy as np

    vocab, eos = grammars.vocabulary.vocab_size, tokenizer.eos_token_id
    texts = {i: grammars.vocabulary.tokenizer.decode_bytes([i]) for i in range(256)}
    closing = np.array([texts.get(i, b"") in (b'"', b"]", b"}") or i == eos for i in range(vocab)])

    def make(expression, rng, most=2000):
        mask, text = grammars.mask(f"start: {expression}")(), b""
        for _ in range(most):
            row = np.full(-(-vocab // 32), 0xFFFFFFFF, np.uint32)
            mask.fill(row)
            allowed = np.unpackbits(row.view(np.uint8), bitorder="little")[:vocab].astype(bool)
            assert allowed.any(), (expression, text)
            ends = np.flatnonzero(allowed & closing)
            token = int(rng.choice(ends if len(ends) and rng.random() < 0.4 else np.flatnonzero(allowed)))
            if token == eos:
                return text.decode()
            mask.accept(token)
            text += texts[token]
        return None

    return make
