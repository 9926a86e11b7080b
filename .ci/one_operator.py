"""Run one operator of an installed wheel, from a model made in memory."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxstream_nb import Session

x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 40])
y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 5])
weight = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"])], "one", [x], [y],
    [onnx.numpy_helper.from_array(weight, "w")],
)  # fmt: skip
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
feed = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
with Session(model) as session:
    result = session.run({"x": feed})["y"]
np.testing.assert_allclose(result, feed @ weight, rtol=1e-4, atol=1e-5)
print("MatMul from the wheel agrees with NumPy")
