"""A pass of a few tokens gives what as many passes of one token give, to the last bit.

Operators are compared row by row, also where there are many rows: none may depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_oracles import normal
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from tokenizer_fixtures import smollm2

from onnxstream_nb import registry
from onnxstream_nb.errors import UnsupportedError
from onnxstream_nb.kernels.attention import attention_23, attention_24, lower_attention
from onnxstream_nb.kernels.lowered import FEW_ROWS, Table
from onnxstream_nb.kernels.threads import set_threads
from onnxstream_nb.kvslot import KVSlot, SlotGroup
from onnxstream_nb.llm import LanguageModel

Array = np.ndarray[Any, Any]
ENCODINGS = pytest.mark.parametrize("encoding", ["f16", "q8"])
THREADS = pytest.mark.parametrize("threads", [1, 2, 5])
HEADS, GROUP, SIZE, VALUE_SIZE = 2, 3, 24, 40
NUMBERS = {"q_num_heads": HEADS * GROUP, "kv_num_heads": HEADS}

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(8)


def same(got: Any, wanted: Any) -> None:
    assert np.asarray(got).dtype == np.asarray(wanted).dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


# -- attention ---------------------------------------------------------------------------------


def new_tokens(rng: np.random.Generator, tokens: int) -> list[Array]:
    """q, k and v (1, T, heads size)."""
    widths = (HEADS * GROUP * SIZE, HEADS * SIZE, HEADS * VALUE_SIZE)
    return [normal(rng, 1, tokens, width) for width in widths]


def filled(rng: np.random.Generator, length: int, encoding: str) -> list[KVSlot]:
    """Slots of keys and values with so many positions."""
    sizes = {"key": SIZE, "value": VALUE_SIZE}
    slots = [
        KVSlot(kind, HEADS, size, encoding=encoding, positions=1000) for kind, size in sizes.items()
    ]
    if length:
        attention_23(*new_tokens(rng, length), None, *slots, is_causal=1, **NUMBERS)
        moved(slots, length)
    return slots


def copies(slots: list[KVSlot]) -> list[KVSlot]:
    """The same content in memory of its own."""
    made = [slot.in_memory() for slot in slots]
    for copy, slot in zip(made, slots, strict=True):
        copy.memory[:], copy.length = slot.memory, slot.length
    return made


def moved(slots: list[KVSlot], tokens: int) -> None:
    for slot in slots:
        slot.length += tokens


def one_by_one(
    slots: list[KVSlot],
    new: list[Array],
    attend: Callable[..., Any] = attention_23,
    mask: Array | None = None,
    **attributes: Any,
) -> Array:
    """Attention of each token by itself; the slots then hold all of them."""
    results = []
    for i in range(new[0].shape[1]):
        seen = None if mask is None else mask[..., i : i + 1, : slots[0].length + 1]
        token = [x[:, i : i + 1] for x in new]
        results.append(attend(*token, seen, *slots, **NUMBERS, **attributes))
        moved(slots, 1)
    return np.concatenate(results, axis=1)


@ENCODINGS
@THREADS
@pytest.mark.parametrize("before", [0, 29, 255, 700])
@pytest.mark.parametrize("tokens", [2, 5, FEW_ROWS])
def test_attention_of_a_few_tokens(
    tokens: int, before: int, threads: int, encoding: str, rng: np.random.Generator
) -> None:
    set_threads(threads)
    slots = filled(rng, before, encoding)
    others, new = copies(slots), new_tokens(rng, tokens)
    y = attention_23(*new, None, *slots, is_causal=1, softcap=3.0, **NUMBERS)
    same(y, one_by_one(others, new, is_causal=1, softcap=3.0))
    moved(slots, tokens)
    for slot, other in zip(slots, others, strict=True):
        same(slot, other)


def causal(before: int, tokens: int, least: float) -> Array:
    """An additive mask (T, S) as exports write it."""
    distance = np.arange(before, before + tokens)[:, None] - np.arange(before + tokens)
    return np.where(distance >= 0, np.float32(0), np.float32(least))


@ENCODINGS
@pytest.mark.parametrize("least", [-np.inf, np.finfo(np.float32).min, np.finfo(np.float16).min])
def test_attention_under_a_causal_mask(
    least: float, encoding: str, rng: np.random.Generator
) -> None:
    set_threads(2)
    slots = filled(rng, 90, encoding)
    others, new, mask = copies(slots), new_tokens(rng, 6), causal(90, 6, least)
    mask[:, 40:45] = least
    y = attention_23(*new, mask, *slots, **NUMBERS)
    same(y, one_by_one(others, new, mask=mask))
    moved(others, -6)
    same(attention_23(*new, mask == 0, *others, **NUMBERS), y)


def test_attention_in_a_window(rng: np.random.Generator) -> None:
    slots = filled(rng, 60, "f16")
    others, new = copies(slots), new_tokens(rng, 4)
    window = {"left_window_size": 11, "is_causal": 1}
    y = attention_24(*new, None, *slots, **window, **NUMBERS)
    same(y, one_by_one(others, new, attention_24, **window))


def test_tokens_that_see_later_ones_are_no_single_tokens(rng: np.random.Generator) -> None:
    """Nothing hides the last token from the first ones: they must not be computed without it."""
    slots, new = filled(rng, 10, "f16"), new_tokens(rng, 3)
    for mask in (None, np.zeros((3, 13), np.float32)):
        y = attention_23(*new, mask, *slots, **NUMBERS)
        alone = one_by_one(copies(slots), new)
        assert np.abs(y[:, 0] - alone[:, 0]).max() > 1e-3
        np.testing.assert_allclose(y[:, 2], alone[:, 2], rtol=0, atol=1e-5)


@ENCODINGS
@THREADS
def test_attention_of_several_sequences(
    threads: int, encoding: str, rng: np.random.Generator
) -> None:
    """Each sequence as if it were alone: prompts, a few tokens, and single ones."""
    set_threads(threads)
    parts = [(0, 30), (300, 1), (31, 4), (255, 9), (0, 1)]
    caches = [filled(rng, before, encoding) for before, _ in parts]
    alone, new = (
        [copies(slots) for slots in caches],
        [new_tokens(rng, tokens) for _, tokens in parts],
    )
    counts = [tokens for _, tokens in parts]
    groups = [SlotGroup(list(zip(s, counts, strict=True))) for s in zip(*caches, strict=True)]
    joined = [np.concatenate(x, axis=1) for x in zip(*new, strict=True)]
    y = attention_23(*joined, None, *groups, is_causal=1, **NUMBERS)
    wanted = [
        attention_23(*x, None, *s, is_causal=1, **NUMBERS) for x, s in zip(new, alone, strict=True)
    ]
    same(y, np.concatenate(wanted, axis=1))
    for mine, others, count in zip(caches, alone, counts, strict=True):
        moved([*mine, *others], count)
        for slot, other in zip(mine, others, strict=True):
            same(slot, other)


def test_sequences_share_no_mask(rng: np.random.Generator) -> None:
    slots = filled(rng, 5, "f16")
    groups = [SlotGroup([(slot, 2)]) for slot in slots]
    assert groups[0].shape == (1, HEADS, 5, SIZE)
    with pytest.raises(UnsupportedError, match="several sequences"):
        attention_23(*new_tokens(rng, 2), np.zeros((2, 7), np.float32), *groups, **NUMBERS)


# -- the other operators -----------------------------------------------------------------------

WIDTHS = (3, 33, 576, 5000)
OPERATORS: dict[str, dict[str, Any]] = {
    "Sigmoid": {}, "Swish": {}, "Tanh": {}, "Exp": {}, "Gelu": {}, "Erf": {}, "Relu": {},
    "Softmax": {}, "LogSoftmax": {}, "Cos": {}, "Sin": {}, "Neg": {}, "Sqrt": {}, "Reciprocal": {},
}  # fmt: skip


def call(op_type: str, *inputs: Array, **attributes: Any) -> Array:
    operator = registry.lookup(op_type, "", 24)
    assert operator is not None
    result: Array = operator.function(*inputs, **attributes)
    return result


def check_rows(run: Callable[..., Array], *inputs: Array) -> None:
    """A run over inputs (1, T, ...), and over each of their rows."""
    whole = run(*inputs)
    for i in range(inputs[0].shape[1]):
        same(whole[:, i : i + 1], run(*(x[:, i : i + 1] for x in inputs)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [2, FEW_ROWS, 40])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("op_type", OPERATORS)
def test_rows_of_functions(
    op_type: str, width: int, tokens: int, dtype: Any, rng: np.random.Generator
) -> None:
    set_threads(2)
    x = 4 * normal(rng, 1, tokens, width)
    x = np.abs(x) if op_type == "Sqrt" else x
    check_rows(lambda x: call(op_type, x), x.astype(dtype))


@pytest.mark.parametrize("op_type", ["Add", "Mul", "Sub", "Div"])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_arithmetic(op_type: str, width: int, rng: np.random.Generator) -> None:
    set_threads(2)
    a, b, bias = (normal(rng, *shape) for shape in ((1, 40, width), (1, 40, width), (width,)))
    check_rows(lambda a, b: call(op_type, a, b), a, b)
    check_rows(lambda a: call(op_type, a, bias), a)


@pytest.mark.parametrize("tokens", [2, FEW_ROWS, 40])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_norms(width: int, tokens: int, rng: np.random.Generator) -> None:
    set_threads(2)
    x, scale, bias = normal(rng, 1, tokens, width), normal(rng, width), normal(rng, width)
    check_rows(lambda x: call("RMSNormalization", x, scale), x)
    check_rows(lambda x: call("LayerNormalization", x, scale, bias), x)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("tokens", [2, FEW_ROWS, 40])
def test_rows_of_rotations(tokens: int, interleaved: int, rng: np.random.Generator) -> None:
    set_threads(2)
    x, angles = normal(rng, 1, tokens, 6 * 40), 9 * normal(rng, 1, tokens, 20)
    how = {"num_heads": 6, "interleaved": interleaved}
    check_rows(lambda x, a: call("RotaryEmbedding", x, np.cos(a), np.sin(a), **how), x, angles)


# -- models ------------------------------------------------------------------------------------


def held(model: LanguageModel) -> list[Array]:
    return [np.array(slot) for slot in model._cache.slots.values()]


def check_model(model: LanguageModel, ids: list[int], few: list[int]) -> None:
    """`few` read at once and one by one behind `ids`: the last logits, and the cache."""
    model.feed(ids)
    wanted = [model.feed([token]).copy() for token in few][-1]
    cache = held(model)
    model.rewind(len(ids))
    same(model.feed(few), wanted)
    for mine, other in zip(held(model), cache, strict=True):
        same(mine, other)
    model.close()


def random_ids(count: int, vocabulary: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(count).integers(3, vocabulary, count)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("load", ["ram", "stream"])
@pytest.mark.parametrize("encoding", ["F32", "F16", "Q8_0", "Q4_1"])
def test_few_tokens_of_a_llama(
    encoding: str, load: str, threads: int, tmp_path: Path, panels_pay: None
) -> None:
    tiny = Tiny(hidden=64, head_dim=16, intermediate=96, context=400)
    write_gguf(tmp_path / "tiny.gguf", tiny, encoding)
    ids = random_ids(250, 64)
    for few in (2, 7, FEW_ROWS):
        model = LanguageModel(tmp_path / "tiny.gguf", load=load, threads=threads)
        check_model(model, ids, random_ids(few, 64))


@pytest.mark.skipif(smollm2() is None, reason="SmolLM2 absent: set ONNXSTREAM_TEST_SMOLLM2")
@pytest.mark.parametrize("load", ["ram", "stream"])
@pytest.mark.parametrize("kv_cache", ["f16", "q8"])
def test_few_tokens_of_smollm2(load: str, kv_cache: str) -> None:
    path = smollm2()
    assert path is not None
    model = LanguageModel(path, load=load, threads=2, kv_cache=kv_cache)
    check_model(model, random_ids(40, 40000), random_ids(6, 40000))


# -- rows of a table ---------------------------------------------------------------------------


def test_a_table_of_tokens_moves_with_the_cache(rng: np.random.Generator) -> None:
    """What one token's row does is done again a position further, whatever came before."""
    slots = filled(rng, 40, "f16")
    others, new = copies(slots), new_tokens(rng, 1)
    rows = lower_attention(*new, None, *slots, is_causal=1, **NUMBERS)
    assert rows is not None
    table, first = Table([rows]), new_tokens(rng, 5)
    same(attention_23(*first, None, *slots, is_causal=1, **NUMBERS), one_by_one(others, first))
    table.run(5)
    moved(slots, 5)
    same(rows.outputs[0], one_by_one(others, new))
