"""Text to calibrate, tune and test on: articles of the English Wikipedia, and how they are divided."""

from __future__ import annotations

import bz2
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cai_runtime.convert.cache import entry, tqdm_disable
from cai_runtime.convert.named import NAMED
from cai_runtime.convert.sources import fetch_file
from cai_runtime.convert.wikitext import plain_text
from cai_runtime.errors import SourceError

# Part of the cached text's identity: raise it when the cleaning changes.
CLEANER_VERSION = 1


@dataclass(frozen=True)
class TextSplits:
    """Articles by use. What is reported comes from `test`, which nothing else has seen."""

    calibration: list[str]
    tune: list[str]
    test: list[str]


def split_articles(articles: Sequence[str]) -> TextSplits:
    """First half of the articles to calibrate, third quarter to tune, last quarter to test; order is kept."""
    half, three_quarters = len(articles) // 2, len(articles) * 3 // 4
    return TextSplits(list(articles[:half]), list(articles[half:three_quarters]), list(articles[three_quarters:]))


def wikipedia_articles(*, force: bool = False, progress: bool | None = None) -> list[str]:
    """Plain text of the articles in `wikipedia-sample` (about a hundred, in the dump's order; redirects left out).

    The cleaned text is cached. `force`: fetch and clean again. Raises SourceError when the dump can't be fetched or read.
    """
    name = "articles.json"

    def build(directory: Path) -> None:
        dump = fetch_file("wikipedia-sample", force=force, progress=progress)
        from tqdm import tqdm

        pages = tqdm(read_dump(dump), desc="clean Wikipedia articles", unit="", disable=tqdm_disable(progress))
        articles = [text for _, markup in pages if (text := plain_text(markup))]
        (directory / name).write_text(json.dumps(articles, ensure_ascii=False))

    identity = f"{NAMED['wikipedia-sample'].places} cleaner {CLEANER_VERSION}"
    return json.loads((entry("texts", "wikipedia-sample", identity, build, force=force) / name).read_text())


def read_dump(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield (title, markup) of each article in a MediaWiki XML dump (`.bz2` or plain), one in memory at a time.

    Pages outside the main namespace and redirects are skipped. Raises SourceError for a damaged file.
    """
    from xml.etree import ElementTree

    path = Path(path)
    opener = bz2.open if path.suffix == ".bz2" else open
    try:
        with opener(path, "rb") as stream:
            for _, element in ElementTree.iterparse(stream, events=("end",)):
                if _tag(element) != "page":
                    continue
                parts = {_tag(child): child for child in element.iter()}
                if parts["ns"].text == "0" and "redirect" not in parts:
                    yield parts["title"].text or "", parts["text"].text or ""
                element.clear()
    except (ElementTree.ParseError, OSError, EOFError, KeyError) as e:
        raise SourceError(f"{path} is not a whole MediaWiki dump: {e}") from e


def _tag(element) -> str:
    """The element's name without its namespace, which carries the dump format's version."""
    return element.tag.rpartition("}")[2]
