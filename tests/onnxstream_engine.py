"""What OnnxStream's engine makes of a language model's folder, in NumPy: its operators with the
restrictions that they have (read in onnxstream.cpp), its types (booleans are int64) and the checks
of shapes that it makes. Anything it refuses is an AssertionError here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Attributes = Mapping[str, str]


def run(folder: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All values that the operators of `folder` compute from `feeds`, by their escaped names."""
    values = {name: np.asarray(array) for name, array in feeds.items()}
    for line in (folder / "model.txt").read_text().splitlines():
        head, inputs, output, *rest = line.split("*")
        attributes = dict(a.split(":") for a in rest[0].split(";")) if rest else {}
        op_type = head.split(":")[1]
        arrays = [_input(folder, values, t) for t in inputs[6:].split(";")]
        name, declared = output[7:].rstrip(")").split("(")
        result = _OPERATORS[op_type](arrays, attributes)
        assert result.dtype in (np.float32, np.int64), (head, result.dtype)
        sizes = [int(d) for d in declared.split(",")] if declared else []
        if sizes:  # none at all is any shape
            fits = len(sizes) == result.ndim and all(
                d in (0, s) for d, s in zip(sizes, result.shape, strict=True)
            )
            assert fits, (head, declared, result.shape)
        values[name] = result
    return values


def _input(folder: Path, values: Mapping[str, Array], text: str) -> Array:
    name, inner = text.rstrip(")").split("(")
    if ":" not in inner:
        return values[name]
    kind, dims = inner.split(":")
    sizes = [int(d) for d in dims.split(",")] if dims else []
    stored = np.fromfile(folder / name, kind).reshape(sizes)
    return stored if kind == "int64" else stored.astype(np.float32)


def _only(attributes: Attributes, *names: str) -> None:
    assert set(attributes) <= set(names), attributes


def _float(function: Callable[..., Any]) -> Any:
    def operator(arrays: list[Array], attributes: Attributes) -> Array:
        assert all(a.dtype == np.float32 for a in arrays)
        return np.asarray(function(*arrays), np.float32)

    return operator


def _arithmetic(function: Callable[..., Any]) -> Any:
    """Two floats or two integers."""

    def operator(arrays: list[Array], attributes: Attributes) -> Array:
        a, b = arrays
        assert a.dtype == b.dtype
        return np.asarray(function(a, b), a.dtype)

    return operator


def _sub(arrays: list[Array], attributes: Attributes) -> Array:
    a, b = arrays
    assert a.dtype == b.dtype
    assert a.dtype == np.float32 or (b.ndim == 0 and a.ndim < 2)
    return np.asarray(a - b, a.dtype)


def _pow(arrays: list[Array], attributes: Attributes) -> Array:
    x, power = arrays
    assert x.dtype == np.float32 and power.ndim == 0
    return np.asarray(x**power, np.float32)


def _unsqueeze(arrays: list[Array], attributes: Attributes) -> Array:
    return np.expand_dims(arrays[0], tuple(arrays[1].tolist()))


def _squeeze(arrays: list[Array], attributes: Attributes) -> Array:
    assert arrays[1].size
    return np.squeeze(arrays[0], tuple(arrays[1].tolist()))


def _concat(arrays: list[Array], attributes: Attributes) -> Array:
    assert len({a.dtype for a in arrays}) == 1
    return np.concatenate([np.atleast_1d(a) for a in arrays], int(attributes["axis"]))


def _reshape(arrays: list[Array], attributes: Attributes) -> Array:
    _only(attributes, "allowzero")
    x, target = arrays
    assert int(attributes.get("allowzero", 0)) == 0 and target.size
    return x.reshape([x.shape[i] if d == 0 else d for i, d in enumerate(target.tolist())])


def _transpose(arrays: list[Array], attributes: Attributes) -> Array:
    _only(attributes, "perm")
    assert arrays[0].dtype == np.float32
    return arrays[0].transpose([int(p) for p in attributes["perm"].split(",")])


def _reduce_mean(arrays: list[Array], attributes: Attributes) -> Array:
    _only(attributes, "axes", "keepdims")
    (x,), axis = arrays, int(attributes["axes"])
    assert attributes["keepdims"] == "1" and axis % x.ndim == x.ndim - 1
    return x.mean(axis, keepdims=True, dtype=np.float32)


def _matmul(arrays: list[Array], attributes: Attributes) -> Array:
    a, b = arrays
    if a.ndim == b.ndim == 4:
        assert a.shape[0] == b.shape[0] == 1
    else:
        assert a.ndim in (2, 3) and b.ndim in (2, 3)
    return np.asarray(a @ b, np.float32)


def _softmax(arrays: list[Array], attributes: Attributes) -> Array:
    assert attributes == {"axis": "-1"}  # what its fused attention looks for
    e = np.exp(arrays[0] - arrays[0].max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True), np.float32)


def _gather(arrays: list[Array], attributes: Attributes) -> Array:
    _only(attributes, "axis")
    x, indices = arrays
    assert int(attributes.get("axis", 0)) == 0 and indices.dtype == np.int64
    assert indices.ndim < 2 or (indices.ndim == 2 and indices.shape[0] == 1)
    return np.asarray(np.take(x, indices, axis=0), x.dtype)


def _slice(arrays: list[Array], attributes: Attributes) -> Array:
    _only(attributes)
    x, start, end, axis, *step = arrays
    assert start.shape == end.shape == axis.shape == (1,) and (not step or step[0].tolist() == [1])
    place = int(axis[0]) % x.ndim
    assert place >= x.ndim - 2
    window = range(x.shape[place])[int(start[0]) : int(end[0])]
    assert len(window)
    return np.take(x, window, axis=place)


def _shape(arrays: list[Array], attributes: Attributes) -> Array:
    _only(attributes)
    assert arrays[0].ndim
    return np.array(arrays[0].shape, np.int64)


def _where(arrays: list[Array], attributes: Attributes) -> Array:
    condition, a, b = arrays
    assert condition.dtype == np.int64 and condition.ndim and a.dtype == b.dtype
    assert all(v.ndim == 0 or v.shape == condition.shape for v in (a, b))
    return np.asarray(np.where(condition, a, b), a.dtype)


def _expand(arrays: list[Array], attributes: Attributes) -> Array:
    x, target = arrays
    assert x.ndim and target.ndim == 1 and x.ndim <= target.size and target.min() > 0
    wide = (1,) * (target.size - x.ndim) + x.shape
    assert all(a in (1, b) for a, b in zip(wide, target.tolist(), strict=True))
    return np.broadcast_to(x, target.tolist())


def _cast(arrays: list[Array], attributes: Attributes) -> Array:
    if attributes["to"] == "1":
        assert arrays[0].dtype == np.int64
        return arrays[0].astype(np.float32)
    assert attributes["to"] in ("9", "7", "6")
    return arrays[0].astype(np.int64)


def _range(arrays: list[Array], attributes: Attributes) -> Array:
    start, limit, delta = arrays
    assert all(a.ndim == 0 and a.dtype == np.int64 for a in arrays)
    assert delta == 1 and start < limit
    return np.arange(start, limit, dtype=np.int64)


def _compare(function: Callable[..., Any]) -> Any:
    def operator(arrays: list[Array], attributes: Attributes) -> Array:
        a, b = arrays
        assert a.shape == b.shape, "what it does for other shapes depends on their sizes"
        return np.asarray(function(a, b), np.int64)

    return operator


def _neg(arrays: list[Array], attributes: Attributes) -> Array:
    return -arrays[0]


_OPERATORS: Mapping[str, Callable[[list[Array], Attributes], Array]] = {
    "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Concat": _concat, "Reshape": _reshape,
    "Transpose": _transpose, "ReduceMean": _reduce_mean, "MatMul": _matmul, "Softmax": _softmax,
    "Gather": _gather, "Slice": _slice, "Shape": _shape, "Where": _where, "Expand": _expand,
    "Cast": _cast, "Range": _range, "Sub": _sub, "Pow": _pow, "Neg": _neg,
    "Mul": _arithmetic(np.multiply), "Add": _arithmetic(np.add), "Div": _arithmetic(np.divide),
    "Cos": _float(np.cos), "Sin": _float(np.sin), "Sqrt": _float(np.sqrt),
    "Sigmoid": _float(lambda x: 1 / (1 + np.exp(-x))), "Less": _compare(np.less),
    "Greater": _compare(np.greater), "And": _compare(np.logical_and),
}  # fmt: skip
