"""OnnxStream folders as they are written: read back, held against its parser's rules, and run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnxruntime
import onnxstream_engine
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_fixtures import write_gguf
from llama_oracle import Tiny, logits
from llm_checks import exact_model, near
from pass_graphs import build, random
from quantising import quantised
from test_smollm2 import REFERENCES, greedy
from tokenizer_fixtures import smollm2

from onnxstream_nb.convert.convert import convert
from onnxstream_nb.convert.draft import Draft, placeholder
from onnxstream_nb.convert.onnxstream.text_folder import known_dims, write_text_folder
from onnxstream_nb.errors import UnsupportedError
from onnxstream_nb.formats.onnx_write import to_model_proto
from onnxstream_nb.formats.onnxstream_write import Contents, write
from onnxstream_nb.graph import Graph, Node, Value, WeightRef
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.session import decode_constant, load_graph

STREAMED = Path(__file__).parent / "fixtures" / "models" / "onnxstream_llama_small"

Array = np.ndarray[Any, Any]


class Out:
    """A folder that takes files, and what it was told will come."""

    def __init__(self, path: Path) -> None:
        self.path, self.reserved = path, 0
        path.mkdir()

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        with (self.path / name).open("xb") as file:
            yield file

    def reserve(self, nbytes: int) -> None:
        self.reserved += nbytes


def silent(text: str, done: float | None) -> None:
    assert text and (done is None or 0 <= done <= 1)


def written(draft: Draft | Graph, path: Path, dtype: str = "") -> Path:
    """The draft's folder, after every rule of OnnxStream's parser was tried on it."""
    draft = Draft(draft) if isinstance(draft, Graph) else draft
    out = Out(path)
    write_text_folder(draft, out, silent, dtype=dtype)
    files = {file.name: file.stat().st_size for file in path.iterdir()}
    named = parsed(path)
    assert set(files) == {*named, *(n.replace("_nchw", "_nhwc") for n in named), "model.txt"}
    assert out.reserved == sum(size for name, size in files.items() if name != "model.txt")
    return path


def parsed(folder: Path) -> set[str]:
    """What OnnxStream's parser asks of model.txt, written out from its source; the files named."""
    known: set[str] = set()
    operators: set[str] = set()
    files: set[str] = set()
    for line in (folder / "model.txt").read_bytes().decode().rstrip("\n").split("\n"):
        fields = line.split("*")
        assert len(fields) in (3, 4)
        name, op_type = fields[0].split(":")
        assert name and op_type.isalnum() and name not in operators
        operators.add(name)
        assert fields[1].startswith("input:") and fields[2].startswith("output:")
        for tensor in filter(None, fields[1][6:].split(";")):
            value, inner = tensor.split("(")
            assert inner.endswith(")") and inner.count(")") == 1 and value
            *kind, dims = inner[:-1].split(":")
            sizes = [int(d) for d in dims.split(",")] if dims else []
            if kind:
                files.add(value)
                assert re.fullmatch(r"float32|float16|int64|uint8\[[^,]+,\d+\]", kind[0])
                item = {"float32": 4, "float16": 2, "int64": 8}.get(kind[0], 1)
                assert (folder / value).stat().st_size == item * int(np.prod(sizes))
                assert re.fullmatch(r"[A-Za-z0-9_]+\.bin", value) and len(value) < 256
        for tensor in fields[2][7:].split(";"):
            value = tensor.split("(")[0]
            assert re.fullmatch(r"[A-Za-z0-9_]+", value) and value not in known
            known.add(value)
        for attribute in fields[3].split(";") if len(fields) == 4 else ():
            assert len(attribute.split(":")) == 2
    return files


def run(model: Graph | Path, feeds: dict[str, Array]) -> dict[str, Array]:
    """What onnxruntime makes of a graph, or of a folder as it is read."""
    data = to_model_proto(load_graph(model), decode_constant).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def same(graph: Graph, folder: Path, feeds: dict[str, Array]) -> None:
    """The folder gives what the graph gives."""
    wanted, got = run(graph, feeds), run(folder, feeds)
    assert wanted.keys() <= got.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        np.testing.assert_allclose(got[name], array, rtol=1e-6, atol=1e-6)


# -- what OnnxStream's own converter wrote


def test_the_converters_own_text_is_written_again(tmp_path: Path) -> None:
    """Operators, names, attributes, weights: only sizes that it left open may be known here."""
    graph = load_graph(STREAMED)
    contents = Contents(decode_constant, lambda ref, dtype: iter((decode_constant(ref),)),
                        known_dims(graph, decode_constant))  # fmt: skip
    write(graph, Out(tmp_path / "out"), contents, silent)
    old = (STREAMED / "model.txt").read_text().splitlines()
    new = (tmp_path / "out" / "model.txt").read_text().splitlines()
    assert len(old) == len(new) == 224
    for theirs, ours in zip(old, new, strict=True):
        for a, b in zip(re.split(r"([(),])", theirs), re.split(r"([(),])", ours), strict=True):
            assert a == b or (a == "0" and b.isdigit())
    for file in STREAMED.glob("*.bin"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_folder_to_a_folder(tmp_path: Path) -> None:
    folder = written(load_graph(STREAMED), tmp_path / "out")
    model, other = exact_model(STREAMED), exact_model(folder)
    for token in (1, 5, 9, 200):
        near(other.feed([token]), model.feed([token]), 1e-6)
    model.close()
    other.close()


# -- names, types and shapes

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=90)


@settings(max_examples=40, deadline=None)
@given(
    name=NAMES,
    node=NAMES,
    shape=st.lists(st.integers(1, 4), max_size=3),
    half=st.booleans(),
    value=st.floats(-1e4, 1e4, width=32),
)
def test_any_name_and_shape_comes_back(
    tmp_path_factory: Any, name: str, node: str, shape: list[int], half: bool, value: float
) -> None:
    elements = np.full(shape, value, np.float16 if half else np.float32)
    data = elements.tobytes()
    ref = WeightRef(name, tuple(shape), "float32", data, 0, len(data),
                    "float16" if half else "raw")  # fmt: skip
    nodes = (Node("Add", ("x", name), ("y",), {}, node),) * (name not in "xy")
    graph = Graph(nodes or (Node("Add", ("x", "w"), ("y",)),),
                  (Value("x", "float32", (3, *shape)),), (Value("y", "float32", (3, *shape)),),
                  {name if nodes else "w": replace(ref, name=name if nodes else "w")},
                  {"": 14})  # fmt: skip
    folder = written(graph, tmp_path_factory.mktemp("names") / "out")
    (again,) = load_graph(folder).initializers.values()
    assert decode_constant(again).tolist() == elements.astype(np.float32).tolist()
    assert again.shape == tuple(shape)
    stored = "float16" if half and len(shape) > 1 else "raw"
    assert again.encoding == stored
    x = np.zeros((3, *shape), np.float32)
    np.testing.assert_array_equal(run(folder, {"x": x})["y"], run(graph, {"x": x})["y"])


@pytest.mark.parametrize("dtype", ["", "float32", "float16"])
def test_types_of_matrices(dtype: str, tmp_path: Path) -> None:
    weights = {
        "full": random(8, 8), "half": random(8, 8).astype(np.float16), "vector": random(8),
        "mask": np.array([[0, -3.4e38] * 4], np.float32), "ids": np.array([[2, 1]]),
    }  # fmt: skip
    steps = [
        ("MatMul", "x full", "a"), ("Cast", "half", "h", {"to": 1}), ("MatMul", "a h", "b"),
        ("Add", "b vector", "c"), ("Add", "c mask", "d"), ("Softmax", "d", "e", {"axis": -1}),
        ("Gather", "e ids", "y", {"axis": 1}),
    ]  # fmt: skip
    graph = build(steps, {"x": ["t", 8]}, weights=weights)
    folder = written(graph, tmp_path / "out", dtype)
    kinds = {n: r.encoding for n, r in load_graph(folder).initializers.items()}
    plain = "float16" if dtype == "float16" else "raw"
    half = {"": "float16", "float32": "raw", "float16": "float16"}[dtype]
    assert kinds == {"full": plain, "h": half, "vector": "raw", "mask": "raw", "ids": "raw"}
    if dtype != "float16":
        same(graph, folder, {"x": random(3, 8, seed=1)})


@pytest.mark.parametrize("made", [True, False])
def test_uint8_weights_keep_their_scale(made: bool, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (8, 5), dtype=np.uint8)
    scale, zero = 0.0035054587850383684, 134
    numbers = ((stored.astype(np.float64) - zero) * scale).astype(np.float32)
    ref = WeightRef("w", (8, 5), "float32", stored.tobytes(), 0, 40, "uint8", scale=scale,
                    zero_point=zero)  # fmt: skip
    graph = build([("MatMul", "x w", "y")], {"x": [2, 8]}, weights={"w": numbers})
    if made:
        ref = replace(placeholder("w", "float32", (8, 5)), encoding="uint8", scale=scale,
                      zero_point=zero)  # fmt: skip
    draft = Draft(graph.with_(initializers={"w": ref}), {"w": lambda: numbers} if made else {})
    folder = written(draft, tmp_path / "out", "float16")
    assert "w.bin(uint8[0.0035054587850383684,134]:8,5)" in (folder / "model.txt").read_text()
    assert (folder / "w.bin").read_bytes() == stored.tobytes()
    x = random(2, 8)
    np.testing.assert_allclose(run(folder, {"x": x})["y"], x @ numbers, rtol=1e-5, atol=1e-6)


# -- operators whose weights lie otherwise


@pytest.mark.parametrize("rank", [1, 2])
def test_convolutions_have_both_layouts(rank: int, tmp_path: Path) -> None:
    weight, bias = random(4, 3, *[3, 2][:rank]), random(4, seed=1)
    attributes = {"kernel_shape": [3, 2][:rank], "pads": [1] * (2 * rank), "strides": [2] * rank}
    graph = build([("Conv", "x w b", "y", attributes)], {"x": [1, 3, *[9, 8][:rank]]},
                  weights={"w": weight, "b": bias})  # fmt: skip
    folder = written(graph, tmp_path / "out")
    whole = weight if rank == 2 else weight[..., None]
    assert (folder / "w_nchw.bin").read_bytes() == whole.tobytes()
    assert (folder / "w_nhwc.bin").read_bytes() == whole.transpose(0, 2, 3, 1).tobytes()
    assert (
        f"w_nchw.bin(float32:{','.join(map(str, whole.shape))})"
        in (folder / "model.txt").read_text()
    )
    x = random(1, 3, *[9, 8][:rank], seed=2)
    same(graph, folder, {"x": x})
    (folder / "w_nchw.bin").unlink()
    same(graph, folder, {"x": x})


def test_a_weight_that_a_convolution_shares_with_another_node(tmp_path: Path) -> None:
    steps = [("Conv", "x w", "c"), ("Mul", "x w", "m"), ("Add", "c m", "y")]
    graph = build(steps, {"x": [1, 1, 2, 2]}, weights={"w": random(1, 1, 1, 1)})
    same(graph, written(graph, tmp_path / "out"), {"x": random(1, 1, 2, 2, seed=1)})


def test_gemm_constants_are_transposed_once(tmp_path: Path) -> None:
    w, a = random(5, 8), random(8, 3, seed=1)
    steps = [("Gemm", "x w b", "h", {"transB": 1, "alpha": 1.0}),
             ("Gemm", "a h", "y", {"transA": 1, "alpha": 0.5})]  # fmt: skip
    graph = build(steps, {"x": [8, 8]}, weights={"w": w, "a": a, "b": random(5, seed=2)})
    folder = written(graph, tmp_path / "out")
    assert (folder / "w_transposed.bin").read_bytes() == np.ascontiguousarray(w.T).tobytes()
    text = (folder / "model.txt").read_text()
    assert "trans" not in re.sub(r"_transposed", "", text) and "alpha:0.5" in text
    same(graph, folder, {"x": random(8, 8, seed=3)})


def test_integers_that_multiply_what_was_filled(tmp_path: Path) -> None:
    """OnnxStream's ConstantOfShape gives floats, so what multiplies it has to be floats as well."""
    steps = [
        ("Shape", "x", "s"), ("ConstantOfShape", "s1", "ones", {"value": np.array([1])}),
        ("Mul", "ones n", "m"), ("Mul", "s k", "t"), ("Add", "m t", "y"), ("Shape", "s", "s1"),
    ]  # fmt: skip
    steps = [steps[0], steps[5], *steps[1:5]]
    weights = {"n": np.array([-1, 5]), "k": np.array([2, 3])}
    graph = build(steps, {"x": ["a", "b"]}, weights=weights, kinds={"y": "i"})
    draft = Draft(graph)
    contents = Contents(draft.read, draft.pieces, known_dims(graph, draft.read))
    write(graph, Out(tmp_path / "out"), contents, silent)
    text = (tmp_path / "out" / "model.txt").read_text()
    assert "n.bin(float32:2)" in text and "k.bin(int64:2)" in text
    assert run(tmp_path / "out", {"x": random(4, 7)})["y"].tolist() == [7, 26]


# -- inputs, outputs, attributes


def test_outputs_that_the_text_could_not_tell(tmp_path: Path) -> None:
    """One that is read again, one that is an input, one that is a constant, one twice in use."""
    steps = [("Neg", "x", "mid"), ("Mul", "mid w", "last"), ("Add", "mid last", "both")]
    graph = build(steps, {"x": [2, 3]}, "last both mid", {"w": random(2, 3)})
    values = {o.name: o for o in graph.outputs}
    extra = (Value("x", "float32", (2, 3)), Value("w", "float32", (2, 3)))
    graph = graph.with_(outputs=(*graph.outputs, *extra))
    folder = written(graph, tmp_path / "out")
    x = random(2, 3, seed=1)
    got = run(folder, {"x": x})
    assert got.keys() == {*values, "x.copy", "w"}
    np.testing.assert_array_equal(got["mid"], -x)
    np.testing.assert_array_equal(got["x.copy"], x)
    np.testing.assert_array_equal(got["w"], random(2, 3))
    np.testing.assert_allclose(got["both"], -x - x * random(2, 3), rtol=1e-6)


def test_omitted_inputs_scalars_and_parts_that_nobody_reads(tmp_path: Path) -> None:
    weights = {"top": np.float32(0.5), "sizes": np.array([1, 2, 1])}
    steps = [("Clip", "x  top", "c"), ("Split", "c sizes", "p q r", {"axis": 1}),
             ("Neg", "q", "y")]  # fmt: skip
    graph = build(steps, {"x": [2, 4]}, weights=weights)
    folder = written(graph, tmp_path / "out")
    assert "input:x(2,4);;top.bin(float32:)" in (folder / "model.txt").read_text()
    got = run(folder, {"x": random(2, 4)})
    assert list(got) == ["y"]
    np.testing.assert_array_equal(got["y"], -np.minimum(random(2, 4), 0.5)[:, 1:3])


def test_names_of_operators_are_made_unique_and_fit_the_fields(tmp_path: Path) -> None:
    names = ("a:b*c", "a_b_c", "", "", "a_b_c")
    nodes = tuple(Node("Neg", (f"v{i}",), (f"v{i + 1}",), {}, name) for i, name in enumerate(names))
    value = Value("v0", "float32", (2,))
    graph = Graph(nodes, (value,), (replace(value, name="v5"),), {}, {"": 14})
    read = load_graph(written(graph, tmp_path / "out"))
    assert [n.name for n in read.nodes] == ["a_b_c", "a_b_c_1", "Neg_2", "Neg_3", "a_b_c_4"]


def test_long_names_and_names_that_look_like_layouts(tmp_path: Path) -> None:
    names = ["é" * 80, "è" * 80, "w_nchw", "w", "weight1"]
    steps = [("Add", f"v{i} n{i}", f"v{i + 1}") for i in range(len(names))]
    graph = build(steps, {"v0": [1]}, f"v{len(names)}",
                  {f"n{i}": np.float32([i]) for i in range(len(names))})  # fmt: skip
    rename = {f"n{i}": name for i, name in enumerate(names)}
    graph = graph.with_(
        nodes=tuple(
            replace(n, inputs=tuple(rename.get(i, i) for i in n.inputs)) for n in graph.nodes
        ),
        initializers={rename[n]: replace(r, name=rename[n]) for n, r in graph.initializers.items()},
    )
    folder = written(graph, tmp_path / "out")
    assert run(folder, {"v0": np.zeros(1, np.float32)})["v5"].tolist() == [10]


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (Node("Einsum", ("x", "x"), ("y",), {"equation": "i;j"}, "e"), "separates"),
        (Node("If", ("b",), ("y",), {"then_branch": 1, "else_branch": 1}, "i"), "cannot hold"),
        (Node("ConstantOfShape", ("n",), ("y",), {"value": np.zeros(2)}, "c"), "cannot hold"),
        (Node("Frobnicate", ("x",), ("y",), {}, "f"), "no operator of opset 14"),
        (Node("FusedMatMul", ("x", "x"), ("y",), {}, "m", "com.microsoft"), "no operator of"),
    ],
)
def test_what_the_text_cannot_hold(node: Node, says: str, tmp_path: Path) -> None:
    kinds = {"x": "float32", "b": "bool", "n": "int64"}
    inputs = tuple(Value(n, kinds[n], (2,)) for n in dict.fromkeys(node.inputs))
    graph = Graph((node,), inputs, (Value("y", "float32", (2,)),), {}, {"": 14})
    with pytest.raises(UnsupportedError, match=says):
        written(graph, tmp_path / "out")


# -- language models


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("encoding", ["F32", "F16", "Q8_0"])
def test_a_gguf_as_a_folder(encoding: str, tied: bool, tmp_path: Path) -> None:
    tiny = Tiny(hidden=64, intermediate=96, heads=6, kv_heads=2, head_dim=16, tied=tied)
    weights = write_gguf(tmp_path / "m.gguf", tiny, encoding)
    folder = written(load_graph(tmp_path / "m.gguf"), tmp_path / "out")
    ids = [1, 5, 9, 33, 7, 2, 8]
    wanted = logits(tiny, weights, ids)
    model = exact_model(folder)
    rounding = 4e-3 if encoding == "Q8_0" else 2e-3  # Q8_0's numbers in float16
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        near(model.feed(ids[start:stop]), wanted[stop - 1].astype(np.float32), rounding)
    model.close()
    elements = sum(w.size for w in weights.values() if w.ndim == 2)
    size = sum(f.stat().st_size for f in folder.glob("*.bin"))
    assert elements * (4 if encoding == "F32" else 2) <= size  # a tied table is there once
    assert size < elements * (4 if encoding == "F32" else 2) + 16384


@pytest.mark.parametrize("nbits", [False, True])
def test_a_quantised_model_as_a_folder(nbits: bool, tmp_path: Path) -> None:
    """Its rotary embeddings are of neighbouring channels, of weights that a node dequantises."""
    tiny = Tiny(hidden=64, intermediate=96, heads=6, kv_heads=2, head_dim=16)
    write_gguf(tmp_path / "m.gguf", tiny, "F32")
    step = partial(quantised, method="rtn", matmul_nbits=nbits)
    convert(tmp_path / "m.gguf", tmp_path / "integers", steps=(step,))
    convert(tmp_path / "integers", tmp_path / "out", to="onnxstream", dtype="float32")
    assert parsed(tmp_path / "out")
    integers, floats = exact_model(tmp_path / "integers"), exact_model(tmp_path / "out")
    for ids in ([1, 5, 9, 33], [7], [2, 8]):
        near(floats.feed(ids), integers.feed(ids))
    integers.close()
    floats.close()


def test_no_weight_is_in_memory_as_a_whole(tmp_path: Path, monkeypatch: Any) -> None:
    """The matrices of a converted model are read by pieces, but for those that change order."""
    tiny = Tiny(hidden=64, vocab=2048)
    write_gguf(tmp_path / "m.gguf", tiny, "F16")
    draft = Draft(load_graph(tmp_path / "m.gguf"))
    whole: list[str] = []
    read = Draft.read
    monkeypatch.setattr(Draft, "read", lambda self, ref: whole.append(ref.name) or read(self, ref))
    written(draft, tmp_path / "out")
    large = {n for n, r in draft.graph.initializers.items() if np.prod(r.shape) > 4096}
    assert large and not large & set(whole)


@pytest.mark.skipif(smollm2() is None, reason="SmolLM2 absent: set ONNXSTREAM_TEST_SMOLLM2")
def test_smollm2_as_a_folder_gives_the_same_ids(tmp_path: Path) -> None:
    path = smollm2()
    assert path is not None
    folder = written(load_graph(path), tmp_path / "out", "float16")
    size = sum(f.stat().st_size for f in folder.iterdir())
    assert 134_515_008 * 2 < size < 134_515_008 * 2.01  # the tied table once
    model = LanguageModel(folder, load="ram")
    for case in json.loads(REFERENCES.read_text("utf-8")):
        assert greedy(model, case) == case["output_ids"], case["prompt"]
    model.close()


def in_onnxstreams_engine(folder: Path, ids: list[int], steps: tuple[int, ...]) -> Array:
    """Logits (T, V), read as OnnxStream's chat program reads: the cache's outputs fed back."""
    pkv = {v.name: v for v in load_graph(folder).inputs if v.name.startswith("pkv")}
    past = {n: np.zeros([d if isinstance(d, int) else 0 for d in v.shape or ()], np.float32)
            for n, v in pkv.items()}  # fmt: skip
    rows, start = [], 0
    for size in steps:
        feeds = {
            "input_5F_ids": np.array([ids[start : start + size]]),
            "position_5F_ids": np.arange(start, start + size)[None],
            "attention_5F_mask": np.ones((1, start + size), np.int64),
        }
        values = onnxstream_engine.run(folder, feeds | past)
        past = {name: values[f"o{name}"] for name in past}
        rows.append(values["logits"][0])
        start += size
    return np.concatenate(rows)


@pytest.mark.parametrize("steps", [(7,), (1,) * 7, (3, 1, 3)], ids=str)
@pytest.mark.parametrize(
    "tiny",
    [
        Tiny(heads=6, kv_heads=2, head_dim=16, tied=True),
        Tiny("qwen3", heads=4, kv_heads=4),
        Tiny("qwen2"),
        Tiny("mistral", window=3),
    ],
    ids=lambda tiny: tiny.architecture,
)
def test_onnxstreams_engine_would_run_it(
    tiny: Tiny, steps: tuple[int, ...], tmp_path: Path
) -> None:
    weights = write_gguf(tmp_path / "m.gguf", tiny, "F16")
    folder = written(load_graph(tmp_path / "m.gguf"), tmp_path / "out")
    ids = [1, 5, 9, 33, 7, 2, 8]
    got = in_onnxstreams_engine(folder, ids, steps)
    wanted = logits(tiny, weights, ids)
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["llama_gqa_op14", "llama_gqa_dyn23", "mistral_sw8_op14"])
def test_onnxstreams_engine_would_run_exports(name: str, tmp_path: Path) -> None:
    model = STREAMED.parent / name
    folder = written(load_graph(model / "model.onnx"), tmp_path / "out")
    with np.load(sorted(model.glob("case*.npz"))[2]) as data:  # six ids, nothing before them
        ids, wanted = data["in__input_ids"][0].tolist(), data["out__logits"][0]
    for steps in ((len(ids),), (1,) * len(ids), (2, len(ids) - 2)):
        got = in_onnxstreams_engine(folder, ids, steps)
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_attention_stands_as_onnxstream_fuses_it(tmp_path: Path) -> None:
    """Its chat program refuses a model without this sequence, each value used once."""
    write_gguf(tmp_path / "m.gguf", Tiny(heads=6, kv_heads=2), "F32")
    folder = written(load_graph(tmp_path / "m.gguf"), tmp_path / "out")
    text = (folder / "model.txt").read_text()
    lines = [line.split("*") for line in text.splitlines()]
    types = [line[0].split(":")[1] for line in lines]
    wanted = ["Transpose", "MatMul", "Div", "Add", "Softmax", "MatMul"]
    starts = [i for i in range(len(types)) if types[i : i + 6] == wanted]
    assert len(starts) == 2
    for start in starts:
        for i, place in zip(range(start, start + 5), (1, 0, 0, 0, 0), strict=True):
            value = lines[i][2].removeprefix("output:").split("(")[0]
            assert lines[i + 1][1].removeprefix("input:").split(";")[place].startswith(f"{value}(")
            assert len(re.findall(rf"[:;]{value}\(", text)) == 2
