"""The cache of keys and values: growth, rewinding, and its contents as plain arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, load_from_string
from onnx_models import make, refusal, run, value

from onnxstream_nb.device import current_rss
from onnxstream_nb.errors import MemoryBudgetError, UnsupportedError, UsageError
from onnxstream_nb.formats import load_bytes
from onnxstream_nb.graph import Graph, Node, Value
from onnxstream_nb.kvcache import ArraySlot, KVCache, KVSlot, bytes_at, bytes_per_position
from onnxstream_nb.passes.kvcache import CachePair
from onnxstream_nb.session import Session
from onnxstream_nb.weights import numpy_dtype

Array = np.ndarray[Any, Any]


def put(slot: KVSlot, new: Array) -> None:
    """Append (1, KV, T, D) in the layout that the class describes, as the kernel does."""
    at, tokens = slot.length, new.shape[2]
    slot.reserve(at + tokens)
    rows = new[0].astype(np.float32)
    if slot.quantised:
        scales = np.abs(rows).max(axis=2, initial=0) / np.float32(127)
        slot.scales[:, at : at + tokens] = scales
        rows = np.rint(rows / np.where(scales == 0, 1, scales)[:, :, None])
    for t in range(tokens):
        for i in range(slot.size):
            if slot.kind == "key":
                slot.array[:, (at + t) // 32, i, (at + t) % 32] = rows[:, t, i]
            else:
                slot.array[:, i // 32, at + t, i % 32] = rows[:, t, i]
    slot.length = at + tokens


@pytest.mark.parametrize("encoding", ["f16", "q8"])
@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize(("heads", "size"), [(1, 1), (3, 8), (2, 33), (5, 64)])
def test_slot_against_concatenation(kind: str, heads: int, size: int, encoding: str) -> None:
    rng = np.random.default_rng(heads * size)
    slot = KVSlot(kind, heads, size, encoding=encoding)
    plain = np.zeros((1, heads, 0, size), np.float16)
    assert slot.shape == np.asarray(slot).shape == plain.shape
    assert slot.nbytes == slot.length == 0
    for step, tokens in enumerate((1, 254, 1, 1, 0, 700, 3, 1)):
        new = rng.standard_normal((1, heads, tokens, size)).astype(np.float16)
        put(slot, new)
        plain = np.concatenate([plain, new], axis=2)
        if step == 5:  # forget some, and write over them
            slot.length = 257
            plain = plain[:, :, :257]
        assert slot.shape == plain.shape
        exact = plain.astype(np.float32)
        if encoding == "f16":
            np.testing.assert_array_equal(np.asarray(slot), exact)
        else:
            step = np.abs(exact).max(axis=3, keepdims=True, initial=0) / 127
            assert (np.abs(np.asarray(slot) - exact) <= 0.5001 * step).all()
    assert np.asarray(slot).dtype == np.float32
    assert np.asarray(slot, np.float16).dtype == np.float16
    assert slot.address == slot.array.ctypes.data
    assert slot.room_bytes == slot.array.nbytes + slot.scales.nbytes
    assert slot.array.size >= slot.capacity * heads * size


@pytest.mark.parametrize("encoding", ["f16", "q8"])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_slot_stays_where_it_is_until_it_is_full(kind: str, encoding: str) -> None:
    slot = KVSlot(kind, 2, 32, encoding=encoding, positions=1000)
    address, each = slot.address, 2 * (32 * 2 if encoding == "f16" else 32 + 4)
    assert 1000 <= slot.capacity < 1100 and slot.room_bytes == slot.capacity * each
    for length in range(1, slot.capacity + 1):
        slot.reserve(length)
        slot.length = length
        assert slot.address == address
        assert slot.nbytes == -(-length // 32) * 32 * each
    with pytest.raises(UsageError, match="do not fit a cache that was made for 1056"):
        slot.reserve(slot.capacity + 1)
    slot.length = 3
    assert slot.nbytes == slot.room_bytes  # rewinding gives nothing back


@pytest.mark.parametrize("positions", [1, 31, 32, 33, 256, 4096, 8192, 100_000])
def test_heads_do_not_meet_in_the_same_sets_of_a_cache(positions: int) -> None:
    slot = KVSlot("key", 1, 1, positions=positions)
    assert positions <= slot.capacity < positions + 64
    assert slot.capacity % 32 == 0 != slot.capacity % 256


def test_a_slot_takes_memory_as_it_fills() -> None:
    before = current_rss()
    slot = KVSlot("key", 4, 128, positions=2_000_000)
    assert slot.room_bytes > 2_000_000_000 and slot.nbytes == 0
    put(slot, np.ones((1, 4, 320, 128), np.float16))
    assert slot.nbytes == 4 * 320 * 256
    assert slot.nbytes - 4096 <= current_rss() - before < slot.nbytes + 4_000_000


def test_address_space_that_the_system_refuses() -> None:
    message = refusal(lambda: KVSlot("key", 64, 128, positions=1 << 50), MemoryBudgetError)
    assert "--context" in message


def test_slot_as_array_is_a_copy() -> None:
    slot = KVSlot("value", 1, 4)
    put(slot, np.ones((1, 1, 2, 4), np.float16))
    before = np.asarray(slot)
    slot.length = 0
    put(slot, np.zeros((1, 1, 2, 4), np.float16))
    assert before.all() and not np.asarray(slot).any()


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_array_slot_against_concatenation(axis: int) -> None:
    shape = [1, 3, 5, 7]
    rng = np.random.default_rng(axis)
    slot = ArraySlot(shape, axis, np.dtype(np.float32))
    plain = np.zeros([0 if i == axis else n for i, n in enumerate(shape)], np.float32)
    assert slot.shape == np.asarray(slot).shape == plain.shape and slot.nbytes == 0
    for tokens, rewound in ((1, 1), (255, 256), (1, 257), (0, 100), (900, 1000), (2, 0), (5, 5)):
        new = rng.standard_normal([tokens if i == axis else n for i, n in enumerate(shape)])
        assert slot.append(new) is slot
        plain = np.concatenate([plain, new.astype(np.float32)], axis)
        np.testing.assert_array_equal(np.asarray(slot), plain)
        slot.length = rewound
        plain = np.take(plain, range(rewound), axis)
        assert slot.shape == plain.shape
        np.testing.assert_array_equal(np.asarray(slot), plain)
    assert slot.nbytes == slot.room_bytes // slot.capacity * 1024 >= plain.nbytes
    with pytest.raises(UsageError, match="1 positions do not fit a cache that was made for 0"):
        ArraySlot(shape, axis, np.dtype(np.float32), 0).append(new[:, :1, :1, :1])
    copy = np.array(slot)
    slot.array[...] = 9
    assert not (copy == 9).any()


def test_array_slot_keeps_its_type() -> None:
    slot = ArraySlot((1, 2, 1, 3), 2, np.dtype(np.float16)).append(np.ones((1, 2, 4, 3)))
    assert np.asarray(slot).dtype == np.float16
    assert np.asarray(slot, np.float64).dtype == np.float64


def _attention_model(heads: int, kv_heads: int, size: int, opset: int = 23) -> bytes:
    """y, present_key, present_value = Attention(q, k, v, "", past_key, past_value), causal."""
    node = helper.make_node(
        "Attention", ["q", "k", "v", "", "past_key", "past_value"],
        ["y", "present_key", "present_value"], is_causal=1,
    )  # fmt: skip
    past, total = (1, kv_heads, "past", size), (1, kv_heads, "total", size)
    model = make(
        [node],
        [value("q", shape=(1, heads, "t", size)), value("k", shape=(1, kv_heads, "t", size)),
         value("v", shape=(1, kv_heads, "t", size)), value("past_key", shape=past),
         value("past_value", shape=past)],
        [value("y", shape=(1, heads, "t", size)), value("present_key", shape=total),
         value("present_value", shape=total)],
        opset_imports=[helper.make_opsetid("", opset)], ir_version=11,
    )  # fmt: skip
    data: bytes = model.SerializeToString()
    return data


@pytest.mark.parametrize("threads", [1, 2])
def test_the_operator_appends_in_place(threads: int) -> None:
    """Against the same operator over arrays that are fed back, which concatenate."""
    heads, kv_heads, size = 6, 2, 24
    rng = np.random.default_rng(5)
    graph = load_bytes(_attention_model(heads, kv_heads, size))
    slots = {
        "past_key": KVSlot("key", kv_heads, size),
        "past_value": KVSlot("value", kv_heads, size),
    }
    past = {name: np.zeros((1, kv_heads, 0, size), np.float32) for name in slots}
    with Session(graph, threads=threads) as session:
        for tokens in (5, 1, 250, 1, 9):
            feeds = {
                name: rng.standard_normal((1, n, tokens, size)).astype(np.float16).astype("f4")
                for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            }
            got, wanted = session.run(feeds | slots), session.run(feeds | past)
            for name, slot in slots.items():
                present = got[name.replace("past", "present")]
                assert present.array is slot.array  # no copy
                assert present.length == slot.length + tokens
                slot.length = present.length
            past = {n: wanted[n.replace("past", "present")] for n in slots}
            for name, slot in slots.items():  # numbers that float16 holds exactly
                np.testing.assert_array_equal(np.asarray(slot), past[name])
            np.testing.assert_allclose(got["y"], wanted["y"], rtol=0, atol=2e-5)


def test_cached_attention_against_onnx() -> None:
    """A step over a filled cache, against the ONNX package's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    heads, kv_heads, size, before, tokens = 4, 2, 17, 37, 3
    data = _attention_model(heads, kv_heads, size)
    rng = np.random.default_rng(6)

    def numbers(n: int, t: int) -> Array:
        return rng.standard_normal((1, n, t, size)).astype(np.float16).astype(np.float32)

    feeds = {"q": numbers(heads, tokens), "k": numbers(kv_heads, tokens),
             "v": numbers(kv_heads, tokens)}  # fmt: skip
    past = {"past_key": numbers(kv_heads, before), "past_value": numbers(kv_heads, before)}
    wanted = dict(
        zip(
            ("y", "present_key", "present_value"),
            ReferenceEvaluator(data).run(None, feeds | past),
            strict=True,
        )
    )
    slots = {name: KVSlot(name.removeprefix("past_"), kv_heads, size) for name in past}
    for name, slot in slots.items():
        put(slot, past[name])
    with Session(data) as session:
        got = session.run(feeds | slots)
    for name in wanted:
        np.testing.assert_allclose(np.asarray(got[name]), wanted[name], rtol=0, atol=1e-5)


def _cache_graph(reader: str) -> tuple[Graph, list[CachePair]]:
    inputs = tuple(
        Value(f"past.{i}", "float32", (1, 2, "past", 40 if i == "key" else 24))
        for i in ("key", "value")
    )
    q = Value("q", "float32", (1, 2, "t", 40))
    readers = {
        "Attention": Node(
            "Attention", ("q", "q", "q", "", "past.key", "past.value"), ("y", "a", "b")
        ),
        "Concat": Node("Concat", ("past.key", "past.value"), ("y",), {"axis": 3}),
    }
    graph = Graph((readers[reader],), (q, *inputs), (), {}, {"": 23})
    pairs = [CachePair("past.key", "a", "key"), CachePair("past.value", "b", "value")]
    return graph, pairs


def test_slots_follow_what_reads_them() -> None:
    fused, plain = (KVCache(*_cache_graph(kind)) for kind in ("Attention", "Concat"))
    graph, pairs = _cache_graph("Attention")
    counted = (*graph.nodes, Node("Shape", ("past.key",), ("size",)))
    assert isinstance(KVCache(graph.with_(nodes=counted), pairs).slots["past.key"], KVSlot)
    key, values = fused.slots["past.key"], fused.slots["past.value"]
    assert isinstance(key, KVSlot) and isinstance(values, KVSlot)
    assert (key.kind, key.heads, key.size) == ("key", 2, 40)
    assert (values.kind, values.heads, values.size) == ("value", 2, 24)
    assert all(isinstance(s, ArraySlot) for s in plain.slots.values())
    assert plain.slots["past.key"].shape == (1, 2, 0, 40)


def test_length_of_a_cache_is_what_all_slots_hold() -> None:
    cache = KVCache(*_cache_graph("Attention"))
    assert cache.length == cache.nbytes == 0
    for slot, length in zip(cache.slots.values(), (7, 5), strict=True):
        slot.reserve(length)
        slot.length = length
    assert cache.length == 5
    assert cache.nbytes == sum(s.nbytes for s in cache.slots.values()) > 0
    with pytest.raises(ValueError, match="not in a cache of"):  # nothing can be made up
        cache.length = 100_000
    cache.length = 2
    assert [s.length for s in cache.slots.values()] == [2, 2]


def test_bytes_per_position() -> None:
    graph, pairs = _cache_graph("Attention")
    # Values of 24 are padded to 32.
    assert bytes_per_position(graph, pairs) == 2 * 2 * (40 + 32)
    assert bytes_per_position(graph, pairs, "q8") == 2 * (40 + 32 + 2 * 4)
    assert bytes_per_position(graph, []) == 0


@pytest.mark.parametrize(
    ("reader", "encoding"), [("Attention", "f16"), ("Attention", "q8"), ("Concat", "f16")]
)
@pytest.mark.parametrize("positions", [1, 256, 1000, 4097])
def test_bytes_at_are_never_exceeded(positions: int, reader: str, encoding: str) -> None:
    graph, pairs = _cache_graph(reader)
    cache = KVCache(graph, pairs, encoding, positions)
    cache.length = positions
    least = bytes_per_position(graph, pairs, encoding) * positions
    assert least <= cache.nbytes <= bytes_at(graph, pairs, positions, encoding)
    # A block more than is needed at most, and a page begun for each slot.
    most = bytes_per_position(graph, pairs, encoding) * (positions + 63) + 2 * 4096
    assert bytes_at(graph, pairs, positions, encoding) <= most
    assert bytes_at(graph, [], positions) == 0


def test_an_encoding_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="kv_cache must be one of f16, q8, not 'q4'"):
        KVCache(*_cache_graph("Attention"), "q4")
    with pytest.raises(UsageError, match="no Attention reads the graph's past"):
        KVCache(*_cache_graph("Concat"), "q8")


def test_heads_that_are_no_number() -> None:
    graph, pairs = _cache_graph("Attention")
    for shape in ((1, "heads", "past", 40), (1, 2, "past", None), None):
        odd = Value("past.key", "float32", shape)
        changed = graph.with_(inputs=(graph.inputs[0], odd, graph.inputs[2]))
        message = refusal(lambda g=changed: KVCache(g, pairs), UnsupportedError)
        assert "past.key" in message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("reader", ["Attention", "Concat"])
def test_a_past_has_the_type_that_the_graph_declares(dtype: str, reader: str) -> None:
    graph, pairs = _cache_graph(reader)
    inputs = tuple(Value(v.name, dtype, v.shape) for v in graph.inputs)
    for slot in KVCache(graph.with_(inputs=inputs), pairs).slots.values():
        slot.reserve(3)
        slot.length = 3
        assert np.asarray(slot).dtype == numpy_dtype(dtype)
        assert np.asarray(slot, np.float32).dtype == np.float32


def test_onnxruntime_agrees_on_the_layout_of_past() -> None:
    """Past comes before present along the third axis: Concat, as exports write it."""
    node = helper.make_node("Concat", ["past", "new"], ["present"], axis=2)
    shape = (1, 2, "n", 3)
    model = make([node], [value("past", shape=shape), value("new", shape=(1, 2, "m", 3))],
                 [value("present", shape=(1, 2, "k", 3))])  # fmt: skip
    rng = np.random.default_rng(1)
    past, new = (rng.standard_normal((1, 2, n, 3)).astype(np.float32) for n in (4, 2))
    slot = ArraySlot((1, 2, 1, 3), 2, np.dtype(np.float32)).append(past)
    wanted = run(model, {"past": past, "new": new})["present"]
    np.testing.assert_array_equal(np.asarray(slot.append(new)), wanted)


def test_a_past_keeps_its_shape_for_those_who_read_it_after_attention() -> None:
    model = load_from_string(_attention_model(2, 1, 8))
    model.graph.node.append(helper.make_node("Shape", ["past_key"], ["shape"]))
    model.graph.output.append(value("shape", TensorProto.INT64, (4,)))
    slots = {"past_key": KVSlot("key", 1, 8), "past_value": KVSlot("value", 1, 8)}
    feeds = {n: np.ones((1, h, 3, 8), np.float32) for n, h in (("q", 2), ("k", 1), ("v", 1))}
    with Session(model, optimize=False) as session:
        got = session.run(feeds | slots)
    assert got["shape"].tolist() == [1, 1, 0, 8]
    assert got["present_key"].shape == (1, 1, 3, 8)
