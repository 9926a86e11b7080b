"""The plan of a graph: operators bound, constants read, the end of every value known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np

from .errors import UnsupportedError
from .graph import Graph, Node, WeightRef
from .registry import Operator, lookup

CONSTANT_BYTES = 65536  # a smaller initializer is read once and kept as an array

Array = np.ndarray[Any, Any]


class Form(IntEnum):
    """How an operator takes an input: as an array, in the engine's own form, or so that a weight
    may come in tiles."""

    ARRAY = 0
    NATIVE = 1
    TILES = 2


@dataclass(frozen=True, slots=True)
class Step:
    """One node, ready to run.

    `inputs` are (name, in which form the operator takes it); `weights` are the
    references it needs from the provider, `dead` the values nobody reads after it.
    """

    node: Node
    operator: Operator
    attributes: Mapping[str, Any]
    inputs: tuple[tuple[str, Form], ...]
    outputs: tuple[str, ...]
    weights: tuple[WeightRef, ...]
    dead: tuple[str, ...]

    def call(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """Run the operator; its results in the order of the node's outputs."""
        try:
            result = self.operator.function(*arguments, **self.attributes)
        except Exception as error:
            error.add_note(f"in node {self.node.name or self.outputs[0]} ({self.node.op_type})")
            raise
        return result if isinstance(result, (tuple, list)) else (result,)


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in order, the constants by name, the weights in order of use, the kernels' names.

    `packable` are the weights that no operator wants otherwise than as panels, if they have that
    form, `tables` those of which only rows are looked up; `kernels` are for weights as stored,
    `panel_kernels` when those are packed (a weight in parts is packed for every product else).
    """

    graph: Graph
    steps: tuple[Step, ...]
    constants: Mapping[str, Array]
    weights: tuple[WeightRef, ...]
    packable: tuple[WeightRef, ...]
    tables: tuple[WeightRef, ...]
    kernels: tuple[str, ...]
    panel_kernels: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all distinct weights that the steps read."""
        return sum({ref.key: ref.nbytes for ref in self.weights}.values())


def make_plan(
    graph: Graph,
    read: Callable[[WeightRef], Array],
    has_panels: Callable[[WeightRef], Any] = lambda ref: False,
    precision: str = "exact",
    device: str = "cpu",
) -> Plan:
    """Plan a graph; `has_panels` says for a weight whether it can be packed, `precision` which
    kernels products of many rows call, `device` whose operators are taken where it has them.

    Raises UnsupportedError naming every operator that is missing.
    """
    operators = _operators(graph, device)
    missing = sorted({n.op_type for n, o in zip(graph.nodes, operators, strict=True) if o is None})
    if missing:
        raise UnsupportedError(
            f"the model uses operators that are not supported: {', '.join(missing)}"
        )
    constants = _constants(graph, operators, read)
    last = _last_uses(graph)
    steps = tuple(
        _step(graph, node, operator, constants, last[i])
        for i, (node, operator) in enumerate(zip(graph.nodes, operators, strict=True))
        if operator is not None
    )
    weights = tuple(ref for step in steps for ref in step.weights)
    to_pack = packable(graph, has_panels)
    tables = tuple(_read_as(graph, operators, "lookups").values())
    kernels = [
        tuple(dict.fromkeys(k for step in steps for k in _kernels(step, graph, packed, precision)))
        for packed in ({n for n, ref in to_pack.items() if ref.parts}, to_pack)
    ]
    return Plan(graph, steps, constants, weights, tuple(to_pack.values()), tables, *kernels)


def packable(graph: Graph, has_panels: Callable[[WeightRef], Any]) -> dict[str, WeightRef]:
    """The initializers that can be packed and that no operator wants otherwise."""
    found = _read_as(graph, _operators(graph), "packs")
    return {name: ref for name, ref in found.items() if has_panels(ref)}


def factors(plan: Plan) -> list[WeightRef]:
    """The distinct matrices that products alone read."""
    found = _read_as(plan.graph, [step.operator for step in plan.steps], "packs")
    return list({ref.matrix: ref for ref in found.values() if len(ref.shape) == 2}.values())


def without(plan: Plan, refs: Collection[WeightRef]) -> Plan:
    """The plan as it is for whoever holds all weights but these."""
    gone = {ref.matrix for ref in refs}
    return replace(
        plan,
        weights=tuple(ref for ref in plan.weights if ref.matrix not in gone),
        packable=tuple(ref for ref in plan.packable if ref.matrix not in gone),
        tables=tuple(ref for ref in plan.tables if ref.matrix not in gone),
    )


def _read_as(graph: Graph, operators: Sequence[Operator | None], how: str) -> dict[str, WeightRef]:
    """The initializers that every reader of the same matrix takes as `how`: packs or lookups."""
    taken: dict[object, bool] = {}
    refs = graph.initializers
    for node, operator in zip(graph.nodes, operators, strict=True):
        for i, name in enumerate(node.inputs):
            if name in refs:
                takes = operator is not None and i in getattr(operator, how)
                matrix = refs[name].matrix
                taken[matrix] = taken.get(matrix, True) and takes
    taken.update((refs[v.name].matrix, False) for v in graph.outputs if v.name in refs)
    return {name: ref for name, ref in refs.items() if taken.get(ref.matrix)}


def _operators(graph: Graph, device: str = "cpu") -> list[Operator | None]:
    versions = graph.opset
    return [lookup(n.op_type, n.domain, versions.get(n.domain, 1), device) for n in graph.nodes]


def _constants(
    graph: Graph, operators: Sequence[Operator | None], read: Callable[[WeightRef], Array]
) -> dict[str, Array]:
    """Small initializers, unless an operator takes them in the engine's form."""
    native = {
        name
        for node, operator in zip(graph.nodes, operators, strict=True)
        for i, name in enumerate(node.inputs)
        if operator is not None and i in operator.native
    }
    constants = {
        name: read(ref)
        for name, ref in graph.initializers.items()
        if ref.nbytes <= CONSTANT_BYTES and name not in native
    }
    for array in constants.values():
        array.flags.writeable = False  # no result may be a view that its owner can change
    return constants


def _last_uses(graph: Graph) -> list[tuple[str, ...]]:
    """For each node, the values that no later node reads."""
    last: dict[str, int] = {}
    for i, node in enumerate(graph.nodes):
        for name in (*node.outputs, *node.inputs):
            last[name] = i
    keep = {v.name for v in graph.outputs} | set(graph.initializers) | {""}
    dead: list[list[str]] = [[] for _ in graph.nodes]
    for name, i in last.items():
        if name not in keep:
            dead[i].append(name)
    return [tuple(names) for names in dead]


def _step(
    graph: Graph,
    node: Node,
    operator: Operator,
    constants: Mapping[str, Array],
    dead: tuple[str, ...],
) -> Step:
    unknown = set(node.attributes) - operator.attributes
    if unknown:
        raise UnsupportedError(
            f"node {node.name or node.outputs[0]}: {node.op_type} has no attribute "
            f"{', '.join(sorted(unknown))} (version {operator.since} is supported)"
        )
    attributes = dict(node.attributes)
    if operator.wants_outputs:
        attributes["n_outputs"] = len(node.outputs)
    refs = graph.initializers
    return Step(
        node, operator, attributes,
        inputs=tuple((name, _form(operator, i)) for i, name in enumerate(node.inputs)),
        outputs=node.outputs,
        weights=tuple(refs[n] for n in node.inputs if n in refs and n not in constants),
        dead=dead,
    )  # fmt: skip


def _form(operator: Operator, i: int) -> Form:
    if i in operator.packs:
        return Form.TILES
    return Form.NATIVE if i in operator.native else Form.ARRAY


def _kernels(step: Step, graph: Graph, packed: Container[str], precision: str) -> list[str]:
    """The kernels a step may call: what its operator uses, for its weights' encodings."""
    names = []
    to_pack = {graph.initializers[name].key for name, _ in step.inputs if name in packed}
    panels = to_pack | {ref.key for ref in step.weights if ref.panel}
    for use in step.operator.uses:
        template = use.replace("{precision}", precision)
        if "{" not in template:
            names.append(template)
            continue
        for ref in step.weights:
            encoding = ref.dtype if ref.encoding == "raw" else ref.encoding
            if encoding == ref.dtype and template == "decode_{encoding}":
                continue  # plain elements are read as they are
            by_rows = ref.transposed != bool(step.attributes.get("transB"))
            order = "panels" if ref.key in panels else "rows" if by_rows else "columns"
            if ref.parts and order != "panels":
                encoding, order = "float32", "columns"  # decoded
            names.append(template.format(encoding=encoding, order=order))
        if panels:
            for ref in step.weights:
                names += pack_kernels(ref) if ref.key in to_pack else ()
                if precision == "fast":  # a few rows are as exact as one
                    names += [f"gemm_exact_panels_{ref.encoding}", "quantize_bytes"]
            names.append("quantize_rows")
        if not step.weights:  # arrays are float32 in the order they come in
            names.append(template.format(encoding="float32", order="columns"))
    decoded = [graph.initializers[n] for n, native in step.inputs if not native
               and n in graph.initializers]  # fmt: skip
    names += [f"decode_{ref.encoding}" for ref in decoded if ref.encoding not in ("raw", ref.dtype)]
    return names


def pack_kernels(ref: WeightRef) -> tuple[str, ...]:
    """What packs a weight: one in parts has its integers in either order, and other parts."""
    if not ref.parts:
        return (f"pack_{ref.encoding}",)
    order = "rows" if ref.transposed else "columns"
    return f"pack_{ref.encoding}_{order}", "pack_affine_heads", "pack_affine_values"


def describe(plan: Plan) -> str:
    """The plan as text: a line a step, with the encodings of its weights and what it frees."""
    width = max((len(s.node.op_type) for s in plan.steps), default=8)
    lines = []
    for i, step in enumerate(plan.steps):
        refs = plan.graph.initializers
        inputs = ", ".join(
            f"{n}:{refs[n].encoding}{list(refs[n].shape)}" if n in refs else n or "-"
            for n, _ in step.inputs
        )
        outputs = ", ".join(step.outputs)
        lines.append(f"{i:5d}  {step.node.op_type:<{width}}  {inputs} -> {outputs}")
    return "\n".join(lines)
