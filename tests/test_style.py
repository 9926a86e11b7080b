"""House rules that a reader relies on: legends of dims, shapes of kernels, annotations, sizes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNEL_FILES = sorted(p for p in (ROOT / "kernels").glob("*.py") if p.name != "__init__.py")
PACKAGE_FILES = sorted((ROOT / "onnxstream_nb").rglob("*.py"))
SHAPE = re.compile(r"\([^()]*(?:,|\.\.\.|\b[A-Z]\b)[^()]*\)")
"""A shape as prose writes it: (M, K), (n,), (..., C)."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
relative = {"ids": lambda p: str(p.relative_to(ROOT))}


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, Function):
            yield node


def is_kernel(function: Function) -> bool:
    calls = [d.func if isinstance(d, ast.Call) else d for d in function.decorator_list]
    return any(isinstance(d, ast.Name) and d.id in ("kernel", "cuda_kernel") for d in calls)


def public_functions(path: Path) -> Iterator[Function]:
    """Module functions and methods of module classes whose names have no underscore."""
    tree = ast.parse(path.read_text("utf-8"))
    owners: list[ast.Module | ast.ClassDef] = [tree]
    owners += [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    for owner in owners:
        yield from (n for n in owner.body if isinstance(n, Function) and n.name[0] != "_")


@pytest.mark.parametrize("path", KERNEL_FILES, **relative)
def test_kernel_file_opens_with_a_legend_of_its_dims(path: Path) -> None:
    legend = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    named = re.search(r"\b(dims|shapes)\b", legend, re.IGNORECASE)
    assert named, f"{path.name}: no line `Dims:` or `Shapes:`"


@pytest.mark.parametrize("path", KERNEL_FILES, **relative)
def test_kernels_state_their_shapes(path: Path) -> None:
    for function in filter(is_kernel, functions(path)):
        text = ast.get_docstring(function) or ""
        stated = SHAPE.search(text) or "Shapes: none" in text
        assert stated, f"{path.name}:{function.lineno} {function.name}: no shape"


@pytest.mark.parametrize("path", PACKAGE_FILES, **relative)
def test_public_functions_are_annotated(path: Path) -> None:
    for function in public_functions(path):
        where = f"{path.name}:{function.lineno} {function.name}"
        given = function.args
        parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        parameters += [p for p in (given.vararg, given.kwarg) if p is not None]
        bare = [p.arg for p in parameters if p.annotation is None and p.arg not in ("self", "cls")]
        assert not bare, f"{where}: no annotation of {', '.join(bare)}"
        assert function.returns is not None, f"{where}: no annotation of the result"


@pytest.mark.parametrize("path", PACKAGE_FILES, **relative)
def test_public_module_functions_are_documented(path: Path) -> None:
    module = ast.parse(path.read_text("utf-8"))
    public = (n for n in module.body if isinstance(n, Function) and n.name[0] != "_")
    for function in public:
        assert ast.get_docstring(function), f"{path.name}:{function.lineno} {function.name}"


@pytest.mark.parametrize("path", [*PACKAGE_FILES, *KERNEL_FILES], **relative)
def test_files_and_functions_stay_small(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 450
    for function in functions(path):
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        assert lines <= 80, f"{path.name}:{function.lineno} {function.name}: {lines} lines"


def test_shape_pattern() -> None:
    assert all(SHAPE.search(t) for t in ("y: (M, K)", "(n,) float32", "(..., C)", "(N) rows"))
    assert not SHAPE.search("adds two things (quickly)")
