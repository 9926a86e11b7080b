"""onnxruntime: the same graph, which our loader builds and our writer writes (opset 23).

Weights are float32; or int8 by quantize_dynamic; or int4 in blocks of 32 by MatMulNBits with int8
activations. The files are made once, in processes of their own, and kept in the cache folder.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Engine, Logits, arguments, serve

LOGITS, ROWS, PAST, PRESENT = "logits", "logit_rows", "past_key_values.", "present."


def written(model: Path, kind: str) -> Path:
    """The ONNX file of a model, made when it is missing."""
    from onnxstream_nb.hub import cache_dir

    path = cache_dir() / "bench" / f"{model.stem}-{kind}" / "model.onnx"
    if path.exists() and path.stat().st_mtime >= model.stat().st_mtime:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    source = model if kind == "fp32" else written(model, "fp32")
    command = [sys.executable, __file__, "--make", kind, str(source), str(path)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        words = (made.stderr.strip().splitlines() or [""])[-1]
        raise ValueError(f"making {kind}: exit code {made.returncode}: {words}")
    return path


def make(kind: str, source: str, path: str) -> None:
    """Write one file: from a GGUF, or from the float32 model."""
    if kind == "fp32":
        from onnxstream_nb import formats, passes
        from onnxstream_nb.formats.onnx import write
        from onnxstream_nb.session import decode_constant

        # A prompt's last position is what the head is for, here as in the other engines.
        graph = passes.rewrite_logit_rows(formats.load(source))
        write(graph, path, read=decode_constant, external=True)
        return
    from onnxruntime.quantization import QuantType, matmul_nbits_quantizer, quantize_dynamic

    if kind == "int8":
        quantize_dynamic(
            source, path, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )  # fmt: skip
        return
    import onnx

    quantiser = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        onnx.load(source), block_size=32, is_symmetric=True, accuracy_level=4
    )
    quantiser.process()
    quantiser.model.save_model_to_file(path, use_external_data_format=True)


class OnnxRuntime(Engine):
    """The cache goes from present to past without a copy in Python."""

    def __init__(self, given: Namespace) -> None:
        super().__init__()
        import onnxruntime

        path = written(given.model, given.kind)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = given.threads
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._empty = {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in self._session.get_inputs()
            if i.name.startswith(PAST)
        }
        self._picks = any(i.name == ROWS for i in self._session.get_inputs())
        self._outputs = [o.name for o in self._session.get_outputs()]
        self.vocab_size = self._session.get_outputs()[self._outputs.index(LOGITS)].shape[-1]
        self.version = f"onnxruntime {onnxruntime.__version__}"
        self.settings = given.kind
        self._past: dict[str, Any] = {}
        self.rewind(0)

    def feed(self, ids: Sequence[int]) -> Logits:
        positions = np.arange(len(self.tokens), len(self.tokens) + len(ids))
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        binding.bind_cpu_input("position_ids", positions[None].astype(np.int64))
        if self._picks:  # not in a file of a graph whose head is not found
            binding.bind_cpu_input(ROWS, np.array([len(ids) - 1], np.int64))
        for name, value in self._past.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        results = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        self._past = {name: results[name.replace(PAST, PRESENT)] for name in self._past}
        self.tokens += ids
        logits: Logits = results[LOGITS].numpy().reshape(-1, self.vocab_size)[-1]
        return logits

    def rewind(self, length: int) -> None:
        if length == 0:
            self._past = {name: self._value(array) for name, array in self._empty.items()}
        elif length < len(self.tokens):
            self._past = {
                name: self._value(np.ascontiguousarray(value.numpy()[:, :, :length]))
                for name, value in self._past.items()
            }
        del self.tokens[length:]


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        make(*sys.argv[2:])
        sys.exit()
    parser = arguments()
    parser.add_argument("--kind", default="fp32", choices=("fp32", "int8", "int4"))
    serve(parser.parse_args(), OnnxRuntime, lambda given: written(given.model, given.kind))
