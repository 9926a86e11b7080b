"""What a budget of memory promises: how much is held, in what, and the least that would do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from budget_models import (
    BYTES,
    LEAST,
    PIECE,
    SLOT,
    WORK,
    lasting_bytes,
    least_named,
    runs,
    summed,
    work,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from onnx import helper, numpy_helper
from onnx_models import make, refusal, saved, value
from weight_files import Reads, pieces_of, process_of

from onnxstream_nb import loading
from onnxstream_nb.errors import MemoryBudgetError
from onnxstream_nb.files import room
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.loading import ARRAYS, BASE, SMALL, SMALLEST_CHUNK, _shares
from onnxstream_nb.session import Session
from onnxstream_nb.streaming import LEAST_PIECES, StreamProvider


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pieces_of(monkeypatch, PIECE)
    return summed(tmp_path / "m.onnx")


@pytest.fixture
def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes no memory itself, so that budgets are exact; a pass's arrays count by a
    formula, as when their sizes cannot be told."""
    process_of(monkeypatch, 0)
    monkeypatch.setattr(loading, "bound_for_tokens", lambda plan, tokens: None)


@pytest.mark.parametrize("load", ["auto", "stream", "ram"])
def test_generous_budget_keeps_everything(load: str, model: Path, no_base: None) -> None:
    with Session(model, load=load, ram=WORK + sum(BYTES)) as session:
        provider: Any = session.provider
        assert isinstance(provider, StreamProvider) and lasting_bytes(session) == sum(BYTES)
        runs(session, model, times=3)
        assert provider.bytes_read == sum(BYTES) and provider.bytes_a_pass == 0


@pytest.mark.parametrize("reserve", [0, 777])
@pytest.mark.parametrize("left", [0, 1, 5000, 100_000, 300_000, sum(BYTES) - 200_000])
def test_a_budget_holds_what_fits_beside_the_buffers(
    left: int, reserve: int, model: Path, no_base: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is left, half at most is for more buffers, and some for longer passes."""
    ram = LEAST + reserve + left
    reads = Reads(monkeypatch)
    with Session(model, ram=ram, reserve=reserve) as session:
        provider: Any = session.provider
        for _ in range(3):
            runs(session, model, times=1)
            held = sum(BYTES) - provider.bytes_a_pass
            assert reads.alive == 0  # nothing was read into memory of its own
        assert lasting_bytes(session) == held
        spent = reserve + work(128, 600, session.chunk) + held
        buffers = len(provider._ring._memory)
        assert len(reads.slots) <= buffers and (buffers - LEAST_PIECES) * SLOT <= left // 2
        assert max(reads.slots) - min(reads.slots) < buffers * SLOT
        assert spent + buffers * SLOT <= ram
        # A step of 32 rows of the largest matrix was not to be had for the rest.
        rest = ram - spent - buffers * SLOT
        longer = session.chunk * ARRAYS * 728 * 4  # what a pass of twice the length takes more
        assert rest <= max(32 * 2400, longer) + SLOT


def test_a_larger_budget_reads_no_more(model: Path, no_base: None) -> None:
    """Nor does it begin passes that are shorter."""
    before, chunk = sum(BYTES) + 1, SMALLEST_CHUNK
    for left in (0, 20_000, 60_000, 200_000, 400_000, 600_000, 10**6, 10**7):
        with Session(model, ram=LEAST + left) as session:
            provider: Any = session.provider
            if session.chunk == chunk:
                assert provider.bytes_a_pass <= before
            assert session.chunk >= chunk
            before, chunk = provider.bytes_a_pass, session.chunk
    assert before == 0


def test_an_impossible_budget_names_the_least(model: Path, no_base: None) -> None:
    for ram in (1, LEAST // 2, LEAST - 1):
        named = least_named(lambda n=ram: Session(model, ram=n))
        assert LEAST <= named <= 1.02 * LEAST
    with Session(model, ram=LEAST) as session:
        assert session.provider.bytes_a_pass == sum(BYTES)  # type: ignore[attr-defined]
        runs(session, model)


@pytest.mark.parametrize("base", [0, 1_111_111, 36_449_999, 163_949_999])
def test_the_least_that_is_named_is_enough(
    base: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is rounded to, following the advice works."""
    process_of(monkeypatch, base)
    least = least_named(lambda: Session(model, ram=1))
    with Session(model, ram=least) as session:
        runs(session, model, times=1)


def test_a_small_model_needs_no_room_for_buffers(tmp_path: Path, no_base: None) -> None:
    """Its weights take less: then that is the least, and it is named."""
    weight = np.ones((128, 200), np.float32)
    proto = make(
        [helper.make_node("MatMul", ["x", "W"], ["y"])], [value("x", shape=("n", 128))],
        [value("y", shape=("n", 200))], [numpy_helper.from_array(weight, "W")],
    )  # fmt: skip
    path = saved(proto, tmp_path / "m.onnx")
    enough = work(128, 200, 32) + weight.nbytes
    least = least_named(lambda: Session(path, ram=enough - 1))
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
    ram = work(400, 130, 32) + 2 * table.nbytes
    with Session(saved(proto, tmp_path / "m.onnx"), ram=ram) as session:
        assert isinstance(session.provider, StreamProvider)
        assert lasting_bytes(session) == 2 * table.nbytes
        assert session.plan.weight_bytes == 2 * table.nbytes
        assert [ref.name for ref in session.plan.weights] == ["W", "V", "W"]


# -- how memory is shared out


def shared(
    sizes: Mapping[WeightRef, int], uses: list[WeightRef], left: int
) -> dict[WeightRef, int]:
    """Rows that are held of each."""
    plan: Any = SimpleNamespace(weights=uses)
    held = _shares(plan, sizes, left)
    assert set(held) <= {ref.matrix for ref in sizes}
    return {ref: held.get(ref.matrix, 0) for ref in sizes}


def rows_of(ref: WeightRef) -> int:
    return ref.shape[0] if len(ref.shape) == 2 else 1


def step(ref: WeightRef, size: int) -> float:
    """Bytes that are held together at least: 32 rows."""
    return size * min(1.0, 32 / rows_of(ref))


WEIGHTS = st.lists(
    st.tuples(
        st.sampled_from((1, 20, 32, 100, 320, 4097)), st.sampled_from((100, 3000, 40_000)),
        st.booleans(), st.sampled_from((1, 1, 1, 2)), st.sampled_from((1.0, 1.125)),
    ), min_size=1, max_size=25,
)  # fmt: skip


@given(WEIGHTS, st.floats(0, 1.1))
def test_memory_is_shared_out_evenly(
    found: list[tuple[int, int, bool, int, float]], fraction: float
) -> None:
    """Never more than there is; what is used twice and what is small first; of the others an equal
    part of each, up to a step of 32 rows and what cannot be cut."""
    sizes, uses = {}, []
    for i, (rows, width, vector, times, packed) in enumerate(found):
        shape: tuple[int, ...] = (rows * width,) if vector else (rows, width)
        ref = WeightRef(f"w{i}", shape, "uint8", Path("w"), i << 40, rows * width)
        sizes[ref] = int(packed * rows * width)
        uses += [ref] * times
    left = int(fraction * sum(sizes.values()))
    held = shared(sizes, uses, left)
    bytes_held = {ref: sizes[ref] * held[ref] / rows_of(ref) for ref in sizes}
    assert sum(bytes_held.values()) <= left + 1e-6
    for ref, rows in held.items():
        assert 0 <= rows <= rows_of(ref) and (rows % 32 == 0 or rows == rows_of(ref))
    for first in (
        [ref for ref in sizes if uses.count(ref) > 1],
        [ref for ref in sizes if uses.count(ref) > 1 or sizes[ref] <= SMALL],
    ):
        if sum(sizes[ref] for ref in first) > left:
            return
        assert all(held[ref] == rows_of(ref) for ref in first)
    others = [ref for ref in sizes if ref not in first]
    rest, total = left - sum(sizes[ref] for ref in first), sum(sizes[ref] for ref in others)
    bound = max((step(ref, sizes[ref]) for ref in others), default=0)
    so_far = due = 0.0
    for ref in others:
        so_far += bytes_held[ref]
        due += min(1.0, rest / total) * sizes[ref]
        assert due - bound - 1 <= so_far <= due + max(0, rest - total) + 1


# -- language models


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_takes_nothing_and_a_tied_one_is_a_head(
    tied: bool, tmp_path: Path, no_base: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a table the rows that are looked up are read; the least is that of the others' stream."""
    pieces_of(monkeypatch, PIECE)
    tiny = Tiny(vocab=2000, hidden=64, intermediate=1024, layers=3, context=600, tied=tied)
    write_gguf(tmp_path / "m.gguf", tiny, "F16")
    context = 2 * 2 * 768 * (3 * (8 + 32) + 32)
    least = work(64, 1024, SMALLEST_CHUNK) + context + LEAST_PIECES * room(PIECE)
    named = least_named(lambda: LanguageModel(tmp_path / "m.gguf", ram=1))
    assert abs(named / 1.01 - least) <= 0.01 * least
    model = LanguageModel(tmp_path / "m.gguf", ram=named, threads=1)
    model.feed([1, 2, 3])
    model.feed([4])
    provider: Any = model.session.provider
    assert provider._disk.bytes_read == 4 * 64 * 2
    assert model.bytes_per_token - provider.bytes_a_pass < 200_000  # nearly all, also of a head
    model.close()


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
    assert BASE < 30e6
