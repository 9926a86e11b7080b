"""Compile every kernel into the cache, as many at once as there are cores."""

from onnxstream_nb.device import physical_cores
from onnxstream_nb.registry import internal, kernels

names = list(kernels())
internal("PrepareKernels")(names, workers=physical_cores())
print(f"{len(names)} kernels")
