"""Fixtures that several files of tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def one_thread_afterwards() -> Iterator[None]:
    """For tests that choose how many threads the kernels use."""
    yield
    from onnxstream_nb.kernels.threads import set_threads

    set_threads(1)
