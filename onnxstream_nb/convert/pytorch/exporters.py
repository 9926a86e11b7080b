"""PyTorch's two exporters to ONNX, each giving a draft whose weights stay PyTorch's own tensors.

The exporters are asked for the graph alone: parameters are inputs of it until `_bound` makes
initializers of them. So no weight is copied before it is written, and no limit of a protobuf
message is met.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import formats, passes
from ...errors import UnsupportedError, UsageError
from ...graph import Dim, Graph, Node, Value, WeightRef
from ...passes.evaluate import LIMIT
from ...passes.rewriting import captured, constant_ref
from ...session import decode_constant
from ..draft import Draft, Make, placeholder

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
Axes = Mapping[str, Mapping[int, str]]
"""Value name -> axis -> the name of its open size."""

INSTALL = "pip install 'onnxstream_nb[export]'"
_PREFIX = "module."  # of the parameters of what `Subject.module` wraps


@dataclass(frozen=True)
class Case:
    """What a graph is fed, and PyTorch's results, by name."""

    feeds: Mapping[str, Array]
    wanted: Mapping[str, Array]


@dataclass(frozen=True)
class Subject:
    """What is exported: a module in evaluation whose `forward(*inputs)` takes and gives tensors,
    and whose attribute `module` is what it wraps.

    `inputs` are examples, `names` theirs, `outputs` the results' names, `axes` the sizes of both
    that are open, `cases` PyTorch's results. A module that is not `large` may be folded into the
    graph by the exporter (convolutions and their normalisations, say).
    """

    module: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: Axes
    cases: tuple[Case, ...]
    large: bool = True


def require(*modules: str) -> None:
    """Raise UsageError, with the command that installs it, when one of them is missing."""
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"exporting needs {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} not "
            f"installed: {INSTALL}"
        )


def drafted(subject: Subject, exporter: str) -> Draft:
    """The subject's graph by one of `EXPORTERS`, simplified, its weights yet to be written.

    Raises UnsupportedError when the exporter fails.
    """
    if exporter == "opset23":
        require("onnxscript")
    try:
        with quiet():
            graph, tensors = EXPORTERS[exporter](subject)
    except Exception as error:  # any: the exporters run the model's own code and have no base class
        other = next(name for name in EXPORTERS if name != exporter)
        raise UnsupportedError(
            f"PyTorch's exporter for {exporter} fails: {reason(error)}; try --exporter {other}"
        ) from error
    graph = _declared(graph, subject, tensors)
    small = {name: make for name, make in tensors.items() if _is_small(graph, name)}
    graph = passes.clean(_with_constants(graph, small), decode_constant)
    return _bound(graph, {name: make for name, make in tensors.items() if name not in small})


def reason(error: BaseException) -> str:
    """The innermost cause's first line: exporters wrap it in advice to their own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:300]}" if line else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and remarks of torch and transformers. The older exporter prints its
    whole graph on standard output, not through Python, when it fails."""
    disabled = logging.root.manager.disable
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        logging.disable(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _opset14(subject: Subject) -> tuple[Graph, dict[str, Make]]:
    """The exporter by tracing, as OnnxStream's recipe uses it."""
    import torch

    file = io.BytesIO()
    mode = torch.onnx.TrainingMode
    with torch.no_grad():
        torch.onnx.export(
            subject.module, subject.inputs, file, dynamo=False, opset_version=14,
            input_names=list(subject.names), output_names=list(subject.outputs),
            dynamic_axes={name: dict(axes) for name, axes in subject.axes.items()},
            export_params=not subject.large, do_constant_folding=not subject.large,
            training=mode.PRESERVE if subject.large else mode.EVAL,
        )  # fmt: skip
    state = subject.module.state_dict(keep_vars=True)
    graph = formats.load_bytes(file.getvalue())
    return graph, {v.name: partial(_array, state[v.name]) for v in graph.inputs if v.name in state}


def _opset23(subject: Subject) -> tuple[Graph, dict[str, Make]]:
    """The exporter by torch.export, which knows Attention, RMSNormalization, RotaryEmbedding."""
    import onnx_ir
    import torch

    given = [subject.axes.get(name, {}) for name in subject.names]
    sizes = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in given)
    with torch.no_grad():
        program = torch.onnx.export(
            subject.module, subject.inputs, dynamo=True, opset_version=23, verbose=False,
            input_names=list(subject.names), output_names=list(subject.outputs),
            dynamic_shapes=(sizes,), optimize=False,
        )  # fmt: skip
    assert program is not None
    tensors = _taken_out(program.model.graph) if subject.large else {}
    program.optimize()  # which would transpose every matrix, and give it a number for a name
    tensors |= _taken_out(program.model.graph)
    data = onnx_ir.serde.serialize_model(program.model).SerializeToString()
    return formats.load_bytes(data), tensors


def _taken_out(graph: Any) -> dict[str, Make]:
    """Make inputs of the large initializers of an onnx_ir.Graph: what gives their elements."""
    tensors: dict[str, Make] = {}
    for name, value in list(graph.initializers.items()):
        if len(value.shape) > 1 or value.const_value.nbytes > LIMIT:
            tensors[name] = value.const_value.numpy
            del graph.initializers[name]
            graph.inputs.append(value)
    return tensors


EXPORTERS: Mapping[str, Callable[[Subject], tuple[Graph, dict[str, Make]]]] = {
    "opset14": _opset14,
    "opset23": _opset23,
}


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().numpy()
    return array


def _declared(graph: Graph, subject: Subject, tensors: Mapping[str, Make]) -> Graph:
    """The graph with inputs and outputs as the subject names their sizes; parameters come last."""
    case = subject.cases[0]

    def value(name: str, array: Array) -> Value:
        axes = subject.axes.get(name, {})
        shape: tuple[Dim, ...] = tuple(axes.get(i, n) for i, n in enumerate(array.shape))
        return Value(name, str(array.dtype), shape)

    known = {name: value(name, array) for name, array in case.feeds.items()}
    used = {v.name for v in graph.inputs}
    if unknown := used - known.keys() - tensors.keys():
        raise UnsupportedError(
            f"the exporter left the inputs {', '.join(sorted(unknown))} open, which are no "
            "parameters of the module"
        )
    inputs = [known[name] for name in subject.names if name in used]
    inputs += [v for v in graph.inputs if v.name in tensors]
    outputs = [value(name, case.wanted[name]) for name in subject.outputs]
    return graph.with_(inputs=tuple(inputs), outputs=tuple(outputs))


def _is_small(graph: Graph, name: str) -> bool:
    """Whether a parameter is a vector that may be folded: a norm's weights plus one, say."""
    shape = next(v.shape for v in graph.inputs if v.name == name) or ()
    return len(shape) <= 1 and all(isinstance(n, int) and n <= LIMIT for n in shape)


def _with_constants(graph: Graph, values: Mapping[str, Make]) -> Graph:
    refs = {name: constant_ref(name, make()) for name, make in values.items()}
    return graph.with_(
        inputs=tuple(v for v in graph.inputs if v.name not in refs),
        initializers={**graph.initializers, **refs},
    )


def _bound(graph: Graph, tensors: Mapping[str, Make]) -> Draft:
    """Parameters as initializers that PyTorch's tensors make. One that is only used transposed
    is stored so; a table that is a head as well is stored once, and transposed in the graph."""
    users, inner = graph.consumers(), captured(graph)
    refs: dict[str, WeightRef] = {}
    made: dict[str, Make] = {}
    renamed: dict[str, str] = {}
    dropped: set[int] = set()
    for name, ref in graph.initializers.items():  # vectors, which are bound already
        own = name if name in inner else name.removeprefix(_PREFIX)
        renamed[name], refs[own] = own, replace(ref, name=own)
    for value in (v for v in graph.inputs if v.name in tensors):
        name, make, nodes = value.name, tensors[value.name], users.get(value.name, [])
        shape = tuple(int(str(n)) for n in value.shape or ())
        if name not in inner:
            name = renamed[value.name] = value.name.removeprefix(_PREFIX)
            if nodes and all(_transposes(n) for n in nodes):
                dropped.update(map(id, nodes))
                renamed.update({n.outputs[0]: name for n in nodes})
                shape, make = shape[::-1], partial(_turned, make)
        if nodes or name in inner:
            refs[name], made[name] = placeholder(name, value.dtype, shape), make
    nodes = [n for n in graph.nodes if id(n) not in dropped]
    return Draft(
        graph.with_(
            inputs=tuple(v for v in graph.inputs if v.name not in tensors),
            nodes=tuple(
                replace(n, inputs=tuple(renamed.get(i, i) for i in n.inputs)) for n in nodes
            ),
            initializers=refs,
        ),
        made,
    )


def _transposes(node: Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes.get("perm", ())) == (1, 0)


def _turned(make: Make) -> Array:
    """The transposition of a matrix, by PyTorch, which copies it in blocks that fit the caches."""
    import torch

    array: Array = torch.from_numpy(make()).t().contiguous().numpy()
    return array
