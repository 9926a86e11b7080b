"""The tests' own decoder of plain weights: what a `WeightRef` stands for, as an array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from onnxstream_nb.graph import DTYPES, WeightRef

_NUMBERS = {name: number for number, name in DTYPES.items()}
_STORED = {"float16": np.float16, "uint8": np.uint8}


def stored(ref: WeightRef) -> bytes:
    """The bytes that `ref` refers to."""
    data = ref.source.read_bytes() if isinstance(ref.source, Path) else ref.source
    return data[ref.offset : ref.offset + ref.nbytes]


def logical(ref: WeightRef) -> np.ndarray[Any, Any]:
    """The logical tensor; element types that numpy lacks are unpacked by the onnx package."""
    shape = ref.stored_shape
    if ref.encoding == "raw":
        array = numpy_helper.to_array(
            TensorProto(dims=shape, data_type=_NUMBERS[ref.dtype], raw_data=stored(ref))
        )
    else:
        array = np.frombuffer(stored(ref), _STORED[ref.encoding]).reshape(shape)
        array = ((array.astype(np.float64) - ref.zero_point) * ref.scale).astype(np.float32)
    return array.swapaxes(-1, -2) if ref.transposed else array
