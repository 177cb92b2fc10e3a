"""No tensor of the package takes its dtype or device from torch's defaults, which belong to the program that imports it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ["kernels", "models", *(f"cai_runtime/{name}" for name in ("engine", "integrations", "layers", "slim"))]
SOURCES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))

# torch's functions that make a tensor out of nothing, see torch.utils._device._device_constructors.
MAKERS = (
    {
        "arange",
        "as_tensor",
        "asarray",
        "empty",
        "empty_permuted",
        "empty_strided",
        "eye",
        "full",
        "linspace",
        "logspace",
    }
    | {"normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"}
    | {"tril_indices", "triu_indices", "vander"}
)
# Makers whose dtype is their argument's, or an integer type, whatever torch's default is.
OWN_DTYPE = {"as_tensor", "asarray"}


def unnamed(source: str) -> list[tuple[int, str]]:
    """(line, call) of each maker that leaves dtype or device to torch's defaults."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        if not (isinstance(owner, ast.Name) and owner.id == "torch"):
            continue
        given = {k.arg for k in node.keywords}
        needed = {"device"} if name in OWN_DTYPE else {"dtype", "device"}
        if (name in MAKERS and not needed <= given) or name in ("Tensor", "FloatTensor", "get_default_dtype"):
            found.append((node.lineno, ast.unparse(node)))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_new_tensor_names_dtype_and_device(path: Path):
    assert unnamed(path.read_text()) == []


def test_the_search_finds_what_it_looks_for():
    assert unnamed("torch.empty(3, dtype=torch.float32)") and unnamed("x = torch.zeros(2, device=d)")
    assert not unnamed("torch.full((2,), 1, dtype=t, device=d); x.new_zeros(3); torch.zeros_like(x)")
