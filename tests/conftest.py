"""Fixtures that several files of tests share."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has what it starts in the background ignore Ctrl-C, and all that is started by that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """All modules and tests stay until the end: who collects garbage need not look through them,
    which takes longer than most of the tests that do so."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread_afterwards() -> Iterator[None]:
    """For tests that choose how many threads the kernels use, or their precision: an earlier
    session's may still be set."""
    from onnxstream_nb.kernels.threads import set_precision, set_threads

    set_precision("exact")
    yield
    set_threads(1)
    set_precision("exact")


@pytest.fixture
def no_endless_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of streams: who waits in vain for a piece fails."""
    from weight_files import wait_no_longer

    wait_no_longer(monkeypatch)


@pytest.fixture
def panels_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of packed weights: taken to pay on this host, whose kernels run them anyway."""
    from onnxstream_nb.kernels import packing

    monkeypatch.setattr(packing, "SUPPORTED", True)
