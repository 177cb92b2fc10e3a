"""Models and files from the Hugging Face hub: safetensors, configuration, tokenizer and templates; never a pickle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cai_runtime.convert.cache import sha256_of, tqdm_disable
from cai_runtime.convert.uris import HubUri
from cai_runtime.errors import SourceError

WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "LICENSE*",
]
# Weights of other frameworks and pickles; sub-directories hold copies in other formats (original/, onnx/, ...).
UNWANTED = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "original/*", "onnx/*", "*/.*"]
# Seconds to wait for the hub's first answer.
PATIENCE = 8.0


def fetch_repository(uri: HubUri, directory: Path, *, progress: bool | None = None) -> None:
    """Download a model repository into `directory`. What a broken download left there is taken up again.

    Every large file is checked against the SHA-256 that the hub states. Raises SourceError: no network, unknown
    repository or revision, no permission, no safetensors, hash mismatch.
    """
    with hub_errors(uri):
        from huggingface_hub import snapshot_download

        info = _info(uri)
        files = [file for file in (info.siblings or []) if file.rfilename.endswith(".safetensors")]
        if not files:
            raise SourceError(f"{uri.repo} holds no safetensors weights; formats that need unpickling are not loaded")
        snapshot_download(
            uri.repo,
            revision=info.sha,
            local_dir=directory,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            etag_timeout=PATIENCE,
            endpoint=endpoint(),
            tqdm_class=bar_class(progress),
        )
    check_files(info, directory)


def fetch_hub_file(uri: HubUri, directory: Path, *, progress: bool | None = None) -> Path:
    """Download one file of a repository into `directory`; returns it. Raises SourceError like `fetch_repository`."""
    assert uri.file is not None
    with hub_errors(uri):
        from huggingface_hub import hf_hub_download

        info = _info(uri)
        if uri.file not in {file.rfilename for file in info.siblings or []}:
            raise SourceError(f"{uri.repo} at {uri.revision} has no file {uri.file}")
        hf_hub_download(
            uri.repo,
            uri.file,
            revision=info.sha,
            local_dir=directory,
            etag_timeout=PATIENCE,
            endpoint=endpoint(),
            tqdm_class=bar_class(progress),
        )
    check_files(info, directory)
    return directory / uri.file


def _info(uri: HubUri) -> Any:
    """The repository's commit and files. The first contact: the one that must fail quickly without a network."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint()).model_info(uri.repo, revision=uri.revision, files_metadata=True, timeout=PATIENCE)


def endpoint() -> str | None:
    """Another hub than the public one, where the environment names it."""
    return os.environ.get("HF_ENDPOINT") or None


def bar_class(progress: bool | None) -> type:
    """A tqdm for huggingface_hub's downloads that is shown as `progress` says; None: on a terminal only."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            kwargs.pop("name", None)  # a group name that only huggingface_hub's own bars take
            kwargs["disable"] = tqdm_disable(progress)
            super().__init__(*args, **kwargs)

    return Bar


def check_files(info: Any, directory: Path) -> None:
    """Hold the downloaded files against the sizes and hashes that the hub states."""
    for file in info.siblings or []:
        path = directory / file.rfilename
        if not path.is_file():
            continue
        if file.size is not None and path.stat().st_size != file.size:
            problem = f"{path.stat().st_size} bytes, not {file.size}"
        elif file.lfs is not None and sha256_of(path) != file.lfs.sha256:
            problem = "a SHA-256 that differs from the hub's"
        else:
            continue
        path.unlink()  # so that the next try fetches it again
        raise SourceError(f"the downloaded {file.rfilename} of {info.id} has {problem}; try again")


class hub_errors:
    """Turns whatever huggingface_hub raises into a SourceError of one sentence."""

    def __init__(self, uri: HubUri):
        self.uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, SourceError):
            return
        from huggingface_hub import errors

        where = f"{self.uri.repo}@{self.uri.revision}"
        hub = endpoint() or "huggingface.co"
        if isinstance(error, errors.GatedRepoError):
            why = f"{where} is gated: accept its terms on the hub and log in with `hf auth login`"
        elif isinstance(error, errors.RevisionNotFoundError):
            why = f"{self.uri.repo} has no revision {self.uri.revision}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            why = f"{self.uri.repo} is not on {hub}, or is private and you are not logged in"
        elif isinstance(error, errors.OfflineModeIsEnabled):
            why = f"{where} is not cached and HF_HUB_OFFLINE is set"
        elif isinstance(error, errors.HfHubHTTPError):
            why = f"{hub} answered: {_first_line(error)}"
        else:
            why = f"{hub} can't be reached ({type(error).__name__}: {_first_line(error)})"
        raise SourceError(why) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
