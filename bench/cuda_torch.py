"""PyTorch on the same GPU (peers/torch_cuda.py): copies, products, and models of one geometry."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cuda_models import TINY_MODEL, context, depths
from cuda_trials import PRODUCTS
from harness import Peer, PeerError

COPIED = 1 << 30  # bytes


def found(
    models: Mapping[str, Mapping[str, Any]], folder: Path, given: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Everything; where it cannot, the error takes the place of what was to be measured."""
    yield from _one("", TINY_MODEL, [], folder, given)
    for name, geometry in models.items():
        for how in [[]] if given.dry_run else [[], ["--compile"]]:
            yield from _one(name, geometry, how, folder, given)


def beside(found: dict[str, Any]) -> None:
    """Say of our speeds which part of PyTorch's they are: the better of its models', and of prompts
    and products that of its own products, the best of them where there is none of these sizes."""
    products = {tuple(c["sizes"]): c["tflops"] for c in found["torch"] if c["kind"] == "product"}
    best = max(products.values(), default=None)
    for case in found["kernels"]:
        if case["kernel"].startswith("gemm") and best:
            case["of_torch"] = case["tflops"] / products.get(tuple(case["sizes"][1:]), best)
    for case in found["models"]:
        if case["kind"] == "prefill" and best:
            case["of_torch_product"] = case["tflops"] / best
        theirs = [
            c["tokens_per_s"] for c in found["torch"]
            if all(c.get(key) == case.get(key) for key in ("kind", "model", "depth", "prompt"))
        ]  # fmt: skip
        if theirs:
            case["of_torch"] = case["tokens_per_s"] / max(theirs)


def _one(
    name: str, geometry: Mapping[str, Any], how: list[str], folder: Path, given: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """What a process of its own finds, with a model or, without a name, of the GPU itself."""
    about = {"model": name, "compiled": bool(how)}
    path = folder / "geometry.json"
    path.write_text(json.dumps(dict(geometry)))
    line = [str(path), "--context", str(context(given)), *how]
    device = "cpu" if given.dry_run else "cuda"
    try:
        with Peer("torch_cuda.py", *line, "--device", device, threads=1) as peer:
            about |= {"version": peer.facts["version"], "settings": peer.facts["settings"]}
            measured = _model(peer, given) if name else _device(peer, given)
            yield from ({**about, **each} for each in measured)
    except PeerError as error:
        yield {**about, "kind": "error", "error": str(error)}


def _device(peer: Peer, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    nbytes = 1 << 10 if given.dry_run else COPIED
    took = peer.ask("copy", nbytes=nbytes)["seconds"]
    yield {"kind": "copy", "bytes_per_s": 2 * nbytes / took}
    for m, n, k in [(3, 5, 40)] if given.dry_run else [sizes[2:] for sizes in PRODUCTS]:
        took = peer.ask("product", m=m, n=n, k=k)["seconds"]
        yield {"kind": "product", "sizes": [m, n, k], "tflops": 2 * m * n * k / took / 1e12}


def _model(peer: Peer, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for depth in depths(given):
        speed = _speed(peer, given.gen, given.runs, do="decode", depth=depth)
        yield {"kind": "decode", "depth": depth, "tokens_per_s": speed}
    for tokens in given.prompt:
        speed = _speed(peer, tokens, given.runs, do="prefill")
        yield {"kind": "prefill", "prompt": tokens, "tokens_per_s": speed}


def _speed(peer: Peer, tokens: int, runs: int, **request: Any) -> float:
    """The median of all runs but the first."""
    took = [peer.ask(tokens=tokens, **request)["seconds"] for _ in range(runs + 1)]
    return tokens / statistics.median(took[1:])
