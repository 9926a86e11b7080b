"""Language models on a GPU: speed beside the bound that its memory sets, and the ids they give."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxstream_nb.graph import Graph
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.synthetic import random_model
from onnxstream_nb.tokenizer import load_tokenizer

TINY_MODEL = {
    "vocab": 40, "hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 32,
    "rope_theta": 1e4, "context": 64, "norm_epsilon": 1e-5, "tied_embeddings": False,
}  # fmt: skip
SHORT = 16  # tokens before those that are timed
QUARTERS = (0, 1, 2, 3)  # budgets of the curve, but for all
PROMPT = "The capital of France is"


def cases(
    name: str, geometry: Mapping[str, Any], folder: Path, ceiling: float, given: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Tokens a second with nothing, some and all of the model on the GPU; at all of it also at a
    depth, and how long prompts take."""
    with random_model(name, geometry, given.dtype, folder) as graph:
        whole = sum({ref.key: ref.nbytes for ref in graph.initializers.values()}.values())
        budgets: list[int | str] = [whole * quarter // 4 for quarter in QUARTERS]
        for budget in [0, "all"] if given.dry_run else [*budgets, "all"]:
            llm = LanguageModel(graph, device="cuda", cuda=budget, context=context(given))
            about = {"model": name, "budget": budget, "of": whole}
            for depth in depths(given) if budget == "all" else [given.short]:
                found = decoding(llm, geometry, depth, ceiling, given)
                yield {"kind": "decode", **about, "gpu_bytes": llm.gpu_bytes, **found}
            if budget == "all":
                for tokens in given.prompt:
                    found = reading(llm, geometry, tokens, given.runs)
                    yield {"kind": "prefill", **about, "gpu_bytes": llm.gpu_bytes, **found}
            llm.close()


def context(given: argparse.Namespace) -> int:
    """How many tokens there has to be room for."""
    return max(given.depth + given.gen, *given.prompt)


def depths(given: argparse.Namespace) -> list[int]:
    """Tokens before those that are timed: few, and as many as were asked for."""
    return sorted({given.short, given.depth})


def decoding(
    llm: LanguageModel, geometry: Mapping[str, Any], depth: int, ceiling: float,
    given: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Speeds of tokens one after the other, behind a context of `depth`; what the memory's
    bandwidth allows, reading each weight once, and keys and values as there are on average."""
    ids = random_ids(geometry, depth + given.gen)
    llm.rewind(0)
    llm.feed(ids[:depth])
    speeds = []
    for _ in range(given.runs + 1):  # the first is recorded, and not counted
        llm.rewind(depth)
        started = time.perf_counter()
        for token in ids[depth:]:
            np.asarray(llm.feed([token]))
        speeds.append(given.gen / (time.perf_counter() - started))
    g, speed = geometry, statistics.median(speeds[1:])
    cache = 2 * 2 * g["layers"] * g["kv_heads"] * g["head_dim"] * (depth + given.gen // 2)
    bound = ceiling / (llm.bytes_per_token + cache)
    return {
        "depth": depth, "tokens_per_s": speed, "samples": speeds[1:],
        "weight_bytes": llm.bytes_per_token, "cache_bytes": cache,
        "bound_tokens_per_s": bound, "share": speed / bound,
    }  # fmt: skip


def reading(
    llm: LanguageModel, geometry: Mapping[str, Any], tokens: int, runs: int
) -> dict[str, Any]:
    """Speeds of reading a prompt, and the operations of its products with matrices (attention
    not counted)."""
    ids, times = random_ids(geometry, tokens), []
    for _ in range(runs + 1):
        llm.rewind(0)
        started = time.perf_counter()
        np.asarray(llm.feed(ids))
        times.append(time.perf_counter() - started)
    took = statistics.median(times[1:])
    operations = operations_a_token(geometry)
    return {
        "prompt": tokens, "tokens_per_s": tokens / took, "seconds": times[1:],
        "operations_per_token": operations, "tflops": tokens * operations / took / 1e12,
    }  # fmt: skip


def operations_a_token(geometry: Mapping[str, Any]) -> int:
    """Multiplications and additions of a prompt's token in all matrices but the head."""
    g = geometry
    heads = g["head_dim"] * (2 * g["heads"] + 2 * g["kv_heads"])
    return int(2 * g["layers"] * g["hidden"] * (heads + 3 * g["ffn"]))


def random_ids(geometry: Mapping[str, Any], count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(0).integers(3, geometry["vocab"], count)]


def greedy(
    model: Path | Graph, prompt: Sequence[int], count: int, **options: Any
) -> tuple[list[int], int]:
    """The likeliest continuation of a prompt, and the bytes of weights on the GPU at its end."""
    llm = LanguageModel(model, precision="exact", context=len(prompt) + count, **options)
    logits, found = llm.feed(prompt), []
    for _ in range(count):
        found.append(int(np.argmax(logits)))
        logits = llm.feed(found[-1:])
    there = llm.gpu_bytes
    llm.close()
    return found, there


def compared(model: Path | Graph, name: str, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """A model's greedy ids with all of it on the GPU, beside the CPU's; those of a GPU that was
    given up are none."""
    wanted, _ = greedy(model, prompt, count)
    found, there = greedy(model, prompt, count, device="cuda", cuda="all")
    pairs = enumerate(zip(found, wanted, strict=True))
    first = next((i for i, (a, b) in pairs if a != b), None)
    return {
        "model": name, "tokens": count, "right": first is None and there > 0,
        "first_difference": first, "gpu_bytes": there, "ids": found,
    }  # fmt: skip


def same_ids(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The comparison for the file that was given; in a dry run for a tiny model."""
    if given.dry_run:
        with random_model("tiny", TINY_MODEL, "f16", folder) as graph:
            return [compared(graph, "tiny", [3, 9], 2)]
    if given.model is None:
        return []
    prompt = load_tokenizer(given.model).encode(PROMPT)
    return [compared(given.model, given.model.name, prompt, given.gen)]
