"""Language models whose keys and values have no room in the budget: the same replies from disk."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from llm_checks import Countdown, exact_model
from onnx_models import refusal
from weight_files import process_of

from onnxstream_nb import hub, passes, spill
from onnxstream_nb.errors import Interrupted, MemoryBudgetError, OnnxstreamError, UsageError
from onnxstream_nb.formats import load
from onnxstream_nb.kvcache import KVCache, bytes_at, bytes_resident
from onnxstream_nb.kvslot import KVSlot
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.loading import Holding, choose_reserve
from onnxstream_nb.spill import SpilledSlot

WIDE = Tiny(vocab=67, heads=6, kv_heads=3, head_dim=16, layers=4, context=30_000)
"""Small weights, large context: 23 MB of keys and values in float16."""
IDS = [int(i) for i in np.random.default_rng(7).integers(0, WIDE.vocab, 900)]

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("wide") / "wide.gguf"
    write_gguf(file, WIDE, "F16")
    return file


@pytest.fixture(autouse=True)
def process_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes no memory itself, so that budgets are exact; and small slices."""
    process_of(monkeypatch, 0)
    monkeypatch.setattr(spill, "SLICE_BYTES", 40_000)


def sizes(path: Path, encoding: str = "f16", threads: int = 1) -> list[int]:
    graph = load(path)
    pairs = passes.find_cache(graph)
    return bytes_resident(graph, pairs, WIDE.context, encoding, windows=2 * threads)


def least_ram(path: Path, **options: Any) -> int:
    """What the refusal says would do without a disk."""
    message = refusal(lambda: exact_model(path, ram=1_000_000, **options), MemoryBudgetError)
    number, unit = re.search(r"at least ([\d.]+) ([kMG])B", message).groups()  # type: ignore[union-attr]
    return int(float(number) * {"k": 1e3, "M": 1e6, "G": 1e9}[unit])


def spilled_layers(model: LanguageModel) -> int:
    return sum(isinstance(slot, SpilledSlot) for slot in model._cache.slots.values()) // 2


@pytest.fixture
def tight(path: Path) -> int:
    """A budget with which all layers' keys and values but none of the weights must be on disk."""
    whole, *_, least = sizes(path)
    return least_ram(path, threads=1) - whole + least + 3_000_000


def descriptors() -> list[str]:
    """Those that are open; the one that lists them is not any more."""
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def replies(model: LanguageModel) -> list[Array]:
    given = [model.feed(IDS[:700])]
    given += [model.feed([token]) for token in IDS[700:720]]
    model.rewind(300)
    given += [model.feed(IDS[720:900]), model.feed([5])]
    model.rewind(0)
    return [*given, model.feed(IDS[:31]), model.feed([1]), model.feed([2])]


@pytest.mark.parametrize("encoding", ["f16", "q8"])
@pytest.mark.parametrize("threads", [1, 2])
def test_replies_are_those_from_memory(
    threads: int, encoding: str, path: Path, tmp_path: Path
) -> None:
    compare(path, tmp_path, threads, encoding)


def test_replies_of_layers_with_windows_are_those_from_memory(tmp_path: Path) -> None:
    write_gguf(tmp_path / "w.gguf", replace(WIDE, window=200), "F16")
    (tmp_path / "spill").mkdir()
    compare(tmp_path / "w.gguf", tmp_path / "spill", 2, "f16")


def compare(path: Path, tmp_path: Path, threads: int, encoding: str) -> None:
    """Replies with the cache in `tmp_path` and in memory, to the last bit."""
    options: dict[str, Any] = {"threads": threads, "kv_cache": encoding}
    whole, *_, least = sizes(path, encoding, threads)
    ram = least_ram(path, **options) - whole + least + 3_000_000
    plain = exact_model(path, load="stream", **options)
    tight = exact_model(path, ram=ram, kv_spill=tmp_path, **options)
    assert spilled_layers(plain) == plain.spilled_bytes == 0
    assert spilled_layers(tight) == WIDE.layers
    assert whole - 4 * WIDE.layers * 4096 <= tight.spilled_bytes <= whole
    for mine, wanted in zip(replies(tight), replies(plain), strict=True):
        np.testing.assert_array_equal(mine, wanted)
    assert tight.cache_bytes == plain.cache_bytes
    plain.close()
    tight.close()
    assert list(tmp_path.iterdir()) == []


def test_more_memory_keeps_more_layers_there(path: Path, tight: int, tmp_path: Path) -> None:
    steps, kept = sizes(path), []
    assert len(steps) == WIDE.layers + 1 and steps == sorted(steps, reverse=True)
    for size in reversed(steps):
        model = exact_model(path, ram=tight + size - steps[-1], threads=1, kv_spill=tmp_path)
        kept.append(WIDE.layers - spilled_layers(model))
        model.close()
    assert kept == [0, 1, 2, 3, 4]


def test_with_room_for_all_nothing_is_on_disk(path: Path, tmp_path: Path) -> None:
    for ram in (least_ram(path, threads=1) + 10_000_000, None):
        model = exact_model(path, ram=ram, threads=1, kv_spill=tmp_path / "none")
        assert model.spilled_bytes == 0 and not (tmp_path / "none").exists()
        model.close()


def test_without_a_folder_it_has_to_fit(path: Path, tight: int, tmp_path: Path) -> None:
    message = refusal(lambda: exact_model(path, ram=tight, threads=1), MemoryBudgetError)
    assert "--context" in message
    refusal(lambda: exact_model(path, ram=tight // 2, kv_spill=tmp_path), MemoryBudgetError)


def test_tokens_are_replayed_beside_a_cache_on_disk(path: Path, tight: int, tmp_path: Path) -> None:
    model = exact_model(path, ram=tight, threads=1, kv_spill=tmp_path)
    plain = exact_model(path, load="stream", threads=1)
    for llm in (model, plain):
        llm.feed(IDS[:200])
        llm.feed([3])
    recorded = model.session._replay
    for token in IDS[200:240]:
        np.testing.assert_array_equal(model.feed([token]), plain.feed([token]))
    assert model.session._replay is recorded is not None
    model.close()
    plain.close()


def test_a_full_disk_is_told_at_the_start(
    path: Path, tight: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    threads = set(threading.enumerate())
    message = refusal(
        lambda: exact_model(path, ram=tight, threads=1, kv_spill=tmp_path), UsageError
    )
    assert "No space left" in message and str(tmp_path) in message and "--kv-spill" in message
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize("name", ["preadv", "pwrite"])
def test_a_disk_that_fails_leaves_the_conversation_as_it_was(
    name: str, path: Path, tight: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exact_model(path, ram=tight, threads=1, kv_spill=tmp_path)
    plain = exact_model(path, load="stream", threads=1)
    for llm in (model, plain):
        llm.feed(IDS[:300])
    call, descriptor = getattr(os, name), model._cache.file._descriptor  # type: ignore[union-attr]
    left = [20]

    def broken(fd: int, *arguments: Any) -> Any:
        left[0] -= fd == descriptor
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(fd, *arguments)

    with monkeypatch.context() as context:
        context.setattr(os, name, broken)
        for ids in (IDS[300:400], [7]):
            refusal(lambda ids=ids: model.feed(ids), OnnxstreamError)
    assert model.tokens == IDS[:300] and model._cache.length == 300
    for ids in ([8], IDS[300:400], [9]):
        np.testing.assert_array_equal(model.feed(ids), plain.feed(ids))
    model.close()
    plain.close()


@pytest.mark.parametrize("left", [1, 9, 30, 60])
def test_an_interrupt_leaves_the_conversation_as_it_was(
    left: int, path: Path, tight: int, tmp_path: Path
) -> None:
    model = exact_model(path, ram=tight, threads=1, kv_spill=tmp_path)
    wanted = replies(exact_model(path, load="stream", threads=1))[-3:]
    model.feed(IDS[:31])
    for ids in (IDS[31:60], [4]):
        with pytest.raises(Interrupted):
            model.feed(ids, Countdown(left))
        assert model.tokens == IDS[:31] and model._cache.length == 31
    for ids, logits in zip(([1], [2]), wanted[1:], strict=True):
        np.testing.assert_array_equal(model.feed(ids), logits)
    model.close()


def test_closing_gives_the_disk_back(path: Path, tight: int, tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    model = exact_model(path, ram=tight, threads=1, kv_spill=tmp_path)
    model.feed(IDS[:300])
    model.feed([1])
    model.close()
    assert model.spilled_bytes == model.cache_bytes == 0
    assert set(threading.enumerate()) <= threads
    open_files = [os.readlink(f"/proc/self/fd/{fd}") for fd in descriptors()]
    assert not any(str(tmp_path) in file for file in open_files)
    model.close()


@pytest.mark.parametrize(
    ("chunks", "wanted"),
    [
        ({9: 512, 5: 512, 2: 512}, 9),
        ({9: 32, 5: 512, 2: 512}, 9),  # shorter passes, but not too short
        ({9: 16, 5: 512, 2: 512}, 5),
        ({5: 256, 2: 512}, 2),
        ({5: 512, 2: 512}, 5),
        ({2: 8}, 2),
    ],
)
def test_which_of_several_reserves(chunks: dict[int, int], wanted: int) -> None:
    def choice(reserve: int) -> Holding:
        if reserve not in chunks:
            raise MemoryBudgetError(f"not {reserve}")
        return Holding("stream", chunks[reserve])

    assert choose_reserve(choice, [9, 5, 2]) == (Holding("stream", chunks[wanted]), wanted)
    with pytest.raises(MemoryBudgetError, match="not 1"):
        choose_reserve(choice, [10, 4, 1])


# -- the cache itself


@pytest.mark.parametrize("encoding", ["f16", "q8"])
def test_what_stays_in_memory_is_within_what_it_may(
    encoding: str, path: Path, tmp_path: Path
) -> None:
    graph = load(path)
    pairs, steps = passes.find_cache(graph), sizes(path, encoding)
    assert steps[0] == bytes_at(graph, pairs, WIDE.context, encoding)
    for on_disk, resident in [*enumerate(steps), (WIDE.layers, 0), (1, steps[0] - 1)]:
        cache = KVCache(
            graph, pairs, encoding, WIDE.context, resident=resident, spill=tmp_path, windows=2
        )
        kinds = [isinstance(cache.slots[p.past_input], SpilledSlot) for p in pairs]
        assert kinds == sorted(kinds) and sum(kinds) == 2 * on_disk  # the last layers
        spilled = [s for s in cache.slots.values() if isinstance(s, SpilledSlot)]
        ranges = sorted((s.offset, s.offset + s.room_bytes) for s in spilled)
        assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))
        assert all(start % 4096 == 0 for start, _ in ranges)
        assert cache.disk_bytes >= max((stop for _, stop in ranges), default=0)
        # Each layer's keys know the layer after it, the last one's the first.
        keys = [s for s in spilled if s.kind == "key"]
        following = [s.following.keys for s in keys if s.following is not None]
        assert following == keys[1:] + keys[:1]
        cache.close()
        assert cache.slots == {} and cache.disk_bytes == 0


def test_without_a_folder_a_cache_is_in_memory(path: Path) -> None:
    graph = load(path)
    cache = KVCache(graph, passes.find_cache(graph), positions=100, resident=0)
    assert all(isinstance(slot, KVSlot) for slot in cache.slots.values())


def test_the_folder_that_a_flag_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONNXSTREAM_CACHE", str(tmp_path))
    assert hub.spill_dir() == tmp_path / "tmp"
    assert hub.spill_dir("off") is None
    assert hub.spill_dir("~/there") == Path.home() / "there"


_PEAK = """
import re, sys
from pathlib import Path
from onnxstream_nb import device
from onnxstream_nb.errors import MemoryBudgetError
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.loading import Holding, choose_reserve

path, folder = sys.argv[1:]
options = {"kv_spill": folder, "threads": 2}
try:
    LanguageModel(path, ram=1, **options)
except MemoryBudgetError as error:
    least = device.parse_size(re.search("at least (.*?) is needed", str(error))[1])
ram = int(1.05 * least)  # the refused one has left something behind
model = LanguageModel(path, ram=ram, **options)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
model.feed([(7 * i) % 60 for i in range(4000)])
for i in range(5):
    model.feed([i])
print(device.peak_rss(), ram, model.spilled_bytes, model.cache_bytes)
"""


def test_the_process_stays_within_its_budget(tmp_path: Path) -> None:
    """A process of its own, with little more than it says would do, once it has loaded."""
    tiny = Tiny(heads=8, kv_heads=4, head_dim=64, layers=8, context=32_000)
    write_gguf(tmp_path / "m.gguf", tiny, "F16")
    for _ in range(2):  # the first run may have to compile kernels
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(tmp_path / "m.gguf"), str(tmp_path)],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    peak, ram, spilled, held = map(int, done.stdout.split())
    assert spilled > 260_000_000 and held > 32_000_000
    assert peak <= ram < 200_000_000
