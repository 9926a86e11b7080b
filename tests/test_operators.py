"""The operators and their kernels: against plain Python, NumPy in double precision, and the schema.

ONNX's own cases are in conformance/; here are the sizes, tails, special values, threads and
element types that those small cases do not reach.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest

from onnxstream_nb import registry
from onnxstream_nb.errors import ShapeError, UnsupportedError
from onnxstream_nb.kernels import mapping, pointwise, reduce, softmax
from onnxstream_nb.kernels.simd import JIT
from onnxstream_nb.kernels.threads import set_threads

TAILS = (0, 1, 15, 16, 17, 63, 64, 65, 1000)
Array = np.ndarray[Any, Any]


@pytest.fixture(params=(1, 2, 5), ids=lambda n: f"{n}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    set_threads(request.param)
    yield request.param
    set_threads(1)


def call(op_type: str, *inputs: Any, opset: int = 23, **attributes: Any) -> Any:
    """Run an operator of that opset on arrays; None for an omitted input."""
    operator = registry.lookup(op_type, "", opset)
    assert operator is not None
    return operator.function(*inputs, **attributes)


def values(n: int, scale: float = 3.0, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal(n) * scale).astype(np.float32)


def close(got: Any, want: Any, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    got = np.asarray(got)
    np.testing.assert_allclose(got, np.asarray(want).reshape(got.shape), rtol, atol)


# -- declarations ------------------------------------------------------------------------------


def schema_defaults(schema: Any) -> dict[str, Any]:
    """Attribute -> its default; None when it has none."""
    from onnx import helper

    return {
        name: helper.get_attribute_value(a.default_value) if a.default_value.type else None
        for name, a in schema.attributes.items()
    }


def standard_versions() -> dict[str, list[Any]]:
    import onnx

    found: dict[str, list[Any]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and not schema.deprecated:
            found.setdefault(schema.name, []).append(schema)
    return {name: sorted(s, key=lambda s: s.since_version) for name, s in found.items()}


def test_every_declaration_is_the_standards() -> None:
    """All attributes of each version are taken, with the standard's defaults; inputs agree."""
    import inspect

    wrong = []
    versions = standard_versions()
    for domain, name, device in registry.operators():
        for schema in versions[name] if (domain, device) == ("", "cpu") else ():
            operator = registry.lookup(name, "", schema.since_version)
            if operator is None:
                continue
            parameters = inspect.signature(operator.function).parameters
            for attribute, default in schema_defaults(schema).items():
                taken = parameters.get(attribute)
                if taken is None or taken.kind is not taken.KEYWORD_ONLY:
                    wrong.append(f"{name}-{schema.since_version}: no attribute {attribute}")
                    continue
                ours = taken.default
                ours = float(np.float32(ours)) if isinstance(ours, float) else ours
                default = default.decode() if isinstance(default, bytes) else default
                if default is not None and ours != default:
                    wrong.append(f"{name}-{schema.since_version}: {attribute}={taken.default!r}")
            positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
            variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
            if not variadic and len(positional) < len(schema.inputs):
                wrong.append(f"{name}-{schema.since_version}: {len(positional)} inputs")
    assert wrong == []


def test_operators_of_language_models_are_declared() -> None:
    needed = """Add And Cast Concat Constant ConstantOfShape Cos CumSum Div Equal Erf Expand Flatten
        Gather GatherElements GatherND Gelu Greater IsNaN LessOrEqual Max Mul Neg OneHot Pow Range
        Reciprocal ReduceMean ReduceSum Relu Reshape Shape Sigmoid Sin Slice Softmax Split Sqrt
        Squeeze Sub Swish Tanh Tile TopK Transpose Unsqueeze Where"""
    for opset in (14, 17, 23):
        late = {"Gelu": 20, "Swish": 24}
        missing = [n for n in needed.split() if late.get(n, 0) <= opset
                   and registry.lookup(n, "", opset) is None]  # fmt: skip
        assert missing == []


# -- one input ---------------------------------------------------------------------------------

UNARY: dict[str, tuple[Callable[[float], float], float]] = {  # kernel: oracle, relative tolerance
    "negative_f32": (lambda x: -x, 0),
    "reciprocal_f32": (lambda x: 1 / x, 1e-7),
    "square_f32": (lambda x: x * x, 1e-7),
    "cube_f32": (lambda x: x**3, 2e-7),
    "relu_f32": (lambda x: max(x, 0.0), 0),
    "exponential_f32": (naive.exp, 1e-6),
    "sigmoid_f32": (naive.sigmoid, 1e-6),
    "tanh_f32": (math.tanh, 5e-7),
    "erf_f32": (math.erf, 7e-7),
    "gelu_f32": (naive.gelu, 1e-6),
    "gelu_tanh_f32": (naive.gelu_tanh, 2e-6),
}


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("n", TAILS)
def test_unary_kernel_tails(name: str, n: int, threads: int) -> None:
    oracle, rtol = UNARY[name]
    x = values(n)
    got = mapping.map_unary(registry.kernels()[name], x)
    # Gelu's left tail is x (1 + erf) / 2 with its cancellation, as the standard defines it:
    # an error of erf counts |x| times.
    atol = 1e-6 if name.startswith("gelu") else 1e-7
    close(got, [oracle(v) for v in x.tolist()], rtol, atol)


@pytest.mark.parametrize("n", (17, 1000))
def test_square_root_and_swish_tails(n: int) -> None:
    x = abs(values(n))
    close(mapping.map_unary(pointwise.square_root_f32, x), np.sqrt(x), 0)
    got = mapping.map_unary(pointwise.swish_f32, -x, 1.7)
    close(got, [naive.swish(v, 1.7) for v in (-x).tolist()])


SPECIAL = np.array(
    [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -1e-42, 3.4e38, -3.4e38, 88.6, -88.6, 100, -103,
     1e-8],
    np.float32,
)  # fmt: skip


@pytest.mark.parametrize("name", ("Exp", "Neg", "Reciprocal", "Relu", "Sigmoid", "Sqrt", "Tanh"))
def test_special_values_of_kernels_are_those_of_numpy(name: str) -> None:
    """What the operator does to few elements (NumPy) and to many (the kernel)."""
    few = call(name, SPECIAL)
    many = call(name, np.resize(SPECIAL, mapping.LARGE))[: SPECIAL.size]
    np.testing.assert_allclose(many, few, 2e-6, 1e-38)
    if name != "Relu":  # where NumPy's maximum gives either zero
        assert (np.signbit(many) == np.signbit(few))[~np.isnan(few)].all()


@pytest.mark.parametrize("name", ("Erf", "Gelu"))
def test_special_values_of_erf(name: str) -> None:
    got = call(name, SPECIAL)
    assert np.isnan(got[0])
    oracle = math.erf if name == "Erf" else naive.gelu
    finite = [3, 4, 5, 6, 9, 10, 11, 12, 13]
    close(got[finite], [oracle(v) for v in SPECIAL[finite].tolist()], 1e-6, 1e-38)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float64"))
@pytest.mark.parametrize("name", ("Sigmoid", "Tanh", "Erf", "Gelu", "Softplus", "Mish", "Elu"))
def test_other_float_types_keep_their_type(name: str, dtype: str) -> None:
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = values(50).astype(kind)
    got = call(name, x)
    assert got.dtype == kind
    wide = call(name, x.astype(np.float64))
    eps = float(ml_dtypes.finfo(kind).eps)
    close(got.astype(np.float64), wide, eps, eps * 1e-1)


def test_large_inputs_reach_the_kernels(threads: int) -> None:
    x = values(1_000_003)
    close(call("Exp", x), np.exp(x.astype(np.float64)), 1e-6)
    close(call("Tanh", x), np.tanh(x.astype(np.float64)), 5e-7)
    close(call("Add", x, x[::-1].copy()), x + x[::-1], 0)
    assert call("Neg", x[::2]).tobytes() == (-x[::2]).tobytes()


# -- several inputs ----------------------------------------------------------------------------

SHAPES = (
    ((7, 33), (7, 33)), ((7, 33), ()), ((), (7, 33)), ((7, 33), (33,)), ((1, 33), (7, 33)),
    ((7, 33), (7, 1)), ((7, 1), (1, 33)), ((2, 3, 17), (2, 1, 1)), ((2, 3, 17), (3, 17)),
    ((2, 3, 17), (2, 1, 17)), ((2, 1, 17), (1, 3, 1)), ((0, 5), (1, 5)), ((1, 1), (1,)),
    ((33,), (2, 1)),
)  # fmt: skip


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_binary_kernel_broadcast_tails(shapes: tuple[Any, Any], threads: int) -> None:
    a, b = (values(math.prod(s), seed=i).reshape(s) for i, s in enumerate(shapes))
    for kernel, function in (
        (pointwise.add_f32, lambda x, y: x + y), (pointwise.subtract_f32, lambda x, y: x - y),
        (pointwise.multiply_f32, lambda x, y: x * y), (pointwise.divide_f32, lambda x, y: x / y),
    ):  # fmt: skip
        got = mapping.map_broadcast(kernel, a, b)
        if got is None:
            assert shapes in (SHAPES[9], SHAPES[10])  # three runs of axes, which are NumPy's
            continue
        assert got.shape == np.broadcast_shapes(*shapes)
        close(got, naive.broadcast(function, a, b), 1e-7)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_where_kernel_broadcast_tails(shapes: tuple[Any, Any], threads: int) -> None:
    x, y = (values(math.prod(s), seed=i).reshape(s) for i, s in enumerate(shapes))
    whole = np.broadcast_shapes(*shapes)
    condition = np.asarray(values(math.prod(whole), seed=3).reshape(whole) > 0)
    got = mapping.map_broadcast(pointwise.where_f32, x, y, condition)
    if got is not None:
        close(got, naive.broadcast(lambda x, y, c: x if c else y, x, y, condition), 0)


def test_broadcasts_of_many_elements() -> None:
    x = values(300 * 513).reshape(300, 513)
    for other in (x[0], x[:, :1].copy(), np.array(2, np.float32), x[:, :1], x[:1]):
        close(call("Sub", x, other), x - other, 0)
        close(call("Where", x > 0, x, other), np.where(x > 0, x, other), 0)
    close(call("Where", x[:1] > 0, np.array(1, np.float32), x), np.where(x[:1] > 0, 1, x), 0)
    close(call("Add", x.T, x.T), 2 * x.T, 0)


def test_failed_broadcast_names_the_shapes() -> None:
    with pytest.raises(ShapeError, match=r"\(2, 3\) and \(4,\)"):
        call("Add", np.zeros((2, 3)), np.zeros(4))


def test_integer_arithmetic() -> None:
    a, b = np.array([7, -7, 7, -7, 6, -8], np.int64), np.array([2, 2, -2, -2, 3, 4], np.int64)
    assert call("Div", a, b).tolist() == [int(x / y) for x, y in zip(a, b, strict=True)]
    assert call("Mod", a, b).tolist() == [
        x % y for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert call("Mod", a, b, fmod=1).tolist() == [
        int(math.fmod(x, y)) for x, y in zip(a, b, strict=True)
    ]
    assert call("Div", a.astype(np.uint8), b.astype(np.uint8)).dtype == np.uint8
    assert call("Pow", a, b).tolist() == [
        int(float(x) ** y) for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert call("Max", a, b, np.array(3)).tolist() == [7, 3, 7, 3, 6, 4]


@pytest.mark.parametrize("exponent", (2, 3, 0.5, -1, 2.5))
@pytest.mark.parametrize("n", (5, mapping.LARGE + 3))
def test_pow(exponent: float, n: int) -> None:
    x = abs(values(n)) + np.float32(0.1)
    got = call("Pow", x, np.array([exponent], np.float32))
    assert got.dtype == np.float32
    close(got, x.astype(np.float64) ** exponent, 1e-6)


def test_old_broadcast_begins_at_an_axis() -> None:
    a, b = values(24).reshape(2, 3, 4), values(3)
    close(call("Mul", a, b, opset=6, broadcast=1, axis=1), a * b[:, None], 0)


# -- conversions -------------------------------------------------------------------------------


def test_half_conversion_tails(threads: int) -> None:
    """Every half, and floats around the halves' ties, by NumPy's own conversion."""
    step = 1 if JIT else 97
    halves = np.arange(0, 65536, step, dtype=np.uint16).view(np.float16)
    halves = halves[~np.isnan(halves)]
    kernel = registry.kernels()["half_to_float"]
    floats = mapping.map_unary(kernel, halves)
    assert floats.tobytes() == halves.astype(np.float32).tobytes()
    near = np.concatenate(
        [np.nextafter(floats, np.float32(d)) for d in (0, 1e38)] + [floats * 1.0004883]
    )
    near = np.append(near, np.array([65519, 65520, 1e9, -1e9, 1e-8, 3e-8], np.float32)).astype(
        np.float32
    )
    with np.errstate(over="ignore"):
        want = near.astype(np.float16)
    got = mapping.map_unary(registry.kernels()["float_to_half"], near, dtype=np.float16)
    assert got.tobytes() == want.tobytes()
    assert np.isnan(call("Cast", np.full(10000, np.nan, np.float32), to=10)).all()


@pytest.mark.parametrize("n", (3, mapping.SMALL + 1))
def test_cast(n: int) -> None:
    x = values(n)
    assert call("Cast", x, to=7).tolist() == [int(v) for v in x]
    assert call("Cast", x, to=9).tolist() == [v != 0 for v in x]
    assert call("Cast", x.astype(np.float16), to=1).dtype == np.float32
    assert call("Cast", call("Cast", x, to=8), to=1).tobytes() == x.tobytes()
    with pytest.raises(UnsupportedError, match="99"):
        call("Cast", x, to=99)


# -- softmax and reductions --------------------------------------------------------------------


@pytest.mark.parametrize("n", TAILS[1:])
def test_softmax_kernel_tails(n: int, threads: int) -> None:
    x = values(3 * n, 20).reshape(3, n)
    for kernel, oracle in (
        (softmax.softmax_f32, naive.softmax), (softmax.log_softmax_f32, naive.log_softmax),
    ):  # fmt: skip
        out = np.empty_like(x)
        mapping.launch(kernel, x.ctypes.data, out.ctypes.data, 3, n)
        close(out, [oracle(row) for row in x.tolist()], 2e-6, 1e-7)


def test_softmax_of_many_and_of_infinities() -> None:
    x = values(2 * 50000).reshape(2, 50000) + np.float32(1000)
    close(call("Softmax", x), [naive.softmax(row) for row in x.tolist()], 2e-6, 1e-12)
    x[0, 1::2] = -np.inf
    masked = call("Softmax", x)
    assert masked[0, 1::2].max() < 1e-37 and abs(masked[0].sum(dtype=np.float64) - 1) < 1e-5
    x[1] = -np.inf
    assert np.isnan(call("Softmax", x)[1]).all() and np.isnan(call("Softmax", x[1:, :9])).all()
    x[0, 7] = np.nan
    assert np.isnan(call("Softmax", x)[0]).all()


def test_softmax_along_axes() -> None:
    x = values(20 * 30 * 40).reshape(20, 30, 40)
    e = np.exp(x.astype(np.float64))
    close(call("Softmax", x, axis=1), e / e.sum(1, keepdims=True))
    close(call("Softmax", x, axis=1, opset=11), e / e.sum((1, 2), keepdims=True))
    close(call("LogSoftmax", x, axis=0), np.log(e / e.sum(0, keepdims=True)), 1e-6, 1e-6)
    assert call("Softmax", x[:0]).shape == (0, 30, 40)


@pytest.mark.parametrize("n", (*TAILS, 4095, 4097))
def test_sum_kernel_tails(n: int, threads: int) -> None:
    x = values(5 * n).reshape(5, n)
    for kernel, power in ((reduce.sum_f32, 1), (reduce.sum_square_f32, 2)):
        out = np.full(5, np.nan, np.float32)
        mapping.launch(kernel, x.ctypes.data, out.ctypes.data, 5, n)
        close(out, [math.fsum(v**power for v in row) for row in x.tolist()], 1e-6, 1e-5)


def test_sums_of_many_are_accurate(threads: int) -> None:
    x = values(1_000_003) + np.float32(100)
    exact = math.fsum(x.tolist())
    assert abs(float(call("ReduceSum", x, keepdims=0)) / exact - 1) < 1e-7
    assert abs(float(call("ReduceMean", x).item()) / (exact / x.size) - 1) < 1e-7


@pytest.mark.parametrize("shape", ((3, 4, 5), (30, 70, 80)), ids=str)
@pytest.mark.parametrize("axes", ((-1,), (0,), (1,), (0, 2), (2, 1), None), ids=str)
@pytest.mark.parametrize("keepdims", (0, 1))
def test_reductions(shape: tuple[int, ...], axes: tuple[int, ...] | None, keepdims: int) -> None:
    x = values(math.prod(shape)).reshape(shape)
    options: dict[str, Any] = {"axis": axes, "keepdims": bool(keepdims)}
    wide = x.astype(np.float64)
    given = None if axes is None else np.array(axes, np.int64)
    for name, want in {
        "ReduceSum": np.sum(wide, **options), "ReduceMean": np.mean(wide, **options),
        "ReduceSumSquare": np.sum(wide**2, **options), "ReduceMax": np.max(wide, **options),
        "ReduceL1": np.sum(abs(wide), **options), "ReduceL2": np.sqrt(np.sum(wide**2, **options)),
        "ReduceLogSumExp": np.log(np.sum(np.exp(wide), **options)),
    }.items():  # fmt: skip
        got = call(name, x, given, keepdims=keepdims)
        assert got.shape == want.shape and got.dtype == np.float32
        close(got, want, 2e-6, 2e-4)
        old = call(name, x, opset=12, keepdims=keepdims, **({"axes": axes} if axes else {}))
        assert old.tobytes() == got.tobytes()


def test_reductions_of_nothing() -> None:
    empty = np.zeros((2, 0, 3), np.float32)
    axis = np.array([1])
    assert call("ReduceSum", empty, axis).tolist() == [[[0, 0, 0]], [[0, 0, 0]]]
    assert (call("ReduceMax", empty, axis) == -np.inf).all()
    x = np.array([[1, -2]], np.float32)
    assert call("ReduceSumSquare", x, noop_with_empty_axes=1).tolist() == [[1, 4]]
    assert call("ReduceMean", np.array([3, 4], np.int64)).tolist() == [3]


# -- as rows of a table ------------------------------------------------------------------------

LOWERED: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("Add", 2, {}), ("Sub", 2, {}), ("Mul", 2, {}), ("Div", 2, {}), ("Sigmoid", 1, {}),
    ("Exp", 1, {}), ("Tanh", 1, {}), ("Erf", 1, {}), ("Relu", 1, {}), ("Neg", 1, {}),
    ("Sqrt", 1, {}), ("Gelu", 1, {"approximate": "tanh"}), ("Swish", 1, {"alpha": 1.5}),
    ("Softmax", 1, {}), ("LogSoftmax", 1, {"axis": 1}), ("Reciprocal", 1, {}),
)  # fmt: skip


@pytest.mark.parametrize("case", LOWERED, ids=lambda c: c[0])
def test_lowered_rows_follow_their_inputs(
    case: tuple[str, int, dict[str, Any]], threads: int
) -> None:
    name, count, attributes = case
    operator = registry.lookup(name, "", 24)
    assert operator is not None and operator.lower is not None
    inputs = [abs(values(3 * 37, seed=i).reshape(3, 37)) for i in range(count)]
    rows = operator.lower(*inputs, **attributes)
    for seed in (5, 6):
        for x in inputs:
            x[:] = abs(values(x.size, seed=seed).reshape(x.shape)) + np.float32(0.1)
        got = rows.run()
        close(got, operator.function(*inputs, **attributes), 1e-6, 1e-6)
    assert operator.lower(*(x.astype(np.float64) for x in inputs), **attributes) is None
    assert operator.lower(*(x.T for x in inputs), **attributes) is None


# -- without the compiler ----------------------------------------------------------------------


@pytest.mark.skipif(not JIT, reason="the child of the test below")
def test_twins_stand_in_for_the_compiler() -> None:
    """The kernels' tails again in a process without JIT."""
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here)]
    command += ["-k", "tails and 2-threads and not 1000 and not 4097 and not 4095"]
    child = subprocess.run(
        command, capture_output=True, text=True, cwd=here.parent.parent,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, check=False,
    )  # fmt: skip
    assert child.returncode == 0 and " passed" in child.stdout, child.stdout[-3000:]
