"""Methods that see the model at work: what they fold, what they gain, and the verb."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_llm import FakeTokenizer
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from onnx_models import saved
from perplexity_oracle import two_models
from quantising import CALIBRATION, REST, agreed, by_us, distance, model_of, quantised, silent

from onnxstream_nb import cli, formats
from onnxstream_nb.convert.draft import Draft
from onnxstream_nb.convert.quantisation import awq
from onnxstream_nb.convert.quantisation.calibration import feeds_of_text
from onnxstream_nb.convert.quantisation.folding import Folding, shared
from onnxstream_nb.convert.quantisation.integer_forms import Grid
from onnxstream_nb.convert.quantisation.layers import Calibration, Layer, scaled
from onnxstream_nb.convert.quantisation.matrices import find
from onnxstream_nb.errors import ModelError, UsageError
from onnxstream_nb.graph import Node, Value, WeightRef

Array = np.ndarray[Any, Any]
TINY = Tiny(hidden=72, intermediate=112, heads=6, kv_heads=2, head_dim=12, vocab=300)
LOUD = 12.0

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Draft:
    """A tiny Llama of which some channels are much louder than others, as in real ones."""
    path = tmp_path_factory.mktemp("loud") / "tiny.gguf"
    write_gguf(path, TINY, seed=1)
    plain = Draft(formats.load(path))
    norms = [n.inputs[1] for n in plain.graph.nodes if n.op_type == "RMSNormalization"]
    loud = np.where(np.arange(TINY.hidden) % 9, 1, LOUD).astype(np.float32)
    louder = scaled(plain, {name: {0: loud} for name in norms})
    factors = {}
    for matrix in find(louder):
        n, k = matrix.rows
        if k == TINY.hidden and not matrix.lookups:
            factors[matrix.name] = {int(matrix.by_rows): np.full(k, 0.3, np.float32)}
    return scaled(louder, factors)


def feeds(draft: Draft, text: str = REST, tokens: int = 48) -> dict[str, Array]:
    return next(feeds_of_text(draft.graph, FakeTokenizer(), text, tokens, 1))


@pytest.fixture(scope="module")
def wanted(draft: Draft) -> Array:
    return agreed(draft, feeds(draft), "logits")


def test_eight_bits_are_close(draft: Draft, wanted: Array) -> None:
    assert distance(agreed(quantised(draft, dtype="int8"), feeds(draft), "logits"), wanted) < 0.03


@pytest.mark.parametrize("block", [32, 0])
def test_methods_that_are_calibrated_are_nearer(draft: Draft, wanted: Array, block: int) -> None:
    far = {
        method: distance(
            agreed(quantised(draft, method=method, block=block), feeds(draft), "logits"), wanted
        )
        for method in ("rtn", "awq", "gptq")
    }
    assert far["awq"] < 0.9 * far["rtn"] and far["gptq"] < 0.7 * far["rtn"]


def test_the_search_for_scales_is_nearer_than_plain_rounding(draft: Draft, wanted: Array) -> None:
    near, far = (
        distance(agreed(quantised(draft, search=search), feeds(draft), "logits"), wanted)
        for search in (True, False)
    )
    assert near < far


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("nbits", [False, True])
def test_calibrated_models_run_in_every_form(draft: Draft, method: str, nbits: bool) -> None:
    kept = (("*q_proj*", "int8"), ("*ffn_up*", "fp32"))
    found = quantised(draft, method=method, asymmetric=True, matmul_nbits=nbits, keep=kept)
    agreed(found, feeds(draft), "logits")


def test_sizes_are_those_of_rounding_to_nearest(draft: Draft) -> None:
    def sizes(method: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        refs = quantised(draft, method=method).graph.initializers
        return {name: (ref.dtype, ref.shape) for name, ref in refs.items()}

    assert sizes("awq") == sizes("rtn") == sizes("gptq")


# -- folding ---------------------------------------------------------------------------------------


def layers_of(draft: Draft) -> list[Layer]:
    matrices = find(draft)
    return [Layer(m, Grid(4, 32, False)) for m in matrices if m.input and "head" not in m.roles]


def test_every_input_of_a_llama_can_be_divided_and_the_function_stays(draft: Draft) -> None:
    folding, rng = Folding(draft.graph, find(draft)), np.random.default_rng(2)
    found = {}
    for layer in layers_of(draft):
        readers = folding.readers(layer.matrix.input)
        assert readers is not None
        size = layer.matrix.rows[1]
        folds = folding.into(layer.matrix.input, size, [m.products[0] for m in readers])
        assert folds, layer.name
        factor = shared(folds, 2.0 ** rng.integers(-2, 3, size))
        found[layer.matrix.input] = awq.Scaling(factor, folds, tuple(readers), factor)
    folded = awq.fold(draft, found)
    assert len(folded.graph.nodes) == len(draft.graph.nodes)
    changed = {name for name in folded.made if name not in draft.made}
    changed |= {n for n in folded.made if n in draft.made and folded.made[n] is not draft.made[n]}
    assert {layer.name for layer in layers_of(draft)} <= changed
    before, after = (by_us(d.graph, feeds(d), "logits") for d in map(in_memory, (draft, folded)))
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6 * np.abs(before).max())


def in_memory(draft: Draft) -> Draft:
    from onnxstream_nb.convert.quantisation.calibration import stored

    refs = {
        name: stored(ref, draft.read(ref)) if name in draft.made else ref
        for name, ref in draft.graph.initializers.items()
    }
    return Draft(draft.graph.with_(initializers=refs))


def vector(name: str, size: int) -> WeightRef:
    data = np.ones(size, np.float32).tobytes()
    return WeightRef(name, (size,), "float32", data, 0, len(data))


def square(name: str) -> WeightRef:
    data = np.eye(4, dtype=np.float32).tobytes()
    return WeightRef(name, (4, 4), "float32", data, 0, len(data))


def folds_of(*nodes: Node, kept: str = "") -> list[tuple[str, int]]:
    """Where a factor on v, the input of the last node, goes."""
    from onnxstream_nb.graph import Graph

    names = {i for node in nodes for i in node.inputs}
    refs = {n: square(n) if n.startswith("w") else vector(n, 4) for n in names if n[0] in "wb"}
    outputs = tuple(Value(n, "float32", None) for n in ("y", *([kept] if kept else ())))
    graph = Graph(nodes, (Value("x", "float32", (1, 4)),), outputs, refs, {"": 21})
    found = Folding(graph, find(Draft(graph))).into("v", 4, [nodes[-1]])
    return [(fold.name, fold.axis) for fold in found]


LAST = Node("MatMul", ("v", "w"), ("y",))


def test_folds_go_through_norms_biases_and_factors() -> None:
    norm = Node("LayerNormalization", ("x", "b1", "b2"), ("v",), {"axis": -1})
    assert folds_of(norm, LAST) == [("b1", 0), ("b2", 0)]
    scale = Node("Mul", ("b1", "n"), ("v",))  # as an RMS norm is exported
    assert folds_of(Node("Sqrt", ("x",), ("n",)), scale, LAST) == [("b1", 0)]
    linear = Node("MatMul", ("x", "w1"), ("p",))
    biased = Node("Add", ("p", "b1"), ("v",))
    assert folds_of(linear, biased, LAST) == [("b1", 0), ("w1", 1)]
    gemm = Node("Gemm", ("x", "w1", "b1"), ("v",), {"transB": 1})
    assert folds_of(gemm, LAST) == [("w1", 0), ("b1", 0)]


def test_no_fold_where_another_sees_the_value() -> None:
    linear = Node("MatMul", ("x", "w1"), ("v",))
    assert folds_of(linear, LAST) == [("w1", 1)]
    assert folds_of(linear, LAST, kept="v") == []
    assert folds_of(linear, Node("Relu", ("v",), ("z",)), LAST) == []
    assert folds_of(linear, Node("MatMul", ("x", "w1"), ("z",)), LAST) == []
    assert folds_of(Node("Tanh", ("x",), ("v",)), LAST) == []
    norm = Node("LayerNormalization", ("x", "b1", "b1"), ("v",), {"axis": -1})
    assert folds_of(norm, LAST) == []


def test_heads_that_share_values_share_a_factor() -> None:
    from onnxstream_nb.convert.quantisation.folding import Fold, folded

    fold = Fold("v_proj", 1, (2, 3, 4))
    factor = shared([fold], np.exp(np.random.default_rng(0).standard_normal(24)))
    heads = factor.reshape(2, 3, 4)
    np.testing.assert_allclose(heads, np.broadcast_to(heads[:, :1], heads.shape))
    np.testing.assert_allclose(folded(fold, factor), 1 / heads[:, 0].reshape(-1))


# -- calibration -----------------------------------------------------------------------------------


def test_later_layers_see_what_earlier_ones_became(draft: Draft) -> None:
    def last_inputs(change: bool) -> Array:
        calibration = Calibration(draft, layers_of(draft), [feeds(draft)], silent)
        for group in calibration:
            (x,) = calibration.inputs(group)
            for layer in group.layers:
                if change and layer.name == layers_of(draft)[0].name:
                    calibration.put(layer, np.zeros(layer.matrix.rows, np.float32))
        return x

    assert distance(last_inputs(True), last_inputs(False)) > 0.01


def test_a_model_that_overflows_is_named(draft: Draft) -> None:
    name = layers_of(draft)[0].name
    broken = scaled(draft, {name: {0: np.full(TINY.hidden, 1e38, np.float32)}})
    with pytest.raises(ModelError, match="not finite"):
        quantised(broken, method="gptq", keep=((name, "fp32"),))


def test_a_text_that_is_too_short_is_refused(draft: Draft) -> None:
    for method in ("awq", "gptq"):
        with pytest.raises(UsageError, match=r"novel\.txt: .*needs 512 tokens .*has 11"):
            quantised(draft, method=method, text="Eleven only", source="novel.txt")


def test_progress_names_the_layers(draft: Draft) -> None:
    from quantising import options

    from onnxstream_nb.convert.quantisation.quantise import quantise

    told: list[tuple[str, float | None]] = []
    quantise(draft, replace(options(), method="gptq"), lambda *what: told.append(what))
    assert any("attn_q" in text or "q_proj" in text for text, _ in told)
    fractions = [f for text, f in told if text.startswith("calibrating") and f is not None]
    assert fractions == sorted(fractions) and fractions[-1] < 1


# -- the verb --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(draft: Draft, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(model_of(draft), tmp_path_factory.mktemp("model") / "model.onnx")


def test_the_verb_writes_what_the_step_makes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.onnx"
    assert cli.main(["quantize", str(model), "-o", str(out), "--keep", "head=fp16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["dtype"]) == ("rtn", "int4")
    again = tmp_path / "again.onnx"
    flags = ["--dtype", "int4", "--keep", "head=fp16"]
    assert cli.main(["convert", str(model), "-o", str(again), *flags]) == 0
    assert out.read_bytes() == again.read_bytes()
    refs = formats.load(out).initializers
    assert any(ref.dtype == "int4" for ref in refs.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "awq"], "--calibration"),
        (["--calibration", "x.txt"], "rtn is not calibrated"),
        (["--tokens", "64"], "rtn is not calibrated: leave out --tokens"),
        (["--percentile", "99"], "--percentile is for --method static, not for rtn"),
        (["--method", "gptq", "--calibration", "no/such.txt"], "--calibration no/such.txt"),
        (["--method", "dynamic", "--block", "64"], "--block"),
        (["--method", "static", "--dtype", "int4"], "int4"),
        (["--range-data", "r.txt"], "--range-data"),
        (["--keep", "head"], "PATTERN=DTYPE"),
        (["--block", "7"], "--block 7"),
    ],
)
def test_flags_that_do_not_go_together(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert cli.main(["quantize", str(model), "-o", str(out), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_short_calibration_file_is_named_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, notes = two_models(tmp_path).paths[0], tmp_path / "notes.txt"
    notes.write_text(CALIBRATION[:40], "utf-8")
    out = tmp_path / "out"
    flags = ["--method", "gptq", "--calibration", str(notes)]
    assert cli.main(["quantize", str(model), "-o", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert f"{notes}: calibration needs 16" in error and "--tokens" in error
    assert not out.exists()
