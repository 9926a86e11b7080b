"""Writing a graph down: nodes, weights of a file and constants, each named by what it yields."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import ModelError
from ..graph import Node, WeightRef

Lookup = Callable[[str], WeightRef]
"""A tensor's reference by its Hugging Face name, as the file stores it (a linear layer as N rows of
K); raises where there is none."""


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A tensor's name with its module as `names` call it, where they do."""
    layered = re.fullmatch(r"(model\.layers\.\d+\.)?(.+)\.(\w+)", name)
    assert layered is not None, name
    base, module, kind = layered[1] or "", layered[2], layered[3]
    return f"{base}{names.get(module, module)}.{kind}"


class Notation:
    """Collects nodes and initializers; each method adds one and gives the name of its value."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self.nodes: list[Node] = []
        self.initializers: dict[str, WeightRef] = {}

    def node(self, op_type: str, output: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(Node(op_type, inputs, (output,), attributes, name=output))
        return output

    def weight(self, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> str:
        """Add the tensor `name`, stored with `shape`, and return its initializer's name."""
        return self._add(self._stored(name, shape), transposed)

    def rows(
        self,
        name: str,
        whole: str,
        where: tuple[int, int],
        shape: tuple[int, ...],
        *,
        transposed: bool = False,
    ) -> str:
        """Add, as `name`, the rows of the tensor `whole` that are stored with `shape`.

        `where` is the first of them, and how many `whole` has. They stay where they are.
        """
        first, total = where
        ref = self._stored(whole, (total, *shape[1:]))
        matrix = replace(ref, shape=(total, *(shape[1:] or (1,))))
        part = replace(matrix.rows(first, first + shape[0]), shape=shape)
        module, _, kind = ref.name.rpartition(".")
        return self._add(replace(part, name=f"{module}.{name}.{kind}"), transposed)

    def _stored(self, name: str, shape: tuple[int, ...]) -> WeightRef:
        ref = self._lookup(name)
        if ref.shape != shape:
            raise ModelError(
                f"{ref.source!s}: tensor '{ref.name}' has shape {list(ref.shape)}, but the "
                f"model's parameters imply {list(shape)}"
            )
        return ref

    def _add(self, ref: WeightRef, transposed: bool) -> str:
        if transposed:
            ref = replace(ref, shape=ref.shape[::-1], transposed=True)
        self.initializers[ref.name] = ref
        return ref.name

    def constant(
        self, name: str, values: tuple[int, ...] | tuple[float, ...], *, scalar: bool = False
    ) -> str:
        """Add a constant kept in memory: int64 when all values are ints, else float32."""
        integers = all(isinstance(v, int) for v in values)
        data = struct.pack(f"<{len(values)}{'q' if integers else 'f'}", *values)
        self.initializers[name] = WeightRef(
            name,
            () if scalar else (len(values),),
            "int64" if integers else "float32",
            data,
            nbytes=len(data),
        )
        return name

    def scalar(self, name: str, value: float) -> str:
        """Add one float32 kept in memory, of shape ()."""
        return self.constant(name, (float(value),), scalar=True)
