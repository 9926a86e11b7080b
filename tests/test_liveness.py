"""The liveness bound, by hand, against what the engine really holds, and the arena against it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusion_graphs import unet, vae_decoder
from pass_graphs import Step, build
from weight_bytes import logical

from onnxstream_nb.graph import Graph, Value
from onnxstream_nb.kernels.buffers import SMALL, Arena, Usage
from onnxstream_nb.liveness import (
    Bound,
    Lives,
    activation_bytes,
    bound_for_tokens,
    sizes_for_tokens,
)  # fmt: skip
from onnxstream_nb.plan import make_plan
from onnxstream_nb.session import Session, decode_constant
from onnxstream_nb.shapes import Shapes

Array = np.ndarray[Any, Any]


def constants_of(graph: Graph) -> dict[str, Array]:
    return {name: logical(ref) for name, ref in graph.initializers.items()}


def bound_of(graph: Graph, **sizes: int) -> Bound:
    return activation_bytes(graph, sizes, constants_of(graph))


def alive(bound: Bound) -> dict[str, int]:
    return {memory.name: memory.nbytes for memory in bound.alive}


# -- by hand


def test_a_chain_holds_two_at_a_time() -> None:
    steps: list[Step] = [("Exp", "x", "a"), ("Neg", "a", "b"), ("Concat", "b b", "y", {"axis": 0})]
    bound = bound_of(build(steps, {"x": ("n", 10)}), n=7)
    assert (bound.nbytes, bound.step, bound.op_type) == (3 * 4 * 70, 2, "Concat")
    assert alive(bound) == {"b": 4 * 70, "y": 2 * 4 * 70} and bound.unknown == ()


def test_what_is_read_later_stays() -> None:
    steps: list[Step] = [
        ("Exp", "x", "a"), ("Exp", "a", "b"), ("Concat", "b b", "c", {"axis": 1}),
        ("ReduceSum", "c", "d", {"keepdims": 0}), ("Add", "a d", "y"),
    ]  # fmt: skip
    bound = bound_of(build(steps, {"x": (5, 5)}))
    assert (bound.step, bound.nbytes) == (2, 100 + 100 + 200)
    assert alive(bound) == {"c": 200, "a": 100, "b": 100}
    memory = next(m for m in bound.alive if m.name == "a")
    assert (memory.first, memory.last, memory.shape, memory.dtype) == (0, 4, (5, 5), "float32")


def test_outputs_stay_to_the_end_and_inputs_until_they_are_read() -> None:
    steps: list[Step] = [("Exp", "x", "a"), ("Exp", "x", "b"), ("Exp", "b", "c"), ("Exp", "c", "d")]
    graph = build(steps, {"x": (5, 5)}, "a d")
    lives = Lives(graph, Shapes(graph, {}, {}))
    assert {m.name: (m.first, m.last) for m in lives.memories} == {
        "x": (0, 1), "a": (0, 3), "b": (1, 2), "c": (2, 3), "d": (3, 3),
    }  # fmt: skip
    assert lives.totals() == [200, 300, 300, 300]


VIEWS: dict[str, tuple[Step, bool]] = {  # of x (6, 4), or of its transpose t (4, 6): whether a view
    "reshape": (("Reshape", "x flat", "y"), True),
    "reshape of a transpose": (("Reshape", "t flat", "y"), False),
    "reshape that parts an axis": (("Reshape", "t parts", "y"), True),
    "transpose": (("Transpose", "t", "y"), True),
    "squeeze": (("Squeeze", "u", "y"), True),
    "flatten": (("Flatten", "x", "y", {"axis": 0}), True),
    "flatten a transpose": (("Flatten", "t", "y", {"axis": 0}), False),
    "identity": (("Identity", "x", "y"), True),
    "expand": (("Expand", "x wide", "y"), True),
    "slice": (("Slice", "x one two", "y"), True),
    "split": (("Split", "x", "y z", {"axis": 0, "num_outputs": 2}), True),
    "dropout": (("Dropout", "x", "y"), True),
    "reshape of an expanded": (("Reshape", "e flat", "y"), False),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_take_nothing_and_copies_do(name: str) -> None:
    step, is_view = VIEWS[name]
    steps: list[Step] = [
        ("Exp", "i", "x"), ("Transpose", "x", "t"), ("Unsqueeze", "x one", "u"),
        ("Expand", "x wide", "e"), step, ("Exp", "y", "v"),
    ]  # fmt: skip
    weights = {
        "flat": np.array([-1], np.int64), "parts": np.array([2, 2, 6], np.int64),
        "one": np.array([1], np.int64), "two": np.array([2], np.int64),
        "wide": np.array([3, 6, 4], np.int64),
    }  # fmt: skip
    graph = build(steps, {"i": (6, 4)}, "v", weights, opset=18)
    lives = Lives(graph, Shapes(graph, {}, constants_of(graph)))
    own = {m.name: m for m in lives.memories}
    assert ("y" not in own) == is_view
    assert own["x"].last == (5 if is_view else 4)  # held by the look at it
    assert not {"t", "u", "e"} & own.keys()
    wanted = Session(graph, optimize=False).run({"i": np.ones((6, 4), np.float32)})
    assert own["v"].shape == wanted["v"].shape


def test_a_look_at_a_weight_takes_nothing() -> None:
    steps: list[Step] = [("Transpose", "w", "t"), ("Add", "x t", "y")]
    graph = build(steps, {"x": (3, 5)}, weights={"w": np.ones((5, 3), np.float32)})
    assert alive(bound_of(graph)) == {"x": 60, "y": 60}


def test_values_of_unknown_size_are_named() -> None:
    steps: list[Step] = [("NonZero", "x", "n"), ("Cast", "n", "y", {"to": 1}), ("Exp", "x", "z")]
    bound = bound_of(build(steps, {"x": (4, 4)}, "y z"))
    assert bound.unknown == ("n", "y") and bound.nbytes == 2 * 64
    whole = bound_of(build([("Exp", "x", "y")], {"x": ("n", 4)}))
    assert whole.unknown == ("x", "y") and whole.nbytes == 0


def test_no_nodes() -> None:
    x = Value("x", "float32", (3,))
    bound = activation_bytes(Graph((), (x,), (x,), {}, {"": 18}), {}, {})
    assert (bound.nbytes, bound.alive) == (0, ())


def test_working_memory_of_products() -> None:
    """The rows of x are packed beside x and the result: of 100 x 256 at least 100 x 256 floats."""
    graph = build([("MatMul", "x w", "y")], {"x": ("n", 256)},
                  weights={"w": np.ones((256, 8), np.float32)})  # fmt: skip
    bound = bound_of(graph, n=100)
    assert bound.nbytes == 4 * 100 * (256 + 8)
    assert 4 * 100 * 256 <= bound.working - bound.nbytes <= 4 * 128 * 256
    assert bound_of(graph, n=1).working == bound_of(graph, n=1).nbytes


# -- diffusion models: every convolution's memory fits this plan


def rehearsed(lives: Lives) -> Usage:
    """Every value's memory taken from an arena and given back, step by step, without computing."""
    where, held = Arena(), dict[int, Array]()

    def take(nbytes: int) -> Array:
        return where.array((nbytes,), np.uint8, nbytes)  # type: ignore[no-any-return]

    for step, working in enumerate(lives.working):
        extra = take(working) if working >= SMALL else None
        for i, memory in enumerate(lives.memories):
            if memory.first == step and memory.nbytes >= SMALL:
                held[i] = take(memory.nbytes)
        del extra
        for i in [i for i in held if lives.memories[i].last <= step]:
            del held[i]
    assert not held
    return where.usage()  # type: ignore[no-any-return]


def test_the_vae_decoder() -> None:
    """256 channels of 512 x 512 four times: a shortcut, the normalised, its sigmoid, both's
    product."""
    graph, constants = vae_decoder()
    sizes = {"batch": 1, "height": 64, "width": 64}
    bound = activation_bytes(graph, sizes, constants)
    assert bound.unknown == ()
    assert bound.nbytes == 4 * (4 * 256 * 512 * 512)
    used = rehearsed(Lives(graph, Shapes(graph, sizes, constants)))
    assert bound.nbytes <= used.peak_live == bound.working  # convolutions copy windows of pieces
    assert used.peak_touched <= 1.15 * bound.working


@pytest.mark.parametrize(("batch", "latent"), [(1, 64), (2, 48)])
def test_the_unet(batch: int, latent: int) -> None:
    """Attention's scores before and after scaling, (B, 8, H W, H W), beside five of (B, 320, H, W),
    the text, the time and a shape."""
    graph, constants = unet()
    sizes = {"batch": batch, "height": latent, "width": latent}
    bound = activation_bytes(graph, sizes, constants)
    pixels = latent * latent
    assert bound.unknown == ()
    text = 77 * 768 + 4 * 320
    assert bound.nbytes == 4 * batch * (2 * 8 * pixels**2 + 5 * 320 * pixels + text) + 4 * 8
    used = rehearsed(Lives(graph, Shapes(graph, sizes, constants)))
    assert used.peak_touched <= 1.15 * bound.working


# -- sizes


def test_open_sizes_of_inputs() -> None:
    def sizes(*values: Value, tokens: int = 8, past: int = 3) -> dict[str, int]:
        return sizes_for_tokens(Graph((), values, (), {}, {}), tokens, past)

    ids = Value("input_ids", "int64", ("batch", "sequence"))
    mask = Value("attention_mask", "int64", ("batch", "all"))
    assert sizes(ids, mask) == {"batch": 1, "sequence": 8, "all": 11}
    assert sizes(Value("x", "float32", ("n", 128))) == {"n": 8}
    assert sizes(Value("x", "float32", (None,))) == {"x.0": 8}
    assert sizes(Value("logit_rows", "int64", ("rows",))) == {"rows": 1}
    image = Value("image", "float32", ("batch", 3, "height", None))
    assert sizes(image) == {"batch": 1, "height": 8, "image.3": 8}
    assert sizes(Value("image", "float32", ("batch", 3, 224, 224))) == {"batch": 1}
    assert sizes(Value("x", "float32", None), Value("y", "float32", (2, 3))) == {}


def test_sizes_that_nobody_can_tell_give_no_number() -> None:
    graph = build([("NonZero", "x", "n"), ("Exp", "x", "y")], {"x": ("n", 4)}, "n y")
    assert bound_for_tokens(make_plan(graph, decode_constant), 8) is None
