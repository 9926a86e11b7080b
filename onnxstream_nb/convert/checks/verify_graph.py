"""Whether a model's graph fits together: weights inside their files, shapes that agree."""

from __future__ import annotations

from pathlib import Path

from ...device import format_size
from ...errors import UsageError
from ...graph import Graph, Value, WeightRef
from ...session import decode_constant
from ...weight import encoded_bytes
from .finding import Findings, failed, ok, skipped
from .verify_files import all_weights, weight_files

KNOWN = 1 << 16  # bytes of a weight whose elements shapes may depend on


def placed(graph: Graph) -> Findings:
    """Whether each weight has the bytes that its shape takes, inside its file."""
    weights, wrong = all_weights(graph), 0
    sizes = {path: path.stat().st_size for path in weight_files(graph)}
    for ref in weights:
        problem = _misplaced(ref, sizes)
        if problem:
            wrong += 1
            remedy = "the file is truncated, or belongs to another version: fetch it again"
            yield failed("graph", problem, file=_file(ref), tensor=ref.name, remedy=remedy)
    if not wrong:
        total = format_size(sum(ref.nbytes for ref in weights))
        files = f"{len(sizes)} file{'' if len(sizes) == 1 else 's'}"
        yield ok("graph", f"{len(graph.nodes)} nodes, {len(weights)} weights, {total} in {files}")


def _misplaced(ref: WeightRef, sizes: dict[Path, int]) -> str:
    if ref.dtype == "string":
        return ""
    needed = encoded_bytes(ref)
    if ref.nbytes != needed:
        return f"{list(ref.shape)} as {_storage(ref)} needs {needed} bytes and has {ref.nbytes}"
    end = ref.offset + ref.nbytes
    size = sizes[ref.source] if isinstance(ref.source, Path) else len(ref.source)
    return f"it ends at byte {end} of {size}" if end > size else ""


def _storage(ref: WeightRef) -> str:
    return ref.dtype if ref.encoding == "raw" else ref.encoding


def _file(ref: WeightRef) -> str:
    return str(ref.source) if isinstance(ref.source, Path) else ""


def shapes(graph: Graph) -> Findings:
    """ONNX's own inference of types and shapes over the graph, with what it declares."""
    import onnx

    from ...formats.onnx import to_model_proto

    bodies = sum(ref.nbytes for ref in all_weights(graph)) - sum(
        ref.nbytes for ref in {r.key: r for r in graph.initializers.values()}.values()
    )
    if bodies > KNOWN << 8:
        yield skipped("shapes", f"bodies of the graph hold {format_size(bodies)} of weights")
        return
    known = {n: ref for n, ref in graph.initializers.items() if ref.nbytes <= KNOWN}
    rest = [Value(n, r.dtype, r.shape) for n, r in graph.initializers.items() if n not in known]
    small = graph.with_(inputs=(*graph.inputs, *rest), initializers=known)
    try:
        model = to_model_proto(small, decode_constant)
        inferred = onnx.shape_inference.infer_shapes(
            model, check_type=True, strict_mode=True, data_prop=True
        )
    except (onnx.shape_inference.InferenceError, UsageError, ValueError, TypeError) as error:
        remedy = "the graph and its weights are not of one version: export or fetch them again"
        yield failed("shapes", " ".join(str(error).split()), remedy=remedy)
        return
    found = sum(v.type.tensor_type.HasField("shape") for v in inferred.graph.value_info)
    results = sum(1 for node in graph.nodes for name in node.outputs if name)
    outputs = "; ".join(f"{v.name} {_dims(v)}" for v in graph.outputs[:1])
    yield ok("shapes", f"{found + len(graph.outputs)} of {results} results; {outputs}")


def _dims(value: Value) -> str:
    return "of any shape" if value.shape is None else f"({', '.join(map(str, value.shape))})"
