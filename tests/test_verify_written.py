"""What `convert` and `quantize` write passes `verify`, its manifest compared."""

from __future__ import annotations

from pathlib import Path

import pytest
from verify_models import WIDE, gguf, hugging_face, states, verify

from onnxstream_nb import cli

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")

TEXT = Path(__file__).parent / "fixtures" / "public_domain.txt"
CALIBRATED = ("--calibration", str(TEXT), "--tokens", "256")
WRITTEN: dict[str, tuple[str, ...]] = {
    "fp32": ("convert", "--dtype", "fp32"),
    "fp16": ("convert", "--dtype", "fp16"),
    "bf16": ("convert", "--dtype", "bf16"),
    "int8": ("convert", "--dtype", "int8"),
    "int4": ("convert", "--dtype", "int4", "--asymmetric", "--keep", "head=fp16"),
    "MatMulNBits": ("convert", "--dtype", "int4", "--matmul-nbits"),
    "OnnxStream": ("convert", "--to", "onnxstream", "--dtype", "fp16"),
    "awq": ("quantize", "--method", "awq", *CALIBRATED),
    "gptq": ("quantize", "--method", "gptq", *CALIBRATED),
    "dynamic": ("quantize", "--method", "dynamic"),
    "static": ("quantize", "--method", "static", *CALIBRATED),
}
FOUND = dict.fromkeys(
    ("manifest", "graph", "shapes", "weights", "tokenizer", "forward", "cache"), "ok"
) | dict.fromkeys(("download", "packed"), "skipped")


@pytest.mark.parametrize("name", WRITTEN)
def test_written_models(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb, *flags = WRITTEN[name]
    out = tmp_path / "out"
    assert cli.main([verb, str(gguf(tmp_path, "F16", WIDE)), "-o", str(out), *flags]) == 0
    capsys.readouterr()
    assert states(verify(out, capsys)) == FOUND


def test_a_folder_of_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = hugging_face(tmp_path / "m"), tmp_path / "out.onnx"
    assert cli.main(["convert", str(source), "-o", str(out)]) == 0
    capsys.readouterr()
    alone = {"manifest": "skipped", "tokenizer": "skipped"}
    assert states(verify(out, capsys)) == FOUND | alone
