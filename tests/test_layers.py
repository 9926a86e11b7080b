"""The import-direction table: who may import whom. Every import counts, also those in functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "onnxstream_nb"
LEAVES = {"errors", "graph", "device", "progress"}
"""Modules without policy, open to every room but the kernels; they import no room."""

ROOMS = {
    "__main__": "cli", "synthetic": "measure", "perplexity": "measure", "generation": "model",
    "loading": "session", "lowering": "session", "weight": "weights",
    "packing": "session", "streaming": "weights", "files": "weights", "kvslot": "kvcache",
    "spill": "kvcache", "spill_file": "kvcache",
    "liveness": "session", "shapes": "session", "lookup": "weights",
    "speculation": "model", "drafting": "model",
    "packed_weights": "session", "sequences": "llm",
    "batch": "model", "seat": "model", "work": "model",
}  # fmt: skip
"""The rooms of files that stand beside their room's own. Any other file or package is a room."""

ALLOWED: dict[str, set[str]] = {
    PACKAGE: {"model", "session"},
    "cli": {
        "chat", "hub", "ui", "model", "measure", "llm", "formats", "session", "tokenizer",
        "registry", "trace", "passes", "kvcache", "packed_file", "convert", "gpu", "plan", PACKAGE,
    },
    "convert": {
        "hub", "formats", "passes", "session", "registry", "tokenizer", "llm", "packed_file",
        "weights", PACKAGE,
    },
    "measure": {
        "hub", "ui", "llm", "formats", "passes", "registry", "packed_file", "weights", "gpu",
        PACKAGE,
    },
    "chat": {"model", "ui", "sampling", PACKAGE},
    "ui": set(),
    "model": {"hub", "llm", "tokenizer", "sampling"},
    "hub": set(),
    "llm": {"session", "kvcache", "passes", "sampling"},
    "sampling": {"registry"},
    "tokenizer": {"formats"},
    "session": {
        "formats", "passes", "weights", "packed_file", "kvcache", "registry", "trace", "gpu",
        "plan",
    },
    "plan": {"registry"},
    "kvcache": {"passes", "weights"},
    "weights": set(),
    "packed_file": {"weights"},
    "gpu": {"weights", "registry", "plan", "kvcache"},
    "formats": set(),
    "passes": set(),
    "trace": set(),
    "registry": set(),
    "kernels": {"registry", "graph", "errors"},
    "errors": set(),
    "graph": set(),
    "progress": set(),
    "device": {"errors"},
}  # fmt: skip
"""Room -> the rooms it may import, beside itself and the leaves."""


def files() -> list[Path]:
    return sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, PACKAGE)
    return ".".join(p for p in parts if p != "__init__")


MODULES = {module_of(path): path for path in files()}


def room_of(module: str) -> str:
    if "." not in module:
        return PACKAGE
    name = module.split(".")[1]
    return ROOMS.get(name, name)


def imported(module: str, source: str) -> Iterator[str]:
    """Modules of this package that the source of `module` imports, wherever in the file."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base.split(".")[0] != PACKAGE:
                continue
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


@cache
def edges() -> dict[str, set[str]]:
    return {m: set(imported(m, p.read_text("utf-8"))) - {m} for m, p in MODULES.items()}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str) -> None:
    room = room_of(module)
    assert room in ALLOWED, f"{module}: name its room in ALLOWED, or add it to one in ROOMS"
    allowed = ALLOWED[room] | {room} | (set() if room in {*LEAVES, "kernels"} else LEAVES)
    for target in edges()[module]:
        assert room_of(target) in allowed, f"{module} imports {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "bench").glob("*.py")), ids=lambda p: p.name)
def test_benchmarks_import_no_kernel_by_name(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "kernels" not in ast.unparse(node), f"{path.name}:{node.lineno}"


def test_no_import_cycles() -> None:
    graph = edges()
    state: dict[str, str] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        if state.get(module) == "done":
            return
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        for target in sorted(graph.get(module, ())):
            # The package's own __init__ imports its public names lazily.
            if target != PACKAGE:
                visit(target, (*path, module))
        state[module] = "done"

    for module in sorted(set(graph) - {PACKAGE}):
        visit(module, ())


def test_the_reader_sees_lazy_and_relative_imports() -> None:
    source = "def f():\n    from . import errors\n    from .graph import Node\n    import numpy\n"
    assert set(imported(f"{PACKAGE}.measure", source)) == {f"{PACKAGE}.errors", f"{PACKAGE}.graph"}


def test_verbs_name_functions_that_exist() -> None:
    from onnxstream_nb.cli.verbs import VERBS

    for verb in VERBS.values():
        module, _, function = verb.run.partition(":")
        path = MODULES[f"{PACKAGE}.{module}"]
        assert room_of(f"{PACKAGE}.{module}") in {"cli", "measure"}
        tree = ast.parse(path.read_text("utf-8"))
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
