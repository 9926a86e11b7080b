"""A catalogue model's geometry filled with random weights, to measure speed without a download.

The weights are one block of plausible values, drawn once and repeated through one temporary file,
so that every byte of a real model's size is really read.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .device import disk_free, format_size
from .errors import UsageError
from .graph import ENCODINGS, Encoding, Graph, WeightRef

if TYPE_CHECKING:
    import numpy as np

    from .formats.decoder_config import DecoderConfig

DTYPES: Mapping[str, str] = {"f16": "float16", "q8_0": "q8_0", "q4_0": "q4_0"}
"""What --dtype calls an encoding -> its name in ENCODINGS."""

DEVIATION = 0.02
"""Standard deviation of the weights: that of a freshly initialised model, so nothing overflows."""

TILE_BYTES = 16 << 20
ALIGNMENT = 64


@contextmanager
def random_model(
    name: str, geometry: Mapping[str, Any], dtype: str, folder: Path
) -> Iterator[Graph]:
    """The graph of `geometry` with random weights of storage `dtype` (a key of DTYPES).

    `geometry` is a catalogue entry's. The weights lie in a temporary file in `folder`, which is
    deleted when the block ends. Raises UsageError when the disk is too full.
    """
    encoding = ENCODINGS[DTYPES[dtype]]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="random-", dir=folder) as place:
        path = Path(place) / f"{name}-{dtype}.bin"
        graph, nbytes = random_graph(llama_config(geometry, path, name), encoding, path)
        free = disk_free(folder)
        if nbytes > free:
            raise UsageError(
                f"--random-weights: {name} in {dtype} takes {format_size(nbytes)} and {folder} has"
                f" {format_size(free)} free; free some space or choose a smaller --dtype"
            )
        fill(path, nbytes, tile(encoding))
        yield graph


def llama_config(geometry: Mapping[str, Any], path: Path, name: str) -> DecoderConfig:
    """The builder's configuration for a catalogue geometry."""
    from .formats.architectures import GGUF_ARCHITECTURES
    from .formats.decoder_config import DecoderConfig, Layer
    from .formats.rope import rotary

    head_dim, context = geometry["head_dim"], geometry["context"]
    rotation = rotary({"rope_theta": geometry["rope_theta"]}, head_dim, context, name)
    return DecoderConfig(
        path=path,
        architecture="llama",
        kind=GGUF_ARCHITECTURES["llama"],
        vocab_size=geometry["vocab"],
        hidden_size=geometry["hidden"],
        intermediate_size=geometry["ffn"],
        heads=geometry["heads"],
        kv_heads=geometry["kv_heads"],
        head_dim=head_dim,
        context_length=context,
        epsilon=geometry["norm_epsilon"],
        layers=(Layer(rotation),) * geometry["layers"],
        tied=geometry["tied_embeddings"],
        name=f"{name} (random weights)",
    )


def random_graph(config: DecoderConfig, encoding: Encoding, path: Path) -> tuple[Graph, int]:
    """The graph of `config` whose matrices lie one after the other in `path`, and that file's
    size. Norm weights are ones, in memory, as float32: as files of quantised models keep them."""
    from .formats.decoder import build

    shape_of = _shapes(config)
    end = 0

    def weight(name: str) -> WeightRef:
        nonlocal end
        shape = shape_of(name)
        if len(shape) == 1:
            ones = b"\0\0\x80\x3f" * shape[0]
            return WeightRef(name, shape, "float32", ones, nbytes=len(ones))
        offset, nbytes = end, math.prod(shape) // encoding.block * encoding.nbytes
        end += -(-nbytes // _step(encoding)) * _step(encoding)
        return WeightRef(name, shape, "float32", path, offset, nbytes, encoding.name)

    return build(config, weight), end


def _shapes(c: DecoderConfig) -> Callable[[str], tuple[int, ...]]:
    """Name of a tensor, as Hugging Face gives it -> its stored shape (N, K), or (D,)."""
    query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
    sizes = {
        "embed_tokens": (c.vocab_size, c.hidden_size), "lm_head": (c.vocab_size, c.hidden_size),
        "q_proj": (query, c.hidden_size), "k_proj": (key, c.hidden_size),
        "v_proj": (key, c.hidden_size), "o_proj": (c.hidden_size, query),
        "gate_proj": (c.intermediate_size, c.hidden_size),
        "up_proj": (c.intermediate_size, c.hidden_size),
        "down_proj": (c.hidden_size, c.intermediate_size),
    }  # fmt: skip
    return lambda name: sizes.get(name.split(".")[-2], (c.hidden_size,))


def _step(encoding: Encoding) -> int:
    """Tensors and tiles begin at multiples of this: whole blocks, and aligned for vectors."""
    return math.lcm(encoding.nbytes, ALIGNMENT)


def tile(encoding: Encoding, nbytes: int = TILE_BYTES) -> np.ndarray[Any, Any]:
    """About `nbytes` (whole blocks) of valid random weights ~ N(0, DEVIATION), as (n,) uint8."""
    import numpy as np

    generator = np.random.default_rng(0)
    blocks = nbytes // _step(encoding) * _step(encoding) // encoding.nbytes
    if encoding.name == "float16":
        values = generator.standard_normal(blocks, np.float32) * DEVIATION
        return values.astype(np.float16).view(np.uint8)
    data = generator.integers(0, 256, (blocks, encoding.nbytes), dtype=np.uint8)
    # A block is an fp16 scale and 32 integers, uniform over their range: 74 and 4.6 are their
    # standard deviations.
    spread = {"q8_0": 74.0, "q4_0": 4.6}[encoding.name]
    scales = generator.uniform(0.5, 1.5, (blocks, 1)) * DEVIATION / spread
    data[:, :2] = scales.astype(np.float16).view(np.uint8)
    return data.reshape(-1)


def fill(path: Path, nbytes: int, block: np.ndarray[Any, Any]) -> None:
    """Write `block` (n,) uint8 again and again until the file holds `nbytes`."""
    with path.open("wb") as file:
        while (left := nbytes - file.tell()) > 0:
            file.write(block[:left].data)
