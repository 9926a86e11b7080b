"""ONNX's own node cases: all that manifest.txt lists pass. update.py writes it anew."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxstream_nb.session import Session

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the suite divides by zero to compute what it expects
    from onnx import TensorProto, numpy_helper
    from onnx.backend.test.loader import load_model_tests

    CASES: dict[str, Any] = {case.name: case for case in load_model_tests(kind="node")}
MANIFEST = Path(__file__).with_name("manifest.txt")


def array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


@pytest.mark.parametrize("name", MANIFEST.read_text("utf-8").split())
def test_node(name: str) -> None:
    case = CASES[name]
    for inputs, outputs in case.data_sets:
        with Session(case.model, load="ram", threads=1) as session:
            feeds = {i.name: array(v) for i, v in zip(session.inputs, inputs, strict=True)}
            results = session.run(feeds).values()
        for got, want in zip(results, map(array, outputs), strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            if want.dtype.kind in "OSUiubc":
                np.testing.assert_array_equal(got, want)
            else:  # the suite's own runner allows two units in the last place of bfloat16
                rtol = 2**-6 if want.dtype.name == "bfloat16" else case.rtol
                np.testing.assert_allclose(got.astype(float), want.astype(float), rtol, case.atol)
