"""The output of a batch: whole lines whatever happens, and a second run that does only what is left."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cai_runtime import Client
from cai_runtime.api.batch import files
from cai_runtime.errors import BatchFileError

COUNT = 12


def request(i, **body):
    body = {"prompt": "abcdefghijkl"[i % 12], "temperature": 0, **body}
    return {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(request(i)) + "\n" for i in range(COUNT)))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def texts(path):
    """By custom id; no custom id is there twice."""
    results = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    found = {r["custom_id"]: r["response"]["body"]["choices"][0]["text"] for r in results}
    assert len(found) == len(results) and path.read_bytes().endswith(b"\n")
    return found


@pytest.mark.parametrize("torn", [1, 7, 30, 100, -2, -1], ids=lambda n: f"cut at {n}")
def test_a_torn_last_line_is_done_again_or_completed(client, source, out, torn):
    client.batch(source, out)
    expected = texts(out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:5]) + lines[5][:torn])
    assert client.batch(source, out).resumed == (6 if torn == -1 else 5)
    assert texts(out) == expected
    done = out.read_bytes()
    summary = client.batch(source, out)
    assert (summary.resumed, summary.succeeded) == (COUNT, COUNT)
    assert out.read_bytes() == done


def test_nothing_is_opened_where_nothing_is_left(client, factory, source, out, new_client, model_dir):
    client.batch(source, out)
    opened = len(factory.opened)
    assert new_client(model_dir).batch(source, out).resumed == COUNT
    assert len(factory.opened) == opened


FOREIGN = {
    "a text": b"shopping list\n",
    "a text without an end": b"shopping list",
    "JSON": b'{"id": 3}\n',
    "another's result": b'{"id": "batch_req_1", "custom_id": "r1", "response": null}\n',
    "a line in the middle": b'{"id": "batch_req_\n{}\n',
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_something_else_is_refused_and_kept(client, source, out, content):
    out.write_bytes(content)
    with pytest.raises(BatchFileError, match="line 1, is no result"):
        client.batch(source, out)
    assert out.read_bytes() == content


@pytest.mark.parametrize("change", ["another input", "a changed line", "a line less"])
def test_the_output_of_another_input_is_refused_and_kept(client, source, out, change):
    client.batch(source, out)
    before = out.read_bytes() + b'{"id": "batch_re'
    out.write_bytes(before)
    lines = source.read_text().splitlines(keepends=True)
    if change == "another input":
        lines = [json.dumps(request(i + 100)) + "\n" for i in range(COUNT)]
    elif change == "a changed line":
        lines[3] = json.dumps(request(3, max_tokens=2)) + "\n"
    else:
        del lines[3]
    source.write_text("".join(lines))
    with pytest.raises(BatchFileError, match="1?[12] results of requests that are not in"):
        client.batch(source, out)
    assert out.read_bytes() == before


def test_new_lines_of_the_input_are_done(client, source, out):
    client.batch(source, out)
    with source.open("a") as file:
        file.write(json.dumps(request(COUNT)))
    summary = client.batch(source, out)
    assert (summary.total, summary.resumed) == (COUNT + 1, COUNT)


def test_places_that_can_hold_no_output(client, source, out, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    before = source.read_bytes()
    for place, said in ((source, "is the input"), (link, "is the input"), (tmp_path, "can't be written"),
                        (tmp_path / "no" / "out", "can't be written"), ("/dev/null", "no regular file"),
                        ("a\0b", "can't be written")):  # fmt: skip
        with pytest.raises(BatchFileError, match=said):
            client.batch(source, place)
    for place in (tmp_path, "/dev/null", "a\0b"):
        with pytest.raises(BatchFileError):
            client.batch(place, out)
    assert source.read_bytes() == before and not out.exists()


def test_two_runs_do_not_write_to_one_file(client, source, out):
    reader = files.RequestReader(["/v1/completions"])
    with files.OutputFile(out, source, reader), pytest.raises(BatchFileError, match="another process"):
        client.batch(source, out)
    assert client.batch(source, out).succeeded == COUNT


def test_a_full_disk_leaves_whole_lines(client, source, out, monkeypatch):
    real, calls = os.write, []

    def write(file, data):
        if not os.path.samestat(os.fstat(file), out.stat()):
            return real(file, data)
        calls.append(file)
        if len(calls) == 5:
            return real(file, data[:20])  # as a disk does that has 20 bytes left
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(BatchFileError, match="No space left on device. It holds 4 whole results"):
        client.batch(source, out)
    assert len(texts(out)) == 4
    assert client.batch(source, out).resumed == 4
    assert len(texts(out)) == COUNT


def test_other_ways_to_write_the_same_file(client, source, out, monkeypatch):
    """A byte order mark, the line ends of Windows, blank lines, no line end at the end."""
    lines = source.read_bytes().splitlines()
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))
    assert client.batch(source, out).succeeded == COUNT


def test_a_line_that_is_too_long_is_refused_and_not_held(client, source, out, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 1000)
    lines = source.read_bytes().splitlines(keepends=True)
    long = json.dumps(request(50, user="u" * 5000)).encode() + b"\n"
    source.write_bytes(b"".join([*lines[:3], long, *lines[3:]]))
    summary = client.batch(source, out)
    assert (summary.succeeded, summary.failed) == (COUNT, 1)
    (failed,) = (r for r in map(json.loads, out.read_text().splitlines()) if r["error"])
    assert (failed["error"]["code"], failed["error"]["line"]) == ("line_too_long", 4)
    assert client.batch(source, out).resumed == COUNT + 1


def test_a_killed_run_goes_on_with_nothing_lost_or_done_twice(tiny_dir, tmp_path, out):
    source = tmp_path / "in.jsonl"
    body = {"prompt": "Once", "max_tokens": 40, "ignore_eos": True}
    lines = [request(i, **body, seed=i, temperature=(0, 1)[i % 2]) for i in range(200)]
    source.write_text("".join(json.dumps(x) + "\n" for x in lines))
    command = [sys.executable, "-m", "cai_runtime.cli", "batch", str(source)]
    options = ["--model", str(tiny_dir), "--window", "8"]
    kills = 0
    for wanted in (20, 90):
        process = subprocess.Popen([*command, str(out), *options], stderr=subprocess.PIPE)
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < wanted):
            time.sleep(0.005)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    held = out.read_bytes().count(b"\n")
    assert kills == 2 and 90 <= held < 200
    with Client(tiny_dir) as client:
        summary = client.batch(source, out)
        client.batch(source, tmp_path / "whole.jsonl")
    assert (summary.succeeded, summary.failed) == (200, 0)
    assert held - 1 <= summary.resumed <= held + 1  # a torn line may be cut off or completed
    assert len(texts(out)) == 200 and texts(out) == texts(tmp_path / "whole.jsonl")


def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(tiny_dir, tmp_path, source, out):
    source.write_text("".join(json.dumps(request(i, max_tokens=30, ignore_eos=True)) + "\n" for i in range(200)))
    command = [sys.executable, "-m", "cai_runtime.cli", "batch", str(source), str(out), "--model", str(tiny_dir)]
    process = subprocess.Popen([*command, "--window", "2"], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 5):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in said and "Traceback" not in said
    assert 5 <= len(texts(out)) < 200
