"""Ranges of activations, range_data.txt, and calibration data from files."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxstream_nb.convert.quantisation.activations import parameters
from onnxstream_nb.convert.quantisation.feeds import feeds_of_files
from onnxstream_nb.convert.quantisation.ranges import (
    Range,
    Seen,
    by_operator,
    by_value,
    format_ranges,
    read_ranges,
)
from onnxstream_nb.errors import ModelError, UsageError
from onnxstream_nb.graph import Graph, Node, Value

Array = np.ndarray[Any, Any]

GRAPH = Graph(
    (
        Node("Relu", ("x",), ("a",), {}, "first"),
        Node("Split", ("a",), ("b", "c"), {}, "both"),
        Node("Add", ("b", "c"), ("y",)),
    ),
    (Value("x", "float32", ("n", 4)), Value("n", "int64", (1,))),
    (Value("y", "float32", None),),
    {},
    {"": 13},
)


def seen(*arrays: Any, percent: float = 0.0) -> Range | None:
    found = Seen(counted=percent > 0)
    for array in arrays:
        found.add(np.asarray(array, np.float32))
    return found.range(percent)


# -- ranges ------------------------------------------------------------------------------------


def test_the_whole_range_is_that_of_all_arrays() -> None:
    assert seen([1, 3], [[-2.5]], []) == Range(-2.5, 3.0)


def test_nothing_finite_gives_no_range() -> None:
    assert seen([]) is None and seen([np.nan, np.inf]) is None
    assert seen([np.nan, 7, -np.inf]) == Range(7.0, 7.0)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0])
@pytest.mark.parametrize("percent", [0.1, 1.0, 10.0])
def test_percentiles_are_numpys_within_a_bin(scale: float, offset: float, percent: float) -> None:
    rng = np.random.default_rng(0)
    x = ((rng.standard_t(3, 50_000) + offset) * scale).astype(np.float32)
    found = seen(*np.array_split(x, 7), percent=percent)
    ordered, cut = np.sort(x.astype(float)), int(len(x) * percent / 100)
    low, high = ordered[cut], ordered[-1 - cut]
    assert found is not None and found.low <= low and found.high >= high  # never inwards
    assert low - found.low <= abs(low) / 128 and found.high - high <= abs(high) / 128


def test_outliers_are_clipped_at_both_ends_and_few_elements_are_not() -> None:
    x = np.linspace(-1, 1, 10_000)
    x[:5], x[-5:] = -1e6, 1e6
    found = seen(x, percent=0.1)
    assert found is not None and -1.01 < found.low < -0.99 and 0.99 < found.high < 1.01
    assert seen(x[:4], x[5000:5010], percent=0.1) == Range(-1e6, float(np.float32(x[5009])))


def test_the_memory_of_percentiles_does_not_grow() -> None:
    found = Seen(counted=True)
    for _ in range(10):
        found.add(np.random.default_rng(0).standard_normal(100_000) * 1e20)
    assert found._counts.nbytes == 8 * 65536 and found._counts.sum() == 1_000_000


@pytest.mark.parametrize(
    "low, high",
    [(-1, 3), (0, 5), (2, 5), (-7, -3), (0, 0), (4, 4), (-4, -4), (-1e-45, 1e-45), (0, 1e-40),
     (-3e38, 3e38), (-1e-20, 1e-20)],
)  # fmt: skip
def test_zero_is_exact_and_the_ends_are_within_half_a_step(low: float, high: float) -> None:
    scale, zero = parameters(Range(low, high))
    assert scale >= np.finfo(np.float32).tiny and scale.dtype == np.float32
    assert zero.dtype == np.uint8
    step = float(scale)
    for end in (low, high, 0.0):
        q = np.clip(np.rint(end / step) + int(zero), 0, 255)
        assert abs((q - int(zero)) * step - end) <= 0.5001 * step
    assert step <= max((max(high, 0) - min(low, 0)) / 254, np.finfo(np.float32).tiny) or low == high


# -- the file ----------------------------------------------------------------------------------


def printed(number: float) -> str:
    """As C's printf("%f") does, which std::to_string is defined by."""
    buffer = ctypes.create_string_buffer(100)
    ctypes.CDLL(None).snprintf(buffer, 100, b"%f", ctypes.c_double(number))
    return buffer.value.decode()


def test_the_file_is_onnxstreams() -> None:
    ranges = {
        "/b/Conv": Range(-1.5, 2.25),
        "Z": Range(0.0, 123456.789),
        "a b:c": Range(-0.333333343, 1e20),
        "Ä": Range(-1, 1),
    }
    lines = [
        f"{name},{printed(r.low)},{printed(r.high)}\r\n"
        for name, r in sorted(ranges.items(), key=lambda item: item[0].encode())
    ]
    assert format_ranges(ranges) == "".join(lines).encode()
    assert lines[0] == "/b/Conv,-1.500000,2.250000\r\n" and lines[-1].startswith("Ä")


def test_numbers_that_six_decimals_lose_have_an_exponent(tmp_path: Path) -> None:
    path = tmp_path / "range_data.txt"
    ranges = {"small": Range(-3e-7, 1.25e-9), "large": Range(-4.0, 5.0)}
    path.write_bytes(format_ranges(ranges))
    assert path.read_bytes() == b"large,-4.000000,5.000000\r\nsmall,-3e-07,1.25e-09\r\n"
    assert read_ranges(path) == ranges


@pytest.mark.parametrize("ends", ["\r\n", "\n", "\r", "\r\n\r\n"])
def test_any_line_ends_are_read(tmp_path: Path, ends: str) -> None:
    path = tmp_path / "range_data.txt"
    path.write_bytes(f"a,-1,2{ends}Conv_7,0.5,0x1p1{ends}".replace("0x1p1", "2e0").encode())
    assert read_ranges(path) == {"a": Range(-1, 2), "Conv_7": Range(0.5, 2)}


@pytest.mark.parametrize(
    "line", ["a,1", "a", "a,b,1,2", "a,x,2", "a,2,1", "a,nan,1", "a,0,inf", "a,1,2,3"]
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "range_data.txt"
    path.write_bytes(f"good,0,1\r\n{line}\r\n".encode())
    with pytest.raises(ModelError, match=r"range_data\.txt:\d+: "):
        read_ranges(path)


def test_files_that_are_no_range_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone.*No such file"):
        read_ranges(tmp_path / "gone")
    for content, message in ((b"", "empty"), (b"\xff\xfe1", "UTF-8")):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ModelError, match=message):
            read_ranges(tmp_path / "bad")


def test_a_name_with_a_comma_cannot_be_written() -> None:
    with pytest.raises(UsageError, match="'a,b'.*comma"):
        format_ranges({"a,b": Range(0, 1)})


def test_ranges_are_of_operators_and_inputs() -> None:
    values = {"x": Range(0, 1), "a": Range(0, 2), "b": Range(-1, 0), "c": Range(0, 3)}
    ranges = by_operator(GRAPH, {**values, "y": Range(5, 6)})
    assert ranges == {
        "x": Range(0, 1), "first": Range(0, 2), "both": Range(-1, 3), "y": Range(5, 6),
    }  # fmt: skip
    assert by_value(GRAPH, ranges, ["a", "c"], "it") == {"a": Range(0, 2), "c": Range(-1, 3)}


def test_a_missing_range_is_named() -> None:
    with pytest.raises(UsageError, match="r.txt: no range for 'both'.*calibrate again"):
        by_value(GRAPH, {"first": Range(0, 1)}, ["a", "b"], "r.txt")


# -- feeds -------------------------------------------------------------------------------------


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


X, N = np.ones((2, 4), np.float32), np.array([3])


def test_feeds_of_a_folder_come_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        saved(tmp_path / f"{name}.npz", x=X * ord(name), n=N)
    (tmp_path / "notes.txt").write_text("no data")
    found = [feed["x"][0, 0] for feed in feeds_of_files(tmp_path, GRAPH)]
    assert found == [97, 98, 99]
    one = list(feeds_of_files(tmp_path / "c.npz", GRAPH))
    assert len(one) == 1 and one[0].keys() == {"x", "n"}


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": X}, "no input n; the model's inputs are x, n"),
        ({"x": X, "n": N, "z": N}, "unknown input z"),
        ({"x": X.astype("f8"), "n": N}, "input x is float64, the model takes float32"),
        ({"x": X[:, :3], "n": N}, r"input x has the shape \[2, 3\], the model takes \['n', 4\]"),
        ({"x": X[0], "n": N}, r"input x has the shape \[4\]"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(tmp_path: Path, arrays: Any, message: str) -> None:
    path = saved(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=f"a.npz: {message}"):
        list(feeds_of_files(path, GRAPH))


def test_files_that_are_no_feeds_are_refused(tmp_path: Path) -> None:
    def refusal(path: Path, least: int = 1) -> str:
        with pytest.raises(UsageError) as caught:
            list(feeds_of_files(path, GRAPH, least))
        return str(caught.value)

    assert "the folder has no .npz file" in refusal(tmp_path)
    assert "no such file or folder" in refusal(tmp_path / "gone.npz")
    (tmp_path / "a.txt").write_text("text")
    assert "not an .npz file" in refusal(tmp_path / "a.txt")
    (tmp_path / "cut.npz").write_bytes(saved(tmp_path / "a.npz", x=X, n=N).read_bytes()[:100])
    assert "cut.npz: not a readable .npz file" in refusal(tmp_path / "cut.npz")
    saved(tmp_path / "pickled.npz", x=np.array([{}], object), n=N)
    assert "pickled.npz: not a readable" in refusal(tmp_path / "pickled.npz")
    assert "3 .npz files, but 4 are needed" in refusal(tmp_path, 4)
