"""Real input that several packages' tests share: fetched once, cached; a failed fetch fails the test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory (fp32, from its Q4_1 GGUF where that is at hand)."""
    from cai_runtime.convert.sources import pull

    return pull("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def wikipedia_texts() -> list[str]:
    """Plain text of about a hundred English Wikipedia articles, in file order."""
    from cai_runtime.convert.texts import wikipedia_articles

    return wikipedia_articles()
