"""Whatever holds the weights, a model computes the same: in memory, mapped, in buffers or parts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from budget_models import least_named
from llama_fixtures import K_QUANT, write_gguf, write_hf
from llama_oracle import Array, Tiny, logits
from llm_checks import Countdown, exact_model, near
from onnx_models import saved
from session_models import deep, random
from weight_files import pieces_of, process_of

from onnxstream_nb import loading, session, streaming
from onnxstream_nb.errors import Interrupted, ModelError
from onnxstream_nb.files import room
from onnxstream_nb.kvcache import bytes_at
from onnxstream_nb.passes import find_cache
from onnxstream_nb.session import Session, internal
from onnxstream_nb.streaming import StreamProvider

WIDE = Tiny(vocab=150, hidden=64, intermediate=160, layers=2, heads=4, kv_heads=2, head_dim=16)
PROMPT = [(7 * i + 3) % 64 for i in range(21)]
WRITTEN = [5, 9, 40]

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices come in several pieces of 32 rows and more; a process that takes nothing itself, so
    that budgets are exact; what they have is for weights, not for longer passes."""
    pieces_of(monkeypatch, 5000)
    process_of(monkeypatch, 0)
    monkeypatch.setattr(loading, "CHUNK", 16)


def streaming_takes(path: Path, chunk: int) -> int:
    """Bytes of a run in passes of `chunk` tokens that holds no weights."""
    model = exact_model(path, load="mmap")
    plan = model.session.plan
    tables = {ref.matrix for ref in plan.tables}
    pieces = [p for ref in plan.weights if ref.matrix not in tables for p in streaming.cut(ref)]
    buffers = streaming.LEAST_PIECES * room(max(piece.nbytes for piece in pieces))
    cache = bytes_at(model.graph, find_cache(model.graph), model.context)
    model.close()
    return cache + buffers + loading.work_bytes(plan, chunk, True)


def budgets(path: Path) -> dict[str, dict[str, Any]]:
    """Ways to load a model, those of a budget that holds nothing, some and all of it included."""
    least = streaming_takes(path, 16)
    size = path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.iterdir())
    found: dict[str, dict[str, Any]] = {
        "ram": {"load": "ram"}, "mmap": {"load": "mmap"}, "stream": {"load": "stream"},
        "nothing": {"ram": least},
    }  # fmt: skip
    for part in (4, 2):
        found[f"{part}. part"] = {"ram": least + size // part}
    return found | {"all": {"ram": least + 20 * size + 10**7}}


def written(path: Path, **options: Any) -> tuple[Array, float]:
    """Logits (T, V) after a prompt, some tokens, and a rewind; what part of a pass is read."""
    model = exact_model(path, **options)
    model.chunk = 16  # of attention over more rows the last bits differ
    rows = [model.feed(PROMPT)]
    rows += [model.feed([token]) for token in WRITTEN]
    rows.append(model.feed(PROMPT[:5]))
    model.rewind(len(PROMPT) + 1)
    rows.append(model.feed(WRITTEN[1:2]))
    provider = model.session.provider
    part = getattr(provider, "bytes_a_pass", 0) / model.bytes_per_token
    model.close()
    return np.stack(rows), part


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("encoding", ["F32", "F16", "BF16"])
def test_plain_weights_to_the_last_bit(
    encoding: str, tied: bool, threads: int, tmp_path: Path
) -> None:
    tiny = Tiny(**{**vars(WIDE), "tied": tied})
    held = write_gguf(tmp_path / "m.gguf", tiny, encoding)
    found, parts = {}, {}
    for name, options in budgets(tmp_path / "m.gguf").items():
        found[name], parts[name] = written(tmp_path / "m.gguf", threads=threads, **options)
    for name, rows in found.items():
        assert np.array_equal(rows, found["mmap"]), name
    assert parts["stream"] > 0.9 and parts["nothing"] > 0.9 and parts["all"] == 0
    assert 0 < parts["2. part"] < parts["4. part"] < parts["nothing"]
    oracle = logits(tiny, held, PROMPT + WRITTEN)
    near(found["stream"][:4], oracle[len(PROMPT) - 1 :])
    near(found["stream"][5:], oracle[len(PROMPT) + 1 : len(PROMPT) + 2])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("encoding", ["Q8_0", "Q4_1", "Q6_K"])
def test_blocks(encoding: str, threads: int, tmp_path: Path) -> None:
    """Held rows are packed where that pays, and then multiplied in integers: near, not the same."""
    tiny = K_QUANT if encoding.endswith("K") else WIDE
    path = tmp_path / "m.gguf"
    held = write_gguf(path, tiny, encoding)
    found, parts = {}, {}
    for name, options in budgets(path).items():
        found[name], parts[name] = written(path, threads=threads, **options)
        assert np.array_equal(written(path, threads=threads, **options)[0], found[name])
    oracle = logits(tiny, held, PROMPT + WRITTEN)
    for rows in found.values():
        near(rows[:4], oracle[len(PROMPT) - 1 :])
    for name in ("stream", "nothing"):
        assert np.array_equal(found[name], found["mmap"])
    assert np.array_equal(found["all"], found["ram"])
    assert parts["all"] == 0 < parts["2. part"] < parts["nothing"]


def test_a_folder_of_several_files(tmp_path: Path) -> None:
    write_hf(tmp_path / "m", WIDE, "BF16", shards=3)
    ways = budgets(tmp_path / "m").values()
    found = [written(tmp_path / "m", **options)[0] for options in ways]
    for rows in found:
        assert np.array_equal(rows, found[0])


@pytest.mark.parametrize("optimize", [False, True])
def test_an_onnx_model(optimize: bool, tmp_path: Path) -> None:
    """Matrices in columns and vectors, for few rows and for many."""
    path = saved(deep(4), tmp_path / "m.onnx")
    options = {"threads": 2, "optimize": optimize, "precision": "exact"}
    least = least_named(lambda: Session(path, ram=1, **options))
    ways: list[dict[str, Any]] = [{"load": "ram"}, {"load": "mmap"}, {"load": "stream"}]
    ways += [{"ram": least + more} for more in (0, 100_000, 200_000, 300_000, 10**8)]
    found = []
    for way in ways:
        with Session(path, **way, **options) as session:
            for m in (1, 8, 9, 40, 1):
                x = random(m, m, 131)
                found.append(session.run({"x": x})["y3"])
    for i, y in enumerate(found):
        assert np.array_equal(y, found[i % 5])


@pytest.mark.parametrize("chunk", [8, 16, 64, 256, 512])
def test_a_budget_says_how_long_passes_over_a_prompt_are(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest that leave room for the buffers; what is computed does not depend on them."""
    monkeypatch.setattr(loading, "CHUNK", 512)
    path, tiny = tmp_path / "m", Tiny(**{**vars(WIDE), "layers": 16})
    wanted = logits(tiny, write_hf(path, tiny), PROMPT)[-1]
    ram = streaming_takes(path, chunk)
    assert ram > streaming_takes(path, chunk // 2) + chunk // 2 * 4 * (64 + 160)
    for less, found in ((0, chunk), (1, chunk // 2)):
        if found < loading.SMALLEST_CHUNK:
            assert least_named(lambda: exact_model(path, ram=ram - 1)) >= ram
            continue
        model = exact_model(path, ram=ram - less)
        assert model.chunk == found
        near(model.feed(PROMPT), wanted)
        model.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stream_that_is_stopped_goes_on(threads: int, tmp_path: Path) -> None:
    """Between any two operators; the buffers serve the next pass from its beginning."""
    write_gguf(tmp_path / "m.gguf", WIDE, "F16")
    ram = streaming_takes(tmp_path / "m.gguf", 16)
    model = exact_model(tmp_path / "m.gguf", ram=ram, threads=threads)
    wanted = [model.feed(PROMPT), model.feed(WRITTEN[:1])]
    for left in range(0, len(model.session.plan.steps), 7):
        model.rewind(0)
        with pytest.raises(Interrupted):
            model.feed(PROMPT, stop=Countdown(left))
        model.rewind(0)
        assert np.array_equal(model.feed(PROMPT), wanted[0])
        with pytest.raises(Interrupted):
            model.feed(WRITTEN[:1], stop=Countdown(left))
        assert np.array_equal(model.feed(WRITTEN[:1]), wanted[1])
    model.close()


def test_a_file_that_fails_under_a_session(tmp_path: Path) -> None:
    """The error names it; when it is whole again the session goes on."""
    path = tmp_path / "m.gguf"
    write_gguf(path, WIDE, "F16")
    whole = path.read_bytes()
    model = exact_model(path, load="stream")
    model.chunk = 1
    wanted = model.feed(PROMPT[:1])
    model.rewind(0)
    for size in (len(whole) - 100, len(whole) // 2, 10, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"m\.gguf.*truncated"):
            for _ in range(100):  # what was read ahead is still good
                model.feed(PROMPT[:1])
                model.rewind(0)
        path.write_bytes(whole)
        model.rewind(0)
        assert np.array_equal(model.feed(PROMPT[:1]), wanted)
        model.rewind(0)
    model.close()


def test_two_streams_at_once(tmp_path: Path) -> None:
    """Each in a thread of its own, on the same file."""
    path = tmp_path / "m.gguf"
    write_gguf(path, WIDE, "F16")
    wanted, _ = written(path, load="mmap")
    found: list[Array] = []

    def work() -> None:
        for _ in range(3):
            found.append(written(path, load="stream")[0])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6 and all(np.array_equal(rows, wanted) for rows in found)


def test_what_a_budget_holds_lasts(tmp_path: Path) -> None:
    """What is in memory may be in the tables of one token's kernels, which are run again and again;
    a buffer that has been read into again may not."""
    path = tmp_path / "m.gguf"
    write_gguf(path, WIDE, "F16")
    for name, options in budgets(path).items():
        model = exact_model(path, **options)
        plan, provider = model.session.plan, model.session.provider
        tables = {ref.matrix for ref in plan.tables}
        assert isinstance(provider, StreamProvider) == (name not in ("ram", "mmap"))
        found = [provider.get(ref).lasting for ref in plan.weights if ref.matrix not in tables]
        everything = name in ("ram", "mmap", "all")
        assert all(found) if everything else not all(found), name
        model.close()


@pytest.mark.parametrize(("load", "ram"), [("auto", "9GB"), ("stream", "9GB"), ("stream", None)])
def test_kernels_are_compiled_before_weights_are_packed_with_them(
    load: str, ram: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not prepared compiles in this process, without a word and with its memory."""
    prepared: list[str] = []

    def prepare(names: Sequence[str], **_: Any) -> None:
        prepared.extend(names)

    def service(name: str) -> Any:
        return prepare if name == "PrepareKernels" else internal(name)

    monkeypatch.setattr(session, "internal", service)
    write_gguf(tmp_path / "m.gguf", Tiny(), "Q8_0")
    with Session(tmp_path / "m.gguf", load=load, ram=ram) as opened:
        plan = opened.plan
        assert set(plan.panel_kernels if ram else plan.kernels) <= set(prepared)
        assert set(plan.panel_kernels) - set(plan.kernels)
