"""A token replayed as tables must be the token run operator by operator.

To the last bit: both run the same kernels, or what rounds as they do.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from onnx import TensorProto, helper, numpy_helper
from onnx_models import make, value

from onnxstream_nb.errors import Interrupted, ShapeError
from onnxstream_nb.formats import load_bytes
from onnxstream_nb.graph import Graph
from onnxstream_nb.kernels.lowered import Table
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.packing import PackedProvider

IDS = [3, 17, 5, 40, 2, 9, 11]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lowering") / "tiny.gguf"
    write_gguf(file, Tiny(context=1024), "F32")  # no rounding of activations
    return file


def same(mine: np.ndarray, reference: np.ndarray) -> None:
    np.testing.assert_array_equal(mine, reference)


def replaying(path: Path, threads: int = 1) -> LanguageModel:
    return LanguageModel(path, load="mmap", threads=threads)


def plain(path: Path, threads: int = 1) -> LanguageModel:
    model = LanguageModel(path, load="stream", threads=threads)
    model.session._recordings_left = 0
    return model


def tokens(model: LanguageModel, count: int) -> list[np.ndarray]:
    model.feed(IDS)
    return [model.feed([1 + i % 50]).copy() for i in range(count)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_replayed_tokens_equal_plain_ones_and_are_recorded_once(path: Path, threads: int) -> None:
    fast, slow = replaying(path, threads), plain(path, threads)
    fast.feed([1])
    recorded = fast.session._replay
    fast.rewind(0)
    for mine, reference in zip(tokens(fast, 300), tokens(slow, 300), strict=True):
        same(mine, reference)
    assert fast.session._replay is recorded is not None
    assert slow.session._replay is None


@pytest.mark.parametrize("encoding", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize("threads", [1, 3])
def test_replayed_products_with_packed_weights_equal_plain_ones(
    encoding: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, panels_pay: None
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, Tiny(tied=True), encoding)
    fast, slow = (LanguageModel(file, load="ram", threads=threads) for _ in range(2))
    monkeypatch.setattr(slow.session, "_replayed", lambda *_: None)
    assert isinstance(fast.session.provider, PackedProvider)
    for mine, reference in zip(tokens(fast, 40), tokens(slow, 40), strict=True):
        same(mine, reference)
    assert fast.session._replay is not None and slow.session._replay is None
    for model in (fast, slow):
        model.close()


def test_replay_goes_on_after_rewinding_and_after_a_longer_pass(path: Path) -> None:
    fast, slow = replaying(path), plain(path)
    for model in (fast, slow):
        tokens(model, 5)
        model.rewind(8)
        model.feed([4, 5, 6])
    same(fast.feed([7]), slow.feed([7]))
    assert fast.tokens == slow.tokens
    for model in (fast, slow):
        model.rewind(2)
    same(fast.feed([8]), slow.feed([8]))


def test_logits_of_a_replay_are_not_overwritten_by_the_next(path: Path) -> None:
    model = replaying(path)
    model.feed(IDS)
    model.feed([1])
    first = model.feed([2])
    kept = first.copy()
    model.feed([3])
    np.testing.assert_array_equal(first, kept)


def test_a_stopped_replay_leaves_the_cache_as_it_was(path: Path) -> None:
    model, reference = replaying(path), plain(path)
    for each in (model, reference):
        tokens(each, 3)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        model.feed([9], stop)
    assert len(model.tokens) == model._cache.length == len(IDS) + 3
    same(model.feed([9]), reference.feed([9]))


def test_two_models_replay_in_turns(path: Path) -> None:
    one, two, reference = replaying(path), replaying(path), plain(path)
    for model in (one, two, reference):
        model.feed(IDS)
    for i in range(4):
        expected = reference.feed([i])
        same(one.feed([i]), expected)
        same(two.feed([i]), expected)


def position_table_graph() -> Graph:
    """Logits of an embedding plus a row of a table, which a Slice looks up by the past's length."""
    size, rng = 32, np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(array, name)
        for name, array in (
            ("embedding", rng.standard_normal((size, size)).astype(np.float32)),
            ("table", rng.standard_normal((64, size)).astype(np.float32)),
            ("two", np.array([2])), ("one", np.array([1])), ("zero", np.array([0])),
        )
    ]  # fmt: skip
    node = helper.make_node
    past, total = [1, 1, "past", size], [1, 1, "total", size]
    model = make(
        [
            node("Gather", ["embedding", "input_ids"], ["e"]),
            node("Shape", ["past_key_values.0.key"], ["shape"]),
            node("Gather", ["shape", "two"], ["start"]),
            node("Add", ["start", "one"], ["stop"]),
            node("Slice", ["table", "start", "stop", "zero"], ["row"]),
            node("Add", ["e", "row"], ["x"]),
            node("Attention", ["x", "x", "x", "", "past_key_values.0.key",
                               "past_key_values.0.value"],
                 ["logits", "present.0.key", "present.0.value"],
                 q_num_heads=1, kv_num_heads=1, is_causal=1),
        ],
        [value("input_ids", TensorProto.INT64, [1, "t"]),
         value("past_key_values.0.key", shape=past), value("past_key_values.0.value", shape=past)],
        [value("logits", shape=[1, "t", size]), value("present.0.key", shape=total),
         value("present.0.value", shape=total)],
        weights, opset_imports=[helper.make_opsetid("", 23)],
    )  # fmt: skip
    return load_bytes(model.SerializeToString())


def test_a_view_that_follows_the_position_is_taken_anew() -> None:
    graph = position_table_graph()
    fast = LanguageModel(graph, load="mmap", threads=1)
    slow = LanguageModel(graph, load="stream", threads=1)
    for i in range(8):
        same(fast.feed([i]), slow.feed([i]))
    assert fast.session._replay is not None


def is_replaying(model: LanguageModel) -> bool:
    before = model.session._replay
    model.feed([1])
    return before is not None and model.session._replay is before


def test_a_window_beside_tables(tmp_path: Path) -> None:
    """Its mask and its Attention grow with the position; the rest is tables all the same."""
    write_gguf(tmp_path / "window.gguf", Tiny(context=128, window=16), "F32")
    fast, slow = replaying(tmp_path / "window.gguf"), plain(tmp_path / "window.gguf")
    for i in range(40):  # beyond the window
        same(fast.feed([i]), slow.feed([i]))
    assert is_replaying(fast)


@pytest.mark.parametrize("name", [
    "llama_gqa_op14", "mistral_sw8_op14", "llama_gqa_dyn23", "onnxstream_llama_small",
])  # fmt: skip
def test_exports_with_a_mask_are_replayed(name: str) -> None:
    model = Path(__file__).parent / "fixtures" / "models" / name
    fast, slow = replaying(model, 2), plain(model)
    for ids in (IDS, *([i] for i in range(1, 20))):
        same(fast.feed(ids), slow.feed(ids))
    assert is_replaying(fast)


def test_every_turn_of_a_long_chat_is_replayed(path: Path) -> None:
    model = replaying(path)
    for _ in range(5):  # a prompt is no token: it must not count as a failed replay
        model.feed(IDS)
        for i in range(3):
            model.feed([i])
        assert is_replaying(model)


def test_a_graph_whose_tables_never_fit_again_is_given_up(path: Path) -> None:
    model = replaying(path)
    model.feed([1])
    for _ in range(2):
        assert model.session._replay is not None
        model.session._replay.run = lambda feeds, stop: False  # type: ignore[method-assign]
        model.feed([2])
    assert model.session._replay is None
    model.feed([3])
    assert model.session._replay is None


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_views_between_rows_stay_inside_a_table(tmp_path: Path, architecture: str) -> None:
    write_gguf(tmp_path / "q.gguf", Tiny(architecture=architecture, context=128), "F32")
    fast, slow = replaying(tmp_path / "q.gguf"), plain(tmp_path / "q.gguf")
    for i in range(12):
        same(fast.feed([i]), slow.feed([i]))
    assert is_replaying(fast)
    replay = fast.session._replay
    assert replay is not None and sum(hasattr(p, "step") for p in replay._parts) <= 6


@pytest.mark.parametrize("encoding", ["F32", "F16", "Q8_0"])
def test_a_token_of_a_model_in_memory_is_one_table(encoding: str, tmp_path: Path) -> None:
    """With the row of the embedding, which is read from its file, and the positions' angles."""
    write_gguf(tmp_path / "tiny.gguf", Tiny(tied=True), encoding)
    fast, slow = (LanguageModel(tmp_path / "tiny.gguf", load="ram", threads=2) for _ in range(2))
    slow.session._recordings_left = 0
    for mine, reference in zip(tokens(fast, 12), tokens(slow, 12), strict=True):
        same(mine, reference)
    assert fast.session._replay is not None and slow.session._replay is None
    assert [type(part) for part in fast.session._replay._parts] == [Table]


def test_an_id_that_no_row_has_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", Tiny(), "F32")
    model, reference = (LanguageModel(tmp_path / "tiny.gguf", load="ram") for _ in range(2))
    for each in (model, reference):
        tokens(each, 3)
    for wrong in (1_000_000, -1_000_000):
        with pytest.raises(ShapeError, match=f"index {wrong} is out of range"):
            model.feed([wrong])
    assert len(model.tokens) == model._cache.length == len(IDS) + 3
    same(model.feed([9]), reference.feed([9]))
    assert is_replaying(model)


def computed_ids_graph(path: Path) -> None:
    """Logits are the row of a table, and of an array, that a step of Python's between tables picks:
    half of the id, and the last row but that."""
    table = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    node, past = helper.make_node, [1, 1, "past", 32]
    model = make(
        [
            node("Cast", ["input_ids"], ["float"], to=TensorProto.FLOAT),
            node("Mul", ["float", "half"], ["halves"]),
            node("Cast", ["halves"], ["ids"], to=TensorProto.INT64),
            node("Gather", ["table", "ids"], ["x"]),
            node("Attention", ["x", "x", "x", "", "past_key_values.0.key",
                               "past_key_values.0.value"],
                 ["y", "present.0.key", "present.0.value"],
                 q_num_heads=1, kv_num_heads=1, is_causal=1),
            node("Neg", ["halves"], ["minus"]),
            node("Cast", ["minus"], ["back"], to=TensorProto.INT64),
            node("Sub", ["back", "one"], ["last"]),
            node("Transpose", ["y"], ["columns"], perm=[0, 2, 1]),
            node("Gather", ["columns", "last"], ["picked"], axis=1),
            node("Add", ["picked", "x"], ["logits"]),
        ],
        [value("input_ids", TensorProto.INT64, [1, "t"]),
         value("past_key_values.0.key", shape=past), value("past_key_values.0.value", shape=past)],
        [value("logits", shape=[1, "t", "t", 32]),
         value("present.0.key", shape=[1, 1, "total", 32]),
         value("present.0.value", shape=[1, 1, "total", 32])],
        [numpy_helper.from_array(a, n) for n, a in (
            ("table", table), ("half", np.float32(0.5)), ("one", np.int64(1)))],
        opset_imports=[helper.make_opsetid("", 23)],
    )  # fmt: skip
    path.write_bytes(model.SerializeToString())


def test_rows_are_picked_when_their_numbers_are_known(tmp_path: Path) -> None:
    computed_ids_graph(tmp_path / "ids.onnx")
    fast, slow = (LanguageModel(tmp_path / "ids.onnx", load="ram", threads=1) for _ in range(2))
    slow.session._recordings_left = 0
    for i in (4, 40, 7, 60, 0):
        same(fast.feed([i]), slow.feed([i]))
    for model in (fast, slow):
        with pytest.raises(ShapeError, match="index 32 is out of range"):
            model.feed([64])
    same(fast.feed([9]), slow.feed([9]))
    assert is_replaying(fast) and slow.session._replay is None
