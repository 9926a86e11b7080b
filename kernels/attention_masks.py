"""Masks of Attention: from what the operator is given to what its kernels read.

Dims: B batch, H query heads, T queries, S keys (past and new). A mask is added to the scores.
"""

import numpy as np

NONE = np.float32(-np.inf)
HIDDEN = np.float32(-6e4)  # exports also write float16's least number: the weight is zero, too


def additive(mask, keys):
    """A boolean or additive mask as additive float32, short rows closed up to `keys`."""
    if mask.dtype == np.bool_:
        mask = np.where(mask, np.float32(0), NONE)
    missing = keys - mask.shape[-1]
    if missing > 0 and mask.shape[-1] != 1:
        mask = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)], constant_values=NONE)
    return mask.astype(np.float32, copy=False)


def limits(batch, queries, keys, before, is_causal, lengths, left, right):
    """What lengths, windows and a causal limit over them allow: additive (B or 1, 1, T, S)."""
    at = np.arange(keys)
    before = np.asarray(before).reshape(-1, 1, 1, 1)
    position = np.arange(queries).reshape(1, 1, -1, 1) + before
    allowed = np.ones((len(before), 1, queries, keys), np.bool_)
    if lengths is not None:
        allowed = allowed & (at < np.asarray(lengths).reshape(batch, 1, 1, 1))
    if is_causal:
        allowed &= at <= position
    if left >= 0:
        allowed &= position - at <= left
    if right >= 0:
        allowed &= at - position <= right
    return np.where(allowed, np.float32(0), NONE)


def mask_view(mask, shape):
    """(address, strides of batch, head and row) of a mask broadcast to (B, H, T, S)."""
    if mask is None:
        return None, (0, 0, 0, 0)
    # Keys must be contiguous; the other axes may repeat.
    if mask.shape[-1] != shape[-1] or mask.strides[-1] != 4:
        mask = np.ascontiguousarray(np.broadcast_to(mask, (*mask.shape[:-1], shape[-1])))
    wide = np.broadcast_to(mask, shape)
    return mask, (wide.ctypes.data, *wide.strides[:3])


def hides_what_follows(mask, shape):
    """Whether a mask, broadcast to (B, H, T, S), hides from each query those that come after it."""
    queries = shape[2]
    new = np.broadcast_to(mask, shape)[..., shape[3] - queries :]
    return bool((new[..., *np.triu_indices(queries, 1)] <= HIDDEN).all())
