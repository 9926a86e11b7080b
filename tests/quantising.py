"""What the tests of quantisation share: small models as drafts, and what a draft computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from fake_llm import FakeTokenizer

from onnxstream_nb import Session
from onnxstream_nb.convert.draft import Draft
from onnxstream_nb.convert.quantisation.quantise import QuantiseOptions, quantise
from onnxstream_nb.formats.onnx import read_bytes
from onnxstream_nb.formats.onnx_write import to_model_proto
from onnxstream_nb.graph import Graph

Array = np.ndarray[Any, Any]
TEXT = (Path(__file__).parent / "fixtures" / "public_domain.txt").read_text("utf-8")
CALIBRATION, REST = TEXT[: len(TEXT) // 2], TEXT[len(TEXT) // 2 :]


def silent(text: str, fraction: float | None) -> None:
    """A report to nobody."""


def options(**given: Any) -> QuantiseOptions:
    """Options with a text to calibrate by."""
    calibrating = {"text": CALIBRATION, "tokenizer": FakeTokenizer(), "tokens": 512, "window": 64}
    return QuantiseOptions(**(calibrating | given))


def quantised(draft: Draft, **given: Any) -> Draft:
    return quantise(draft, options(**given), silent)


def model_of(draft: Draft) -> onnx.ModelProto:
    """The draft as a checked ONNX model."""
    model = to_model_proto(draft.graph, draft.read)
    onnx.checker.check_model(model, full_check=True)
    return model


def by_onnxruntime(
    model: onnx.ModelProto, feeds: dict[str, Array], output: str, *, optimised: bool = False
) -> Array:
    """The graph as it stands; or with all of onnxruntime's own rewrites, of which the one that
    joins DequantizeLinear and MatMul is told not to round activations to 8 bits, its default."""
    settings = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    settings.graph_optimization_level = levels.ORT_DISABLE_ALL
    if optimised:
        settings.graph_optimization_level = levels.ORT_ENABLE_ALL
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings)
    result: Array = session.run([output], feeds)[0]
    return result


def by_us(graph: Graph, feeds: dict[str, Array], output: str) -> Array:
    with Session(graph, precision="exact") as session:
        result: Array = session.run(feeds, [output])[output]
    return result


def agreed(draft: Draft, feeds: dict[str, Array], output: str) -> Array:
    """What the written draft computes here, when onnxruntime computes the same: to 5e-4, since
    each layer's activations meet panels of integers in 15 bits."""
    model = model_of(draft)
    ours = by_us(read_bytes(model.SerializeToString()), feeds, output)
    for optimised in (False, True):
        theirs = by_onnxruntime(model, feeds, output, optimised=optimised)
        np.testing.assert_allclose(ours, theirs, rtol=5e-4, atol=5e-4 * np.abs(theirs).max())
    return ours


def distance(got: Array, wanted: Array) -> float:
    """The error's deviation by that of what is wanted."""
    return float(np.sqrt(np.square(got - wanted).mean()) / wanted.std())
