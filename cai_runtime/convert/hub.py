"""Models and files from the Hugging Face hub: safetensors, configuration, tokenizer and templates; never a pickle."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

from cai_runtime.convert.cache import sha256_of, tqdm_disable
from cai_runtime.convert.uris import HubUri
from cai_runtime.errors import CaiError, SourceError
from cai_runtime.slim.files import read_json

# Beside the weights, of the repository's root: configuration, tokenizer, templates, licence.
WANTED = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*"]
# What training leaves there.
UNWANTED = ["*.index.json", "*.index.*.json", "trainer_state.json", "training_args*", "*_results.json", "optimizer*"]
# The one folder that a model reads besides.
TEMPLATES = "additional_chat_templates/*.jinja"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Seconds to wait for the hub's first answer.
PATIENCE = 8.0


def fetch_repository(uri: HubUri, directory: Path, *, progress: bool | None = None) -> None:
    """Download what a model in a repository needs into `directory`. What a broken download left there is taken up again.

    Its weights are those that transformers loads by default: model.safetensors, or else the shards of its index; not those
    of variants, of other formats (consolidated*) or of checkpoints in folders. Every large file is checked against the
    SHA-256 that the hub states. Raises SourceError: no network, unknown repository or revision, no permission, no weights
    of this kind, hash mismatch.
    """
    with hub_errors(uri):
        from huggingface_hub import hf_hub_download, snapshot_download

        info = _info(uri)
        names = [file.rfilename for file in info.siblings or []]
        options: dict[str, Any] = {
            "revision": info.sha,
            "local_dir": directory,
            "etag_timeout": PATIENCE,
            "endpoint": endpoint(),
            "tqdm_class": bar_class(progress),
        }
        index = None
        if INDEX in names:
            index = read_json(Path(hf_hub_download(uri.repo, INDEX, **options)))
        chosen = weight_files(uri.repo, names, index) + other_files(names)
        if index is not None and INDEX not in chosen:
            (directory / INDEX).unlink()
        # Patterns, not names: a bracket in a name would be read as one.
        snapshot_download(uri.repo, allow_patterns=[glob.escape(name) for name in chosen], **options)
    check_files(info, directory)


def weight_files(repo: str, names: Sequence[str], index: Mapping[str, Any] | None) -> list[str]:
    """Which files of a repository hold the weights of its model. index: `INDEX`, parsed, where there is one.

    Raises SourceError where there are none, or a choice that only a person can make.
    """
    shards: set[str] = set()
    if index is not None:
        weight_map = index.get("weight_map")
        shards = {str(shard) for shard in weight_map.values()} if isinstance(weight_map, dict) else set()
    if SINGLE in names and SINGLE not in shards:  # as the reader and transformers choose
        return [SINGLE]
    if index is not None:
        if not shards:
            raise SourceError(f"{repo}: {INDEX} has no weight_map, so nothing says which files are the model's")
        if missing := sorted(shards - set(names)):
            raise SourceError(f"{repo}: {INDEX} names {missing[0]}, which the repository lacks")
        return [INDEX, *sorted(shards)]
    found = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    models = [name for name in found if not name.startswith(("consolidated", "adapter_"))]
    if len(models) == 1 or (models and all(re.search(r"-\d{5}-of-\d{5}\.", name) for name in models)):
        return models
    if models:
        raise SourceError(
            f"{repo} holds several weights and neither {SINGLE} nor {INDEX}: {', '.join(models)}. Fetch them by hand"
        )
    if "adapter_model.safetensors" in found:
        raise SourceError(
            f"{repo} is an adapter (PEFT), not a model: pull its base model, and load the adapter with peft"
        )
    if found:
        raise SourceError(f"{repo} holds {found[0]} alone, a format that is not read; pull a repository with {SINGLE}")
    raise SourceError(f"{repo} holds no safetensors weights; formats that need unpickling are not loaded")


def other_files(names: Sequence[str]) -> list[str]:
    """Which of a repository's files a model needs beside its weights."""

    def is_wanted(name: str) -> bool:
        if "/" in name:
            return fnmatch(name, TEMPLATES)
        return any(fnmatch(name, p) for p in WANTED) and not any(fnmatch(name, p) for p in UNWANTED)

    return [name for name in names if is_wanted(name)]


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
        if error is None or not isinstance(error, Exception) or isinstance(error, CaiError):
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
