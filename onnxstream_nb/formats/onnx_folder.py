"""Write a graph as an ONNX model larger than memory: weights pass through in pieces.

In a folder, weights lie in data files of a limited size beside `model.onnx`, each from a page on.
A single file has them inside; its protobuf is put together here, since the library would need all
of it in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from onnx import ModelProto, TensorProto

from ..errors import ModelError, UsageError
from ..graph import Graph, WeightRef
from ..progress import Report
from .onnx_tensors import stored_bytes
from .onnx_write import NUMBERS, PAGE, PROTOBUF_LIMIT, all_weights, model_proto
from .sink import Data, Folder, Sink, view_of

Raw = Callable[[WeightRef], Iterable[Data]]
"""A weight -> its raw_data, as `Draft.raw` gives it."""

MODEL = "model.onnx"
SHARD = 256_000_000
"""Bytes of a data file at most; a tensor that is larger has one of its own."""
INSIDE = 1024
"""Weights of fewer bytes stay in model.onnx."""

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # field numbers of ModelProto, GraphProto, TensorProto


def weight_bytes(graph: Graph) -> int:
    """How many bytes the weights take when they are written."""
    return sum(stored_bytes(ref.dtype, ref.shape) for ref in all_weights(graph))


def write_folder(
    graph: Graph, raw: Raw, folder: Folder, report: Report, shard_bytes: int = SHARD
) -> None:
    """Write `model.onnx` and its data files, `model-00001.data` and so on.

    Raises ModelError for a weight whose bytes are not what the graph says.
    """
    total = weight_bytes(graph)
    folder.reserve(total + PAGE * (1 + len(graph.initializers)))
    with ExitStack() as stack:
        shards = _Shards(raw, folder, stack, _Told(report, total), shard_bytes)
        model = model_proto(graph, shards.tensor)
    with folder.file(MODEL) as file:
        file.write(model.SerializeToString())


def write_file(graph: Graph, raw: Raw, folder: Folder, report: Report) -> None:
    """Write `model.onnx` with all weights inside.

    Raises UsageError when they are more than a protobuf message can hold (2 GiB).
    """
    total = weight_bytes(graph)
    if total > PROTOBUF_LIMIT:
        raise UsageError(
            f"the weights take {total} bytes, more than the 2 GiB of one .onnx file; name a folder "
            "as the output (a name without .onnx): it takes any size"
        )
    folder.reserve(total)
    told, whole = _Told(report, total), dict[str, WeightRef]()

    def tensor(name: str, ref: WeightRef) -> TensorProto:
        size = stored_bytes(ref.dtype, ref.shape)
        if graph.initializers.get(name) is ref and size >= INSIDE:
            whole[name] = ref
            return _header(name, ref)
        data = b"".join(map(bytes, told.pieces(ref, raw(ref), size)))
        return TensorProto(name=name, data_type=NUMBERS[ref.dtype], dims=ref.shape, raw_data=data)

    model = model_proto(graph, tensor)
    with folder.file(MODEL) as file:
        _write_embedded(model, whole, raw, file, told)


def _write_embedded(
    model: ModelProto, whole: dict[str, WeightRef], raw: Raw, file: Sink, told: _Told
) -> None:
    """A model, `raw_data` of the initializers in `whole` added: fields may come in any order."""
    headers = [t.SerializeToString() for t in model.graph.initializer if t.name in whole]
    small = [t for t in model.graph.initializer if t.name not in whole]
    graph = model.graph.__class__()
    graph.CopyFrom(model.graph)
    del graph.initializer[:]
    graph.initializer.extend(small)
    model.ClearField("graph")
    parts: list[tuple[bytes, WeightRef, int]] = []
    for header, ref in zip(headers, whole.values(), strict=True):
        size = stored_bytes(ref.dtype, ref.shape)
        head = header + _field(_RAW_DATA, size)
        parts.append((_field(_INITIALIZER, len(head) + size) + head, ref, size))
    start = graph.SerializeToString()
    length = len(start) + sum(len(head) + size for head, _, size in parts)
    file.write(model.SerializeToString() + _field(_GRAPH, length) + start)
    for head, ref, size in parts:
        file.write(head)
        for data in told.pieces(ref, raw(ref), size):
            file.write(data)


def _field(number: int, length: int) -> bytes:
    """The beginning of a protobuf field of so many bytes: its tag, and their count."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*result, value])


def _header(name: str, ref: WeightRef) -> TensorProto:
    return TensorProto(name=name, data_type=NUMBERS[ref.dtype], dims=ref.shape)


class _Told:
    """Weights on their way to a file, checked for their size, and reported."""

    def __init__(self, report: Report, total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def pieces(self, ref: WeightRef, data: Iterable[Data], size: int) -> Iterable[Data]:
        """The pieces of a weight of `size` bytes."""
        before = self.done
        for piece in data:
            yield piece
            self.done += len(view_of(piece))
            self.report(f"writing {ref.name}", self.done / self.total if self.total else None)
        if self.done - before != size:
            raise ModelError(
                f"weight {ref.name!r} has {self.done - before} bytes, and {ref.dtype} "
                f"{list(ref.shape)} takes {size}; the model is damaged, fetch or export it again"
            )


class _Shards:
    """The data files of a folder, filled one after the other."""

    def __init__(self, raw: Raw, folder: Folder, stack: ExitStack, told: _Told, most: int) -> None:
        self.raw, self.folder, self.stack, self.told, self.most = raw, folder, stack, told, most
        self.count = self.size = 0
        self.file: Sink | None = None

    def tensor(self, name: str, ref: WeightRef) -> TensorProto:
        """A weight: its bytes inside when they are few, else behind those of the ones before."""
        tensor, size = _header(name, ref), stored_bytes(ref.dtype, ref.shape)
        if size < INSIDE:
            tensor.raw_data = b"".join(map(bytes, self.told.pieces(ref, self.raw(ref), size)))
            return tensor
        file, offset = self._place(size)
        for data in self.told.pieces(ref, self.raw(ref), size):
            file.write(data)
        self.size = offset + size
        tensor.data_location = TensorProto.EXTERNAL
        where = {"location": self._name, "offset": str(offset), "length": str(size)}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=value)
        return tensor

    @property
    def _name(self) -> str:
        return f"{Path(MODEL).stem}-{self.count:05d}.data"

    def _place(self, size: int) -> tuple[Sink, int]:
        """Where so many bytes are to be written: the next page, or the next file."""
        offset = -(-self.size // PAGE) * PAGE
        if self.file is None or offset + size > self.most:
            self.stack.close()  # the file before is complete
            self.count, offset, self.size = self.count + 1, 0, 0
            self.file = self.stack.enter_context(self.folder.file(self._name))
        elif offset > self.size:
            self.file.write(bytes(offset - self.size))
        return self.file, offset
