"""Graphs over files of block-encoded weights, and what they compute in float64 with a bound.

Dims: x (M, K); an embedding (V, D) and a head (D, V) may be the same stored rows (V, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kernel_oracles import Array, decoded, random_blocks

from onnxstream_nb.graph import Graph, Node, Value, WeightRef
from onnxstream_nb.kernels.quads import LIMIT

OPSET = {"": 21}
X = Value("x", "float32", None)


def stored(encoding: str, rows: int, k: int, seed: int = 0) -> Array:
    """(rows, bytes a row): random blocks that stand for weights around 1 / sqrt(K)."""
    rng = np.random.default_rng((seed, rows, k))
    raw = random_blocks(encoding, rows, k, rng)
    spread = decoded(encoding, raw).std() * k**0.5
    scales = rng.uniform(0.5, 1.5, (rows, 1, 2)) * (0.05 / spread)
    return random_blocks(encoding, rows, k, np.random.default_rng((seed, rows, k)), scales)


def matrix(
    name: str, encoding: str, raw: Array, k: int, source: Path | None = None, offset: int = 0
) -> WeightRef:
    """Rows (N, bytes a row) as a logical (K, N), in a file or in memory."""
    data = raw.tobytes() if source is None else source
    return WeightRef(
        name, (k, len(raw)), "float32", data, offset, raw.nbytes, encoding, transposed=True
    )


def table(ref: WeightRef, name: str) -> WeightRef:
    """The same stored rows as a logical (N, K)."""
    k, n = ref.shape
    return WeightRef(name, (n, k), "float32", ref.source, ref.offset, ref.nbytes, ref.encoding)


def graph_of(
    nodes: Sequence[Node], refs: Sequence[WeightRef], outputs: Sequence[str] = ("y",), x: Value = X
) -> Graph:
    values = tuple(Value(name, "float32", None) for name in outputs)
    return Graph(tuple(nodes), (x,), values, {r.name: r for r in refs}, OPSET)


def one_product(encoding: str, k: int, n: int) -> tuple[Graph, Array]:
    """y = x w over bytes in memory, and w (K, N)."""
    raw = stored(encoding, n, k)
    graph = graph_of([Node("MatMul", ("x", "w"), ("y",))], [matrix("w", encoding, raw, k)])
    return graph, decoded(encoding, raw).T


class TiedModel:
    """logits = relu(E[ids] A) E', the head tied to the embedding, in one file.

    The pieces lie at odd offsets.
    """

    vocabulary, width = 83, 512

    def __init__(self, folder: Path, encoding: str) -> None:
        self.path = folder / f"tied_{encoding}.bin"
        self.raws = {
            "head": stored(encoding, self.vocabulary, self.width, 1),
            "a": stored(encoding, self.width, self.width, 2),
        }
        refs, data = [], b"\x5a" * 7
        for name, raw in self.raws.items():
            refs.append(matrix(name, encoding, raw, self.width, self.path, len(data)))
            data += raw.tobytes() + b"\x5a" * 3
        self.path.write_bytes(data)
        self.embedding = table(refs[0], "embedding")
        self.graph = graph_of(
            [
                Node("Gather", ("embedding", "ids"), ("e",)),
                Node("MatMul", ("e", "a"), ("p",)),
                Node("Relu", ("p",), ("q",)),
                Node("MatMul", ("q", "head"), ("logits",)),
            ],
            [self.embedding, *refs], ("logits",), Value("ids", "int64", ("T",)),
        )  # fmt: skip
        self.encoding = encoding

    @property
    def bytes(self) -> int:
        """Of the matrices, those that are tied once."""
        return sum(raw.nbytes for raw in self.raws.values())

    def logits(self, ids: Array, packed: bool) -> tuple[Array, Array]:
        """(T, V) in float64, and how far float32 may be from that.

        Each product adds its own error (kernel_oracles.assert_product): a millionth of its terms'
        magnitudes, and packed half of 1 / 16256 of a group's largest for each; what came in wrong
        by e leaves wrong by at most e |W|. Relu makes no error larger, the table is exact.
        """
        dense = {name: decoded(self.encoding, raw).T for name, raw in self.raws.items()}
        x, error = dense["head"].T[ids].astype(np.float64), np.zeros((len(ids), self.width))
        for name in ("a", "head"):
            w = dense[name].astype(np.float64)
            seen = np.abs(x) + error
            own = 1e-6 * seen
            if packed:
                largest = seen.reshape(len(ids), -1, 32).max(axis=2).repeat(32, axis=1)
                own = own + largest / (2 * LIMIT)
            x, error = x @ w, (error + own) @ np.abs(w)
            if name != "head":
                x = np.maximum(x, 0)
        return x, error


def assert_within(got: Array, known: tuple[Array, Array]) -> None:
    wanted, bound = known
    assert got.shape == wanted.shape and got.dtype == np.float32
    assert (np.abs(got - wanted) <= bound).all()


def feeds(ids: Sequence[int]) -> dict[str, Any]:
    return {"ids": np.array(ids, np.int64)}
