"""A graph on its way to a file, and what gives the elements of weights that no file holds yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..errors import ModelError
from ..formats.onnx_tensors import raw_data
from ..formats.sink import Data
from ..graph import Graph, WeightRef
from ..session import decode_constant
from ..weights import numpy_dtype
from . import elements

Array = np.ndarray[Any, Any]
FLOATS: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The types of floats that weights may be stored as: what flags call them -> the element type."""

Make = Callable[[], Array]


@runtime_checkable
class InPieces(Protocol):
    """What makes a weight and can do so a piece at a time, for those larger than memory."""

    def pieces(self) -> Iterator[Array]:
        """The elements in C order, in arrays of any shape."""


@dataclass(frozen=True)
class Draft:
    """`graph`, of which the initializers named in `made` have no bytes yet: they are computed when
    they are read, one at a time, so that a model larger than memory can be converted."""

    graph: Graph
    made: Mapping[str, Make] = field(default_factory=dict)

    def read(self, ref: WeightRef) -> Array:
        """The logical elements of an initializer: any encoding and transposition is undone."""
        make = self.made.get(ref.name)
        return decode_constant(ref) if make is None else make()

    def pieces(self, ref: WeightRef, dtype: str = "") -> Iterator[Array]:
        """What `read` gives, some rows at a time, as `dtype` or else as the graph says."""
        make, dtype = self.made.get(ref.name), dtype or ref.dtype
        if make is None:
            yield from elements.pieces(ref, dtype)
            return
        made = make.pieces() if isinstance(make, InPieces) else iter((_checked(make(), ref),))
        yield from (elements.as_dtype(piece, dtype, ref.name) for piece in made)

    def raw(self, ref: WeightRef) -> Iterator[Data]:
        """The bytes of an initializer as an ONNX file holds them, a bounded piece at a time."""
        if ref.name not in self.made and ref.encoding == "raw" and not ref.transposed:
            yield from elements.copied(ref)
        else:
            yield from raw_data(self.pieces(ref), ref.dtype)

    def with_(self, graph: Graph, made: Mapping[str, Make] | None = None) -> Draft:
        """The draft of another graph; what `made` tells is added, what is not used is dropped."""
        everything = {**self.made, **(made or {})}
        names = graph.initializers.keys() & everything.keys()
        return replace(self, graph=graph, made={name: everything[name] for name in names})


def placeholder(name: str, dtype: str, shape: tuple[int, ...]) -> WeightRef:
    """The reference of an initializer that a draft makes: it has a type and a shape, no bytes."""
    return WeightRef(name, shape, dtype, b"")


def _checked(array: Array, ref: WeightRef) -> Array:
    if array.shape != ref.shape or array.dtype != numpy_dtype(ref.dtype):
        raise ModelError(
            f"weight {ref.name!r} was made as {array.dtype} {array.shape}; the graph says "
            f"{ref.dtype} {ref.shape}"
        )
    return array
