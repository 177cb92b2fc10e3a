"""A cache of its own for every test."""

import pytest


@pytest.fixture(autouse=True)
def always_home(home):
    """Every test has a `home` of its own."""


@pytest.fixture
def cached_model(tiny_dir):
    """Puts the tiny model into the cache as `cai pull` would; called with what it was pulled from. Returns the entry."""
    import shutil

    from cai_runtime.convert.cache import entry

    def put(identity, kind="models", inside="."):
        def build(directory):
            shutil.copytree(tiny_dir, directory / inside, dirs_exist_ok=True)

        return entry(kind, "tiny", identity, build)

    return put
