"""Each primitive of the SIMD layer against NumPy. With NUMBA_DISABLE_JIT=1 these test the twins."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernel_oracles import widened
from numba import njit

from onnxstream_nb.kernels import vector as v
from onnxstream_nb.kernels.simd import JIT

RNG = np.random.default_rng(7)
COUNTS = range(18)
SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-38, 1e-45, 65504, 65520, 6e-8, 0.1,
     -7e-5, 2.0], np.float32,
)  # fmt: skip
Array = np.ndarray[Any, Any]


def floats(scale: float = 1.0) -> Array:
    return (RNG.standard_normal(16) * scale).astype(np.float32)


def stored(function: Callable[..., None], *arguments: Any) -> Array:
    """The 16 floats that `function` writes to the address that is its last argument."""
    out = np.zeros(16, np.float32)
    function(
        *[a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments], out.ctypes.data
    )
    return out


def unary(primitive: Any) -> Callable[..., None]:
    return njit(lambda p, q: v.store_f32(q, primitive(v.load_f32(p))))  # type: ignore[no-any-return]


def binary(primitive: Any) -> Callable[..., None]:
    code = njit(lambda p, r, q: v.store_f32(q, primitive(v.load_f32(p), v.load_f32(r))))
    return code  # type: ignore[no-any-return]


# -- loads and stores --------------------------------------------------------------------------

LOADS: dict[str, tuple[Any, type[np.generic]]] = {
    "load_f32": (v.load_f32, np.float32), "load_f16": (v.load_f16, np.float16),
    "load_bf16": (v.load_bf16, np.uint16), "load_i8": (v.load_i8, np.int8),
    "load_u8": (v.load_u8, np.uint8),
}  # fmt: skip
PARTIAL_LOADS: dict[str, tuple[Any, type[np.generic]]] = {
    "load_f32_n": (v.load_f32_n, np.float32), "load_f16_n": (v.load_f16_n, np.float16),
}  # fmt: skip


def source(dtype: type[np.generic]) -> tuple[Array, Array]:
    """16 elements that are not aligned to anything, and their values as float32."""
    memory = RNG.integers(0, 255, 200, dtype=np.uint8)
    size = np.dtype(dtype).itemsize
    items: Array = np.frombuffer(memory.data, dtype, 16, offset=size)
    if np.dtype(dtype).kind == "f":
        memory[size : 17 * size] = RNG.standard_normal(16).astype(dtype).view(np.uint8)
    elif dtype == np.uint16:
        memory[size : 17 * size] = (floats().view(np.uint32) >> 16).astype(dtype).view(np.uint8)
        return items, widened(items)
    return items, items.astype(np.float32)


@pytest.mark.parametrize("name", LOADS)
def test_load_gives_sixteen_elements(name: str) -> None:
    load, dtype = LOADS[name]
    code = njit(lambda p, q: v.store_f32(q, load(p)))
    items, expected = source(dtype)
    assert np.array_equal(stored(code, items), expected)


@pytest.mark.parametrize("name", PARTIAL_LOADS)
def test_partial_load_pads_with_zeros(name: str) -> None:
    load, dtype = PARTIAL_LOADS[name]
    code = njit(lambda p, n, q: v.store_f32(q, load(p, n)))
    items, expected = source(dtype)
    for n in (-3, *COUNTS):
        wanted = np.where(np.arange(16) < n, expected, 0)
        assert np.array_equal(stored(code, items, n), wanted), n


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@pytest.mark.parametrize("name", PARTIAL_LOADS)
def test_partial_load_never_reads_beyond_its_count(name: str) -> None:
    load, dtype = PARTIAL_LOADS[name]
    code = njit(lambda p, n, q: v.store_f32(q, load(p, n)))
    page, size = mmap.PAGESIZE, np.dtype(dtype).itemsize
    pages = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
    for n in range(17):
        assert not stored(code, start + page - n * size, n).any()


STORES: dict[str, tuple[Any, type[np.generic]]] = {
    "store_f32_n": (v.store_f32_n, np.float32), "store_f16_n": (v.store_f16_n, np.float16),
}  # fmt: skip


@pytest.mark.parametrize("name", STORES)
def test_partial_store_leaves_the_rest_alone(name: str) -> None:
    store, dtype = STORES[name]
    code = njit(lambda p, n, q: store(q, v.load_f32(p), n))
    x, size = floats(), np.dtype(dtype).itemsize
    for n in (-5, *COUNTS):
        memory = np.full(160, 0xA5, np.uint8)
        code(x.ctypes.data, n, memory.ctypes.data + 33)
        end = 33 + size * max(0, min(16, n))
        assert np.array_equal(memory[33:end], x[: max(0, n)].astype(dtype).view(np.uint8)), n
        assert (memory[:33] == 0xA5).all() and (memory[end:] == 0xA5).all(), n


@pytest.mark.parametrize("name", ["store_f32", "store_f16"])
def test_store_writes_sixteen_elements_only(name: str) -> None:
    store = getattr(v, name)
    dtype = np.float32 if name == "store_f32" else np.float16
    code = njit(lambda p, q: store(q, v.load_f32(p)))
    x, memory = floats(), np.full(160, 0xA5, np.uint8)
    code(x.ctypes.data, memory.ctypes.data + 7)
    wanted = x.astype(dtype).view(np.uint8)
    assert np.array_equal(memory[7 : 7 + wanted.size], wanted)
    assert (memory[:7] == 0xA5).all() and (memory[7 + wanted.size :] == 0xA5).all()


# -- conversions -------------------------------------------------------------------------------


def assert_same_halves(bits: Array, values: Array) -> None:
    """float16 bits, where any NaN equals any NaN."""
    with np.errstate(over="ignore"):
        wanted = values.astype(np.float16)
    got = bits.view(np.float16)
    same = (bits == wanted.view(np.uint16)) | (np.isnan(got) & np.isnan(wanted))
    wrong = np.flatnonzero(~same)
    assert not wrong.size, f"{values[wrong[:4]]} -> {got[wrong[:4]]}, not {wanted[wrong[:4]]}"


def test_all_halves_become_the_float_that_they_are() -> None:
    halves = np.arange(65536, dtype=np.uint16)
    code = njit(lambda p, q: v.store_f32(q, v.load_f16(p)))
    peek = njit(lambda p, q: v.poke_f32(q, v.peek_f16(p)))
    wanted = halves.view(np.float16).astype(np.float32)
    for convert, step in ((code, 16), (peek, 1)):
        got = np.zeros(65536, np.float32)
        for i in range(0, 65536, step):
            convert(halves.ctypes.data + 2 * i, got.ctypes.data + 4 * i)
        assert np.array_equal(got, wanted, equal_nan=True)
        assert np.array_equal(np.signbit(got), np.signbit(wanted))


def test_floats_round_to_the_nearest_half_at_every_boundary() -> None:
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (finite + np.append(finite[1:], np.float32(65536))) / np.float32(2)
    cases = np.concatenate(
        [finite, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9)),
         SPECIAL, np.array([np.nan, 1e9, 1e-9, 2e-45], np.float32),
         RNG.integers(0, 2**32, 4096, dtype=np.uint32).view(np.float32)]
    )  # fmt: skip
    cases = np.concatenate([cases, -cases])
    cases = np.append(cases, np.zeros(-cases.size % 16, np.float32))
    bits = np.zeros(cases.size, np.uint16)
    code = njit(lambda p, q: v.store_f16(q, v.load_f32(p)))
    for i in range(0, cases.size, 16):
        code(cases.ctypes.data + 4 * i, bits.ctypes.data + 2 * i)
    assert_same_halves(bits, cases)
    code = njit(lambda p, q: v.poke_f16(q, v.peek_f32(p)))
    bits[:] = 0
    for i in range(0, cases.size, 7):
        code(cases.ctypes.data + 4 * i, bits.ctypes.data + 2 * i)
    assert_same_halves(bits[::7].copy(), cases[::7])


def test_all_bfloats_become_the_float_that_they_are() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    got = np.zeros(65536, np.float32)
    code = njit(lambda p, q: v.store_f32(q, v.load_bf16(p)))
    for i in range(0, 65536, 16):
        code(bits.ctypes.data + 2 * i, got.ctypes.data + 4 * i)
    assert np.array_equal(got, widened(bits), equal_nan=True)
    peek = njit(lambda p, q: v.poke_f32(q, v.peek_bf16(p)))
    for i in range(0, 65536, 16):
        peek(bits.ctypes.data + 2 * i, got.ctypes.data + 4 * i)
    assert np.array_equal(got, widened(bits), equal_nan=True)


def test_nibbles_and_the_bits_above_them() -> None:
    low, high = RNG.integers(0, 256, (2, 16), dtype=np.uint8)
    code = njit(lambda p, s, q: v.store_f32(q, v.load_nibbles(p, s)))
    assert np.array_equal(stored(code, low, 0), low % 16)
    assert np.array_equal(stored(code, low, 4), low // 16)
    code = njit(lambda p, r, at, q: v.store_f32(q, v.load_five_bits(p, r, at)))
    for at in range(8):
        nibble = low // 16 if at % 2 else low % 16
        assert np.array_equal(stored(code, low, high, at), nibble + 16.0 * (high >> at & 1)), at
    code = njit(lambda p, r, at, q: v.store_f32(q, v.load_six_bits(p, r, at)))
    for at in range(4):
        nibble = low // 16 if at > 1 else low % 16
        wanted = nibble + 16.0 * (high >> 2 * at & 3) - 32
        assert np.array_equal(stored(code, low, high, at), wanted), at


def test_scalars() -> None:
    peeks = {np.float32: v.peek_f32, np.uint8: v.peek_u8, np.int8: v.peek_i8}
    for dtype, peek in peeks.items():
        code = njit(lambda p, q, peek=peek: v.poke_f32(q, peek(p)))
        for value in (-128, -1, 0, 127) if dtype == np.int8 else (0, 1, 127, 128, 255):
            memory = np.array([77, value, 77], dtype)
            where = memory.ctypes.data + memory.itemsize
            assert stored(code, where)[0] == value
    wide = np.array([2**62 + 3, -(2**62) - 5], np.int64)
    copied = np.zeros(3, np.int64)
    code = njit(lambda p, q: v.atomic_store(q, v.peek_i64(p)))
    for i in range(2):
        code(wide.ctypes.data + 8 * i, copied.ctypes.data + 8 * i)
    assert copied.tolist() == [*wide.tolist(), 0]
    code = njit(lambda p: v.peek_f64(p))
    value = np.array([1 / 3])
    assert code(value.ctypes.data) == 1 / 3


# -- arithmetic --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "oracle"),
    [("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div", np.divide),
     ("maximum", np.maximum), ("minimum", np.minimum)],
)  # fmt: skip
def test_binary_arithmetic_is_ieee(name: str, oracle: Any) -> None:
    code = binary(getattr(v, name))
    pairs = [(floats(), floats()), (floats(1e18), floats(1e18)), (floats(1e-18), floats(1e-3))]
    for x, y in [*pairs, (floats(), np.ones(16, np.float32))]:
        assert np.array_equal(stored(code, x, y), oracle(x, y))


@pytest.mark.parametrize(("name", "oracle"), [("sqrt", np.sqrt), ("absolute", np.abs)])
def test_unary_arithmetic_is_ieee(name: str, oracle: Any) -> None:
    code = unary(getattr(v, name))
    for x in (np.abs(floats()), np.abs(floats(1e30)), np.abs(SPECIAL)):
        x = x if name == "sqrt" else -x
        assert np.array_equal(stored(code, x), oracle(x))


def test_division_by_zero_is_quiet() -> None:
    x, y = floats(), np.zeros(16, np.float32)
    x[:3] = 0, 1, -1
    got = stored(binary(v.div), x, y)
    assert np.isnan(got[0]) and got[1] == np.inf and got[2] == -np.inf


def test_multiply_and_add() -> None:
    code = njit(
        lambda p, r, s, q: v.store_f32(q, v.fma(v.load_f32(p), v.load_f32(r), v.load_f32(s)))
    )
    x, y, z = floats(), floats(), floats()
    exact = x.astype(np.float64) * y + z
    slack = 2**-23 * (np.abs(x * y) + np.abs(exact))
    assert (np.abs(stored(code, x, y, z) - exact) <= slack).all()


def test_constants_fill_all_lanes() -> None:
    code = njit(lambda p, q: v.store_f32(q, v.splat(v.peek_f32(p))))
    assert np.array_equal(stored(code, SPECIAL[3:4]), np.full(16, SPECIAL[3]))
    assert not stored(njit(lambda q: v.store_f32(q, v.zero()))).any()


def test_reductions() -> None:
    total = njit(lambda p, q: v.poke_f32(q, v.sum_lanes(v.load_f32(p))))
    top = njit(lambda p, q: v.poke_f32(q, v.max_lanes(v.load_f32(p))))
    for scale in (1, 1e-20, 1e20):
        x = floats(scale)
        slack = 16 * 2**-24 * np.abs(x.astype(np.float64)).sum()
        assert abs(stored(total, x)[0] - x.astype(np.float64).sum()) <= slack
        assert stored(top, x)[0] == x.max()
    for i in range(16):
        x = np.full(16, -np.inf, np.float32)
        assert stored(top, x)[0] == -np.inf
        x[i] = -2.5
        assert stored(top, x)[0] == -2.5
        assert stored(total, np.eye(16, dtype=np.float32)[i] * 3)[0] == 3


def test_choice_by_bytes() -> None:
    code = njit(
        lambda p, r, s, n, q: v.store_f32(q, v.choose_n(p, v.load_f32(r), v.load_f32(s), n))
    )
    wanted = np.array([0, 1, 2, 128, 255, 0, 0, 1] * 2, np.uint8)
    x, y = floats(), floats()
    for n in COUNTS:
        chosen = (wanted != 0) & (np.arange(16) < n)
        assert np.array_equal(stored(code, wanted, x, y, n), np.where(chosen, x, y)), n


# -- exp ---------------------------------------------------------------------------------------

TINY, LARGE = np.float32(-87.33654), np.float32(88.02969)


def test_exp_is_within_two_units_over_its_whole_range() -> None:
    x = np.concatenate(
        [np.linspace(TINY, LARGE, 60000, dtype=np.float32), np.float32([TINY, LARGE, 0, -0.0]),
         np.linspace(-1e-3, 1e-3, 4000, dtype=np.float32), np.arange(-87, 89, dtype=np.float32),
         (np.arange(-126, 127) * np.log(2)).astype(np.float32)]
    )  # fmt: skip
    x = x[(x >= TINY) & (x <= LARGE)]
    x = x[: x.size // 16 * 16]
    got = np.zeros_like(x)
    code = unary(v.exp)
    for i in range(0, x.size, 16):
        code(x.ctypes.data + 4 * i, got.ctypes.data + 4 * i)
    exact = np.exp(x.astype(np.float64))
    unit = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(got - exact) <= 2 * unit).all()


def test_exp_beyond_its_range() -> None:
    below = np.nextafter(TINY, np.float32(-100))
    x = np.array([below, -88, -100, -1e4, -3e38, -np.inf, np.nan, 0, -0.0], np.float32)
    x = np.append(x, np.array([LARGE, 88.5, 89, 1e4, 3e38, np.inf, 1], np.float32))
    got = stored(unary(v.exp), x)
    assert (got[:6] == 0).all() and np.isnan(got[6]) and (got[7:9] == 1).all()
    assert (got[9:15] == got[9]).all() and np.isfinite(got[9])
    assert got[15] == pytest.approx(np.e, rel=2e-7)


# -- moving lanes, memory, threads -------------------------------------------------------------


def test_transpose_of_sixteen_rows_by_strides() -> None:
    x = RNG.standard_normal((16, 21)).astype(np.float32)
    out = np.full((16, 19), 7, np.float32)
    code = njit(lambda p, stride, q, to: v.transpose16(p, stride, q, to))
    code(x.ctypes.data + 8, x.strides[0], out.ctypes.data + 4, out.strides[0])
    assert np.array_equal(out[:, 1:17], x[:, 2:18].T)
    assert (out[:, 0] == 7).all() and (out[:, 17:] == 7).all()


def test_transpose_in_place() -> None:
    x = RNG.standard_normal((16, 16)).astype(np.float32)
    wanted = x.T.copy()
    code = njit(lambda p: v.transpose16(p, 64, p, 64))
    code(x.ctypes.data)
    assert np.array_equal(x, wanted)


def test_prefetch_takes_any_address() -> None:
    code = njit(lambda p: v.prefetch(p))
    assert [code(p) for p in (0, -1, 8, 2**47, -(2**62))] == [None] * 5


def test_atomics_in_one_thread() -> None:
    cell = np.array([0, 40, 0], np.int64)
    where = cell.ctypes.data + 8
    add = njit(lambda p, x: v.atomic_add(p, x))
    load = njit(lambda p: v.atomic_load(p))
    store = njit(lambda p, x: v.atomic_store(p, x))
    assert (add(where, 2), load(where), add(where, -(2**40))) == (40, 42, 42)
    store(where, -7)
    assert load(where) == -7 and cell.tolist() == [0, -7, 0]


@pytest.mark.skipif(not JIT, reason="the NumPy twins run in one thread only")
def test_atomic_add_loses_nothing_between_threads() -> None:
    cell, each = np.zeros(1, np.int64), 20000

    @njit(nogil=True)
    def count(p: int, times: int) -> int:
        before = 0
        for _ in range(times):
            before = v.atomic_add(p, 1)
        return before

    count(cell.ctypes.data, 0)
    last: list[int] = []
    threads = [
        threading.Thread(target=lambda: last.append(count(cell.ctypes.data, each)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cell[0] == 4 * each and max(last) == 4 * each - 1 and len(set(last)) == 4
