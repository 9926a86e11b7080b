"""What the tests of conversions share: running a model here and in onnxruntime, and what it holds.

Dims: T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from llama_oracle import dense

from onnxstream_nb import Session, formats
from onnxstream_nb.graph import Graph

Array = np.ndarray[Any, Any]
IDS = [3, 17, 0, 42, 5, 9, 63, 1]


def feeds_of(graph: Graph, ids: Sequence[int]) -> dict[str, Array]:
    """A language model's feeds for ids at the begin of a text."""
    feeds: dict[str, Array] = {
        "input_ids": np.array([ids], np.int64),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
    }
    for value in graph.inputs:
        if value.name.startswith("past_key_values") and value.shape is not None:
            shape = [size if isinstance(size, int) else 0 for size in value.shape]
            feeds[value.name] = np.zeros(shape, np.float32)
    return feeds


def ours(path: Path, ids: Sequence[int] = IDS) -> Array:
    """Logits (T, V) of the model at `path`, exactly computed."""
    with Session(path, precision="exact") as session:
        logits: Array = session.run(feeds_of(session.graph, ids), ["logits"])["logits"][0]
    return logits


def theirs(path: Path, ids: Sequence[int] = IDS) -> Array:
    """Logits (T, V) by onnxruntime, of the last half of the ids over a past of the others."""
    file = path if path.is_file() else path / "model.onnx"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    feeds, rows = feeds_of(formats.load(file), ids[:0]), []
    for start, part in ((0, ids[: len(ids) // 2]), (len(ids) // 2, ids[len(ids) // 2 :])):
        feeds["input_ids"] = np.array([part], np.int64)
        feeds["position_ids"] = np.arange(start, start + len(part), dtype=np.int64)[None]
        found = dict(zip(names, session.run(names, feeds), strict=True))
        rows.append(found["logits"][0])
        feeds |= {n: found[n.replace("past_key_values", "present")] for n in feeds if "past" in n}
    result: Array = np.concatenate(rows)
    return result


def plainly(path: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    """Outputs by onnxruntime without its optimisations, which round what meets integers."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def same(one: Array, other: Array, tolerance: float = 1e-5) -> None:
    """Equal within a share of the greatest magnitude."""
    assert one.shape == other.shape
    assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def unchanged(one: Path, other: Path) -> None:
    """Two files of one model: every weight the same to the last bit, and the logits but for
    rounding, for products by columns and by rows add up in orders of their own."""
    found, wanted = (formats.load(path).initializers for path in (one, other))
    # A tied head may be a weight of its own or the table transposed.
    assert set(found) ^ set(wanted) <= {"lm_head.weight"}
    for name in set(found) & set(wanted):
        np.testing.assert_array_equal(dense(found[name]), dense(wanted[name]), name)
    same(ours(one), ours(other))


def check(folder: Path, shard_bytes: int = 256_000_000) -> onnx.ModelProto:
    """The model in an output folder, which is valid, all of whose files are in a true manifest,
    and whose tensors lie from a page on in files that are not too large; without its data."""
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    check_manifest(folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        where = {e.key: e.value for e in tensor.external_data}
        if where:
            assert int(where["offset"]) % 4096 == 0 and set(where) == {
                "location", "offset", "length",
            }  # fmt: skip
            assert (folder / where["location"]).stat().st_size <= max(
                shard_bytes, int(where["length"])
            )
    return model


def check_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's files, which are those of the folder, each with its size and hash."""
    files: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))["files"]
    assert {p.name for p in folder.iterdir()} == {*files, "manifest.json"}
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}, name
    return files


def data_bytes(folder: Path) -> int:
    """Bytes of the files of weights."""
    return sum(path.stat().st_size for path in folder.glob("*.data"))
