"""Whisper tiny.en, fetched once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def whisper_dir() -> Path:
    """Whisper tiny.en as a Hugging Face directory."""
    from cai_runtime.convert.sources import pull

    return pull("whisper-tiny.en")
