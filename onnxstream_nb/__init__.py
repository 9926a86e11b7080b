"""onnxstream_nb: run ONNX models larger than memory, with kernels in Python compiled by Numba."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import Model
    from .session import Session

__version__ = "0.1.0"
__all__ = ["Model", "Session", "__version__"]

if not (Path(__file__).parent / "kernels").is_dir():
    # A checkout: kernels/ lies beside this package and is installed inside it by the wheel.
    __path__.append(str(Path(__file__).parent.parent))

_LAZY = {"Model": ".model", "Session": ".session"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
