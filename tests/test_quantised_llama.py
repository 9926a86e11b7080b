"""A small Llama whose linear layers are quantised as ONNX exports have them, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from llama_fixtures import random_weights, write_hf
from llama_oracle import Tiny, logits
from llm_checks import near
from onnx import helper, numpy_helper
from onnx_models import saved
from quantised_models import Array, pairs

from onnxstream_nb import formats
from onnxstream_nb.formats.onnx import to_model_proto
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.session import decode_constant

TINY = Tiny(hidden=64, intermediate=160, heads=4, kv_heads=2, head_dim=16)
IDS = [3, 17, 0, 42, 63, 5, 5, 28, 9, 1]
LOADS = ("auto", "ram", "mmap", "stream")

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


class Layers:
    """Linear layers (N, K) of one form: what they become, and what that stands for."""

    def __init__(self, form: str) -> None:
        self.form = form
        self.bits = 8 if form.endswith("8") else 4
        self.per_row = form.startswith("rows")
        self.nbytes = 0

    def rounded(self, w: Array) -> tuple[Array, Array]:
        """Integers (N, K) and scales (N, blocks of 32 or one)."""
        n, k = w.shape
        most = (1 << (self.bits - 1)) - 1
        blocks = w.reshape(n, 1 if self.per_row else k // 32, -1)
        s = (np.abs(blocks).max(axis=2) / most).astype(np.float32)
        return np.rint(blocks / s[..., None]).astype(np.int8).reshape(n, k), s

    def values(self, w: Array) -> Array:
        q, s = self.rounded(w)
        return q * np.repeat(s, q.shape[1] // s.shape[1], axis=1)

    def nodes(self, name: str, node: Any, w: Array, weights: dict[str, Array]) -> list[Any]:
        """The nodes of x w' in the place of one, whose weights are added."""
        q, s = self.rounded(w)
        n, k = w.shape
        names = f"{name}.q", f"{name}.s"
        x, y = node.input[0], node.output[0]
        self.nbytes += q.size * self.bits // 8 + s.nbytes
        if self.form.startswith("nbits"):
            above = (q.astype(np.int16) + (1 << (self.bits - 1))).astype(np.uint8)
            packed = pairs(above) if self.bits == 4 else above
            weights[names[0]] = packed.reshape(n, k // 32, -1)
            weights[names[1]] = s.reshape(-1)
            self.nbytes += 1  # what all zero points are
            return [helper.make_node("MatMulNBits", [x, *names], [y], domain="com.microsoft",
                                     K=k, N=n, bits=self.bits, block_size=32)]  # fmt: skip
        integers = q.astype(ml_dtypes.int4) if self.bits == 4 else q
        weights[names[0]] = np.ascontiguousarray(integers.T)
        weights[names[1]] = s.reshape(-1) if self.per_row else np.ascontiguousarray(s.T)
        blocked = {"axis": 1} if self.per_row else {"axis": 0, "block_size": 32}
        return [helper.make_node("DequantizeLinear", list(names), [f"{name}.w"], **blocked),
                helper.make_node("MatMul", [x, f"{name}.w"], [y])]  # fmt: skip


@pytest.fixture(scope="module", params=["nbits4", "nbits8", "blocks4", "blocks8", "rows8"])
def model(request: Any, tmp_path_factory: Any) -> tuple[Path, Layers, Array]:
    """A file, how its layers are stored, and the logits (T, V) of what they stand for."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    layers = Layers(request.param)
    weights = random_weights(TINY)
    write_hf(folder / "hf", TINY, weights=weights)
    proto = to_model_proto(formats.load(folder / "hf"), decode_constant)
    nodes: list[Any] = []
    added: dict[str, Array] = {}
    linear = {n.input[1] for n in proto.graph.node if n.op_type == "MatMul"} & weights.keys()
    assert len(linear) == 15
    for node in proto.graph.node:
        name = node.input[1] if node.op_type == "MatMul" else ""
        nodes += layers.nodes(name, node, weights[name], added) if name in linear else [node]
    kept = [t for t in proto.graph.initializer if t.name not in linear]
    kept += [numpy_helper.from_array(array, name) for name, array in added.items()]
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in kept]
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(kept)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    meant = {k: layers.values(w) if k in linear else w for k, w in weights.items()}
    return saved(proto, folder / "model.onnx"), layers, logits(TINY, meant, IDS)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("load", LOADS)
def test_logits(model: tuple[Path, Layers, Array], load: str, threads: int) -> None:
    path, layers, wanted = model
    llm = LanguageModel(path, load=load, threads=threads, precision="exact")
    try:
        near(llm.feed(IDS), wanted[-1])
        assert llm.bytes_per_token == layers.nbytes
        llm.rewind(0)
        for i, known in zip(IDS, wanted, strict=True):
            near(llm.feed([i]), known)
    finally:
        llm.close()


def test_one_token_is_replayed_when_it_is_packed(model: tuple[Path, Layers, Array]) -> None:
    path, _, wanted = model
    llm = LanguageModel(path, load="ram", precision="fast")
    try:
        for i, known in zip(IDS, wanted, strict=True):
            near(llm.feed([i]), known)
        assert llm.session._replay is not None
    finally:
        llm.close()
