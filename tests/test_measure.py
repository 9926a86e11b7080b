"""bench, random weights, inspect and trace: their arithmetic against independent references."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from onnxstream_nb import cli, measure, registry, synthetic, trace
from onnxstream_nb.cli import activations, report
from onnxstream_nb.errors import UsageError
from onnxstream_nb.graph import ENCODINGS, Graph, Node, Value, WeightRef
from onnxstream_nb.measure import Case

GGUF_TYPES = {
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
TINY: Mapping[str, Any] = {
    "vocab": 99, "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96,
    "rope_theta": 1e4, "context": 128, "norm_epsilon": 1e-5, "tied_embeddings": False,
}  # fmt: skip
TINY_MATRICES = 2 * 99 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)


# -- random weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", GGUF_TYPES)
def test_tile_is_valid_and_plausible(dtype: str) -> None:
    encoding = ENCODINGS[synthetic.DTYPES[dtype]]
    tile = synthetic.tile(encoding, 1 << 20)
    assert tile.dtype == np.uint8 and tile.ndim == 1
    assert tile.size % encoding.nbytes == 0 and tile.size % synthetic.ALIGNMENT == 0
    assert (1 << 20) - 2000 < tile.size <= 1 << 20
    values = gguf.dequantize(tile, GGUF_TYPES[dtype])
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(synthetic.DEVIATION, rel=0.06)
    assert abs(values.mean()) < 0.003
    assert abs(values).max() < 0.2


@pytest.mark.parametrize("dtype", GGUF_TYPES)
def test_random_model_has_the_geometry_and_cleans_up(dtype: str, tmp_path: Path) -> None:
    encoding = ENCODINGS[synthetic.DTYPES[dtype]]
    with synthetic.random_model("tiny", TINY, dtype, tmp_path / "made") as graph:
        matrices = [r for r in graph.initializers.values() if isinstance(r.source, Path)]
        (path,) = {ref.source for ref in matrices}
        assert isinstance(path, Path)
        spans = sorted((ref.offset, ref.offset + ref.nbytes) for ref in matrices)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
        assert spans[-1][1] <= path.stat().st_size
        for ref in matrices:
            assert ref.encoding == encoding.name
            assert ref.offset % encoding.nbytes == 0 and ref.offset % synthetic.ALIGNMENT == 0
            data = np.fromfile(path, np.uint8, ref.nbytes, offset=ref.offset)
            values = gguf.dequantize(data, GGUF_TYPES[dtype])
            assert values.size == np.prod(ref.shape)
            assert 0.015 < values.std() < 0.025
        assert sum(np.prod(ref.shape) for ref in matrices) == TINY_MATRICES
        head = graph.initializers["lm_head.weight"]
        assert (head.shape, head.transposed) == ((64, 99), True)
    assert list((tmp_path / "made").iterdir()) == []


def test_random_model_cleans_up_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), synthetic.random_model("t", TINY, "f16", tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_random_model_asks_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "disk_free", lambda path: 1000)
    with (
        pytest.raises(UsageError, match=r"tiny in f16 takes 1\d\d kB and .* has 1.00 kB free"),
        synthetic.random_model("tiny", TINY, "f16", tmp_path),
    ):
        pass


def test_fill_repeats_the_tile_and_cuts_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    synthetic.fill(path, 25, np.arange(10, dtype=np.uint8))
    assert path.read_bytes() == bytes([*range(10), *range(10), *range(5)])


# -- bench ---------------------------------------------------------------------------------------


class FakeLanguageModel:
    """Counts what it is fed; `clock` advances by a second per token, by 2 in single steps."""

    made: FakeLanguageModel

    def __init__(self, graph: Graph, *, progress: Any, **options: Any) -> None:
        type(self).made = self
        self.graph, self.options, self.closed = graph, options, False
        self.vocab_size, self.bytes_per_token, self.tokens = 99, 5000, 0
        self.spilled_bytes = self.gpu_bytes = 0
        self.precision = "exact"
        self.feeds: list[tuple[int, int]] = []
        self.clock = 0.0

    def feed(self, ids: Sequence[int]) -> None:
        assert all(0 <= i < self.vocab_size for i in ids)
        assert self.tokens + len(ids) <= self.options["context"]
        self.feeds.append((self.tokens, len(ids)))
        self.tokens += len(ids)
        self.clock += 2.0 if len(ids) == 1 else 1.0 * len(ids)

    def rewind(self, length: int) -> None:
        assert length <= self.tokens
        self.tokens = length

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def language_model(monkeypatch: pytest.MonkeyPatch) -> type[FakeLanguageModel]:
    module = ModuleType("onnxstream_nb.llm")
    module.LanguageModel = FakeLanguageModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxstream_nb.llm", module)
    clock = SimpleNamespace(
        perf_counter=lambda: (
            FakeLanguageModel.made.clock if "made" in vars(FakeLanguageModel) else 0.0
        )
    )
    monkeypatch.setattr(measure, "time", clock)
    asked = SimpleNamespace(function=lambda nbytes, threads: lambda: 1e4 * threads)
    monkeypatch.setattr(registry, "lookup", lambda *key: asked)
    return FakeLanguageModel


def test_plan_is_every_length_at_every_depth() -> None:
    cases = measure.plan((128, 0, 512), (64,), (0, 100))
    assert [c.name for c in cases] == [
        "pp128", "pp512", "tg64", "pp128 @ d100", "pp512 @ d100", "tg64 @ d100",
    ]  # fmt: skip
    assert max(c.context for c in cases) == 612
    with pytest.raises(UsageError, match="nothing to measure"):
        measure.plan((0,), (), (0,))


def test_run_case_feeds_what_the_test_says(language_model: type[FakeLanguageModel]) -> None:
    llm: Any = language_model(SimpleNamespace(), progress=None, context=15)  # type: ignore[arg-type]
    prompt = measure.run_case(llm, Case(8, 0, 5), 2, lambda text, fraction: None)
    assert llm.feeds == [(0, 5), (5, 8), (5, 8), (5, 8)]  # depth, warm-up, two runs
    assert (prompt.test, prompt.samples_ts, prompt.stddev_ts) == ("pp8 @ d5", (1.0, 1.0), 0.0)
    llm.feeds.clear()
    generated = measure.run_case(llm, Case(0, 3, 0), 1, lambda text, fraction: None)
    assert llm.feeds == [(0, 1), (1, 1), (2, 1)] * 2
    assert (generated.avg_ts, generated.n_gen) == (0.5, 3)


def test_result_has_mean_and_sample_deviation() -> None:
    result = measure.Result.of(Case(0, 4, 0), [1.0, 2.0, 4.0])
    assert result.avg_ts == pytest.approx(np.mean([1, 2, 4]))
    assert result.stddev_ts == pytest.approx(np.std([1, 2, 4], ddof=1))


def test_bench_json_and_table(
    language_model: type[FakeLanguageModel],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ONNXSTREAM_CACHE", str(tmp_path))
    arguments = ["bench", "smollm2-135m", "--random-weights", "--dtype", "q4_0"]
    arguments += ["-p", "16", "-n", "4", "-d", "0,2", "-r", "2", "--threads", "2"]
    assert cli.main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"] == "smollm2-135m q4_0 (random weights)"
    assert document["params"] == 134_515_040  # 134515008 weights, and 32 rotary frequencies
    assert [t["test"] for t in document["tests"]] == ["pp16", "tg4", "pp16 @ d2", "tg4 @ d2"]
    assert [t["avg_ts"] for t in document["tests"]] == [1.0, 0.5, 1.0, 0.5]
    assert (document["threads"], document["read_bandwidth"]) == (2, 2e4)
    assert document["decode_share"] == pytest.approx(0.5 * 5000 / 2e4)
    made = language_model.made
    assert made.closed and made.options["context"] == 18
    assert list((tmp_path / "tmp").iterdir()) == []

    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert titles == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert lines[2].rstrip("| ").endswith("pp16      | 1.00 ± 0.00")
    assert len({len(line) for line in lines[:6]}) == 1
    assert "decoding reaches 12% of it" in lines[-1]


def test_bandwidth_buffer_fits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    entry = SimpleNamespace(function=lambda *a: asked.append(a) or 1.0)
    monkeypatch.setattr(registry, "lookup", lambda *key: entry)
    monkeypatch.setattr(measure.device, "memory_available", lambda: 10_000_000)
    measure.bandwidth_reader(10**12, 3)
    measure.bandwidth_reader(1000, 1)
    assert asked == [(5_000_000, 3), (1000, 1)]


def test_share_is_none_without_generation() -> None:
    assert measure.decode_share([measure.Result.of(Case(8, 0, 0), [3.0])], 10, 1e9) is None


# -- inspect -------------------------------------------------------------------------------------


def graph() -> Graph:
    """Two matrices, tied with a third, a body, a past of 2 heads of 8."""
    file = Path("w.bin")
    embedding = WeightRef("e", (100, 32), "float32", file, 0, 100 * 34, "q8_0")
    head = WeightRef("h", (32, 100), "float32", file, 0, 100 * 34, "q8_0", transposed=True)
    other = WeightRef("o", (32, 32), "float32", file, 3400, 2048, "float16")
    bias = WeightRef("b", (32,), "float32", b"\0" * 128, nbytes=128)
    body = Graph((Node("Add", ("x", "x"), ("y",)),), (), (), {}, {"": 23})
    nodes = (
        Node("MatMul", ("x", "o"), ("y",)), Node("MatMul", ("y", "h"), ("z",)),
        Node("If", ("c",), ("w",), {"then_branch": body, "else_branch": body}),
        Node("Frobnicate", ("w",), ("v",), domain="com.example"),
    )  # fmt: skip
    past = Value("past_key_values.0.key", "float32", (1, 2, "past", 8))
    ids = Value("input_ids", "int64", (1, "sequence"))
    image = Value("image", "float32", (1, 3, 224, 224))
    outputs = (Value("v", "float32", None), Value("present.0.key", "float32", (1, 2, "total", 8)))
    return Graph(
        nodes, (ids, past, image), outputs,
        {"e": embedding, "h": head, "o": other, "b": bias}, {"": 23, "com.example": 1},
        metadata={"context_length": 50},
    )  # fmt: skip


def test_facts_count_tied_weights_once_and_bodies_too(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {("MatMul", "", 23), ("Add", "", 23), ("If", "", 23)}
    monkeypatch.setattr(registry, "lookup", lambda *key: True if key in known else None)
    facts = report.graph_facts(graph())
    assert facts["operators"] == [
        {"operator": "MatMul", "count": 2, "supported": True},
        {"operator": "Add", "count": 2, "supported": True},
        {"operator": "If", "count": 1, "supported": True},
        {"operator": "com.example.Frobnicate", "count": 1, "supported": False},
    ]
    assert facts["encodings"] == [
        {"encoding": "q8_0", "tensors": 1, "parameters": 3200, "size_bytes": 3400},
        {"encoding": "float16", "tensors": 1, "parameters": 1024, "size_bytes": 2048},
        {"encoding": "float32", "tensors": 1, "parameters": 32, "size_bytes": 128},
    ]
    assert (facts["weights_bytes"], facts["parameters"]) == (5576, 4256)
    position = 2 * 8 * 4  # float32, for no Attention reads it
    assert (facts["context"], facts["cache_bytes"]) == (50, 50 * position)
    assert report.graph_facts(graph(), 10)["cache_bytes"] == 10 * position
    json.dumps(facts)


def test_overview_and_operators_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "lookup", lambda op_type, *key: op_type != "Frobnicate" or None)
    monkeypatch.setattr(report.device, "memory_available", lambda: 5000)
    facts = report.graph_facts(graph())
    text = report.overview_text(facts)
    assert "opset      ai.onnx 23, com.example 1" in text
    assert "memory     8.78 kB: weights 5.58 kB + cache 3.20 kB for 50 tokens; 5.00 kB free" in text
    assert "(does not fit: weights will be streamed)" in text
    assert "inputs     input_ids  int64 (1, sequence)" in text
    assert "outputs    v  float32 of any shape" in text
    table = report.operators_text(facts["operators"])
    assert table.endswith("not supported: com.example.Frobnicate")


def test_columns_line_up_and_show_no_control_characters() -> None:
    text = report.columns([("a\x1b[2J", "1"), ("bbbbbb", "")], ("x", "count"))
    assert text.splitlines() == ["x       count", "a[2J    1", "bbbbbb"]


def saved_chain(path: Path) -> Path:
    """y = relu(x W) of (n, 300) times (300, 200)."""
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((300, 200), np.float32), "W")
    nodes = [helper.make_node("MatMul", ["x", "W"], ["p"]), helper.make_node("Relu", ["p"], ["y"])]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
              for n, s in (("x", ("n", 300)), ("y", ("n", 200)))]  # fmt: skip
    model = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    opset = [helper.make_opsetid("", 21)]
    path.write_bytes(helper.make_model(model, opset_imports=opset).SerializeToString())
    return path


def test_inspect_prints_the_liveness_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """x and p, 500 floats a row, are more than p and y."""
    path = str(saved_chain(tmp_path / "m.onnx"))
    assert cli.main(["inspect", path, "--tokens", "100"]) == 0
    line = "activations 200 kB at n=100 (step 0, MatMul; liveness bound)"
    assert line in capsys.readouterr().out.splitlines()
    assert cli.main(["inspect", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["activations"]
    assert facts["activation_bytes"] == 4 * 512 * 500 < facts["with_working_memory_bytes"]
    assert (facts["sizes"], facts["tokens"], facts["unknown"]) == ({"n": 512}, None, [])
    assert [m["name"] for m in facts["alive"]] == ["x", "p"]
    assert cli.main(["inspect", path, "--ops"]) == 0
    assert "activations" not in capsys.readouterr().out


def test_inspect_plan_ends_with_what_is_alive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(saved_chain(tmp_path / "m.onnx"))
    assert cli.main(["inspect", path, "--plan", "--tokens", "10"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "    0  MatMul  x, W:raw[300, 200] -> p",
        "    1  Relu    p -> y",
        "",
        "activations 20.0 kB at n=10 (step 0, MatMul; liveness bound)",
        "",
        "alive  type     shape   size     steps",
        "x      float32  10x300  12.0 kB  0-0",
        "p      float32  10x200  8.00 kB  0-1",
    ]


def test_the_bound_says_what_it_leaves_out() -> None:
    facts = {
        "activation_bytes": 1500, "tokens": 7, "sizes": {"n": 7}, "step": 3, "operator": "Mul",
        "unknown": ["a", "b", "c", "d"],
    }  # fmt: skip
    text = "1.50 kB at 7 tokens (step 3, Mul; liveness bound)"
    assert activations.line(facts) == (
        f"{text}, not counting 4 values of unknown size (a, b, c, ...)"
    )
    assert activations.line(facts | {"unknown": []}) == text
    fixed = facts | {"tokens": None, "sizes": {}, "unknown": []}
    assert activations.line(fixed) == "1.50 kB (step 3, Mul; liveness bound)"


# -- the benchmarks' harness ---------------------------------------------------------------------


def test_harness_times_processes_and_ends_with_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    harness = importlib.import_module("harness")
    code = "import time; print('a', flush=True); time.sleep(0.2); print('b')"
    timing = harness.timed([sys.executable, "-c", code])
    assert timing.output == "a\nb\n"
    assert timing.total_s - timing.first_output_s == pytest.approx(0.2, abs=0.15)
    assert harness.engine("--version").output.startswith("onnxstream_nb ")
    with pytest.raises(SystemExit, match="exit code 3"):
        harness.timed([sys.executable, "-c", "raise SystemExit(3)"])
    harness.report(("name", "s"), [("first", "0.5")], {"benchmark": "x"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["name   s", "first  0.5"]
    assert json.loads(lines[-1])["benchmark"] == "x"


# -- trace ---------------------------------------------------------------------------------------


def test_trace_adds_up_and_nests() -> None:
    assert trace.current() is None
    with trace.tracing() as outer:
        outer.record("Add", 0.25)
        with trace.tracing() as inner:
            assert trace.current() is inner
        assert trace.current() is outer
        outer.record("MatMul", 0.5, 10)
        outer.record("MatMul", 0.25, 20)
    assert trace.current() is None
    assert outer.totals["MatMul"] == trace.Total(2, 0.75, 30)
    lines = outer.table().splitlines()
    assert [line.split()[0] for line in lines] == ["operator", "MatMul", "Add"]
    assert lines[2].split()[1:4] == ["1", "0.2500", "25.0%"]
    assert inner.table() == "trace: no node was run"
