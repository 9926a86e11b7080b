"""Pools, and normalization by known statistics.

Dims: x (N, C, *S) -> (N, C, *O), the windows' sizes are *K.
"""

from dataclasses import replace

import numpy as np

from ..errors import UnsupportedError
from ..registry import op
from .windows import windows


def _spatial(x):
    return tuple(range(2, x.ndim))


def _last(view, out):
    """The axes of a window in a view (N, C, *O, *K)."""
    return tuple(range(2 + len(out), view.ndim))


@op("MaxPool", since=1)
def max_pool(
    x, *, auto_pad="NOTSET", ceil_mode=0, dilations=None, kernel_shape, pads=None,
    storage_order=0, strides=None, n_outputs=1,
):  # fmt: skip
    """x (N, C, *S) -> (N, C, *O): the greatest of each window; no indices."""
    if n_outputs > 1:
        raise UnsupportedError("MaxPool with Indices as its second output is not supported")
    where = windows(x.shape[2:], kernel_shape, strides, pads, dilations, auto_pad, ceil_mode)
    least = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    view = where.view(x, least)
    return view.max(axis=_last(view, where.out))


@op("AveragePool", since=1)
def average_pool(
    x, *, auto_pad="NOTSET", ceil_mode=0, count_include_pad=0, dilations=None, kernel_shape,
    pads=None, strides=None,
):  # fmt: skip
    """x (N, C, *S) -> (N, C, *O): the mean of each window, of what is not padding by default."""
    where = windows(x.shape[2:], kernel_shape, strides, pads, dilations, auto_pad, ceil_mode)
    view = where.view(x, 0)
    ones = np.ones((1, 1, *x.shape[2:]), x.dtype)
    if count_include_pad:
        around = ((0, 0), (0, 0), *zip(where.before, where.behind, strict=True))
        none = (0,) * len(around[2:])
        counted = np.pad(ones, around, constant_values=1)
        counts = replace(where, before=none, behind=none).view(counted, 0)
    else:
        counts = where.view(ones, 0)
    window = _last(view, where.out)
    return view.sum(axis=window, dtype=x.dtype) / counts.sum(axis=window, dtype=x.dtype)


@op("GlobalAveragePool")
def global_average_pool(x):
    """x (N, C, *S) -> (N, C, 1, ...): the mean of each channel."""
    return x.mean(axis=_spatial(x), keepdims=True, dtype=np.float64).astype(x.dtype)


@op("GlobalMaxPool")
def global_max_pool(x):
    """x (N, C, *S) -> (N, C, 1, ...): the greatest of each channel."""
    return x.max(axis=_spatial(x), keepdims=True)


def _channels(values, x):
    return values.reshape(1, -1, *(1,) * (x.ndim - 2))


@op("BatchNormalization", since=9)
def batch_normalization(
    x, scale, b, input_mean, input_var, *, epsilon=1e-5, momentum=0.9, training_mode=0, n_outputs=1
):
    """x (N, C, *S), statistics (C,) -> (N, C, *S): scale (x - mean) / sqrt(var + epsilon) + b."""
    if training_mode or n_outputs > 1:
        raise UnsupportedError("BatchNormalization in training is not supported")
    factor = scale / np.sqrt(input_var + np.asarray(epsilon, input_var.dtype))
    y = x * _channels(factor, x) + _channels(b - input_mean * factor, x)
    return y.astype(x.dtype, copy=False)


@op("InstanceNormalization", since=6)
def instance_normalization(x, scale, b, *, epsilon=1e-5):
    """x (N, C, *S), scale and b (C,) -> (N, C, *S), each channel of each N by its statistics."""
    wide = x.astype(np.float64)
    mean = wide.mean(axis=_spatial(x), keepdims=True)
    variance = np.square(wide - mean).mean(axis=_spatial(x), keepdims=True)
    y = (wide - mean) / np.sqrt(variance + epsilon)
    return (y * _channels(scale, x) + _channels(b, x)).astype(x.dtype)
