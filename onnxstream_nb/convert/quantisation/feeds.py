"""Inputs of a model from files: one .npz for each run, its arrays under the inputs' names."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError
from ...graph import Graph, Value

Array = np.ndarray[Any, Any]
_FORM = "calibration takes .npz files with the model's inputs by name"


def files_of(path: str | Path) -> list[Path]:
    """The .npz files that a path names: itself, or all of a folder, in the order of their names.

    Raises UsageError when there are none.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise UsageError(f"{path}: the folder has no .npz file; {_FORM}")
        return files
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder; {_FORM}")
    if path.suffix != ".npz":
        raise UsageError(f"{path}: not an .npz file; {_FORM}")
    return [path]


def feeds_of_files(path: str | Path, graph: Graph, least: int = 1) -> Iterator[dict[str, Array]]:
    """The inputs of one run for each file, read when they are asked for.

    Raises UsageError naming the file and the input when there are fewer than `least` files, one is
    no .npz, or an input is missing, unknown, or of another type, rank or size than declared.
    """
    files = files_of(path)
    if len(files) < least:
        raise UsageError(f"{path}: {len(files)} .npz files, but {least} are needed")
    for file in files:
        yield _checked(file, _read(file), graph)


def _read(file: Path) -> dict[str, Array]:
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UsageError(f"{file}: not a readable .npz file ({e}); {_FORM}") from e


def _checked(file: Path, arrays: Mapping[str, Array], graph: Graph) -> dict[str, Array]:
    declared = {value.name: value for value in graph.inputs}
    unknown, missing = arrays.keys() - declared.keys(), declared.keys() - arrays.keys()
    if unknown or missing:
        kind, names = ("unknown", unknown) if unknown else ("no", missing)
        raise UsageError(
            f"{file}: {kind} input {', '.join(sorted(names))}; the model's inputs are "
            f"{', '.join(declared)}"
        )
    for name, array in arrays.items():
        _check(file, declared[name], array)
    return dict(arrays)


def _check(file: Path, value: Value, array: Array) -> None:
    if value.dtype not in ("", array.dtype.name):
        raise UsageError(
            f"{file}: input {value.name} is {array.dtype.name}, the model takes {value.dtype}"
        )
    shape = value.shape
    fits = shape is None or len(shape) == array.ndim
    if shape is not None and fits:
        fits = all(
            not isinstance(size, int) or size in (got, -1)
            for size, got in zip(shape, array.shape, strict=True)
        )
    if not fits:
        raise UsageError(
            f"{file}: input {value.name} has the shape {list(array.shape)}, the model takes "
            f"{['?' if size is None else size for size in shape or ()]}"
        )
