"""Calls that the thread team walks with no barrier between them compute what they do one by one.

Dims: H hidden, I inner, heads of D elements; M tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from kernel_oracles import Array, normal, random_weight
from panel_oracles import random_packed

from onnxstream_nb.kernels import joined as module
from onnxstream_nb.kernels.elementwise import lower_swish
from onnxstream_nb.kernels.joined import Flow, rows_of
from onnxstream_nb.kernels.lowered import Rows, Table
from onnxstream_nb.kernels.mapping import broadcast_rows
from onnxstream_nb.kernels.matmul import lower_matmul
from onnxstream_nb.kernels.norm import lower_rms
from onnxstream_nb.kernels.pointwise import add_f32, multiply_f32
from onnxstream_nb.kernels.rope import lower_rotary
from onnxstream_nb.kernels.threads import Team, set_threads
from onnxstream_nb.weights import Weight

THREADS = pytest.mark.parametrize("threads", [1, 2, 5])
HEADS, SIZE, HIDDEN, INNER = 8, 32, 256, 512

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


# -- what is joined ------------------------------------------------------------------------------


def call(name: str, flow: Flow | None, serial: bool = False, source: object = None) -> Rows:
    return Rows((), [(name,)], serial=serial, flows=(flow,), source=source)


def joined(*parts: Rows, shares: int = 4) -> list[str]:
    """The rows of a table, the names of a row's calls together."""
    return ["".join(str(line.call[0]) for line in row) for row in rows_of(parts, shares)]


def written(start: int, items: int = 64, align: int = 16, **reads: Any) -> Flow:
    """What writes float32 elements one by one, from address `start` on."""
    return Flow(((start, 4 * items),), items=items, align=align, **reads)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of compiled kernels, whatever this process runs."""
    monkeypatch.setattr(module, "JIT", True)


def test_products_of_one_value_are_a_row_and_so_is_what_follows_them_share_by_share() -> None:
    a, b = written(1000, whole=((0, 256),)), written(2000, whole=((0, 256),))
    both = written(3000, own=((1000, 256), (2000, 256)))
    assert joined(call("a", a), call("b", b), call("c", both)) == ["abc"]


def test_what_is_read_whole_is_waited_for() -> None:
    first = written(1000)
    assert joined(call("a", first), call("b", written(2000, whole=((1000, 256),)))) == ["a", "b"]
    part = written(2000, whole=((1200, 8),))
    assert joined(call("a", first), call("b", part)) == ["a", "b"]
    beside = written(2000, whole=((1256, 8), (992, 8)))
    assert joined(call("a", first), call("b", beside)) == ["ab"]


@pytest.mark.parametrize("items, align, each, alike", [
    (64, 16, 1, True), (16, 4, 4, True), (4, 1, 16, True), (64, 4, 1, True),
    (8, 1, 8, True), (0, 16, 1, False), (63, 16, 1, False), (2, 1, 32, False),
])  # fmt: skip
def test_shares_must_begin_at_the_same_elements(
    items: int, align: int, each: int, alike: bool
) -> None:
    follows = Flow(((2000, 256),), own=((1000, 256),), items=items, align=align, each=each)
    rows = joined(call("a", written(1000)), call("b", follows))
    assert rows == (["ab"] if alike else ["a", "b"])


def test_shares_must_begin_at_the_same_elements_for_their_number() -> None:
    parts = call("a", written(1000, 96, 4)), call("b", written(2000, 96, 16, own=((1000, 384),)))
    assert joined(*parts, shares=3) == ["ab"]
    assert joined(*parts, shares=4) == ["a", "b"]


@pytest.mark.parametrize("size, reads, items, shares", [
    (2, 16, 256, 16), (2, 15, 256, 8), (2, 4, 256, 4), (2, 3, 256, 2), (2, 0, 256, 2),
    (2, 16, 80, 2), (1, 16, 256, 1), (3, 40, 384, 24), (5, 40, 512, 32), (5, 31, 512, 16),
])  # fmt: skip
def test_a_row_is_cut_as_finely_as_its_calls_allow(
    size: int, reads: int, items: int, shares: int
) -> None:
    """By what it reads, and so that a share still finds what it wrote itself: 80 elements in blocks
    of 16 and of 32 begin alike in 2 shares only."""
    first = written(100_000, items, 16, weights=reads * module.SHARE_BYTES)
    align = 32 if items == 80 else 16
    follows = written(200_000, items, align, own=((100_000, 4 * items),))
    rows = rows_of([call("a", first), call("b", follows)], size)
    assert [len(row) for row in rows] == [2]
    assert module.shares_of(rows[0], Team(size)) == shares


def test_a_call_alone_is_cut_by_what_it_reads() -> None:
    def shares(flow: Flow | None, serial: bool = False) -> int:
        [row] = rows_of([call("a", flow, serial)], 2)
        return module.shares_of(row, Team(2))

    assert shares(None) == shares(written(0)) == 0
    assert shares(written(0, weights=1 << 30)) == 16
    assert shares(written(0, weights=1 << 30), serial=True) == shares(None, serial=True) == 1


def test_a_look_at_a_part_is_waited_for() -> None:
    view = written(2000, 32, own=((1128, 128),))
    assert joined(call("a", written(1000)), call("b", view)) == ["a", "b"]


def test_nothing_is_overwritten_that_another_share_may_still_read_or_write() -> None:
    reads = written(1000, whole=((0, 256),))
    assert joined(call("a", reads), call("b", written(0))) == ["a", "b"]
    assert joined(call("a", written(1000, own=((0, 256),))), call("b", written(0))) == ["a", "b"]
    assert joined(call("a", written(0)), call("b", written(128))) == ["a", "b"]


def test_serial_calls_join_a_row_and_begin_none() -> None:
    first, then = written(1000), written(2000, own=((1000, 256),))
    assert joined(call("a", first), call("b", then, serial=True)) == ["ab"]
    assert joined(call("a", first, serial=True), call("b", then, serial=True)) == ["a", "b"]
    assert joined(call("a", first, serial=True), call("b", then)) == ["a", "b"]


def test_calls_of_which_nothing_is_known_stand_alone() -> None:
    assert joined(call("a", None), call("b", written(0)), call("c", None)) == ["a", "b", "c"]


def test_calls_of_one_source_stand_where_the_first_of_them_was() -> None:
    q, k = (call(n, written(1000 * i), source="x") for i, n in ((1, "q"), (2, "k")))
    turned = call("r", written(3000, whole=((1000, 256),)), serial=True)
    other = call("y", written(4000), source="z")
    assert joined(q, turned, other, k) == ["qk", "r", "y"]


def test_what_is_still_there_is_not_written_again() -> None:
    made = Flow(((0, 64),), own=((500, 256),), items=2, each=32)
    pack = call("p", made, serial=True)
    reads = [call(n, written(1000 * i, whole=((0, 64),))) for i, n in ((1, "a"), (2, "b"))]
    assert joined(pack, reads[0], pack, reads[1]) == ["p", "ab"]
    for spoiled in (written(32), written(600), None):
        lines = joined(pack, reads[0], call("s", spoiled, serial=True), pack, reads[1])
        assert "".join(lines) == "paspb", spoiled


def test_nothing_is_joined_without_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JIT", False)
    assert joined(call("a", written(0)), call("b", written(1000))) == ["a", "b"]


# -- what it computes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A layer without attention: the input, and its parts in an export's order."""

    x: Array
    parts: list[Rows]

    def agrees(self, table: Table, rng: Any) -> None:
        """Whether the table gives what the parts give one by one, for another input."""
        self.x[:] = normal(rng, *self.x.shape)
        wanted = [np.copy(part.run()) for part in self.parts]
        for part in self.parts:
            part.outputs[0][:] = np.nan
        table.run(0)
        for part, each in zip(self.parts, wanted, strict=True):
            np.testing.assert_array_equal(part.outputs[0], each)


def block(make: Callable[[int, int, int], Weight], rng: Any, tokens: int = 1) -> Block:
    """The weights by `make(number, K, N)`. Biases stand between products, and one is read by a view
    of it alone."""
    parts: list[Rows] = []

    def add(rows: Rows | None) -> Array:
        assert rows is not None
        parts.append(rows)
        array: Array = rows.outputs[0]
        return array

    hidden, count = normal(rng, 1, tokens, HIDDEN), iter(range(7))
    scale, bias = normal(rng, HIDDEN), normal(rng, HIDDEN // 4)
    cos, sin = normal(rng, 1, tokens, SIZE // 2), normal(rng, 1, tokens, SIZE // 2)

    def product(x: Array, n: int) -> Array:
        return add(lower_matmul(x, make(next(count), x.shape[-1], n)))

    x = add(lower_rms(hidden, scale))
    q = add(lower_rotary(product(x, HIDDEN), cos, sin, num_heads=HEADS))
    k = add(broadcast_rows(add_f32, product(x, HIDDEN // 4), bias))
    k = add(lower_rotary(k, cos, sin, num_heads=HEADS // 4))
    v = add(broadcast_rows(add_f32, product(x, HIDDEN // 4), k))
    add(lower_swish(v.reshape(tokens, -1)[:, : HIDDEN // 8].copy()))
    residual = add(broadcast_rows(add_f32, hidden, product(q, HIDDEN)))
    x = add(lower_rms(residual, scale))
    gate, up = product(x, INNER), product(x, INNER)
    y = add(broadcast_rows(multiply_f32, add(lower_swish(gate)), up))
    add(broadcast_rows(add_f32, residual, product(y, HIDDEN)))
    return Block(hidden, parts)


def checked(made: Block, rng: Any) -> Table:
    table = Table(made.parts)
    for _ in range(5):
        made.agrees(table, rng)
    return table


@THREADS
@pytest.mark.parametrize("encoding", ["q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k"])
def test_packed_matrices(encoding: str, threads: int, rng: np.random.Generator) -> None:
    set_threads(threads)
    made = block(lambda _, k, n: random_packed(encoding, k, n, rng)[0], rng)
    table = checked(made, rng)
    names = [function.name for function in table._functions]
    # Of the 7 products 3 and 2 share an x; what the last one reads is quantised where it is made.
    assert sum(len(part.calls) == 2 for part in made.parts) == 7
    assert names.count("quantize_rows") == (4 if threads == 5 else 3)
    assert names.count("joined") == 4 and f"gemv_panels_{encoding}" not in names


@THREADS
@pytest.mark.parametrize("tokens", [2, 7])
def test_packed_matrices_times_several_tokens(
    tokens: int, threads: int, rng: np.random.Generator
) -> None:
    set_threads(threads)
    made = block(lambda i, k, n: random_packed(("q4_0", "q8_0")[i % 2], k, n, rng)[0], rng, tokens)
    names = [function.name for function in checked(made, rng)._functions]
    assert names.count("quantize_rows") == 4 and names.count("joined") >= 2


@THREADS
def test_matrices_of_different_encodings_and_orders(threads: int, rng: np.random.Generator) -> None:
    set_threads(threads)

    def make(number: int, k: int, n: int) -> Weight:
        if number in (1, 4):
            return random_weight("float16", k, n, rng, transposed=True)[0]
        if number in (2, 5):
            return random_weight("float32", k, n, rng, transposed=False)[0]
        return random_packed(("q4_k", "q6_k")[number % 2], k, n, rng)[0]

    checked(block(make, rng), rng)


@THREADS
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("encoding", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_plain_matrices(
    encoding: str, transposed: bool, tokens: int, threads: int, rng: np.random.Generator
) -> None:
    set_threads(threads)
    made = block(lambda _, k, n: random_weight(encoding, k, n, rng, transposed)[0], rng, tokens)
    assert "joined" in [function.name for function in checked(made, rng)._functions]


def test_rows_of_a_busy_team_stay_apart(rng: np.random.Generator) -> None:
    """More members than cores: shares are put aside anywhere."""
    set_threads(8)
    made = block(lambda _, k, n: random_packed("q4_1", k, n, rng)[0], rng)
    table = Table(made.parts)
    for _ in range(100):
        made.agrees(table, rng)
