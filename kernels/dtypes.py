"""Element types: their numbers in ONNX, and computing the 16-bit ones in float32.

Shapes: none; every operator states its own.
"""

from functools import cache, wraps

import numpy as np

from ..errors import UnsupportedError
from ..graph import DTYPES
from .buffers import contiguous


@cache
def numpy_dtype(number):
    """The NumPy type of a TensorProto.DataType number; strings are Python objects."""
    name = DTYPES.get(number, "")
    if name == "string":
        return np.dtype(object)
    try:
        return np.dtype(name or "unknown")
    except TypeError:
        import onnx

        try:
            return onnx.helper.tensor_dtype_to_np_dtype(number)
        except KeyError:
            raise UnsupportedError(f"element type number {number} is not supported") from None


def is_half(dtype):
    """Whether the type is float16 or bfloat16, which are computed in float32."""
    return dtype.itemsize == 2 and (dtype.kind == "f" or dtype.name == "bfloat16")


def numeric(function):
    """Let an operator compute fp16 and bf16 in fp32, and make NaN and infinity silently.

    The result, a single one, has the first input's type in that case.
    """

    @wraps(function)
    def run(*inputs, **attributes):
        with np.errstate(all="ignore"):
            dtype = inputs[0].dtype
            if not is_half(dtype):
                return np.asarray(function(*inputs, **attributes))
            wide = [
                contiguous(i, np.float32) if i is not None and i.dtype == dtype else i
                for i in inputs
            ]
            return contiguous(np.asarray(function(*wide, **attributes)), dtype)

    return run
