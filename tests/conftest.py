"""Real input that several packages' tests share: fetched once, cached; a failed fetch fails the test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests run in as many processes as there are processors: each, and what it starts, takes one of them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CAI_NUM_THREADS", "1")


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
