"""W8A8 quantisation: against floats, onnxruntime's execution, and onnxruntime's own quantiser."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from integer_models import (
    Node,
    conv_net,
    draft_of,
    images,
    ours,
    saved_feeds,
    silent,
    snr,
    theirs,
    weight,
    written,
)
from onnx import helper, numpy_helper
from onnx_models import make, saved, value
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from onnxstream_nb.cli.main import main
from onnxstream_nb.convert.draft import Draft
from onnxstream_nb.convert.quantisation.activations import seen
from onnxstream_nb.convert.quantisation.integer import (
    StaticProducts,
    prepared,
    with_rounded_activations,
)
from onnxstream_nb.convert.quantisation.quantise import QuantiseOptions, quantise
from onnxstream_nb.convert.quantisation.ranges import read_ranges
from onnxstream_nb.errors import ModelError, UnsupportedError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")

Array = np.ndarray[Any, Any]
X = images(4, seed=9)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return conv_net()


@pytest.fixture(scope="module")
def exact(model: onnx.ModelProto) -> Array:
    return theirs(model, {"x": X})


@pytest.fixture(scope="module")
def feeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_feeds(tmp_path_factory.mktemp("feeds"), {"x": images(8)})


def quantised(model: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    return written(quantise(draft_of(model), QuantiseOptions(**options), silent))


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def stored(model: onnx.ModelProto) -> dict[str, Array]:
    return {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}


# -- accuracy ----------------------------------------------------------------------------------


@contextmanager
def errors_alone() -> Iterator[None]:
    """onnxruntime's quantiser tells the root logger a good deal."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


@pytest.fixture(scope="module")
def peers(
    model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, onnx.ModelProto]:
    """What onnxruntime's quantiser makes of the model."""

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Array] = iter(images(8))

        def get_next(self) -> dict[str, Array] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch[None]}

    folder = tmp_path_factory.mktemp("peer")
    plain = saved(model, folder / "model.onnx")
    kinds = ["Conv", "MatMul", "Gemm"]
    source, names = str(folder / "pre.onnx"), ("dynamic", "static", "static per channel")
    paths = [folder / f"{i}.onnx" for i in range(3)]
    with errors_alone():
        quant_pre_process(str(plain), source, skip_symbolic_shape=True)  # that would want sympy
        quantize_dynamic(
            source, str(paths[0]), weight_type=QuantType.QUInt8, op_types_to_quantize=kinds
        )
        for path, per_channel in ((paths[1], False), (paths[2], True)):
            quantize_static(
                source, str(path), Reader(), per_channel=per_channel, op_types_to_quantize=kinds
            )
    return {name: onnx.load(path) for name, path in zip(names, paths, strict=True)}


@pytest.mark.parametrize("asymmetric", [False, True])
def test_dynamic_products_are_as_good_as_onnxruntimes(
    model: onnx.ModelProto, exact: Array, peers: Any, asymmetric: bool
) -> None:
    found = quantised(model, method="dynamic", asymmetric=asymmetric)
    assert kinds(found)["MatMulInteger"] == 2 and kinds(found)["ConvInteger"] == 2
    assert kinds(found)["Conv"] == 1 and not kinds(found)["BatchNormalization"]  # the depthwise one
    y = theirs(found, {"x": X})
    np.testing.assert_allclose(ours(found, {"x": X}, optimize=False), y, 1e-4, 1e-5)
    reached = snr(exact, y)
    assert reached > 24 and reached >= snr(exact, theirs(peers["dynamic"], {"x": X}))
    assert abs(snr(exact, ours(found, {"x": X})) - reached) < 2


@pytest.mark.parametrize("percentile", [100.0, 99.9])
def test_static_products_are_as_good_as_onnxruntimes(
    model: onnx.ModelProto, exact: Array, peers: Any, feeds: Path, percentile: float
) -> None:
    found = quantised(model, method="static", feeds=feeds, percentile=percentile)
    assert kinds(found)["QuantizeLinear"] == 5 and kinds(found)["Conv"] == 3
    y = theirs(found, {"x": X})
    np.testing.assert_allclose(ours(found, {"x": X}, optimize=False), y, 1e-4, 1e-4)
    reached = snr(exact, y)
    assert reached > 20
    if percentile == 100:
        for name in ("static", "static per channel"):
            assert reached >= snr(exact, theirs(peers[name], {"x": X})) - 0.5, name
    assert abs(snr(exact, ours(found, {"x": X})) - reached) < 2


def test_stored_integers_have_the_promised_forms(model: onnx.ModelProto, feeds: Path) -> None:
    found = quantised(model, method="static", feeds=feeds)
    arrays, readers = stored(found), {n.output[0]: n for n in found.graph.node}
    for node in found.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        x, w, *bias = (readers[name] for name in node.input)
        scale, zero = (arrays[name] for name in x.input[1:])
        assert scale.shape == zero.shape == () and zero.dtype == np.uint8
        q, scales = (arrays[name] for name in w.input[:2])
        axis = w.attribute[0].i
        assert q.dtype == np.int8 and scales.shape == (q.shape[axis],) and np.abs(q).max() == 127
        for b in bias:
            steps, by = (arrays[name] for name in b.input)
            assert steps.dtype == np.int32
            np.testing.assert_allclose(by, scales * scale, 1e-6)
    assert not any(a.dtype == np.float32 and a.size > 40 for a in arrays.values())


def test_graphs_from_before_opset_13_are_raised(feeds: Path) -> None:
    plain = conv_net(opset=11)
    plain.graph.node.append(Node("Softmax", ["y"], ["s"], axis=0))
    del plain.graph.output[:]
    plain.graph.output.append(value("s", shape=("n", 10)))
    for method, opset in (("dynamic", 11), ("static", 13)):
        found = quantised(plain, method=method, feeds=feeds)
        assert found.opset_import[0].version == opset
        y = ours(found, {"x": X}, optimize=False)
        np.testing.assert_allclose(y, theirs(found, {"x": X}), 1e-3, 1e-6)
        assert abs(y.sum() - 1) < 1e-5  # all axes were one


# -- what is quantised -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dynamic", "static"])
def test_what_is_kept_stays_in_floats(model: onnx.ModelProto, feeds: Path, method: str) -> None:
    keep = (("w1*", "fp32"), ("ge*", "fp16"), ("last", "fp32"))
    found = quantised(model, method=method, feeds=feeds, keep=keep)
    assert {"w4", "w5"} <= stored(found).keys()
    assert kinds(found)["MatMulInteger"] == 0 and kinds(found)["Gemm"] == 1
    assert kinds(found)["QuantizeLinear"] == (2 if method == "static" else 0)
    with pytest.raises(UsageError, match="nothing to quantise"):
        quantised(model, method=method, feeds=feeds, keep=(("*", "fp32"),))
    with pytest.raises(UsageError, match="--keep w1=int4"):
        quantised(model, method=method, feeds=feeds, keep=(("w1", "int4"),))


def test_a_table_that_is_looked_up_and_multiplied_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    nodes = [
        Node("Gather", ["table", "ids"], ["h"]),
        Node("MatMul", ["h", "w"], ["m"]),
        Node("Transpose", ["table"], ["head"], perm=[1, 0]),
        Node("MatMul", ["m", "head"], ["y"]),
    ]
    weights = [weight(rng, "table", 50, 24), weight(rng, "w", 24, 24)]
    ids = value("ids", onnx.TensorProto.INT64, ("t",))
    model = make(nodes, [ids], [value("y", shape=("t", 50))], weights)
    found = quantised(model, method="dynamic")
    assert kinds(found)["MatMulInteger"] == 1 and kinds(found)["MatMul"] == 1
    feeds = {"ids": np.array([3, 49, 0])}
    np.testing.assert_allclose(ours(found, feeds), theirs(found, feeds), 1e-3, 1e-3)


def test_a_weight_of_several_operators_is_stored_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    nodes = [
        Node("Gemm", ["x", "w", "b"], ["m"], "a"),
        Node("Gemm", ["m", "w", "c"], ["k"], "b"),
        Node("MatMul", ["k", "w"], ["y"], "c"),
    ]
    large = numpy_helper.from_array(np.float32([1e7, *[0.5] * 15]), "c")
    model = make(
        nodes, [value("x", shape=("n", 16))], [value("y", shape=("n", 16))],
        [weight(rng, "w", 16, 16), weight(rng, "b", 16), large],
    )  # fmt: skip
    x = rng.standard_normal((40, 16)).astype("f4")
    exact = theirs(model, {"x": x})
    feeds = saved_feeds(tmp_path / "feeds", {"x": x})
    for method, count in (("dynamic", 1), ("static", 1)):
        found = quantised(model, method=method, feeds=feeds)
        assert sum(a.dtype == np.int8 and a.ndim == 2 for a in stored(found).values()) == count
        np.testing.assert_allclose(ours(found, {"x": x}), theirs(found, {"x": x}), 1e-3)
        assert snr(exact, theirs(found, {"x": x})) > 20


def test_other_operators_are_rounded_where_asked(model: onnx.ModelProto, exact: Array) -> None:
    draft = prepared(draft_of(model))
    batch = [{"x": images(8)}]

    def rounded(*operators: str) -> Draft:
        step = StaticProducts(draft, lambda *names: False, operators)
        ranges = seen(draft, step.values(), batch, 0.0, silent)
        return with_rounded_activations(draft, step, ranges, silent)

    found = written(rounded("Conv", "Gemm", "Add"))
    (add,) = (n for n in found.graph.node if n.op_type == "Add")
    makers = {n.output[0]: n.op_type for n in found.graph.node}
    assert [makers[name] for name in add.input] == ["DequantizeLinear"] * 2
    assert snr(exact, theirs(found, {"x": X})) > 15
    with pytest.raises(UsageError, match="Loop cannot be computed in 8 bits"):
        rounded("Conv", "Loop")


# -- ranges ------------------------------------------------------------------------------------


def test_range_data_is_written_once_and_then_read(
    model: onnx.ModelProto, feeds: Path, tmp_path: Path
) -> None:
    path = tmp_path / "range_data.txt"
    by_feeds = quantised(model, method="static", feeds=feeds)
    first = quantised(model, method="static", feeds=feeds, range_data=path)
    ranges = read_ranges(path)
    assert {"first", "relu", "depthwise", "clip", "gemm", "last", "x"} <= ranges.keys()
    assert ranges["relu"].low == 0 and ranges["clip"].high <= 6
    again = quantised(model, method="static", range_data=path)  # no calibration data
    assert first == again
    scales = [{n: a for n, a in stored(m).items() if a.shape == ()} for m in (by_feeds, first)]
    assert scales[0].keys() == scales[1].keys()
    for name in scales[0]:
        np.testing.assert_allclose(scales[0][name], scales[1][name], 1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["range_data.txt"]


def test_onnxstreams_own_file_has_no_inputs(
    model: onnx.ModelProto, feeds: Path, tmp_path: Path
) -> None:
    path = tmp_path / "range_data.txt"
    quantised(model, method="static", feeds=feeds, range_data=path)
    lines = [line for line in path.read_bytes().splitlines(True) if not line.startswith(b"x,")]
    path.write_bytes(b"".join(lines))
    found = quantised(model, method="static", range_data=path)
    (first,) = (n for n in found.graph.node if n.name == "first")
    assert first.input[0] == "x" and kinds(found)["QuantizeLinear"] == 4
    path.write_bytes(b"".join(line for line in lines if not line.startswith(b"clip,")))
    with pytest.raises(UsageError, match="no range for 'clip'"):
        quantised(model, method="static", range_data=path)


def test_calibration_that_is_missing_or_does_not_fit_is_refused(
    model: onnx.ModelProto, feeds: Path, tmp_path: Path
) -> None:
    path = tmp_path / "none" / "range_data.txt"
    for options, message in (
        ({}, "give --calibration"),
        ({"feeds": tmp_path}, "no .npz file"),
        ({"feeds": feeds, "percentile": 40.0}, "--percentile 40"),
        ({"feeds": feeds, "percentile": 101.0}, "--percentile 101"),
        ({"feeds": feeds, "range_data": path}, "--range-data .*cannot be written"),
    ):
        with pytest.raises(UsageError, match=message):
            quantised(model, method="static", **options)


@pytest.mark.parametrize("fill", [0.0, 3.5, -2.0, 1e-39, 1e-30, 1e25])
def test_constant_and_tiny_activations_stay_what_they_are(fill: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    w = weight(rng, "w", 8, 20)
    model = make(
        [Node("Gemm", ["x", "w", "b"], ["y"])], [value("x", shape=("n", 8))],
        [value("y", shape=("n", 20))], [w, weight(rng, "b", 20)],
    )  # fmt: skip
    x = np.full((3, 8), fill, np.float32)
    exact = numpy_helper.to_array(w).T @ x[0].astype(float)
    feeds = saved_feeds(tmp_path / "feeds", {"x": x})
    for method in ("dynamic", "static"):
        found = quantised(model, method=method, feeds=feeds)
        arrays = stored(found)
        assert all(np.isfinite(a).all() for a in arrays.values())
        y = theirs(found, {"x": x})
        assert np.isfinite(y).all() and np.isfinite(ours(found, {"x": x})).all()
        largest = np.abs(numpy_helper.to_array(w)).max()
        tolerance = 8 * (abs(fill) or 1 / 2000) * largest / 127 + 1e-6
        np.testing.assert_allclose(y[0], exact + theirs(model, {"x": 0 * x})[0], 1e-4, tolerance)


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1e30])
def test_weights_of_any_size_are_finite_integers(size: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    floats = rng.standard_normal((16, 4)).astype("f4")
    floats[:, 1] = 0
    floats[:, 2] *= size
    model = make(
        [Node("MatMul", ["x", "w"], ["y"])], [value("x", shape=("n", 16))],
        [value("y", shape=("n", 4))], [numpy_helper.from_array(floats, "w")],
    )  # fmt: skip
    x = rng.standard_normal((5, 16)).astype("f4")
    exact = x.astype(float) @ floats
    feeds = saved_feeds(tmp_path / "feeds", {"x": x})
    every: list[dict[str, Any]] = [
        {"method": "dynamic"}, {"method": "dynamic", "asymmetric": True},
        {"method": "static", "feeds": feeds},
    ]  # fmt: skip
    for options in every:
        found = quantised(model, **options)
        assert all(np.isfinite(a).all() for a in stored(found).values())
        y = theirs(found, {"x": x})
        for column in range(4):
            if np.abs(exact[:, column]).max() > 1e-35:
                assert snr(exact[:, column], y[:, column].astype(float)) > 25
            else:
                np.testing.assert_allclose(y[:, column], 0, atol=1e-35)


def test_weights_that_are_not_finite_are_refused() -> None:
    floats = np.array([[1, np.inf], [0, 1]], np.float32)
    model = make(
        [Node("MatMul", ["x", "w"], ["y"])], [value("x", shape=("n", 2))],
        [value("y", shape=("n", 2))], [numpy_helper.from_array(floats, "w")],
    )  # fmt: skip
    with pytest.raises(ModelError, match="weight 'w' cannot be quantised.*infinities"):
        quantised(model, method="dynamic")


def test_an_opset_that_cannot_be_raised_is_told(feeds: Path) -> None:
    model = conv_net(opset=11)
    model.graph.node.insert(6, Node("Dropout", ["c3"], ["d"]))
    old = make(
        model.graph.node, model.graph.input, model.graph.output, model.graph.initializer,
        opset_imports=[helper.make_opsetid("", 11)], ir_version=8,
    )  # fmt: skip
    old.graph.node[7].input[0] = "d"
    try:
        found = quantised(old, method="static", feeds=feeds)
    except UnsupportedError as error:
        assert "opset 11 cannot be raised to 13" in str(error)
    else:  # the dropout was folded away
        assert not kinds(found)["Dropout"]


def test_the_command_writes_a_model_that_runs(
    model: onnx.ModelProto, exact: Array, feeds: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, out = saved(model, tmp_path / "net.onnx"), tmp_path / "out.onnx"
    ranges = tmp_path / "range_data.txt"
    command = ["quantize", str(source), "-o", str(out), "--overwrite", "--method"]
    more = ["static", "--range-data", str(ranges)]
    assert main([*command, *more, "--calibration", str(feeds), "--percentile", "99.9"]) == 0
    assert ranges.is_file()
    for given in (more, ["dynamic", "--asymmetric"]):
        assert main([*command, *given]) == 0
        assert snr(exact, theirs(onnx.load(out), {"x": X})) > 20
    capsys.readouterr()
    assert main([*command, "static"]) == 2
    assert "give --calibration" in capsys.readouterr().err


def arrays_of(models: Iterable[onnx.ModelProto]) -> list[int]:
    return [sum(w.ByteSize() for w in m.graph.initializer) for m in models]


def test_files_shrink(model: onnx.ModelProto, feeds: Path) -> None:
    found = [quantised(model, method=m, feeds=feeds) for m in ("dynamic", "static")]
    before = arrays_of([model])[0]
    assert all(after < 0.33 * before for after in arrays_of(found))
