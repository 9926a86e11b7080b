"""A graph on its way to a file, and what gives the elements of weights that no file holds yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..graph import Graph, WeightRef
from ..session import decode_constant

Array = np.ndarray[Any, Any]
Make = Callable[[], Array]


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

    def with_(self, graph: Graph, made: Mapping[str, Make] | None = None) -> Draft:
        """The draft of another graph; what `made` tells is added, what is not used is dropped."""
        everything = {**self.made, **(made or {})}
        names = graph.initializers.keys() & everything.keys()
        return replace(self, graph=graph, made={name: everything[name] for name in names})


def placeholder(name: str, dtype: str, shape: tuple[int, ...]) -> WeightRef:
    """The reference of an initializer that a draft makes: it has a type and a shape, no bytes."""
    return WeightRef(name, shape, dtype, b"")
