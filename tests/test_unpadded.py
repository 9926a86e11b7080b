"""Masks that say no more than causal, or a window, where nothing is padded; and others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_fixtures import write_gguf, write_hf
from llama_oracle import Tiny, logits
from llm_checks import exact_model, near
from test_onnxstream_write import written

from onnxstream_nb import passes
from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.passes.rewriting import constant_ref
from onnxstream_nb.sequences import can_share_passes
from onnxstream_nb.session import Session, decode_constant, load_graph

IDS = [1, 5, 9, 33, 7, 2, 8, 40, 11]
PLAIN, WINDOW = Tiny(heads=6, kv_heads=2), Tiny("mistral", window=3)


def text_folder(tiny: Tiny, path: Path) -> tuple[Path, Any]:
    weights = write_hf(path / "hf", tiny)
    return written(load_graph(path / "hf"), path / "text"), weights


def fused(folder: Path) -> Graph:
    return passes.optimize(load_graph(folder), decode_constant)


def attentions(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op_type == "Attention"]


@pytest.mark.parametrize("tiny", [PLAIN, WINDOW], ids=["all positions", "a window"])
def test_a_folder_runs_as_its_source_does(tiny: Tiny, tmp_path: Path) -> None:
    folder, weights = text_folder(tiny, tmp_path)
    model, source = exact_model(folder), exact_model(tmp_path / "hf")
    kinds = [[n.op_type for n in m.graph.nodes] for m in (model, source)]
    assert sorted(kinds[0]) == sorted(kinds[1])
    for ours, theirs in zip(attentions(model.graph), attentions(source.graph), strict=True):
        assert ours.attributes == pytest.approx(dict(theirs.attributes))
        assert [bool(i) for i in ours.inputs] == [bool(i) for i in theirs.inputs]
    assert "attention_mask" not in {v.name for v in model.graph.inputs}
    assert can_share_passes(model.graph, model.pairs)
    wanted = logits(tiny, weights, IDS).astype(np.float32)
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        near(model.feed(IDS[start:stop]), wanted[stop - 1])
    model.close()
    source.close()


def test_a_session_pads_as_before(tmp_path: Path) -> None:
    """Only the language model knows that nothing is padded."""
    folder, _ = text_folder(PLAIN, tmp_path)
    feeds = {
        "input_ids": np.array([IDS]), "position_ids": np.array([[0, 0, *range(7)]]),
        "attention_mask": np.array([[0, 0] + [1] * 7]),
        **{f"pkv{i}": np.zeros((1, 2, 0, 8), np.float32) for i in range(4)},
    }  # fmt: skip
    alone = {k: v[:, 2:] if v.ndim == 2 else v for k, v in feeds.items()}
    with Session(folder, precision="exact") as session:
        padded = session.run(feeds)["logits"][0, 2:]
        np.testing.assert_allclose(padded, session.run(alone)["logits"][0], rtol=0, atol=1e-5)


def changed(graph: Graph, find: Callable[[Graph], str], value: Any) -> Graph:
    """The graph with a constant of another value, for one of its readers only."""
    name = find(graph)
    ref = graph.initializers[name.split(" ")[0]]
    array = np.asarray(value, ref.dtype).reshape(ref.shape)
    reader = name.split(" ")[1]
    nodes = tuple(
        replace(n, inputs=tuple("other" if i == ref.name else i for i in n.inputs))
        if n.outputs[0] == reader
        else n
        for n in graph.nodes
    )
    added = {**graph.initializers, "other": constant_ref("other", array)}
    return graph.with_(nodes=nodes, initializers=added)


def constant_of(op_type: str, number: float, nth: int = 0) -> Callable[[Graph], str]:
    """Finds "constant reader": the nth node of a type that reads such a constant."""

    def find(graph: Graph) -> str:
        found = [
            f"{i} {n.outputs[0]}"
            for n in graph.nodes
            if n.op_type == op_type
            for i in n.inputs
            if i in graph.initializers
            and graph.initializers[i].shape == ()
            and decode_constant(graph.initializers[i]) == number
        ]
        return found[nth]

    return find


@pytest.mark.parametrize(
    ("find", "value"),
    [
        (constant_of("Add", 1), 2),  # every query would see one key more
        (constant_of("Add", 1), 0),  # and here one less: not itself
        (constant_of("Range", 0), 1),  # positions begin elsewhere
        (constant_of("Where", 0.0), 0.5),  # it is no mask but a bias
        (constant_of("Where", -65504.0), -1.0),  # hides nothing
        (constant_of("Sub", 1.0), 2.0),  # padding that is something else
    ],
    ids=["one more", "one less", "another start", "a bias", "a small number", "no padding"],
)
def test_other_masks_stay(find: Callable[[Graph], str], value: float, tmp_path: Path) -> None:
    graph = fused(text_folder(PLAIN, tmp_path)[0])
    known = passes.rewrite_unpadded(graph, decode_constant)
    assert all(n.attributes.get("is_causal") for n in attentions(known))
    other = changed(graph, find, value)
    assert passes.rewrite_unpadded(other, decode_constant) is other


def test_a_mask_that_only_windows_stays(tmp_path: Path) -> None:
    """A window without a causal limit is another mask."""
    graph = fused(text_folder(WINDOW, tmp_path)[0])
    both = next(n for n in graph.nodes if n.op_type == "And")
    greater = next(n.outputs[0] for n in graph.nodes if n.op_type == "Greater")
    nodes = tuple(replace(n, inputs=(greater, greater)) if n is both else n for n in graph.nodes)
    other = graph.with_(nodes=nodes)
    assert passes.rewrite_unpadded(other, decode_constant) is other


EXPORTS = {"llama_gqa_op14": 0, "llama_gqa_dyn23": 0, "mistral_sw8_op14": 8,
           "onnxstream_llama_small": 0}  # fmt: skip
MODELS = Path(__file__).parent / "fixtures" / "models"


@pytest.mark.parametrize("name", EXPORTS)
def test_masks_of_exports(name: str) -> None:
    """Of PyTorch's both exporters, and of OnnxStream's published folders; test_exports.py holds
    their numbers against PyTorch's."""
    path = MODELS / name if name.startswith("onnxstream") else MODELS / name / "model.onnx"
    after = passes.rewrite_unpadded(fused(path), decode_constant)
    assert "attention_mask" not in {v.name for v in after.inputs}
    shared = can_share_passes(passes.rewrite_logit_rows(after), passes.find_cache(after))
    assert shared == (name != "onnxstream_llama_small")  # which cuts its tables by the past
    for node in attentions(after):
        assert node.attributes["is_causal"] == 1 and not node.inputs[3]
        assert node.attributes.get("left_window_size", -1) == EXPORTS[name] - 1


def test_sources_and_other_masks_are_left(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", PLAIN, "F32")
    graph = fused(tmp_path / "m.gguf")
    assert passes.rewrite_unpadded(graph, decode_constant) is graph


@pytest.mark.parametrize("what", ["filling", "zeros", "limit"])
def test_squares_of_another_kind_stay(what: str) -> None:
    """OnnxStream's published form: zeros for the past, and a square of least numbers."""
    graph = fused(MODELS / "onnxstream_llama_small")
    if what == "limit":
        other = changed(graph, constant_of("Add", 1), 2)
    else:
        wanted = {"filling": -3.4028234663852886e38, "zeros": 0.0}[what]
        other = graph.with_(
            nodes=tuple(
                replace(n, attributes={"value": np.float32([-5.0])})
                if n.op_type == "ConstantOfShape" and n.attributes["value"] == np.float32(wanted)
                else n
                for n in graph.nodes
            )
        )
    assert passes.rewrite_unpadded(graph, decode_constant) is not graph
    assert passes.rewrite_unpadded(other, decode_constant) is other
