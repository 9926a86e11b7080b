"""Attention over slots on disk: that over slots in memory, to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from spilled_slots import Twins

from onnxstream_nb import spill
from onnxstream_nb.kernels.attention import attention_23, lower_attention
from onnxstream_nb.kernels.threads import set_precision, set_threads

ENCODINGS = pytest.mark.parametrize("encoding", ["f16", "q8"])
PRECISIONS = pytest.mark.parametrize("precision", ["exact", "fast"])

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


@pytest.fixture(params=["small slices", "large slices"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of the fewest positions that there may be, or some that hold a whole layer."""
    if request.param == "small slices":
        monkeypatch.setattr(spill, "SLICE_BYTES", 1)


@ENCODINGS
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("heads", "group", "sizes"),
    [(1, 1, (16, 16)), (3, 3, (64, 64)), (2, 8, (33, 80)), (5, 1, (80, 24)), (1, 11, (128, 40))],
)
def test_tokens_across_every_boundary(
    heads: int, group: int, sizes: tuple[int, int], threads: int, encoding: str,
    slices: None, tmp_path: Path,
) -> None:  # fmt: skip
    set_threads(threads)
    twins = Twins(tmp_path, heads, group, sizes, encoding)
    for length in (1, 31, 32, 33, 127, 128, 129, 255, 256, 257, 258, 511, 640, 1000):
        if missing := length - 1 - twins.length:
            twins.step(0, missing)
        twins.step(1)
        assert twins.length == length
    twins.assert_same_contents()


@ENCODINGS
@PRECISIONS
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("heads", "group", "sizes"),
    [(1, 1, (16, 16)), (3, 3, (64, 64)), (2, 8, (33, 80)), (1, 11, (128, 40))],
)
def test_prompts_across_every_boundary(
    heads: int, group: int, sizes: tuple[int, int], threads: int, precision: str, encoding: str,
    slices: None, tmp_path: Path,
) -> None:  # fmt: skip
    set_threads(threads)
    set_precision(precision)
    twins = Twins(tmp_path, heads, group, sizes, encoding)
    for tokens in (9, 22, 10, 87, 127, 2, 1, 129, 512, 9, 92):
        twins.step(tokens)
    assert twins.length == 1000
    twins.assert_same_contents()


@ENCODINGS
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_few_tokens_across_blocks(
    threads: int, encoding: str, slices: None, tmp_path: Path
) -> None:
    """Computed one by one, and read together where their number of blocks is the same."""
    set_threads(threads)
    twins = Twins(tmp_path, 3, 2, (48, 40), encoding)
    for tokens in (5, 22, 8, 2, 200, 8, 7, 6, 5, 4, 3, 8, 300, 8, 8, 8):
        twins.step(tokens)
    rng = np.random.default_rng(2)
    distance = np.arange(8)[:, None] + twins.length - np.arange(twins.length + 8)
    twins.step(8, mask=(distance >= 0) & (rng.random(distance.shape) > 0.2), softcap=3.0)
    twins.assert_same_contents()


@ENCODINGS
@PRECISIONS
def test_prompts_that_do_not_go_through_the_keys_at_once(
    precision: str, encoding: str, slices: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill.SpilledPair, "state_rows", 100)
    set_threads(2)
    set_precision(precision)
    twins = Twins(tmp_path, 2, 3, (64, 32), encoding)
    for tokens in (40, 300, 33, 34, 100):
        twins.step(tokens)
    twins.step(120, mask=np.random.default_rng(1).random((120, twins.length + 120)) > 0.3)


@ENCODINGS
@pytest.mark.parametrize("queries", [1, 2, 40])
def test_masks_soft_cap_scale_and_windows(
    queries: int, encoding: str, slices: None, tmp_path: Path
) -> None:
    set_threads(2)
    rng = np.random.default_rng(5)
    twins = Twins(tmp_path, 2, 3, (48, 33), encoding)
    twins.step(0, 300)
    for shape in ((queries, 1), (1, 6, queries, 1), (1, 1, 1, 1), (6, queries, 1)):
        keys = twins.length + queries
        mask = rng.random((*shape[:-1], keys)) > 0.3
        twins.step(queries, mask=mask)
        twins.step(queries, mask=rng.standard_normal((*shape[:-1], keys + queries), np.float32))
    twins.step(queries, softcap=5.0, scale=0.3)
    twins.step(queries, left_window_size=150)
    twins.step(queries, is_causal=0)
    twins.step(queries, qk_matmul_output_mode=1, n_outputs=4)
    mask = np.zeros((queries, twins.length + queries), bool)
    assert not twins.step(queries, mask=mask).any()  # who sees nothing gets zeros


@ENCODINGS
def test_slots_set_back_forget_what_followed(encoding: str, slices: None, tmp_path: Path) -> None:
    set_threads(2)
    twins = Twins(tmp_path, 2, 2, (48, 40), encoding)
    twins.step(400)
    for length in (350, 33, 32, 31, 3, 0, 5):
        twins.rewind(length)
        twins.step(9)
        twins.step(1)
        twins.assert_same_contents()
    twins.step(500)
    twins.assert_same_contents()


def test_nothing_of_it_is_lowered(tmp_path: Path) -> None:
    twins = Twins(tmp_path, 1, 1, (16, 16))
    x = np.zeros((1, 1, 16), np.float32)
    heads = {"q_num_heads": 1, "kv_num_heads": 1}
    assert lower_attention(x, x, x, None, *twins.in_memory, **heads) is not None
    assert lower_attention(x, x, x, None, *twins.on_disk, **heads) is None


def test_more_positions_than_there_is_room_for(tmp_path: Path) -> None:
    twins = Twins(tmp_path, 1, 1, (16, 16), positions=100)
    twins.step(100)
    x = np.zeros((1, 1, 30, 16), np.float32)
    with pytest.raises(ValueError, match="130 positions do not fit a cache that was made for 128"):
        attention_23(x, x, x, None, *twins.on_disk)
    twins.assert_same_contents()
