"""From any format that is read to one that is written: read, simplify, take steps, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..formats import onnx_folder
from ..formats.onnx_write import all_weights
from ..graph import Graph
from ..progress import Report
from . import carry, floats, ties, uint8
from .draft import FLOATS, Draft
from .folder import OutputFolder, check_out, is_file, output_folder
from .source import read

Step = Callable[[Draft], Draft]

UINT8 = "uint8"
"""--dtype int8 in an OnnxStream folder: all weights as its exporter rounds them."""
KINDS = ("onnx", "onnxstream")


@dataclass(frozen=True, slots=True)
class Written:
    """What a conversion wrote: files by name -> bytes, of which `weight_bytes` are the weights'
    own (without pages, graph and tokenizer), how long it took, and a remark or ""."""

    path: Path
    kind: str
    files: dict[str, int]
    weight_bytes: int
    source_bytes: int
    seconds: float
    note: str = ""

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(self.files.values())


def convert(
    source: Path,
    out: Path,
    *,
    to: str = "onnx",
    dtype: str | None = None,
    steps: Sequence[Step] = (),
    overwrite: bool = False,
    shard_bytes: int = onnx_folder.SHARD,
    report: Report | None = None,
) -> Written:
    """Convert the model at `source` to the folder `out`, or to one file when its name ends in
    .onnx. `dtype` is what floats are stored as: "float32", "float16", "bfloat16", or as they are;
    `steps` come before that.

    Raises UsageError for an output that exists or flags that exclude each other, ModelError for a
    model that is damaged, OutputError when it cannot be written; then nothing is left at `out`.
    """
    began, tell = time.perf_counter(), report or (lambda text, fraction: None)
    _check_form(out, to, dtype)
    check_out(out, overwrite=overwrite, source=source)
    tell("reading the graph", None)
    draft = read(source)
    source_bytes = _stored(draft.graph)
    for step in steps:
        draft = step(draft)
    single, note = onnx_folder.MODEL if is_file(out) else "", ""
    with output_folder(out, overwrite=overwrite, single=single, source=source) as folder:
        if not single:
            carry.tokenizer(source, draft.graph, folder)
        if to == "onnxstream":
            note = carry.text_vocabulary(source, draft.graph, folder)
            weights = _write_onnxstream(draft, dtype, folder, tell)
        else:
            note = _remarks(source, draft.graph, out, dtype)
            weights = _write_onnx(draft, dtype, folder, tell, None if single else shard_bytes)
    sizes = {name: file.size for name, file in folder.files.items()}
    if single:
        sizes = {out.name: sizes[single]}
    seconds = time.perf_counter() - began
    return Written(out, to, sizes, weights, source_bytes, seconds, note)


def _check_form(out: Path, to: str, dtype: str | None) -> None:
    if to not in KINDS:
        raise UsageError(f"--to {to}: it is one of {', '.join(KINDS)}")
    if to == "onnx":
        if dtype == UINT8:
            raise UsageError("uint8 is a form of weights in OnnxStream's folders alone")
        return
    if is_file(out):
        raise UsageError(f"-o {out}: --to {to} writes a folder; name it without .onnx")
    if dtype not in (None, "float32", "float16", UINT8):
        flag = next((flag for flag, name in FLOATS.items() if name == dtype), dtype)
        raise UsageError(f"--dtype {flag}: OnnxStream stores fp32 or fp16, or int8; give one")


def _stored(graph: Graph) -> int:
    """Bytes of all weights as their files have them, also in bodies; tied ones count once."""
    return sum({ref.key: ref.nbytes for ref in all_weights(graph)}.values())


def _remarks(source: Path, graph: Graph, out: Path, dtype: str | None) -> str:
    """What is not as one may expect of an ONNX model that was asked for; "" for nothing."""
    left = carry.left_behind(source, graph, out) if is_file(out) else ""
    return "; ".join(filter(None, [left, _integers(graph) if dtype else ""]))


def _integers(graph: Graph) -> str:
    """A remark on weights that no type of floats is for."""
    kinds = {
        graph.initializers[node.inputs[i]].dtype
        for node in graph.nodes
        for i in (0, 1)
        if node.op_type == ("DequantizeLinear", "MatMulNBits")[i]
        and node.inputs[i] in graph.initializers
    }
    if not kinds:
        return ""
    return f"weights that the source stores as {', '.join(sorted(kinds))} integers stay so"


def _write_onnx(
    draft: Draft, dtype: str | None, folder: OutputFolder, report: Report, shard_bytes: int | None
) -> int:
    """Write model.onnx, its weights inside unless there is a size of shards; their bytes."""
    draft = ties.share(draft)
    draft = in_order(floats.store(draft if dtype else uint8.keep(draft), dtype))
    if shard_bytes is None:
        onnx_folder.write_file(draft.graph, draft.raw, folder, report)
    else:
        onnx_folder.write_folder(draft.graph, draft.raw, folder, report, shard_bytes)
    return onnx_folder.weight_bytes(draft.graph)


def in_order(draft: Draft) -> Draft:
    """Weights in the order in which a run needs them, and so they will lie in the files."""
    known = draft.graph.initializers
    names = dict.fromkeys(i for node in draft.graph.nodes for i in node.inputs if i in known)
    return draft.with_(draft.graph.with_(initializers={n: known[n] for n in (*names, *known)}))


def _write_onnxstream(draft: Draft, dtype: str | None, folder: OutputFolder, report: Report) -> int:
    """Write model.txt and its weights; their bytes."""
    from .onnxstream.text_folder import write_text_folder

    write_text_folder(draft, folder, report, dtype=dtype or "")
    return sum(file.size for name, file in folder.files.items() if name.endswith(".bin"))
