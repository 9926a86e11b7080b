"""Model formats: one module per format, each giving a `Graph` whose weights stay in their files."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    from ..graph import Graph

_LOOKED_FOR = (
    "an .onnx or .gguf file, or a folder with model.txt (OnnxStream), "
    "config.json and *.safetensors (Hugging Face), one .gguf or one .onnx"
)
_LFS_POINTER = b"version https://git-lfs"


def load(path: str | Path) -> Graph:
    """Read the model at `path`, a file or a folder, as a `Graph`; the format is found out.

    Raises ModelError when there is no model there, or it is damaged, and UnsupportedError when
    it uses something this package cannot run. Weights are not read.
    """
    module, target = identify(Path(path))
    graph: Graph = import_module(f"{__name__}.{module}").read(target)
    return graph


def load_bytes(data: bytes) -> Graph:
    """Read a serialized `onnx.ModelProto`. External data is refused: bytes have no folder."""
    from .onnx import read_bytes

    return read_bytes(data)


def identify(path: Path) -> tuple[str, Path]:
    """The name of the format's module, and the file or folder that it reads."""
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    return _identify_folder(path) if path.is_dir() else _identify_file(path)


def _identify_file(path: Path) -> tuple[str, Path]:
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ModelError(f"{path}: the file is empty; fetch or export the model again")
    if start.startswith(_LFS_POINTER):
        raise ModelError(f"{path}: this is a Git LFS pointer, not the model; run `git lfs pull`")
    if path.name == "model.txt":
        return "onnxstream", path.parent
    if path.suffix.lower() == ".onnx":
        return "onnx", path
    if path.suffix.lower() == ".gguf" or start.startswith(b"GGUF"):
        return "gguf", path
    if path.suffix.lower() == ".safetensors":
        raise ModelError(f"{path}: give the folder {path.parent}, which holds config.json too")
    raise ModelError(f"{path}: not a known model file; looked for {_LOOKED_FOR}")


def _identify_folder(folder: Path) -> tuple[str, Path]:
    if (folder / "model.txt").is_file():
        return "onnxstream", folder
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "safetensors", folder
    for suffix in (".gguf", ".onnx"):
        found = sorted(folder.glob(f"*{suffix}"))
        if len(found) > 1:
            names = ", ".join(f.name for f in found)
            raise ModelError(f"{folder}: several {suffix} files ({names}); name one of them")
        if found:
            return _identify_file(found[0])
    raise ModelError(f"{folder}: no model in this folder; looked for {_LOOKED_FOR}")
