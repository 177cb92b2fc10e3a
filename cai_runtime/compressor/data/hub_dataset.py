"""Text from the parquet files of a dataset on the Hugging Face hub. Downloads only as many files as needed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cai_runtime.convert import hub
from cai_runtime.convert.cache import entry
from cai_runtime.convert.uris import HubUri
from cai_runtime.errors import CompressionError, SourceError

PREFIX = "hf:"
# The branch on which the hub converts datasets to parquet: <config>/<split>/0000.parquet, ...
CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True)
class DatasetName:
    """`hf:owner/name[:config[:split]][@revision]`.

    config: None: the default or only one. split: default "train". revision: default "main".
    """

    repo: str
    config: str | None
    split: str
    revision: str

    @staticmethod
    def parse(text: str) -> DatasetName:
        """Raises CompressionError on a malformed name."""
        match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?::([\w.+-]*))?(?::([\w.+-]+))?(?:@(.+))?", text)
        if match is None:
            raise CompressionError(f"{text!r} is not hf:owner/name[:config[:split]][@revision]")
        return DatasetName(match[1], match[2] or None, match[3] or "train", match[4] or "main")

    def __str__(self) -> str:
        config = f":{self.config or ''}:{self.split}" if self.config or self.split != "train" else ""
        return f"{PREFIX}{self.repo}{config}@{self.revision}"


@dataclass(frozen=True)
class Shards:
    """The parquet files of one split at one commit, in order. config: its resolved name. files: paths in the repository."""

    name: DatasetName
    commit: str
    config: str
    files: tuple[str, ...]


def find_shards(name: DatasetName) -> Shards:
    """The files of a split. The result is cached, also for a branch such as `main`.

    The repository's own parquet files come first: those that its card lists for the configuration, else those whose paths
    contain configuration and split. Without any, the hub's parquet conversion is used.

    Raises CompressionError: no network, no such dataset, revision, configuration or split, or no parquet files.
    """

    def build(directory: Path) -> None:
        (directory / "shards.json").write_text(json.dumps(_look_up(name)))

    try:
        found = json.loads((entry("datasets", name.repo, f"listing of {name}", build) / "shards.json").read_text())
    except SourceError as e:
        raise CompressionError(f"calibration dataset {name}: {e}") from e
    return Shards(name, found["commit"], found["config"], tuple(found["files"]))


def fetch_shards(shards: Shards, *, progress: bool | None = None) -> Iterator[Path]:
    """Yields the local path of each file, downloading it on demand unless it is cached.

    Raises CompressionError: no network, or a file whose hash differs from the hub's.
    """
    uri = HubUri(shards.name.repo, shards.commit, None)
    for file in shards.files:

        def download(directory: Path, file: str = file) -> None:
            with hub.hub_errors(uri):
                from huggingface_hub import hf_hub_download

                info = _info(uri)
                hf_hub_download(
                    uri.repo,
                    file,
                    repo_type="dataset",
                    revision=uri.revision,
                    local_dir=directory,
                    etag_timeout=hub.PATIENCE,
                    endpoint=hub.endpoint(),
                    tqdm_class=hub.bar_class(progress),
                )
            hub.check_files(info, directory)
            # huggingface_hub's metadata for resuming a download.
            shutil.rmtree(directory / ".cache", ignore_errors=True)

        identity = f"dataset {uri.repo}@{uri.revision}/{file}"
        try:
            directory = entry("datasets", Path(file).name, identity, download, keep_partial=True)
        except SourceError as e:
            raise CompressionError(f"calibration dataset {shards.name}, {file}: {e}") from e
        yield directory / file


def _info(uri: HubUri) -> Any:
    """The repository's commit, files and card."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.endpoint()).dataset_info(
        uri.repo, revision=uri.revision, files_metadata=True, timeout=hub.PATIENCE
    )


def _look_up(name: DatasetName) -> dict[str, Any]:
    info = _repository(name, name.revision)
    own = _parquet_files(info)
    if own:
        config, files = _own_files(name, own, _card_configs(info))
        return {"commit": info.sha, "config": config, "files": files}
    try:
        converted = _repository(name, CONVERTED)
    except SourceError as e:
        raise CompressionError(
            f"calibration dataset {name} holds no parquet files, and no conversion to parquet is there ({e}): download its "
            "text and give it as .jsonl"
        ) from e
    config, files = _own_files(name, _parquet_files(converted), [])
    return {"commit": converted.sha, "config": config, "files": files}


def _repository(name: DatasetName, revision: str) -> Any:
    uri = HubUri(name.repo, revision, None)
    with hub.hub_errors(uri):
        return _info(uri)


def _parquet_files(info: Any) -> list[str]:
    return sorted(file.rfilename for file in info.siblings or [] if file.rfilename.endswith(".parquet"))


def _card_configs(info: Any) -> list[Mapping[str, Any]]:
    """The `configs` of the dataset card that have data files, see "Manual Configuration" in the hub's documentation."""
    card = info.card_data
    card = card.to_dict() if hasattr(card, "to_dict") else card
    configs = (card or {}).get("configs") or []
    return [c for c in configs if isinstance(c, Mapping) and c.get("data_files")]


def _own_files(name: DatasetName, files: list[str], configs: list[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """The resolved configuration, and the files of its split."""
    by_config = {str(c.get("config_name", "default")): _patterns(c["data_files"]) for c in configs}
    if not by_config:
        return _by_path(name, files)
    default = next((str(c.get("config_name", "default")) for c in configs if c.get("default")), None)
    config = name.config or default or ("default" if "default" in by_config else next(iter(by_config)))
    if config not in by_config:
        raise CompressionError(
            f"calibration dataset {name} has no configuration {config!r}; it has {', '.join(by_config)}"
        )
    patterns = by_config[config]
    if name.split not in patterns:
        raise CompressionError(f"calibration dataset {name} has no split {name.split!r}; it has {', '.join(patterns)}")
    found = [file for file in files if any(_matches(file, pattern) for pattern in patterns[name.split])]
    if not found:
        raise CompressionError(f"calibration dataset {name}: no parquet file matches {', '.join(patterns[name.split])}")
    return config, found


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Path patterns by split. A card may give one pattern, a list of patterns, or a list of {split, path}."""
    if isinstance(data_files, str):
        return {"train": [data_files]}
    patterns: dict[str, list[str]] = {}
    for item in data_files:
        split, paths = (
            (str(item.get("split", "train")), item.get("path")) if isinstance(item, Mapping) else ("train", item)
        )
        patterns.setdefault(split, []).extend([paths] if isinstance(paths, str) else paths or [])
    return patterns


def _matches(file: str, pattern: str) -> bool:
    """Whether a path matches a pattern; `*` does not cross folders, `**` does."""
    parts, wanted = file.split("/"), pattern.removeprefix("./").split("/")
    if "**" in wanted:
        return fnmatchcase(file, pattern.replace("**/", "*"))
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _by_path(name: DatasetName, files: list[str]) -> tuple[str, list[str]]:
    """Configuration and files by path: data/train-00000-of-00002.parquet, <config>/train-*.parquet,
    <config>/<split>/0000.parquet."""
    found: dict[str, list[str]] = {}
    splits: dict[str, None] = {}
    for file in files:
        words = re.split(r"[/._-]", file.lower())
        split = next((w for w in ("train", "validation", "test") if w in words), None)
        if name.split.lower() in words:
            split = name.split
        splits[split or "train"] = None
        if (split or "train") == name.split:
            folder = file.split("/")[0] if "/" in file else "default"
            found.setdefault("default" if folder == "data" else folder, []).append(file)
    if not found:
        raise CompressionError(f"calibration dataset {name} has no split {name.split!r}; it has {', '.join(splits)}")
    config = name.config or ("default" if "default" in found else next(iter(found)) if len(found) == 1 else None)
    if config is None or config not in found:
        what = f"no configuration {config!r}" if config else "several configurations"
        raise CompressionError(
            f"calibration dataset {name} has {what}: name one of {', '.join(found)}, as in "
            f"hf:{name.repo}:{next(iter(found))}"
        )
    return config, found[config]
