"""External data, damaged and hostile ONNX files, and what a path may be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_models import FLOAT, adding, make, ramp, refusal, saved, value
from weight_bytes import logical, stored

from onnxstream_nb.errors import ModelError, OnnxstreamError, UnsupportedError
from onnxstream_nb.formats import load, load_bytes

# --- External data


def external(folder: Path, **entries: Any) -> Path:
    """A model whose weight of 600 floats is in another file, as `entries` say."""
    folder.mkdir(parents=True, exist_ok=True)
    tensor = TensorProto(name="w", dims=[600], data_type=FLOAT, data_location=1)
    for key, entry in {"location": "w.bin", **entries}.items():
        tensor.external_data.add(key=key, value=str(entry))
    return saved(adding(tensor), folder / "model.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """600 floats after 16 other bytes."""
    path = tmp_path / "w.bin"
    path.write_bytes(bytes(16) + np.arange(600, dtype=np.float32).tobytes())
    return path


@pytest.mark.parametrize("one_file", [True, False])
def test_external_data_written_by_onnx(one_file: bool, tmp_path: Path) -> None:
    model = adding(ramp())
    model.graph.node.append(helper.make_node("Mul", ["y", "v"], ["z"]))
    model.graph.initializer.append(ramp(300, "v"))
    path = tmp_path / "m.onnx"
    onnx.save_model(
        onnx.ModelProto.FromString(model.SerializeToString()), path,
        save_as_external_data=True, all_tensors_to_one_file=one_file, size_threshold=0,
    )  # fmt: skip
    graph = load(path)
    sources = {r.source for r in graph.initializers.values()}
    assert len(sources) == (1 if one_file else 2)
    assert path not in sources
    for tensor in model.graph.initializer:
        assert stored(graph.initializers[tensor.name]) == tensor.raw_data


def test_offset_length_and_checksum(data: Path, tmp_path: Path) -> None:
    digest = hashlib.sha1(data.read_bytes()).hexdigest()
    graph = load(external(tmp_path, offset=16, length=2400, checksum=digest))
    np.testing.assert_array_equal(logical(graph.initializers["w"]), np.arange(600))
    message = refusal(lambda: load(external(tmp_path, offset=16, checksum="0" * 40)))
    assert digest in message and "0" * 40 in message and "'w.bin'" in message


def test_a_hub_cache_of_links_is_followed(data: Path, tmp_path: Path) -> None:
    """snapshots/REVISION/onnx/* are links to blobs/*, as huggingface_hub lays them out."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1" / "onnx"
    model = external(blobs, offset=16)
    snapshot.mkdir(parents=True)
    data.rename(blobs / "5678")
    model.rename(blobs / "1234")
    (snapshot / "model.onnx").symlink_to("../../../blobs/1234")
    (snapshot / "w.bin").symlink_to("../../../blobs/5678")
    ref = load(snapshot / "model.onnx").initializers["w"]
    assert ref.source == blobs / "5678"
    np.testing.assert_array_equal(logical(ref), np.arange(600))


@pytest.mark.parametrize("location", ["../w.bin", "a/../../w.bin", "{absolute}", "C:\\w.bin", "\0"])
def test_paths_that_leave_the_folder_are_refused(location: str, data: Path, tmp_path: Path) -> None:
    path = external(tmp_path / "inner", location=location.format(absolute=data))
    assert "outside the model's folder" in refusal(lambda: load(path))


def test_links_that_leave_the_folder_are_refused(data: Path, tmp_path: Path) -> None:
    path = external(tmp_path / "inner")
    (path.parent / "w.bin").symlink_to(data)
    assert "outside the model's folder" in refusal(lambda: load(path))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"location": "none.bin"}, "'none.bin' is missing"),
        ({"location": "."}, "not a regular file"),
        ({"location": ""}, "names no location"),
        ({"offset": 20}, "ends at byte 2420, but 'w.bin' has only 2416 bytes"),
        ({"offset": -1}, "offset is '-1'"),
        ({"offset": 9 * "9" * 3}, "offset is '9"),
        ({"length": 100}, "has 100 bytes; its shape and type need 2400"),
    ],
)
def test_wrong_external_data_is_an_error(
    entries: Any, says: str, data: Path, tmp_path: Path
) -> None:
    message = refusal(lambda: load(external(tmp_path, **entries)))
    assert says in message and "model.onnx" in message


def test_external_data_of_bytes_is_refused(data: Path, tmp_path: Path) -> None:
    path = external(tmp_path)
    assert "load the model from its path" in refusal(lambda: load_bytes(path.read_bytes()))


@pytest.mark.parametrize("kind", [FLOAT, TensorProto.STRING])
def test_external_attributes_of_bytes_open_no_file(
    kind: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    tensor = TensorProto(dims=[604], data_type=kind, data_location=1)
    tensor.external_data.add(key="location", value="w.bin")
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    other = helper.make_node("Custom", ["c"], ["y"], value=tensor)
    for nodes in ([node], [other]):
        model = make(nodes, [value("c")] if nodes == [other] else [], [value(nodes[0].output[0])])
        assert "external" in refusal(lambda m=model: load_bytes(m.SerializeToString()))


# --- Bad input


def damaged(change: Callable[[onnx.ModelProto], Any]) -> bytes:
    model = adding(ramp())
    change(model)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.ClearField("graph"), "no graph"),
        (lambda m: m.graph.ClearField("output"), "no graph with outputs"),
        (lambda m: m.ClearField("opset_import"), "no operator set"),
        (lambda m: m.graph.node[0].input.append("nowhere"), "needs 'nowhere'"),
        (lambda m: m.graph.output.append(value("lost")), "outputs needs 'lost'"),
        (lambda m: m.graph.node.append(m.graph.node[0]), "'y' is defined twice"),
        (lambda m: m.graph.initializer.append(ramp()), "'w' is defined twice"),
        (lambda m: m.graph.initializer[0].dims.append(2), "need 4800"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, -1), r"shape \[-1\]"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 99), "element type 99"),
        (lambda m: m.graph.sparse_initializer.add(), "sparse"),
        (lambda m: m.graph.initializer[0].external_data.add(key="onnxstream_nb.offset"), "locat"),
        (lambda m: m.metadata_props.add(key="onnxstream_nb.metadata", value="{"), "damaged"),
    ],
)
def test_malformed_models_are_refused(change: Any, says: str) -> None:
    with pytest.raises((ModelError, UnsupportedError), match=says):
        load_bytes(damaged(change))


def test_typed_fields_must_match_the_shape() -> None:
    weight = TensorProto(name="w", dims=[3], data_type=FLOAT, float_data=[1.0])
    assert "'w' is malformed" in refusal(lambda: load_bytes(adding(weight).SerializeToString()))


def test_external_entries_of_an_embedded_tensor_are_ignored() -> None:
    weight = helper.make_tensor("w", FLOAT, [1], [3.0])
    weight.external_data.add(key="location", value="/etc/passwd")
    graph = load_bytes(adding(weight).SerializeToString())
    assert logical(graph.initializers["w"]).tolist() == [3.0]


def test_a_forged_location_stays_inside_the_file() -> None:
    weight = TensorProto(name="w", dims=[600], data_type=FLOAT)
    weight.external_data.add(key="onnxstream_nb.offset", value="100000")
    weight.external_data.add(key="onnxstream_nb.length", value="2400")
    assert "'w'" in refusal(lambda: load_bytes(adding(weight).SerializeToString()))


@pytest.mark.parametrize("keep", [0, 1, 20, 1000, -1])
def test_truncated_files_are_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(adding(ramp()).SerializeToString()[:keep])
    assert str(path) in refusal(lambda: load(path))


def field(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field."""
    size, length = len(data), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + data


def test_deeply_nested_bodies_are_refused() -> None:
    graph = field(5, ramp().SerializeToString())
    for _ in range(60):
        graph = field(1, field(5, field(6, graph)))  # a node's attribute holds the graph
    assert "nested" in refusal(lambda: load_bytes(field(7, graph)))


SMALL = adding(ramp(300)).SerializeToString()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_gives_a_graph_or_a_clean_error(changes: list[tuple[int, int]]) -> None:
    data = bytearray(SMALL)
    weights = SMALL.index(np.arange(300, dtype=np.float32).tobytes())
    for position, byte in changes:
        position %= len(data) - 1200
        data[position if position < weights else position + 1200] = byte
    try:
        graph = load_bytes(bytes(data))
    except OnnxstreamError:
        return
    assert all(len(stored(r)) == r.nbytes for r in graph.initializers.values())


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=2000))
def test_random_bytes_are_no_model(data: bytes) -> None:
    with pytest.raises(OnnxstreamError):
        load_bytes(data)


# --- What a path is


def test_folders_and_files_find_their_format(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(lambda: load(tmp_path / "none"))
    assert "model.txt" in refusal(lambda: load(tmp_path))
    saved(adding(ramp()), tmp_path / "a.onnx")
    assert load(tmp_path).initializers["w"].source == tmp_path / "a.onnx"
    saved(adding(ramp()), tmp_path / "b.onnx")
    assert "several .onnx files (a.onnx, b.onnx)" in refusal(lambda: load(tmp_path))
    for name, content, says in (
        ("c.onnx", b"", "the file is empty"),
        ("d.onnx", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("e.onnx", b"<!DOCTYPE html>", "not an intact ONNX model"),
        ("f.safetensors", b"x", "give the folder"),
        ("g.pdf", b"%PDF", "not a known model file"),
    ):
        (tmp_path / name).write_bytes(content)
        assert says in refusal(lambda n=name: load(tmp_path / n))
