"""Whether a tokenizer belongs to a model: its ids have rows in the table and among the logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import ModelError
from ...graph import Graph
from ...tokenizer import Tokenizer
from .finding import Findings, failed, ok, skipped

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  Two spaces,\n\ta tab; 12345 + 67890 = 80235?",
    "naïve café, Привет, 日本語, 🎉",
)
"""What is turned into ids and back."""

IDS = "input_ids"
BELONGS = "put the tokenizer beside it that belongs to the model"


def rows(graph: Graph) -> dict[str, int]:
    """How many ids the model knows: by the name of a table that ids pick rows of, by `logits`,
    and by what the format says."""
    found = {
        node.inputs[0]: graph.initializers[node.inputs[0]].shape[node.attributes.get("axis", 0)]
        for node in graph.nodes
        if node.op_type == "Gather" and node.inputs[1] == IDS
        if node.inputs[0] in graph.initializers and graph.initializers[node.inputs[0]].shape
    }
    last = next((v.shape[-1] for v in graph.outputs if v.name == "logits" and v.shape), None)
    if isinstance(last, int):
        found["logits"] = last
    declared = graph.metadata.get("vocab_size")
    if isinstance(declared, int) and declared > 0:
        found["the model's vocab_size"] = declared
    return found


def found_tokenizer(path: Path) -> Tokenizer | str:
    """The model's tokenizer, or why there is none. Raises ModelError when it is damaged."""
    from ...tokenizer import load_tokenizer

    try:
        return load_tokenizer(path)
    except ModelError as error:
        if str(error).startswith("no tokenizer in "):
            return str(error)
        raise


def tokenizer(graph: Graph, path: Path) -> Findings:
    """Vocabulary against the model's rows, the ids that begin and end texts, some texts."""
    if not any(value.name == IDS for value in graph.inputs):
        yield skipped("tokenizer", f"the graph has no input {IDS}: it is no language model")
        return
    found = found_tokenizer(path)
    if isinstance(found, str):
        yield skipped("tokenizer", found)
        return
    known = rows(graph)
    name, size = min(known.items(), key=lambda item: item[1], default=("", 0))
    if not known:
        yield skipped("tokenizer", "the graph does not say how many ids it knows")
    problems = list(_outside(found, size, name)) if known else []
    problems += _lost(found)
    for problem in problems:
        yield failed("tokenizer", problem, tensor=name, remedy=BELONGS)
    if known and not problems:
        ends = ", ".join(map(str, sorted(found.eos_ids))) or "no id"
        notes = "".join(f"; {note}" for note in _notes(found, size))
        yield ok(
            "tokenizer",
            f"{found.vocab_size} ids, {size} rows of {name}; a reply ends with {ends}{notes}",
        )


def _outside(tokenizer: Tokenizer, size: int, name: str) -> Iterator[str]:
    """Ids that have no row, and are used: ordinary ones, and those that begin and end texts."""
    ids = range(size, tokenizer.vocab_size)
    ordinary = next((i for i in ids if i not in tokenizer.special_ids), None)
    if ordinary is not None:
        yield (
            f"it has {tokenizer.vocab_size} ids, and {name} {size} rows: none for {ordinary} "
            f"({tokenizer.token_text(ordinary)!r})"
        )
    named = [("EOS", i) for i in sorted(tokenizer.eos_ids)]
    for kind, token in [("BOS", tokenizer.bos_id), *named]:
        if token is not None and not 0 <= token < size:
            yield f"its {kind} is {token}, and {name} has {size} rows"


def _notes(tokenizer: Tokenizer, size: int) -> Iterator[str]:
    """What is odd and does no harm."""
    unknown = sorted(i for i in tokenizer.special_ids if i >= size)
    if unknown:
        text = tokenizer.token_text(unknown[0])
        yield f"{text!r} ({unknown[0]}) has no row, and must not occur"
    changed = [text for text in TEXTS if tokenizer.decode(tokenizer.encode(text)) != text]
    if changed:
        yield f"{changed[0]!r} is normalised to {_again(tokenizer, changed[0])!r}"


def _lost(tokenizer: Tokenizer) -> list[str]:
    """Texts that come back as others, and these again as others: no normal form either."""
    lost = []
    for text in TEXTS:
        once = _again(tokenizer, text)
        if once != text and (not once.strip() or _again(tokenizer, once) != once):
            lost.append(f"{text!r} comes back as {once!r}")
    return lost


def _again(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text))


def some_ids(path: Path, size: int, count: int) -> Sequence[int]:
    """Ids to feed: of a text where there is a tokenizer that fits, else any below `size`."""
    found = found_tokenizer(path)
    ids = [] if isinstance(found, str) else found.encode(TEXTS[0])[:count]
    if len(ids) == count and all(0 <= i < size for i in ids):
        return ids
    return [(7 * i + 3) % max(1, size) for i in range(count)]
