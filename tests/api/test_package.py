"""`import cai_runtime`: light, with functions over a client that all calls share."""

import subprocess
import sys
import threading

import pytest

import cai_runtime
from cai_runtime import functions


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_import_is_light():
    heavy = python(
        "import sys, threading, cai_runtime, cai_runtime.errors, cai_runtime.options, cai_runtime.models.catalog\n"
        "print(*(m for m in ('torch', 'transformers', 'openai', 'pydantic', 'numpy') if m in sys.modules))\n"
        "assert threading.active_count() == 1"
    )
    assert heavy == []


def test_client_needs_no_torch():
    assert python("import sys, cai_runtime; cai_runtime.Client; print('torch' in sys.modules)") == ["False"]


def test_every_name_is_there():
    for name in cai_runtime.__all__:
        assert callable(getattr(cai_runtime, name)), name
        assert name in dir(cai_runtime)
    with pytest.raises(AttributeError, match="nothing"):
        cai_runtime.nothing  # noqa: B018


@pytest.mark.parametrize("first", ["import cai_runtime.formats.messages, cai_runtime.models.catalog", ""])
def test_functions_are_functions_and_packages_are_packages(first):
    """Whatever was imported before, no name stands for both."""
    printed = python(
        f"{first}\nimport cai_runtime, inspect, pkgutil\n"
        "packages = {m.name for m in pkgutil.iter_modules(cai_runtime.__path__)} | {'kernels', 'models'}\n"
        "print(*packages & {*cai_runtime.__all__})\n"
        "print(len(cai_runtime.list_models().data))\n"
        "print(*(n for n in ('chat', 'complete', 'compress', 'compare') if not inspect.isfunction(getattr(cai_runtime, n))))"
    )
    assert printed == ["16"]


@pytest.fixture
def shared(factory, model_dir):
    client = cai_runtime.configure(model=model_dir, _engine_factory=factory)
    yield client
    factory.resume()
    cai_runtime.close()


def test_functions_over_the_shared_client(shared, factory, model_dir, ask):
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    assert cai_runtime.chat("hi", temperature=0).choices[0].message.content == alphabet
    assert cai_runtime.chat(ask["messages"], temperature=0).choices[0].message.content == alphabet
    chunks = cai_runtime.chat("hi", temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alphabet
    assert cai_runtime.complete("w", temperature=0).choices[0].text == "xyz"
    assert cai_runtime.complete("w", temperature=0, model=model_dir).model == str(model_dir)
    assert cai_runtime.list_models().data[-1].id == str(model_dir)
    assert len(factory.opened) == 1
    with pytest.raises(cai_runtime.BadRequestError):
        cai_runtime.chat("hi", nothing=1)


def test_configure_and_close_give_models_back(shared, factory, model_dir):
    cai_runtime.chat("hi")
    new = cai_runtime.configure(models={"abc": model_dir}, _engine_factory=factory)
    assert factory.runners[0].closed and functions.client() is new
    cai_runtime.chat("hi", model="abc")
    cai_runtime.close()
    cai_runtime.close()
    assert factory.runners[1].closed
    assert functions.client() is not new


def test_one_shared_client_for_all_threads():
    cai_runtime.close()
    clients = []
    barrier = threading.Barrier(8)

    def use():
        barrier.wait()
        clients.append(functions.client())

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cai_runtime.close()
    assert len(clients) == 8 and len(set(map(id, clients))) == 1
