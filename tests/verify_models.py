"""Small models of every format with their tokenizer, and what `verify` says of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from llama_fixtures import write_gguf, write_hf
from llama_oracle import Tiny
from onnx import helper, numpy_helper
from onnx_models import make, saved, value
from perplexity_oracle import VOCAB, tokenizer
from tokenizer_fixtures import small_bpe

from onnxstream_nb import cli, formats
from onnxstream_nb.formats.onnx import write
from onnxstream_nb.session import decode_constant

TINY = Tiny(vocab=VOCAB, context=64)
WIDE = Tiny(vocab=VOCAB, hidden=256, intermediate=256, heads=4, kv_heads=2, head_dim=64, layers=1)
EXPORTED = Path(__file__).parent / "fixtures" / "models"

Document = dict[str, Any]


def gguf(folder: Path, encoding: str = "F32", tiny: Tiny = TINY, **changes: Any) -> Path:
    """A GGUF that carries its tokenizer; `changes` are of its fields."""
    path = folder / "m.gguf"
    write_gguf(path, tiny, encoding, extra=lambda writer: tokenizer(writer, **changes))
    return path


def hugging_face(folder: Path, **options: Any) -> Path:
    """A folder of safetensors in two shards."""
    write_hf(folder, TINY, **{"dtype": "BF16", "shards": 2, **options})
    return with_tokenizer(folder)


def with_tokenizer(folder: Path, eos: str = "<|im_end|>") -> Path:
    """The folder, a tokenizer in it."""
    small_bpe().save(str(folder / "tokenizer.json"))
    config = {"eos_token": eos, "bos_token": "<|begin|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def exported(folder: Path, *, external: bool = True, tiny: Tiny = TINY) -> Path:
    """An ONNX model of the same kind, its weights in a file of their own with a checksum."""
    folder.mkdir(exist_ok=True)
    source = folder / "source.gguf"
    write_gguf(source, tiny)
    write(formats.load(source), folder / "model.onnx", read=decode_constant, external=external)
    source.unlink()
    with_tokenizer(folder)
    return with_checksum(folder / "model.onnx") if external else folder / "model.onnx"


def with_checksum(path: Path) -> Path:
    """The model, the SHA1 of its external data told with every tensor in it."""
    model = onnx.load(path, load_external_data=False)
    digest = hashlib.sha1(path.with_name("model.onnx.data").read_bytes()).hexdigest()
    for tensor in model.graph.initializer:
        if tensor.external_data:
            tensor.external_data.add(key="checksum", value=digest)
    return saved(model, path)


def perceptron(folder: Path, scale: float = 1.0) -> Path:
    """y = relu(x w) of an image of any size, x (1, height, width, 3)."""
    w = (scale * np.random.default_rng(0).standard_normal((3, 40))).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Relu", ["p"], ["y"])]
    image = value("x", shape=(1, "height", "width", 3))
    model = make(nodes, [image], [value("y", shape=(1, "height", "width", 40))],
                 [numpy_helper.from_array(w, "w")])  # fmt: skip
    return saved(model, folder / "m.onnx")


def with_manifest(folder: Path) -> Path:
    """The folder, a manifest of all of its files in it."""
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}), "utf-8")
    return folder


def verify(path: Path, capsys: pytest.CaptureFixture[str], *flags: str, code: int = 0) -> Document:
    """What `verify --json` prints."""
    assert cli.main(["verify", str(path), "--json", *flags]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    document: Document = json.loads(out)
    assert document["ok"] == (code == 0)
    return document


def states(document: Document) -> dict[str, str]:
    """The state of each check; of one that found several things, the last."""
    return {finding["check"]: finding["state"] for finding in document["checks"]}


def failures(document: Document) -> list[dict[str, str]]:
    return [finding for finding in document["checks"] if finding["state"] == "failed"]


def only_failure(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    """The one thing that `verify` finds wrong."""
    (finding,) = failures(verify(path, capsys, *flags, code=1))
    return finding


def spoil(path: Path, change: Callable[[bytearray], object]) -> Path:
    """The file, its bytes changed."""
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def place_of(model: Path, tensor: str) -> tuple[Path, int, int]:
    """The file, offset and bytes of a model's weight."""
    ref = formats.load(model).initializers[tensor]
    assert isinstance(ref.source, Path)
    return ref.source, ref.offset, ref.nbytes
