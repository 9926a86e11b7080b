"""The command `perplexity` on ONNX files and OnnxStream folders: figures by other engines."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from llama_fixtures import random_weights, write_gguf
from llama_oracle import Array
from llama_oracle import logits as oracle
from llm_checks import FLOAT16_CACHE
from perplexity_oracle import TINY, counted, expected, expected_divergence, tokenizer
from tokenizer_fixtures import gguf_bpe, small_bpe
from verify_models import EXPORTED, exported, with_tokenizer

from onnxstream_nb import cli, formats
from onnxstream_nb.formats.onnx import to_model_proto
from onnxstream_nb.session import decode_constant

TEXT = Path(__file__).parent / "fixtures" / "public_domain.txt"
WINDOW, WINDOWS = 21, 4
Capture = pytest.CaptureFixture[str]


def run(path: Path, capsys: Capture, *flags: str) -> dict[str, Any]:
    line = ["perplexity", str(path), "--text", str(TEXT), "--tokens", str(WINDOW * WINDOWS)]
    assert cli.main([*line, "--window", str(WINDOW), "--json", *flags]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def cuts(bos: bool) -> list[list[int]]:
    """The windows; the tokenizer of a tokenizer.json says nothing of a BOS."""
    ids = gguf_bpe().encode(TEXT.read_text("utf-8"))
    begin = small_bpe().token_to_id("<|begin|>")
    whole = [begin, *ids] if bos else ids
    found = [whole[at : at + WINDOW] for at in range(0, WINDOW * WINDOWS, WINDOW)]
    return [[begin, *cut[1:]] for cut in found] if bos else found


def near(document: dict[str, Any], wanted: dict[str, float], e: float) -> None:
    """Within what errors of `e` in each logit do."""
    assert document["perplexity"] == pytest.approx(wanted["perplexity"], rel=2 * e)
    assert document["perplexity_error"] == pytest.approx(wanted["perplexity_error"], rel=0.01)
    assert document["tokens_counted"] == WINDOWS * (WINDOW - 1 - WINDOW // 2)
    assert document["tokens_per_s"] > 0


@pytest.mark.parametrize("external", [True, False])
def test_an_onnx_model_and_a_reference(external: bool, tmp_path: Path, capsys: Capture) -> None:
    path = exported(tmp_path / "m", external=external)
    rng = np.random.default_rng(3)
    held = random_weights(TINY)
    off = {n: (w + 0.05 * w.std() * rng.standard_normal(w.shape)) for n, w in held.items()}
    other = tmp_path / "other.gguf"
    write_gguf(other, TINY, weights={n: w.astype(np.float32) for n, w in off.items()},
               extra=lambda writer: tokenizer(writer))  # fmt: skip
    document = run(path, capsys, "--precision", "exact", "--reference", str(other))
    own, far = (list(counted(cuts(False), lambda ids, w=w: oracle(TINY, w, ids)))
                for w in (held, off))  # fmt: skip
    e = FLOAT16_CACHE * max(abs(row).max() for row, _ in [*own, *far])
    near(document, expected(own), e)
    divergence = expected_divergence(own, far)
    assert divergence["kl_mean"] > 10 * e * e
    assert math.sqrt(document["reference"]["kl_mean"]) == pytest.approx(
        math.sqrt(divergence["kl_mean"]), abs=2 * e
    )


def test_an_onnxstream_folder(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "m"
    shutil.copytree(EXPORTED / "onnxstream_llama_small", folder)
    with_tokenizer(folder)
    graph = formats.load(folder)
    session = onnxruntime.InferenceSession(
        to_model_proto(graph, decode_constant).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )

    def logits(ids: list[int]) -> Array:
        known = {"sequence": len(ids), "past": 0, "total": len(ids)}
        feeds: dict[str, Array] = {}
        for value in graph.inputs:
            shape = [known[d] if isinstance(d, str) else d for d in value.shape or ()]
            feeds[value.name] = np.zeros(shape, value.dtype)
        feeds["input_ids"][0], feeds["position_ids"][0] = ids, range(len(ids))
        feeds["attention_mask"][:] = 1
        found: Array = session.run(["logits"], feeds)[0][0]
        return found

    document = run(folder, capsys, "--precision", "exact", "--reference-precision", "fast")
    pairs = list(counted(cuts(False), logits))
    near(document, expected(pairs), FLOAT16_CACHE * float(max(abs(r).max() for r, _ in pairs)))
    assert document["model"] == "m" and document["reference"]["kl_mean"] < 1e-5


def test_a_graph_with_the_last_logits_alone(tmp_path: Path, capsys: Capture) -> None:
    """It can be read one token at a time, and the error says how."""
    path = exported(tmp_path / "m", external=False)
    whole = run(path, capsys, "--precision", "exact")
    model = onnx.load(path)
    (last,) = (node for node in model.graph.node if "logits" in node.output)
    constants = {"minus": np.array([-1]), "end": np.array([1 << 62]), "axis": np.array([1])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items())
    last.output[0] = "all_logits"
    names = ["all_logits", *constants]
    model.graph.node.append(onnx.helper.make_node("Slice", names, ["logits"]))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    path.write_bytes(model.SerializeToString())
    line = ["perplexity", str(path), "--text", str(TEXT), "--tokens", "84", "--window", "21"]
    assert cli.main(line) == 2
    assert "read one at a time (--batch 1)" in capsys.readouterr().err
    alone = run(path, capsys, "--precision", "exact", "--batch", "1")
    assert alone["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-3)
