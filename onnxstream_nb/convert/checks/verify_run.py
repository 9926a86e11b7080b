"""Whether a model computes: a few tokens or a sample, finite, the same twice, with its cache.

Dims: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ... import passes
from ...errors import ShapeError, UnsupportedError, UsageError
from ...graph import Graph, Value
from ...llm import LanguageModel
from ...progress import Report
from ...session import Session, decode_constant
from ...weight import numpy_dtype
from .finding import Finding, Findings, failed, ok, skipped
from .verify_tokenizer import rows, some_ids

Array = np.ndarray[Any, Any]

TOKENS = 9  # more than are read as a few single ones would be
FAR = 0.05  # of the logits' deviation: float16 in the cache, another order of sums
FAR_QUANTISED = 0.5  # where activations are quantised by what else is in the pass
_WEIGHTS = "the weights are damaged or belong to another graph: fetch or export the model again"


def forward(
    graph: Graph, path: Path, holding: Mapping[str, Any], sizes: Mapping[str, int], report: Report
) -> Findings:
    """Run the model: as a language model where it has a cache, else on a sample of its inputs.

    `holding` are `load`, `ram` and `threads` as for Session; `sizes` are the inputs' open sizes by
    name, that of "" for all others (1 without it).
    """
    optimized = passes.optimize(graph, decode_constant)
    try:
        if passes.find_cache(optimized):
            yield from _language(graph, path, holding, report)
            return
        yield from _sample(optimized, holding, sizes, report)
        yield skipped("cache", "the graph has no past/present inputs and outputs")
    except UnsupportedError as error:  # that says nothing of the model's files
        yield skipped("forward", f"it cannot be computed here: {error}")


def _language(graph: Graph, path: Path, holding: Mapping[str, Any], report: Report) -> Findings:
    own = int(graph.metadata.get("context_length") or 4 * TOKENS)
    count = min(TOKENS, own)
    llm = LanguageModel(
        graph, context=min(own, 4 * TOKENS), precision="exact", progress=report, **holding
    )
    with closing(llm):
        known = min(rows(graph).values(), default=llm.vocab_size)
        ids = some_ids(path, known, count)
        report("reading a few tokens", None)
        once = _at_once(llm, ids)
        if not np.isfinite(once).all():
            row, column = (int(i) for i in np.argwhere(~np.isfinite(once))[0])
            detail = f"the logit of id {column} after token {row} is {once[row, column]}"
            yield failed("forward", detail, tensor=llm.graph.outputs[0].name, remedy=_WEIGHTS)
            yield skipped("cache", "the logits are no finite numbers")
            return
        report("reading them once more", None)
        yield _told_twice(
            np.array_equal(once, _at_once(llm, ids)),
            f"logits ({count}, {once.shape[-1]}) after {count} tokens are finite",
        )
        report("reading them one by one", None)
        yield from _one_by_one(llm, ids, once)


def _at_once(llm: LanguageModel, ids: Any) -> Array:
    """Logits (T, V) of an empty cache, or (1, V) where the graph has the last ones only."""
    llm.rewind(0)
    return np.array(llm.logits(ids) if llm.every_position else llm.feed(ids)[None])


def _told_twice(same: bool, detail: str) -> Finding:
    if same:
        return ok("forward", f"{detail}, and the same twice")
    remedy = "report it: the engine must compute the same from the same"
    return failed("forward", f"{detail}, but not the same in a second run", remedy=remedy)


def _one_by_one(llm: LanguageModel, ids: Any, once: Array) -> Findings:
    """Whether the cache is appended to as the graph means it."""
    llm.rewind(0)
    steps = np.stack([llm.feed([token]) for token in ids])[-len(once) :]
    quantised = any(node.op_type == "DynamicQuantizeLinear" for node in llm.graph.nodes)
    far = math.sqrt(float(np.mean((steps - once) ** 2))) / max(float(once.std()), 1e-30)
    detail = f"one by one, logits differ by {far:.2g} of their deviation from those at once"
    if far <= (FAR_QUANTISED if quantised else FAR):
        yield ok("cache", detail)
    else:
        remedy = "the graph does not append to its cache as it reads it: export it again"
        yield failed("cache", detail, remedy=remedy)


def _sample(
    graph: Graph, holding: Mapping[str, Any], sizes: Mapping[str, int], report: Report
) -> Findings:
    unknown = sizes.keys() - {""} - {d for v in graph.inputs for d in v.shape or ()}
    if unknown:
        raise UsageError(
            f"--size {sorted(unknown)[0]}: the inputs have no open size of that name; they are "
            + "; ".join(f"{v.name} {v.shape}" for v in graph.inputs)
        )
    feeds = {value.name: sample(value, sizes) for value in graph.inputs}
    with Session(graph, optimize=False, progress=report, **holding) as session:
        report("running the model on a sample", None)
        given = ", ".join(f"{name} {list(feed.shape)}" for name, feed in feeds.items())
        try:
            results = session.run(feeds)
        except ShapeError as error:
            yield failed("forward", f"of {given}: {error}", remedy=_wrong_size(graph, sizes))
            return
        for name, result in results.items():
            if _has_odd(result):
                detail = f"of {given} it computes numbers that are not finite"
                yield failed("forward", detail, tensor=name, remedy=_WEIGHTS)
                return
        detail = f"{len(results)} finite output{'s' * (len(results) != 1)} of {given}"
        report("running it once more", None)
        again = session.run(feeds)
        yield _told_twice(all(_same(results[name], again[name]) for name in results), detail)


def _wrong_size(graph: Graph, sizes: Mapping[str, int]) -> str:
    """What to do about a sample that does not fit: its open sizes may have been too small."""
    names = {d or "" for v in graph.inputs for d in v.shape or () if not isinstance(d, int)}
    if "" in sizes or names <= sizes.keys():
        return _WEIGHTS
    return "open sizes were taken to be 1; give one that the model is made for, as in --size 64"


def sample(value: Value, sizes: Mapping[str, int]) -> Array:
    """Elements for an input: reproducible numbers from 0 to 1, integers of 1, true. Its open sizes
    are those of `sizes`."""
    shape, dtype = open_shape(value, sizes), numpy_dtype(value.dtype)
    if dtype.kind in "iub":
        return np.ones(shape, dtype)
    return np.random.default_rng(math.prod(shape)).random(shape).astype(dtype)


def open_shape(value: Value, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an input, its open sizes by name in `sizes`, else what "" has there, else 1."""
    rest = sizes.get("", 1)
    return tuple(d if isinstance(d, int) else sizes.get(d or "", rest) for d in value.shape or ())


def _has_odd(result: Any) -> bool:
    array = np.asarray(result)
    if array.dtype.kind not in "fcV":
        return False
    return not np.isfinite(array.astype(np.complex128 if array.dtype.kind == "c" else float)).all()


def _same(one: Any, other: Any) -> bool:
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))
