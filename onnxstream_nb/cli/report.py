"""What is known about a model, as text or JSON: the verbs inspect and show."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import device
from ..device import format_size
from ..errors import ModelError, UsageError
from ..graph import Graph, Value
from ..progress import of_download
from .activations import activation_facts, alive_rows, line, prepared

if TYPE_CHECKING:
    from ..hub import Installed

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class OperatorCount:
    """How often a graph uses one operator, and whether this installation can run it."""

    operator: str
    count: int
    supported: bool


@dataclass(frozen=True, slots=True)
class EncodingTotal:
    """The weights of one storage encoding; tied weights are counted once."""

    encoding: str
    tensors: int
    parameters: int
    size_bytes: int


def inspect(options: Mapping[str, Any]) -> int:
    """Print a model's operators, weights and memory, or with --plan what will run."""
    from .. import hub, ui
    from ..formats import load

    with ui.progress() as progress:
        found = hub.resolve(options["model"], progress=of_download(progress))
        if options["plan"]:
            print(plan_text(found.path, options["tokens"]))
            return 0
        facts = graph_facts(load(found.path), options["context"])
        if not options["ops"]:
            facts["activations"] = activation_facts(prepared(found.path), options["tokens"])
    if options["json"]:
        print(json.dumps({"model": found.name, "path": str(found.path)} | facts, default=str))
        return 0
    if not options["ops"]:
        print(f"model      {found.name}\npath       {found.path}\n{overview_text(facts)}\n")
    print(operators_text(facts["operators"]))
    return 0


def plan_text(path: Path, tokens: int) -> str:
    """What the executor will run, in order, and what is alive where that takes most memory."""
    from ..plan import describe, make_plan
    from ..session import decode_constant

    graph = prepared(path)
    plan = describe(make_plan(graph, decode_constant))
    facts = activation_facts(graph, tokens)
    alive = columns(alive_rows(facts), ("alive", "type", "shape", "size", "steps"))
    return f"{plan}\n\nactivations {line(facts)}\n\n{alive}"


def graph_facts(graph: Graph, context: int | None = None) -> Facts:
    """Operators, weights by encoding, inputs, outputs, and memory for `context` tokens (default:
    the model's own), as JSON's types."""
    from ..kvcache import bytes_per_position
    from ..passes import find_cache

    encodings = encoding_totals(graph)
    weights = sum(e.size_bytes for e in encodings)
    tokens = context or int(graph.metadata.get("context_length") or 0)
    cache = bytes_per_position(graph, find_cache(graph)) * tokens
    return {
        "opset": dict(graph.opset),
        "nodes": sum(1 for _ in all_nodes(graph)),
        "inputs": [_signature(v) for v in graph.inputs],
        "outputs": [_signature(v) for v in graph.outputs],
        "operators": [_as_dict(o) for o in operator_counts(graph)],
        "encodings": [_as_dict(e) for e in encodings],
        "parameters": sum(e.parameters for e in encodings),
        "weights_bytes": weights,
        "context": tokens,
        "cache_bytes": cache,
        "memory_bytes": weights + cache,
        "memory_available_bytes": device.memory_available(),
        "metadata": dict(graph.metadata),
    }


def all_nodes(graph: Graph) -> Iterator[tuple[str, str]]:
    """(domain, op_type) of every node, also of those in bodies of If, Loop and Scan."""
    for node in graph.nodes:
        yield node.domain, node.op_type
        for value in node.attributes.values():
            for body in value if isinstance(value, tuple) else (value,):
                if isinstance(body, Graph):
                    yield from all_nodes(body)


def operator_counts(graph: Graph) -> list[OperatorCount]:
    """Every operator of the graph, the most frequent first."""
    from ..registry import lookup

    counts = Counter(all_nodes(graph)).most_common()
    return [
        OperatorCount(
            f"{domain}.{op_type}" if domain else op_type,
            count,
            lookup(op_type, domain, graph.opset.get(domain, 1)) is not None,
        )
        for (domain, op_type), count in counts
    ]


def encoding_totals(graph: Graph) -> list[EncodingTotal]:
    """Stored size of the weights by encoding, the largest first; tied weights count once."""
    from ..passes import with_quantised_weights

    refs = with_quantised_weights(graph).initializers.values()
    totals: dict[str, list[int]] = {}
    for ref in {ref.key: ref for ref in refs}.values():
        name = ref.dtype if ref.encoding == "raw" else ref.encoding
        total = totals.setdefault(name, [0, 0, 0])
        for i, amount in enumerate((1, math.prod(ref.shape), ref.nbytes)):
            total[i] += amount
    result = [EncodingTotal(name, *total) for name, total in totals.items()]
    return sorted(result, key=lambda e: -e.size_bytes)


def overview_text(facts: Facts) -> str:
    """Everything of `graph_facts` but the operators, as text."""
    opset = ", ".join(f"{domain or 'ai.onnx'} {n}" for domain, n in facts["opset"].items())
    need, free = facts["memory_bytes"], facts["memory_available_bytes"]
    cache = f" + cache {format_size(facts['cache_bytes'])} for {facts['context']} tokens"
    fits = "fits" if need <= free else "does not fit: weights will be streamed"
    lines = [
        f"opset      {opset}",
        f"nodes      {facts['nodes']}",
        f"parameters {facts['parameters'] / 1e6:.2f} million",
        f"memory     {format_size(need)}: weights {format_size(facts['weights_bytes'])}"
        f"{cache if facts['cache_bytes'] else ''}; {format_size(free)} free ({fits})",
        *([f"activations {line(facts['activations'])}"] if "activations" in facts else []),
        "",
        *signature_lines("inputs", facts["inputs"]),
        *signature_lines("outputs", facts["outputs"]),
        "",
        columns(
            [
                (e["encoding"], str(e["tensors"]), format_size(e["size_bytes"]))
                for e in facts["encodings"]
            ],
            ("weights", "tensors", "size"),
        ),
    ]
    return "\n".join(lines)


def signature_lines(title: str, values: Sequence[Facts], most: int = 6) -> list[str]:
    """One line per input or output, the first `most` of them."""
    lines = [f"{v['name']}  {v['dtype']} {_dims(v['shape'])}" for v in values[:most]]
    if len(values) > most:
        lines.append(f"and {len(values) - most} more")
    return [f"{title if i == 0 else '':<11}{line}" for i, line in enumerate(lines)]


def _dims(shape: Sequence[int | str] | None) -> str:
    return "of any shape" if shape is None else f"({', '.join(map(str, shape))})"


def operators_text(operators: Sequence[Facts]) -> str:
    """The table of operators, and a line on what is missing."""
    rows = [(o["operator"], str(o["count"]), "yes" if o["supported"] else "NO") for o in operators]
    missing = [o["operator"] for o in operators if not o["supported"]]
    verdict = f"not supported: {', '.join(missing)}" if missing else "all operators are supported"
    return columns(rows, ("operator", "count", "supported")) + f"\n\n{verdict}"


def show(options: Mapping[str, Any]) -> int:
    """Print what is known about a model, without downloading it."""
    facts = model_facts(options["model"])
    if options["json"]:
        print(json.dumps(facts, ensure_ascii=False, default=str))
        return 0
    template = facts.pop("chat_template", None)
    if template is not None:
        facts["chat_template"] = (
            f"{len(template)} characters; --json prints it" if template else "none"
        )
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        print(f"{name.replace('_', ' '):<18}{text}")
    return 0


def model_facts(name: str) -> Facts:
    """The catalogue's entry, and what the files say when they are here."""
    from .. import hub

    entry = hub.CATALOGUE.get(name)
    copy = next((m for m in hub.installed() if m.name == name), None)
    path = Path(name) if Path(name).exists() else copy.path if copy and copy.complete else None
    if entry is None and copy is None and path is None:
        raise UsageError(
            f"{name!r} is no path, no catalogue name and not installed; `onnxstream_nb list` shows"
            " what there is, and `onnxstream_nb pull` fetches a hub repository"
        )
    facts: Facts = {"name": name}
    if entry is not None:
        facts |= {"description": entry.description, "source": entry.source}
    facts["installed"] = _installed_text(name, copy, path)
    if path is not None:
        facts |= file_facts(path)
    elif entry is not None:
        facts["download"] = format_size(entry.size_bytes)
    return facts


def _installed_text(name: str, copy: Installed | None, path: Path | None) -> str:
    if path is not None:
        return str(path)
    return f"{'in part' if copy else 'no'}; get it with: onnxstream_nb pull {name}"


def file_facts(path: Path) -> Facts:
    """Architecture, context, size, quantisation and chat template of the model at `path`."""
    from ..formats import load

    graph = load(path)
    encodings = encoding_totals(graph)
    facts: Facts = {
        "architecture": graph.metadata.get("architecture", "unknown"),
        "parameters": f"{sum(e.parameters for e in encodings) / 1e6:.2f} million",
        "context": graph.metadata.get("context_length", "unknown"),
        "size": format_size(sum(e.size_bytes for e in encodings)),
        "quantisation": [f"{e.encoding} {format_size(e.size_bytes)}" for e in encodings],
    }
    return facts | tokenizer_facts(path)


def tokenizer_facts(path: Path) -> Facts:
    """The vocabulary's size and the chat template; a model without a tokenizer says so."""
    from ..tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(path)
    except ModelError as error:
        return {"tokenizer": f"none ({error})"}
    return {
        "vocabulary": tokenizer.vocab_size,
        "chat_template": tokenizer.chat_template or "none",
    }


def columns(rows: Sequence[Sequence[str]], titles: Sequence[str]) -> str:
    """Left-aligned columns under titles, two spaces apart and never wrapped, so that grep works."""
    from ..ui.text import clean

    cells = [titles, *([clean(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _signature(value: Value) -> Facts:
    shape = None if value.shape is None else ["?" if d is None else d for d in value.shape]
    return {"name": value.name, "dtype": value.dtype, "shape": shape}


def _as_dict(item: OperatorCount | EncodingTotal) -> Facts:
    return {name: getattr(item, name) for name in item.__slots__}
