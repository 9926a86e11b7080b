"""Attention and rotary embeddings in operators that OnnxStream has.

Dims: B batch, T queries, P past, S new keys, L = P + S keys, H and KV heads, D head size. The
products stand one behind the other as OnnxStream's own fused attention wants them: Transpose,
MatMul, Div, Add, Softmax, MatMul. Sources: ONNX Attention-23, RotaryEmbedding-23.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .emit import FLOAT, Emit
from .simple_formulas import Formula

HIDDEN = -65504.0
"""Float16's least number: added to a score, it leaves the key no weight."""


def attention(e: Emit) -> None:
    """softmax(q k^T * scale + mask) v over past and present."""
    node = e.node
    if len(node.inputs) > 6 and node.inputs[6]:
        raise e.error("its keys are padded by nonpad_kv_seqlen")
    if len(node.outputs) > 3 and node.outputs[3]:
        raise e.error("its scores are used")
    if node.attributes.get("right_window_size", -1) >= 0:
        raise e.error("it sees a window of what follows")
    q, k, v, mask, past_key, past_value = (*node.inputs, "", "", "")[:6]
    output, present_key, present_value = (*node.outputs, "", "")[:3]
    query, heads, width = _heads(e, q, "q_num_heads")
    new_key, kv_heads, _ = _heads(e, k, "kv_num_heads")
    new_value, _, value_width = _heads(e, v, "kv_num_heads")
    keys = _appended(e, past_key, new_key, present_key)
    values = _appended(e, past_value, new_value, present_value)
    bias = _bias(e, mask)
    values = _repeated(e, values, heads, kv_heads, value_width)
    keys = _repeated(e, keys, heads, kv_heads, width)
    scores = _scores(e, query, keys, width, bias)
    mixed = e("MatMul", e("Softmax", scores, axis=-1), values,
              output=output if len(e.shape(q)) == 4 else "")  # fmt: skip
    if len(e.shape(q)) == 3:
        e.merge_heads(mixed, heads * value_width, output=output)


def _heads(e: Emit, value: str, attribute: str) -> tuple[str, int, int]:
    """A value as (B, H, T, D), with H and D."""
    shape = e.shape(value)
    if len(shape) == 4:
        return value, e.size(shape[1], "a number of heads"), e.size(shape[3], "a head's size")
    heads = e.node.attributes[attribute]
    width = e.size(shape[2], "a head's size") // heads
    return e.split_heads(value, heads, width), heads, width


def _appended(e: Emit, past: str, new: str, present: str) -> str:
    if not past and not present:
        return new
    return e.concat(2, *filter(None, (past, new)), output=present)


def _repeated(e: Emit, value: str, heads: int, kv_heads: int, width: int) -> str:
    """(B, KV, L, D) -> (B, H, L, D): each head as often as queries share it."""
    if heads == kv_heads:
        return value
    single = e("Unsqueeze", value, e.integers(2))
    copies = e.concat(2, *[single] * (heads // kv_heads))
    return e.reshape(copies, (0, heads, -1, width))


def _scores(e: Emit, query: str, keys: str, width: int, bias: str) -> str:
    a = e.node.attributes
    scale = a["scale"] if a.get("scale") is not None else 1 / math.sqrt(width)
    product = e("MatMul", query, e("Transpose", keys, perm=(0, 1, 3, 2)))
    scores = e("Div", product, e.number(1 / scale))
    if softcap := a.get("softcap", 0.0):
        cap = e.number(softcap)
        scores = e("Mul", e.tanh(e("Div", scores, cap)), cap)
    return e("Add", scores, bias) if bias else scores


def _bias(e: Emit, mask: str) -> str:
    """What is added to the scores; "" for nothing.

    A key that is hidden gets HIDDEN, which is finite: a query that sees no key at all would else
    become NaN, and with it, in the next layer, every value.
    """
    boolean = bool(mask) and e.rewriter.facts.dtype(mask) == "bool"
    causal = bool(e.node.attributes.get("is_causal", 0))
    if not causal and e.node.attributes.get("left_window_size", -1) >= 0:
        raise e.error("it has a window without being causal")
    allowed = _causal(e) if causal else mask
    if causal and boolean:
        allowed = e("And", allowed, mask)
    terms = [e("Where", allowed, e.number(0.0), e.number(HIDDEN))] if causal or boolean else []
    if e.padding and (causal or boolean):
        padded = e("Sub", e.number(1.0), e("Cast", e.padding, to=FLOAT))
        terms.append(e("Mul", padded, e.number(HIDDEN)))
    if mask and not boolean:
        terms.append(mask)
    bias = terms[0] if terms else ""
    for term in terms[1:]:
        bias = e("Add", bias, term)
    return bias


def _causal(e: Emit) -> str:
    """(T, L): whether a key stands at or before the query, which stands behind the past, and not
    before its window.

    Both sides are expanded, since OnnxStream does not broadcast comparisons.
    """
    inputs = (*e.node.inputs, "", "", "")
    axis = len(e.shape(inputs[0])) - 2
    zero, one = e.integer(0), e.integer(1)
    queries = e.size_of(inputs[0], axis)
    before = e("Add", e.size_of(inputs[4], 2), one) if inputs[4] else one
    rows = e("Add", e("Range", zero, queries, one), before)
    keys = e("Range", zero, _key_count(e, axis), one)
    full = e.concat(0, e("Shape", rows), e("Shape", keys))
    keys = e("Expand", keys, full)
    causal = e("Less", keys, e("Expand", e("Unsqueeze", rows, e.integers(1)), full))
    window = e.node.attributes.get("left_window_size", -1)
    if window < 0:
        return causal
    before = e("Unsqueeze", e("Add", rows, e.integer(-window - 2)), e.integers(1))
    return e("And", causal, e("Greater", keys, e("Expand", before, full)))


def _key_count(e: Emit, axis: int) -> str:
    if e.padding:
        return e.size_of(e.padding, 1)
    new, past = e.size_of(e.node.inputs[1], axis), (*e.node.inputs, "", "", "")[4]
    return e("Add", e.size_of(past, 2), new) if past else new


def rotary_embedding(e: Emit) -> None:
    """x * cos + rotate_half(x) * sin over the first R channels of each head."""
    x, cos, sin, positions = (*e.node.inputs, "")[:4]
    shape = e.shape(x)
    if positions:
        cos, sin = (e("Gather", table, positions, axis=0) for table in (cos, sin))
    heads, width = shape[1], shape[3] if len(shape) == 4 else shape[2]
    if len(shape) == 3:
        heads = e.node.attributes["num_heads"]
        width = e.size(width, "a head's size") // heads
    width = e.size(width, "a head's size")
    whole = x if len(shape) == 4 else e.split_heads(x, e.size(heads, "heads"), width)
    size = e.node.attributes.get("rotary_embedding_dim", 0) or width
    output = e.node.outputs[0]
    inner = output if len(shape) == 4 else ""
    if size == width:
        rotated = _rotated(e, whole, size, (cos, sin), inner)
    else:
        low, high = e.window(whole, 0, size, -1), e.window(whole, size, width, -1)
        rotated = e.concat(-1, _rotated(e, low, size, (cos, sin)), high, output=inner)
    if len(shape) == 3:
        e.merge_heads(rotated, e.size(heads, "heads") * width, output=output)


def _rotated(e: Emit, x: str, size: int, angles: tuple[str, str], output: str = "") -> str:
    """x (B, H, T, R) rotated by cos and sin (B, T, R / 2)."""
    interleaved = e.node.attributes.get("interleaved", 0)
    if interleaved:  # pairs to half a head apart, and back
        x = _swapped(e, x, (size // 2, 2), size)
    cos, sin = (e("Unsqueeze", e.concat(-1, a, a), e.integers(1)) for a in angles)
    half = size // 2
    negative = e("Neg", e.window(x, half, size, -1))
    turned = e.concat(-1, negative, e.window(x, 0, half, -1))
    last = "" if interleaved else output
    y = e("Add", e("Mul", x, cos), e("Mul", turned, sin), output=last)
    return _swapped(e, y, (2, half), size, output) if interleaved else y


def _swapped(e: Emit, x: str, pair: tuple[int, int], size: int, output: str = "") -> str:
    """The last axis seen as a table of the shape `pair`, and that table transposed."""
    table = e("Transpose", e.reshape(x, (0, 0, 0, *pair)), perm=(0, 1, 2, 4, 3))
    return e.reshape(table, (0, 0, 0, size), output=output)


FORMULAS: Mapping[str, Formula] = {
    "Attention": attention, "RotaryEmbedding": rotary_embedding,
}  # fmt: skip
