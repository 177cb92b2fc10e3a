"""Calibration text out of files: what is read, how it is cut, and what is said of a file that can't be used."""

import hashlib
import json
import sys

import pytest
import torch
from transformers import AutoTokenizer

from cai_runtime.compressor.data.calibration import calibration_sequences, tokenize
from cai_runtime.convert import text_files
from cai_runtime.convert.text_files import Document, read_documents, sample_documents, whole_texts
from cai_runtime.errors import CompressionError

CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
TEMPLATE = (
    "{% for m in messages %}{% if m.tool is defined %}{{ raise_exception('no tools') }}{% endif %}"
    "w9 {{ m.content }} <eos> {% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def chat_tokenizer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def load(source, tokenizer, **options):
    settings = {"samples": 4, "sequence_length": 8, "model_path": "unused", "progress": False}
    return calibration_sequences(source, tokenizer=tokenizer, **{**settings, **options})


def write_parquet(path, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=7)
    return path


def test_windows_of_a_text_file(tokenizer, text_file):
    found = load(text_file, tokenizer, samples=6, sequence_length=32, seed=3)
    assert found.sequences.shape == (6, 32) and found.sequences.dtype == torch.int64
    row = tokenize(tokenizer, [text_file.read_text()])[: 62 * 32].view(62, 32).tolist()
    assert [row.index(window) for window in found.sequences.tolist()] == sorted(
        row.index(window) for window in found.sequences.tolist()
    )
    assert torch.equal(found.sequences, load(text_file, tokenizer, samples=6, sequence_length=32, seed=3).sequences)
    assert not torch.equal(found.sequences, load(text_file, tokenizer, samples=6, sequence_length=32, seed=4).sequences)
    said = found.to_json()
    assert said["source"] == "words.txt: 1 text" and said["tokens"] == 192 and said["seed"] == 3
    assert said["files"][0]["sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    json.dumps(said)


def test_the_global_generator_is_left_alone(tokenizer, text_file):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load(text_file, tokenizer)
    assert torch.equal(torch.get_rng_state(), before)


def test_texts_and_conversations_of_a_jsonl_file(chat_tokenizer, tmp_path):
    lines = [{"text": "w1 w2 w3"}, {"messages": CHAT}, {"text": " "}, {"text": "w4 w5"}]
    (tmp_path / "t.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, lines)) + "\n\n")
    found = load(tmp_path / "t.jsonl", chat_tokenizer, samples=1, sequence_length=14)
    text = "w1 w2 w3 <eos> w9 w1 w2 <eos> w9 w3 <eos> w4 w5 <eos>"
    assert chat_tokenizer.decode(found.sequences[0]) == text
    assert found.source == "t.jsonl: 2 texts and 1 conversation"


def test_parquet_columns(chat_tokenizer, tmp_path):
    texts = [f"w{k} w{k + 1}" for k in range(30)]
    write_parquet(tmp_path / "a.parquet", text=[*texts, None], title=["x"] * 31)
    write_parquet(tmp_path / "b.parquet", number=list(range(30)), body=texts)
    assert [d.text for d in read_documents(tmp_path / "a.parquet")] == texts
    assert [d.text for d in read_documents(tmp_path / "b.parquet")] == texts
    # A field that one message has is null in the others: templates must not see it there.
    write_parquet(tmp_path / "c.parquet", messages=[[CHAT[0] | {"tool": None}, CHAT[1]]], text=["w1"])
    found = load(tmp_path / "c.parquet", chat_tokenizer, samples=1, sequence_length=7)
    assert chat_tokenizer.decode(found.sequences[0]) == "w9 w1 w2 <eos> w9 w3 <eos>"
    write_parquet(tmp_path / "d.parquet", title=["w1"], body=["w2"])
    with pytest.raises(CompressionError, match=r'd\.parquet has no column "text".*title, body'):
        list(read_documents(tmp_path / "d.parquet"))


def test_a_directory_and_a_list_of_files(tokenizer, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("w1 w2 w3")
    (tmp_path / "sub" / "a.jsonl").write_text('{"text": "w4 w5 w6"}')
    (tmp_path / ".hidden.txt").write_text("w7")
    (tmp_path / "notes.pdf").write_bytes(b"\xff")
    found = load(tmp_path, tokenizer, samples=1)
    assert tokenizer.decode(found.sequences[0]) == "w1 w2 w3 <eos> w4 w5 w6 <eos>"
    assert [file["name"] for file in found.provenance["files"]] == ["b.txt", "a.jsonl"]
    listed = load([tmp_path / "sub" / "a.jsonl", tmp_path / "b.txt"], tokenizer, samples=1)
    assert tokenizer.decode(listed.sequences[0]) == "w4 w5 w6 <eos> w1 w2 w3 <eos>"


def test_a_long_text_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE_BYTES", 64)
    lines = [f"w{k} é" for k in range(100)]
    (tmp_path / "t.txt").write_text("\n".join(lines))
    pieces = list(read_documents(tmp_path / "t.txt"))
    assert len(pieces) > 5 and "".join(p.text for p in pieces) == "\n".join(lines)
    for piece in pieces:
        assert piece.text.split("\n")[0] == lines[int(piece.where.rpartition(" ")[2]) - 1]


def test_a_sample_of_documents_is_uniform_bounded_and_in_order():
    documents = [Document(str(k), text="x" * 10) for k in range(50)]
    assert sample_documents(documents, 10**9, 0) == documents
    hits = torch.zeros(50)
    for seed in range(300):
        found = [int(d.where) for d in sample_documents(iter(documents), 95, seed)]
        assert len(found) == 10 and found == sorted(found)
        hits[found] += 1
    assert hits.sum() == 3000 and hits.min() > 30 and hits.max() < 95  # 60 expected, standard deviation 7


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"w1\nw2\n\xff\n", r"t\.txt, line 3: not UTF-8"),
        ("t.txt", b" \n", r"t\.txt holds no text"),
        ("t.txt", b"w1 w2", r"has 3 tokens, less than one sequence of 8.*longer text"),
        ("t.jsonl", b'{"text": "w1"}\n{"text"\n', r"t\.jsonl, line 2: not JSON"),
        ("t.jsonl", b'{"text": "w1"}\n\xff\n', r"t\.jsonl, line 2: not UTF-8"),
        ("t.jsonl", b'{"text": 1}', r'line 1: must be an object with a string "text" or a list "messages"'),
        ("t.jsonl", b'{"text": "\\ud800"}', r"line 1: half a surrogate pair"),
        ("t.jsonl", b'{"messages": [{"role": "user"}]}', r'line 1: "messages" must be a list of objects'),
        ("t.jsonl", b'{"messages": []}', r'line 1: "messages" must be a list of objects'),
        ("t.parquet", b"nothing", r"t\.parquet is not a parquet file"),
        ("t.csv", b"a,b", r"t\.csv ends in none of .*rename it to \.txt"),
    ],
)
def test_a_bad_file_is_named(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompressionError, match=message):
        load(tmp_path / name, tokenizer)


def test_other_bad_sources(tokenizer, chat_tokenizer, tmp_path):
    with pytest.raises(CompressionError, match=r"none\.txt is not there.*self, wikipedia, or hf:owner/name"):
        load(tmp_path / "none.txt", tokenizer)
    with pytest.raises(CompressionError, match=r"directory .* holds no \.txt"):
        load(tmp_path, tokenizer)
    with pytest.raises(CompressionError, match="of no files"):
        load([], tokenizer)
    path = tmp_path / "t.jsonl"
    path.write_text("\n" + json.dumps({"messages": CHAT}))
    with pytest.raises(
        CompressionError, match=r"t\.jsonl, line 2: a conversation, but this model has no chat template"
    ):
        load(path, tokenizer)
    with pytest.raises(CompressionError, match=r"t\.jsonl, line 2: a conversation where a text is wanted"):
        whole_texts(path)
    path.write_text(json.dumps({"messages": [CHAT[0] | {"tool": "x"}]}))
    with pytest.raises(CompressionError, match=r"line 1: the model's chat template refuses .*no tools"):
        load(path, chat_tokenizer)


def test_missing_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(CompressionError, match=r"needs pyarrow.*pip install 'cai-runtime\[parquet\]'"):
        list(read_documents(tmp_path / "t.parquet"))


def test_wikipedia_gives_the_first_half_alone(tokenizer, monkeypatch):
    articles = [f"w{k} " * 20 for k in range(10)]
    monkeypatch.setattr("cai_runtime.convert.texts.wikipedia_articles", lambda **_: articles)
    found = load("wikipedia", tokenizer, samples=100, sequence_length=5)
    words = set(tokenizer.decode(found.sequences.flatten()).split())
    assert words == {"w0", "w1", "w2", "w3", "w4", "<eos>"}
    assert found.source == "wikipedia-sample, first half: 5 articles" and len(found.provenance["articles_sha256"]) == 64
