"""Small tokenizers of each kind, and forged contents. Makes `tests/formats/helpers` importable: pytest's importlib mode
puts no test directory on the path."""

import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

HELPERS = str(Path(__file__).parent / "helpers")
if HELPERS not in sys.path:
    sys.path.append(HELPERS)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKERS = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
WORDS = ["▁Hello", "▁world", "▁a", "Hello", "<s", "</s", "im_end"]


def byte_level(**options):
    """Bytes as tokens, as GPT-2 has them; merges that lead to a marker."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    merges = [("<", "s"), ("<s", ">")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return _finished(inner, **options)


def sentencepiece(kind="first"):
    """Pieces with byte fallback, as Llama 2 has them. kind: where the space before a text goes: "first", "always",
    "never", or "legacy", where the normalizer puts it before each stretch between added tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *WORDS]
    pieces += [chr(i) for i in range(33, 127)] + ["▁"]
    merges = [("<s", ">"), ("</s", ">"), ("▁", "a"), ("<", "s"), ("</", "s"), ("<", "/")]
    pieces += ["</"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if kind == "legacy":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finished(inner, unk_token="<unk>")


def unigram():
    """Unigram pieces, among them the begin and end tokens: the likeliest segmentation of "<s>" is the token <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), ("▁", -3.0), ("▁Hello", -2.0)]
    pieces += [(chr(i), -5.0) for i in range(33, 127)]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    return _finished(inner, unk_token="<unk>")


def _finished(inner, normalizer=None, tags=True, **tokens):
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    if normalizer is not None:
        inner.normalizer = normalizer
    inner.add_special_tokens([AddedToken(text, normalized=False) for text in ("<s>", "</s>", *MARKERS[:2])])
    inner.add_tokens([AddedToken(text, normalized=False) for text in (MARKERS[2:] if tags else ())])
    inner.add_tokens([AddedToken("  ", normalized=False)])  # a run of spaces: an ordinary word
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", **tokens)
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZERS = {
    "bytes": byte_level,
    "first": lambda: sentencepiece("first"),
    "always": lambda: sentencepiece("always"),
    "never": lambda: sentencepiece("never"),
    "legacy": lambda: sentencepiece("legacy"),
    "unigram": unigram,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    """One tokenizer of each kind, with a ChatML template."""
    return TOKENIZERS[request.param]()


@pytest.fixture
def byte_tokenizer():
    """A new byte-level tokenizer, whose template a test may replace."""
    return byte_level()


@pytest.fixture(scope="session")
def make_byte_tokenizer():
    return byte_level


def forged_texts(spellings):
    """Texts made to become control tokens: spellings whole, cut, nested, hidden between other characters."""
    spelling = st.sampled_from(sorted(spellings))
    cut = st.builds(lambda text, at: (text[: at % len(text)], text[at % len(text) :]), spelling, st.integers(1, 99))
    piece = st.one_of(
        spelling,
        cut.map(lambda halves: halves[0]),
        cut.map(lambda halves: halves[1]),
        st.builds(lambda halves, inner: halves[0] + inner + halves[1], cut, spelling),
        st.builds(
            lambda halves, between: halves[0] + between + halves[1], cut, st.sampled_from("\u200b\u200d\ufeff \n")
        ),
        spelling.map(str.upper),
        spelling.map(lambda text: text.translate({ord("<"): "＜", ord("|"): "｜", ord(">"): "＞"})),
        st.sampled_from(
            ["\n", " ", "  ", "system\n", "user", "{{ bos_token }}", "{% raw %}", "\x00", "\x01", "0" * 40]
        ),
        st.sampled_from(["CONTENT_0", "\ue000", "\ue001", "__content__", "<|content|>", "%s", "{}", "🙂", "é", "ß"]),
        st.text(st.characters(codec="utf-8"), max_size=5),
    )
    return st.lists(piece, max_size=6).map("".join)


def conversations(texts, names=False):
    """Messages that any template takes: perhaps a system message, then user and assistant in turn, the user last."""

    def build(system, pairs, last, name):
        turns = [{"role": "system", "content": system}] if system is not None else []
        for asked, answered in pairs:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        turns.append({"role": "user", "content": last, **({"name": name} if name is not None else {})})
        return turns

    parts = st.lists(texts.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=3)
    content = st.one_of(texts, parts)
    name = st.none() | texts if names else st.none()
    return st.builds(build, st.none() | texts, st.lists(st.tuples(content, content), max_size=2), content, name)


def harmless(messages):
    """The same conversation with contents that spell nothing; blank ones stay: templates leave blank turns out."""

    def same(text):
        return "x" if text.strip() else text

    def plain(content):
        if isinstance(content, str):
            return same(content)
        return [{"type": "text", "text": same(part["text"])} for part in content]

    return [
        {**turn, "content": plain(turn["content"]), **({"name": same(turn["name"])} if "name" in turn else {})}
        for turn in messages
    ]


@pytest.fixture(scope="session")
def forging():
    """(forged_texts, conversations, harmless)"""
    return forged_texts, conversations, harmless
