"""Whole models on a GPU, which acts late, against the same models on the CPU."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_oracle import Tiny
from llm_checks import Countdown
from whole_models import (
    HALVES,
    SMALL,
    TOLERANCE,
    CountingDevice,
    fed,
    near,
    on_cpu,
    opened,
    opened_on_cpu,
    written,
)

from onnxstream_nb.errors import Interrupted, ShapeError, UsageError
from onnxstream_nb.gpu import offload
from onnxstream_nb.gpu.slots import DeviceSlot
from onnxstream_nb.kernels.cuda_rows import DeviceTable
from onnxstream_nb.kvslot import KVSlot
from onnxstream_nb.sequences import Sequences

FOLDER = Path(__file__).parent / "fixtures" / "models"
PARTS = ([3, 9, 40, 1, 7, 12], [5], [9], [66])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CountingDevice:
    made = CountingDevice()
    monkeypatch.setattr(offload, "_first", lambda: made)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("whole"))


def same(
    path: Path, parts: Sequence[Sequence[int]] = PARTS, error: float = TOLERANCE, **options: Any
) -> Any:
    """What the model gives is what it gives on the CPU; the model, for a look at it."""
    llm = opened(path, **options)
    near(fed(llm, parts), on_cpu(path, parts, **options), error)
    return llm


# -- of every kind


@pytest.mark.parametrize(
    ("encoding", "tiny"),
    [
        ("Q8_0", SMALL), ("Q4_0", replace(SMALL, tied=True)), ("Q4_1", SMALL),
        ("Q4_1", replace(SMALL, tied=True)), ("F32", replace(SMALL, layers=2)),
        ("BF16", replace(SMALL, architecture="qwen2", tied=True)),
        ("F16", replace(SMALL, architecture="qwen3", kv_heads=2)),
        ("F16", replace(SMALL, architecture="mistral", window=5, kv_heads=1)),
        ("F16", replace(SMALL, hidden=40, heads=2, kv_heads=1)),
        ("F16", replace(SMALL, head_dim=8)),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.architecture} {x.hidden} {x.tied}",
)  # fmt: skip
def test_gguf(encoding: str, tiny: Tiny, tmp_path: Path, device: CountingDevice) -> None:
    """Also a hidden size that the products do not take, and heads that no kernel is for."""
    llm = same(written(tmp_path, encoding, tiny), error=HALVES if encoding[0] != "Q" else 1e-3)
    slots = list(llm._cache.slots.values())
    assert all(isinstance(s, KVSlot if tiny.head_dim == 8 else DeviceSlot) for s in slots)
    llm.close()
    assert not device.held and device.closed


@pytest.mark.parametrize("name", ["llama_gqa_op14", "mistral_sw8_op14", "llama_gqa_dyn23"])
def test_exports(name: str, device: CountingDevice) -> None:
    """With masks, positions, and caches of arrays that were made by others."""
    same(FOLDER / name / "model.onnx", ([3, 9, 40], [5], [9]), HALVES, context=64).close()
    assert not device.held


@pytest.mark.parametrize("about", [{"capability": (7, 5)}, {"order": "random"}], ids=str)
def test_on_any_device(about: dict[str, Any], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without what Ampere brought, and whatever comes first."""
    monkeypatch.setattr(offload, "_first", lambda: CountingDevice(**about))
    same(model, ([3, 9, 40, 1, 7, 12, 2, 5, 11], [5], [9]), HALVES).close()


@pytest.mark.parametrize("load", ["stream", "mmap"])
@pytest.mark.parametrize("threads", [1, 2])
def test_however_the_cpu_holds_the_rest(
    load: str, threads: int, tmp_path: Path, device: CountingDevice, one_thread_afterwards: None
) -> None:
    path = written(tmp_path, "F16", replace(SMALL, hidden=40, heads=2, kv_heads=1))
    same(path, PARTS[:2], load=load, threads=threads).close()


# -- the course of a text


def test_a_prompt_in_chunks_and_other_ends(model: Path, device: CountingDevice) -> None:
    ids = [int(i) for i in np.random.default_rng(1).integers(0, SMALL.vocab, 21)]
    llm = opened(model)
    llm.chunk = 8
    near(fed(llm, [ids]), on_cpu(model, [ids]))
    llm.rewind(11)
    near(fed(llm, [[5], [6]]), on_cpu(model, [ids[:11], [5], [6]])[1:])
    llm.rewind(12)
    near(fed(llm, [[7], [1, 2], [3]]), on_cpu(model, [[*ids[:11], 5], [7], [1, 2], [3]])[1:])
    llm.rewind(0)
    near(fed(llm, [[4]]), on_cpu(model, [[4]]))
    with pytest.raises(UsageError, match="do not fit the context"):
        llm.feed([1] * 96)
    llm.close()


def test_logits_of_all_positions(model: Path, device: CountingDevice) -> None:
    ids = [3, 9, 40, 1, 7]
    found = []
    for options in ({}, {"device": "cuda", "cuda": "all"}):
        llm: Any = opened(model) if options else opened_on_cpu(model)
        found.append([llm.logits(ids), llm.logits(ids[:2]), llm.logits([8]), llm.logits([9])])
        llm.close()
    near(found[1], found[0])


def test_the_full_context(tmp_path: Path, device: CountingDevice) -> None:
    """To the last position, beyond a block of 32 of them."""
    path, ids = written(tmp_path), [int(i) for i in np.arange(37) * 7 % SMALL.vocab]
    same(path, [ids, [1], [2], [3]], HALVES, context=40).close()


def test_keys_and_values_of_eight_bits_stay_with_the_cpu(
    model: Path, device: CountingDevice
) -> None:
    llm = same(model, PARTS[:3], kv_cache="q8")
    assert all(isinstance(s, KVSlot) for s in llm._cache.slots.values())
    llm.close()


def test_several_sequences(model: Path, device: CountingDevice) -> None:
    prompts = [[3, 9, 40], [7], [int(i) for i in range(12)]]
    wanted = [on_cpu(model, [p, *([i] for i in (5, 9, 2))]) for p in prompts]
    llm = opened(model)
    sequences = Sequences(llm, 3)
    strands = [sequences.open(40) for _ in prompts]
    for strand, prompt in zip(strands, prompts, strict=True):
        strand.waiting = list(prompt)
    rows: dict[Any, list[Any]] = {strand: [] for strand in strands}
    for token in (5, 9, 2, None):
        for strand, logits in sequences.step(strands):
            rows[strand].append(logits.copy())
        for strand in strands:
            strand.waiting = [] if token is None else [token]
    for strand, theirs in zip(strands, wanted, strict=True):
        near(rows[strand][: len(theirs)], theirs[: len(rows[strand])], HALVES)
        assert len(rows[strand]) >= 3
    slots = [weakref.ref(slot) for s in strands for slot in s.cache.slots.values()]
    rows.clear()
    while strands:
        strand = strands.pop()
        sequences.close(strand)
    gc.collect()
    assert len(slots) == 6 and all(slot() is None for slot in slots)
    llm.close()
    assert not device.held


def test_a_stop_leaves_what_was_read(model: Path, device: CountingDevice) -> None:
    llm = opened(model)
    wanted = on_cpu(model, PARTS)
    near(fed(llm, PARTS[:1]), wanted[:1])
    for after in (0, 3, 9):
        with pytest.raises(Interrupted):
            llm.feed(PARTS[1], stop=Countdown(after))
        assert len(llm.tokens) == len(PARTS[0])
    near(fed(llm, PARTS[1:3]), wanted[1:3])
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        llm.feed(PARTS[3], stop=stop)
    near(fed(llm, PARTS[3:]), wanted[3:])
    llm.close()


# -- a token as one graph


def test_a_token_is_one_graph(model: Path, device: CountingDevice) -> None:
    """What was captured is launched, and nothing else; a few numbers go up, the logits come down,
    and no weight is uploaded again."""
    llm = opened(model)
    assert device.up >= llm.gpu_bytes
    fed(llm, PARTS[:2])
    replay = llm.session._replay
    assert replay is not None
    tables = [part for part in replay._parts if isinstance(part, DeviceTable)]
    others = [part for part in replay._parts if not isinstance(part, DeviceTable)]
    assert len(tables) == 1 and all(p.step.node.op_type == "Cast" for p in others)
    captured = len(tables[0]._graph)
    for token in (9, 40, 2):
        launched, up, down = len(device.launched), device.up, device.down
        allocations = device.allocations
        llm.feed([token])
        assert len(device.launched) - launched == captured
        assert device.up - up <= 64 and device.down - down == 4 * SMALL.vocab
        assert device.allocations == allocations and llm.session._replay is replay
    llm.close()


def test_ids_that_are_none(model: Path, device: CountingDevice) -> None:
    """Each is looked at, before what was captured looks it up."""
    llm, wanted = opened(model), on_cpu(model, PARTS)
    found = []
    for part in PARTS:
        for wrong in ([SMALL.vocab], [2, -SMALL.vocab - 1]):
            with pytest.raises(ShapeError, match=f"Gather: index {wrong[-1]} is out of range"):
                llm.feed(wrong)
        found += fed(llm, [part])
    near(found, wanted)
    llm.close()


def test_tokens_that_nobody_waits_for(model: Path, device: CountingDevice) -> None:
    """Logits that stay are not looked at between: what goes up is not what comes later."""
    llm = opened(model)
    llm.logits_stay = True
    for part in PARTS:
        llm.feed(part)
    near([llm.feed([11])], on_cpu(model, [*PARTS, [11]])[-1:])
    llm.close()


def test_a_second_model_after_the_first(model: Path, device: CountingDevice) -> None:
    wanted = on_cpu(model, PARTS[:2])
    for _ in range(2):
        llm = opened(model)
        near(fed(llm, PARTS[:2]), wanted)
        llm.session.close()
        assert not device.held and device.closed
        llm.close()
        with pytest.raises(UsageError, match="closed"):
            llm.feed([1])
