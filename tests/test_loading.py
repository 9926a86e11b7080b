"""How `load` and `ram` choose where weights come from, and what a budget promises."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from onnx import helper, numpy_helper
from onnx_models import make, refusal, run, saved, value
from weight_files import until

from onnxstream_nb import device
from onnxstream_nb.errors import MemoryBudgetError, UsageError
from onnxstream_nb.graph import Graph, Node, Value, WeightRef
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.loading import ARRAYS, BASE, CHUNK, logit_chunk, prompt_chunk, work_bytes
from onnxstream_nb.session import Session
from onnxstream_nb.weights import BudgetProvider, MmapProvider, PrefetchProvider, RamProvider

ROWS = (150, 600, 200, 450)  # of matrices 128 wide: 76,800, 307,200, 102,400 and 230,400 bytes
BYTES = tuple(4 * 128 * n for n in ROWS)
WINDOW = 2 * max(BYTES)


def work(k: int, n: int) -> int:
    """What a run with products of at most this size takes beside its weights."""
    return BASE + ARRAYS * CHUNK * (k + n) * 4


WORK = work(128, max(ROWS))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """y = sum of W_i x over weights of several sizes."""
    rng = np.random.default_rng(0)
    weights, nodes = [], []
    for i, n in enumerate(ROWS):
        weights.append(numpy_helper.from_array(rng.standard_normal((128, n)).astype("f4"), f"W{i}"))
        nodes.append(helper.make_node("MatMul", ["x", f"W{i}"], [f"y{i}"]))
    nodes.append(helper.make_node("Concat", [f"y{i}" for i in range(len(ROWS))], ["y"], axis=1))
    proto = make(nodes, [value("x", shape=("n", 128))], [value("y", shape=("n", "m"))], weights)
    return saved(proto, tmp_path / "m.onnx")


@pytest.fixture
def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes no memory itself, so that budgets are exact."""
    monkeypatch.setattr(device, "current_rss", lambda: 0)


def runs(session: Session, path: Path, times: int = 2) -> None:
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    wanted = run(path, {"x": x})["y"]
    for _ in range(times):
        np.testing.assert_allclose(session.run({"x": x})["y"], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("load", "kind"),
    [("stream", PrefetchProvider), ("mmap", MmapProvider), ("ram", RamProvider)],
)
def test_by_name(load: str, kind: type[Any], model: Path) -> None:
    with Session(model, load=load) as session:
        assert type(session.provider) is kind
        runs(session, model)


def test_bytes_read_by_each_kind(model: Path) -> None:
    for load, passes in (("stream", 3), ("ram", 1)):
        with Session(model, load=load) as session:
            runs(session, model, times=3)
            assert session.provider.bytes_read == passes * sum(BYTES)


def test_unknown_kind(model: Path) -> None:
    message = refusal(lambda: Session(model, load="disk"), UsageError)
    assert "'disk'" in message and "stream" in message and "mmap" in message


def test_budget_and_mmap(model: Path) -> None:
    message = refusal(lambda: Session(model, load="mmap", ram=10**12), UsageError)
    assert "--ram" in message and "mmap" in message


def test_auto_maps_what_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "memory_available", lambda: 10**11)
    with Session(model) as session:
        assert isinstance(session.provider, MmapProvider)
        runs(session, model)


@pytest.mark.parametrize("reserve", [0, 123_456])
def test_auto_streams_what_does_not_fit(
    reserve: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "current_rss", lambda: 10**9)
    needed = WORK + reserve + sum(BYTES)
    monkeypatch.setattr(device, "memory_available", lambda: int(needed / 0.9) + 2)
    with Session(model, reserve=reserve) as session:
        assert isinstance(session.provider, MmapProvider)
    monkeypatch.setattr(device, "memory_available", lambda: int((needed - 10) / 0.9))
    with Session(model, reserve=reserve) as session:
        assert isinstance(session.provider, BudgetProvider)
        runs(session, model)


@pytest.mark.parametrize("load", ["auto", "stream", "ram"])
def test_generous_budget_keeps_everything(load: str, model: Path, no_base: None) -> None:
    with Session(model, load=load, ram=WORK + sum(BYTES)) as session:
        assert isinstance(session.provider, RamProvider)
        runs(session, model, times=3)
        assert session.provider.bytes_read == sum(BYTES)


@pytest.mark.parametrize(
    ("room", "kept"),
    [(WINDOW, 0), (WINDOW + BYTES[0] - 1, 0), (WINDOW + BYTES[0], BYTES[0]),
     (sum(BYTES) - 1, BYTES[0])],
)  # fmt: skip
def test_a_budget_pins_what_fits_beside_the_stream(
    room: int, kept: int, model: Path, no_base: None
) -> None:
    with Session(model, ram=WORK + 777 + room, reserve=777) as session:
        assert isinstance(session.provider, BudgetProvider)
        runs(session, model, times=3)
        assert session.provider.bytes_read == kept + 3 * (sum(BYTES) - kept)


def test_an_impossible_budget_names_the_least(model: Path, no_base: None) -> None:
    for ram in (1, WORK, WORK + WINDOW - 1):
        message = refusal(lambda n=ram: Session(model, ram=n), MemoryBudgetError)
        assert "--ram" in message and "at least" in message
    with Session(model, ram=WORK + WINDOW) as session:
        runs(session, model)


@pytest.mark.parametrize("base", [0, 1_111_111, 36_449_999, 163_949_999])
def test_the_least_that_is_named_is_enough(
    base: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is rounded to, following the advice works."""
    monkeypatch.setattr(device, "current_rss", lambda: base)
    message = refusal(lambda: Session(model, ram=1), MemoryBudgetError)
    least = message.split("at least ")[1].split(" is needed")[0]
    with Session(model, ram=device.parse_size(least)) as session:
        runs(session, model, times=1)


def test_a_single_weight_needs_no_room_for_two(tmp_path: Path, no_base: None) -> None:
    weight = np.ones((128, 200), np.float32)
    proto = make(
        [helper.make_node("MatMul", ["x", "W"], ["y"])], [value("x", shape=("n", 128))],
        [value("y", shape=("n", 200))], [numpy_helper.from_array(weight, "W")],
    )  # fmt: skip
    path = saved(proto, tmp_path / "m.onnx")
    enough = work(128, 200) + weight.nbytes
    message = refusal(lambda: Session(path, ram=enough - 1), MemoryBudgetError)
    least = device.parse_size(message.split("at least ")[1].split(" is needed")[0])
    assert enough <= least <= 1.02 * enough
    with Session(path, ram=enough) as session:
        runs(session, path)


def test_tied_weights_count_once(tmp_path: Path, no_base: None) -> None:
    table = np.random.default_rng(0).standard_normal((400, 130)).astype(np.float32)
    proto = make(
        [helper.make_node("MatMul", names[:2], names[2:])
         for names in (["x", "W", "a"], ["a", "V", "b"], ["b", "W", "y"])],
        [value("x", shape=("n", 400))], [value("y", shape=("n", 130))],
        [numpy_helper.from_array(table, "W"),
         numpy_helper.from_array(np.ascontiguousarray(table.T), "V")],
    )  # fmt: skip
    ram = work(400, 130) + 2 * table.nbytes
    with Session(saved(proto, tmp_path / "m.onnx"), ram=ram) as session:
        assert isinstance(session.provider, RamProvider)
        assert session.plan.weight_bytes == 2 * table.nbytes
        assert [ref.name for ref in session.plan.weights] == ["W", "V", "W"]


def test_a_model_without_weights() -> None:
    proto = make([helper.make_node("Neg", ["x"], ["y"])], [value("x")], [value("y")])
    for load in ("auto", "stream", "mmap", "ram"):
        with Session(proto, load=load) as session:
            np.testing.assert_array_equal(session.run({"x": np.ones(3, "f4")})["y"], -np.ones(3))
    assert "at least" in refusal(lambda: Session(proto, ram=1), MemoryBudgetError)


def test_the_stream_never_holds_more_than_its_share(
    model: Path, no_base: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of weights alive, what the running operator reads included, stay in the window."""
    import weakref

    from onnxstream_nb import weights

    alive = most = 0
    original: Callable[..., Any] = weights.Files.read

    def gone(nbytes: int) -> None:
        nonlocal alive
        alive -= nbytes

    def read(files: Any, ref: Any, start: int, stop: int) -> Any:
        nonlocal alive, most
        alive += stop - start
        most = max(most, alive)
        buffer = original(files, ref, start, stop)
        weakref.finalize(buffer, gone, stop - start)
        return buffer

    monkeypatch.setattr(weights.Files, "read", read)
    with Session(model, ram=WORK + WINDOW, optimize=False) as session:
        runs(session, model, times=20)
    assert 0 < most <= WINDOW


def test_a_session_that_is_dropped_ends_its_thread(model: Path) -> None:
    before = threading.active_count()
    session = Session(model, load="stream", threads=1)
    runs(session, model, times=1)
    assert threading.active_count() == before + 1
    del session
    gc.collect()
    until(lambda: threading.active_count() == before)


# -- language models


def _products(*shapes: tuple[int, int], last: int = 0, rows: str = "constant") -> Graph:
    """Products of a prompt with matrices (K, N), of some positions with a head (8, `last`)."""

    def ref(name: str, *shape: int, dtype: str = "float32") -> WeightRef:
        return WeightRef(name, shape, dtype, b"", 0, 4 * math.prod(shape))

    refs = {f"W{i}": ref(f"W{i}", *shape) for i, shape in enumerate(shapes)}
    nodes = [Node("MatMul", ("x", name), (f"y{name}",)) for name in refs]
    if last:
        refs |= {"head": ref("head", 8, last), "constant": ref("constant", 1, dtype="int64")}
        nodes.append(Node("Gather", ("x", rows), ("hidden",), {"axis": 1}))
        nodes.append(Node("MatMul", ("hidden", "head"), ("logits",)))
    outputs = tuple(Value(n.outputs[0], "float32", None) for n in nodes)
    inputs = (Value("x", "float32", (1, "t", "k")), Value("rows", "int64", ("r",)))
    return Graph(tuple(nodes), inputs, outputs, refs, {"": 23})


@pytest.mark.parametrize(
    ("shapes", "chunk"),
    [([], 512), ([(576, 1536)], 512), ([(2048, 5632), (5632, 2048)], 512),
     ([(4096, 4096), (4096, 14336)], 128), ([(8192, 28672)], 32), ([(65536, 65536)], 32)],
)  # fmt: skip
def test_a_prompt_is_read_in_pieces_that_a_stop_can_wait_for(
    shapes: list[tuple[int, int]], chunk: int
) -> None:
    """At most 16e9 operations between two looks; the head's matrix sees some positions only."""
    assert prompt_chunk(_products(*shapes)) == chunk
    assert prompt_chunk(_products(*shapes, last=10**9)) == chunk
    assert prompt_chunk(_products(*shapes, last=10**9, rows="rows")) == chunk
    operations = max((2 * chunk * k * n for k, n in shapes), default=0)
    assert chunk == 32 or operations <= 16e9
    assert chunk == 512 or 2 * operations > 16e9


@pytest.mark.parametrize("rows", ["constant", "rows"])
@pytest.mark.parametrize(
    ("vocabulary", "chunk"),
    [(1000, 512), (19192, 512), (19193, 256), (38393, 128), (10**9, 32)],
)
def test_logits_take_no_more_memory_than_a_prompt(vocabulary: int, chunk: int, rows: str) -> None:
    """Twice what the head gives, within five times what the largest product takes and gives."""
    assert logit_chunk(_products((2048, 5632), last=vocabulary, rows=rows)) == chunk


def test_logits_take_no_longer_than_a_prompt() -> None:
    wide = _products((8, 10**9), last=10**9)
    assert (prompt_chunk(wide), logit_chunk(wide)) == (32, 32)
    narrow = _products((2 * 10**6, 1), last=3 * 10**6)
    assert (prompt_chunk(narrow), logit_chunk(narrow)) == (512, 256)
    assert logit_chunk(_products((64, 64))) == 512


def test_a_product_with_rows_of_a_table_is_no_head() -> None:
    graph = _products((8192, 28672), last=1)
    lookup = Node("Gather", ("W0", "rows"), ("x",), {"axis": 0})
    embedded = graph.with_(nodes=(lookup, *graph.nodes), inputs=graph.inputs[1:])
    assert prompt_chunk(embedded) == prompt_chunk(graph) == 32


def test_work_grows_with_what_is_decoded_for_an_operator() -> None:
    """Softmax takes arrays only: a weight in float16 becomes one of float32 for the call."""
    x = Value("x", "float32", (1, 300))
    nodes = (Node("Softmax", ("W",), ("s",)), Node("Add", ("x", "s"), ("y",)))
    sizes = {}
    for encoding in ("raw", "float16"):
        raw = bytes(300 * 300 * (4 if encoding == "raw" else 2))
        ref = WeightRef("W", (300, 300), "float32", raw, 0, len(raw), encoding)
        graph = Graph(nodes, (x,), (Value("y", "float32", None),), {"W": ref}, {"": 13})
        with Session(graph, optimize=False) as session:
            sizes[encoding] = work_bytes(session.plan)
    assert sizes == {"raw": BASE, "float16": BASE + 4 * 300 * 300}


@pytest.mark.parametrize("tied", [False, True])
def test_tables_are_pinned_first(tied: bool, tmp_path: Path, no_base: None) -> None:
    """A table streamed for one row costs its whole size; a tied one is asked for twice a token."""
    tiny = Tiny(vocab=2000, hidden=64, intermediate=1024, layers=3, context=600, tied=tied)
    write_gguf(tmp_path / "m.gguf", tiny, "F16")
    table, matrix = 2000 * 64 * 2, 64 * 1024 * 2
    context = 2 * 2 * 768 * (3 * (8 + 32) + 32)
    ram = work(64, 1024) + context + table + 2 * (matrix if tied else table)
    model = LanguageModel(tmp_path / "m.gguf", ram=ram, threads=1)
    assert isinstance(model.session.provider, BudgetProvider)
    pinned = model.session.provider._pinned
    embedding = next(r for r in model.session.plan.weights if r.shape == (2000, 64))
    assert embedding.key in pinned
    model.feed([1, 2, 3])
    model.close()
    message = refusal(lambda: LanguageModel(tmp_path / "m.gguf", ram=1), MemoryBudgetError)
    least = device.parse_size(message.split("at least ")[1].split(" is needed")[0])
    assert ram - (0 if tied else table) <= least <= 1.02 * ram


def test_a_budget_holds_the_whole_context(tmp_path: Path, no_base: None) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, Tiny(context=200_000), "F16")
    model = LanguageModel(path, threads=1)  # without a budget the context may be a possibility
    model.close()
    message = refusal(lambda: LanguageModel(path, ram="30MB"), MemoryBudgetError)
    assert "full context" in message and "--context" in message
    LanguageModel(path, ram="30MB", context=4096).close()
    message = refusal(lambda: LanguageModel(path, ram="1MB", context=512), MemoryBudgetError)
    assert "--context" not in message  # it would not help


_PEAK = """
import re, sys
from onnxstream_nb import device
from onnxstream_nb.errors import MemoryBudgetError
from onnxstream_nb.llm import LanguageModel

path, factor = sys.argv[1], float(sys.argv[2])
try:
    LanguageModel(path, ram=1)
except MemoryBudgetError as error:
    least = device.parse_size(re.search("at least (.*?) is needed", str(error))[1])
ram = int(factor * least)
model = LanguageModel(path, ram=ram)
model.feed([(7 * i) % 8000 for i in range(512)])
for i in range(30):
    model.feed([i])
print(type(model.session.provider).__name__, device.peak_rss(), ram)
"""


def test_the_process_stays_within_its_budget(tmp_path: Path) -> None:
    """Reading a prompt and writing, in a process of its own; the kernels are compiled before."""
    path = tmp_path / "m.gguf"
    tiny = Tiny(vocab=8000, hidden=512, intermediate=1536, layers=8, heads=8, kv_heads=4,
                head_dim=64, context=1024)  # fmt: skip
    write_gguf(path, tiny, "F16")

    def process(factor: float) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(path), str(factor)],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    process(10)
    for factor, kind in ((1, "BudgetProvider"), (1.15, "BudgetProvider"), (2, "RamProvider")):
        provider, peak, ram = process(factor)
        assert provider == kind
        assert int(peak) <= int(ram)
