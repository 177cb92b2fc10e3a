"""The packages' imports run one way: no circle of modules, and none of packages."""

import ast
import re
from pathlib import Path

import pytest

LEAVES = {"errors", "options", "scalars", "tables", "progress", "home", "byte_sizes", "_lib"}
ROOT = Path(__file__).parents[1]
PLACES = {
    "cai_runtime": ROOT / "cai_runtime",
    "cai_runtime.kernels": ROOT / "kernels",
    "cai_runtime.models": ROOT / "models",
}


def find_modules():
    """Path of every module by name."""
    found = {}
    for prefix, folder in PLACES.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = file
    return found


def imported(tree, known):
    """Modules of `known` that a file imports, inside functions too; what only a type checker imports is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else node.module
        yield from imported(node, known)


def circles(graph):
    """The strongly connected components of more than one node (Tarjan 1972)."""
    order, low, stack, found = {}, {}, [], []

    def visit(node):
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in order:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == order[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in graph:
        if node not in order:
            visit(node)
    return found


def reached(graph, starts):
    """Every node on a way from `starts`, these left out unless one leads to another."""
    found, left = set(), [other for start in starts for other in graph.get(start, ())]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += graph.get(node, ())
    return found


@pytest.fixture(scope="module")
def graph():
    modules = find_modules()
    return {name: set(imported(ast.parse(file.read_text()), modules)) - {name} for name, file in modules.items()}


@pytest.fixture(scope="module")
def packages(graph):
    """What each package imports. `kernels` and `models` are packages as those below cai_runtime/ are."""
    found = {}
    for name, others in graph.items():
        own = name.split(".")[1:2]
        found.setdefault(*own or ["cai_runtime"], set()).update(
            package for other in others for package in other.split(".")[1:2] if [package] != own
        )
    return found


def test_no_circle_of_modules(graph):
    assert circles(graph) == []


def test_no_circle_of_packages(packages):
    assert circles(packages) == []


def test_the_picture_of_the_packages_is_true(packages):
    """docs/architecture.md shows every arrow that does not follow from others, and no other."""
    drawn = re.findall(r"^  (\w+) --> (\w+)$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    real = {
        (package, other)
        for package, others in packages.items()
        for other in others
        if package != "cai_runtime" and other not in LEAVES | reached(packages, others - {other})
    }
    assert set(drawn) == {arrow for arrow in real if arrow[0] not in LEAVES}


def test_the_search_finds_circles():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set()}) == [["a", "b", "c"]]
    assert list(imported(ast.parse("def f():\n    from x import y"), {"x", "x.y"})) == ["x.y"]
