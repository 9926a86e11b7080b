"""Every provider of weights: the bytes of the file, in any order, and errors that name it."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from weight_files import Provider, Reads, closing, cut, expected, taken

from onnxstream_nb.errors import ModelError
from onnxstream_nb.graph import ENCODINGS, WeightRef
from onnxstream_nb.weights import (
    BudgetProvider,
    DiskProvider,
    MmapProvider,
    PrefetchProvider,
    RamProvider,
    Weight,
    encoded_bytes,
    numpy_dtype,
)

AHEAD = 10_000

KINDS: dict[str, Callable[[list[WeightRef]], Provider]] = {
    "disk": lambda refs: DiskProvider(),
    "prefetch": lambda refs: PrefetchProvider(AHEAD),
    "prefetch nothing": lambda refs: PrefetchProvider(0),
    "mmap": lambda refs: MmapProvider(),
    "ram": lambda refs: RamProvider(),
    "budget": lambda refs: BudgetProvider(refs[::2], AHEAD),
}


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[list[WeightRef]], Provider]]:
    """Makes a provider of each kind for the given references, and closes it after the test."""
    made: list[Provider] = []

    def build(refs: list[WeightRef]) -> Provider:
        made.append(KINDS[request.param](refs))
        return made[-1]

    yield build
    for provider in made:
        provider.close()


# -- every provider


def test_bytes_are_the_files_pass_after_pass(
    make: Callable[[list[WeightRef]], Provider], tmp_path: Path
) -> None:
    memory = WeightRef("m", (11,), "uint8", bytes(range(40)), 7, 11)
    first, second = cut(tmp_path / "a.bin"), cut(tmp_path / "bb.bin")
    refs = [r for pair in zip(first, second, strict=True) for r in (*pair, memory)]
    provider = make(refs)
    for _ in range(3):
        provider.prefetch(refs)
        for ref in refs:
            assert taken(provider, ref) == expected(ref), ref.name


def test_any_order_announced_or_not(
    make: Callable[[list[WeightRef]], Provider], tmp_path: Path
) -> None:
    refs, others = cut(tmp_path / "a.bin"), cut(tmp_path / "bb.bin")
    provider = make(refs)
    assert taken(provider, refs[3]) == expected(refs[3])  # nothing was announced
    shuffle = random.Random(3)
    for _ in range(4):
        order = refs * 2 + others[:3]
        shuffle.shuffle(order)
        provider.prefetch(refs)
        for ref in order:
            assert taken(provider, ref) == expected(ref), ref.name
    provider.prefetch([])
    assert taken(provider, refs[5]) == expected(refs[5])


def test_abandoned_pass(make: Callable[[list[WeightRef]], Provider], tmp_path: Path) -> None:
    refs = cut(tmp_path / "a.bin")
    provider = make(refs)
    for stop in (1, 4, 0, 6, len(refs)):
        provider.prefetch(refs)
        for ref in refs[:stop]:
            assert taken(provider, ref) == expected(ref), ref.name


def test_two_weights_at_once(make: Callable[[list[WeightRef]], Provider], tmp_path: Path) -> None:
    """What one reference gave stays as it is while others are read."""
    refs = cut(tmp_path / "a.bin")
    provider = make(refs)
    provider.prefetch(refs)
    held = [provider.get(ref) for ref in refs]
    assert [bytes(w.buffer) for w in held] == [expected(r) for r in refs]
    for ref in refs:
        provider.release(ref)


def test_tensors_without_bytes(make: Callable[[list[WeightRef]], Provider], tmp_path: Path) -> None:
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "full.bin").write_bytes(b"abc")
    sources: list[Path | bytes] = [tmp_path / "empty.bin", tmp_path / "full.bin", b"", b"abc"]
    refs = [WeightRef(f"w{i}", (3, 0), "float32", s, 0, 0) for i, s in enumerate(sources)]
    refs.append(WeightRef("end", (0, 4), "float32", tmp_path / "full.bin", 3, 0))
    provider = make(refs)
    for _ in range(2):
        provider.prefetch(refs)
        for ref in refs:
            weight = provider.get(ref)
            assert weight.buffer.nbytes == 0 and weight.stored().shape == ref.shape
            provider.release(ref)


def test_truncated_file(make: Callable[[list[WeightRef]], Provider], tmp_path: Path) -> None:
    refs = cut(tmp_path / "short.bin", (4096, 5000, 100))
    with (tmp_path / "short.bin").open("r+b") as file:
        file.truncate(refs[1].offset + 4999)
    provider = make(refs)
    for _ in range(2):
        provider.prefetch(refs)
        assert taken(provider, refs[0]) == expected(refs[0])
        for ref in refs[1:]:
            with pytest.raises(ModelError, match=rf"short\.bin.* ends before {ref.name} .*fetch"):
                provider.get(ref)


def test_missing_file(make: Callable[[list[WeightRef]], Provider], tmp_path: Path) -> None:
    refs, gone = cut(tmp_path / "a.bin"), cut(tmp_path / "gone.bin")
    (tmp_path / "gone.bin").unlink()
    provider = make([*refs, *gone])
    for _ in range(2):
        provider.prefetch([refs[0], gone[1], refs[1]])
        assert taken(provider, refs[0]) == expected(refs[0])
        with pytest.raises(ModelError, match=r"gone\.bin: cannot open"):
            provider.get(gone[1])
        assert taken(provider, refs[1]) == expected(refs[1])


def test_a_file_that_came_back(make: Callable[[list[WeightRef]], Provider], tmp_path: Path) -> None:
    """An error belongs to the pass that met it."""
    refs = cut(tmp_path / "a.bin", (700, 800))
    whole = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").unlink()
    provider = make(refs)
    provider.prefetch(refs)
    with pytest.raises(ModelError):
        provider.get(refs[0])
    time.sleep(0.02)  # for a thread that reads ahead to fail too
    (tmp_path / "a.bin").write_bytes(whole)
    provider.prefetch(refs)
    assert [taken(provider, r) for r in refs] == [expected(r) for r in refs]


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed on Windows")
def test_file_removed_after_opening(
    make: Callable[[list[WeightRef]], Provider], tmp_path: Path
) -> None:
    refs = cut(tmp_path / "a.bin")
    wanted = [expected(r) for r in refs]
    provider = make(refs)
    assert taken(provider, refs[0]) == wanted[0]
    assert taken(provider, refs[1]) == wanted[1]  # a budget opens the file twice
    (tmp_path / "a.bin").unlink()
    provider.prefetch(refs)
    assert [taken(provider, r) for r in refs] == wanted


_AFTER_OPENING = """
import os, sys
from pathlib import Path
from onnxstream_nb import weights
from onnxstream_nb.errors import ModelError
from onnxstream_nb.graph import WeightRef

path = Path(sys.argv[2])
size = 1 << 20
path.write_bytes(os.urandom(3 * size))
first, second, third = (
    WeightRef(n, (size,), "uint8", path, i * size, size) for i, n in enumerate(["a", "b", "c"])
)
provider = {
    "disk": weights.DiskProvider, "mmap": weights.MmapProvider, "ram": weights.RamProvider,
    "prefetch": lambda: weights.PrefetchProvider(100),
    "budget": lambda: weights.BudgetProvider([second], 100),
}[sys.argv[1]]()
assert len(bytes(provider.get(first).buffer)) == size
os.truncate(path, size + 10)
for ref in (second, third):
    try:
        provider.prefetch([ref])
        sum(provider.get(ref).buffer)
    except ModelError as error:
        print(error)
provider.close()
"""


@pytest.mark.parametrize("kind", ["disk", "prefetch", "mmap", "ram", "budget"])
def test_file_truncated_after_opening(kind: str, tmp_path: Path) -> None:
    """In a process of its own: reading a mapped page behind the end of a file would end it."""
    done = subprocess.run(
        [sys.executable, "-c", _AFTER_OPENING, kind, str(tmp_path / "shrunk.bin")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("shrunk.bin" in line for line in lines), lines
    assert all("truncated" in line for line in lines)


def test_closing_twice(make: Callable[[list[WeightRef]], Provider], tmp_path: Path) -> None:
    refs = cut(tmp_path / "a.bin")
    provider = make(refs)
    provider.prefetch(refs)
    assert taken(provider, refs[1]) == expected(refs[1])
    provider.close()
    provider.close()


# -- keeping


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def _tied(path: Path) -> tuple[WeightRef, WeightRef]:
    path.write_bytes(np.random.default_rng(0).bytes(4 * 21 + 3))
    table = WeightRef("table", (7, 3), "float32", path, 3, 84)
    return table, WeightRef("head", (3, 7), "float32", path, 3, 84, transposed=True)


def test_ram_reads_each_weight_once(tmp_path: Path, reads: Reads) -> None:
    table, head = _tied(tmp_path / "tied.bin")
    refs = [table, *cut(tmp_path / "a.bin", (100, 33)), head]
    with closing(RamProvider()) as provider:
        for _ in range(3):
            provider.prefetch(refs)
            for ref in refs:
                assert taken(provider, ref) == expected(ref)
        assert provider.get(table).address == provider.get(head).address
        assert reads.names == ["table", "a.0", "a.1"]
        assert provider.bytes_read == 84 + 133


def test_tied_weights_are_mapped_once(tmp_path: Path) -> None:
    table, head = _tied(tmp_path / "tied.bin")
    with closing(MmapProvider()) as provider:
        rows, columns = provider.get(table), provider.get(head)
        assert rows.address == columns.address
        assert rows.stored().shape == columns.stored().shape == (7, 3)
        assert rows.shape == columns.shape[::-1] == (7, 3)


def test_mapped_bytes_cannot_be_written(tmp_path: Path) -> None:
    ref = cut(tmp_path / "a.bin", (10,))[0]
    with closing(MmapProvider()) as provider, pytest.raises(ValueError, match="read-only"):
        provider.get(ref).buffer[0] = 1


def test_budget_keeps_what_is_pinned_and_streams_the_rest(tmp_path: Path, reads: Reads) -> None:
    refs = cut(tmp_path / "a.bin", (11, 222, 33, 444, 55))
    with closing(BudgetProvider([refs[1], refs[4]], ahead=300)) as provider:
        for _ in range(4):
            provider.prefetch(refs)
            for ref in refs:
                assert taken(provider, ref) == expected(ref)
        assert sorted(reads.names) == sorted(["a.1", "a.4"] + 4 * ["a.0", "a.2", "a.3"])
        assert provider.bytes_read == 277 + 4 * 488


def test_disk_and_stream_count_every_read(tmp_path: Path) -> None:
    refs = cut(tmp_path / "a.bin", (11, 222, 33))
    for make_one in (DiskProvider, PrefetchProvider):
        with closing(make_one()) as provider:
            for _ in range(3):
                provider.prefetch(refs)
                assert [taken(provider, r) for r in refs] == [expected(r) for r in refs]
            assert provider.bytes_read == 3 * 266


# -- the weight itself


def test_weight_seen_from_both_sides() -> None:
    values = np.arange(15, dtype=np.float16).reshape(5, 3)
    ref = WeightRef("w", (3, 5), "float32", values.tobytes(), 0, 30, "float16", transposed=True)
    weight = Weight(ref, np.frombuffer(ref.source, np.uint8))
    assert weight.shape == (3, 5) and weight.dtype == np.float32
    assert weight.encoding == "float16" and weight.row_bytes == 6
    np.testing.assert_array_equal(weight.stored(), values)
    turned = weight.T
    assert turned.shape == (5, 3) and not turned.transposed and turned.row_bytes == 6
    assert turned.address == weight.address and turned.T.ref == ref
    np.testing.assert_array_equal(turned.stored(), values)


def test_raw_weights_are_named_by_their_type() -> None:
    ref = WeightRef("w", (3,), "float16", bytes(6), 0, 6)
    weight = Weight(ref, np.frombuffer(bytes(6), np.uint8))
    assert weight.encoding == "float16" and weight.stored().dtype == np.float16


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k"])
def test_sizes_of_quantised_tensors(name: str) -> None:
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    assert (ENCODINGS[name].block, ENCODINGS[name].nbytes) == (block, nbytes)
    ref = WeightRef("w", (3, 5 * block), "float32", b"", encoding=name)
    assert encoded_bytes(ref) == 3 * 5 * nbytes


def test_sizes_of_plain_tensors() -> None:
    for dtype, nbytes in (("int64", 8), ("float16", 2), ("bfloat16", 2), ("bool", 1)):
        assert encoded_bytes(WeightRef("w", (7, 3), dtype, b"")) == 21 * nbytes
        assert numpy_dtype(dtype).itemsize == nbytes
    assert encoded_bytes(WeightRef("w", (7, 3), "float32", b"", encoding="bfloat16")) == 42
    assert encoded_bytes(WeightRef("w", (), "float64", b"")) == 8
    for name in ("float8e4m3fn", "float8e5m2", "int4", "uint4"):
        assert numpy_dtype(name).itemsize == 1
