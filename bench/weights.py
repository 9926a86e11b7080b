"""The models that benchmarks run: files there are, and geometries filled with random weights.

`NAME:DTYPE` is a catalogue model's geometry as a GGUF with random weights, written once and kept in
the cache folder, under bench/; `NAME@N:DTYPE` has N of its layers. Its tokenizer is the
default model's, cut to the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from harness import model_path

DEVIATION = 0.02  # of the weights: that of a freshly initialised model
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

FLOAT16_FIELDS: Mapping[str, Mapping[int, float]] = {
    "f16": {},
    "q8_0": {0: DEVIATION / 74},
    "q4_0": {0: DEVIATION / 4.6},
    "q4_1": {0: DEVIATION / 4.6, 2: -7.5 * DEVIATION / 4.6},
    "q4_k": {0: DEVIATION / 258, 2: 7.5 * DEVIATION / 258},
    "q5_k": {0: DEVIATION / 516, 2: 15.5 * DEVIATION / 516},
    "q6_k": {208: DEVIATION / 1369},
}
"""dtype -> where in a block the scales lie, and their size: the rest of a block is random bits,
whose deviation the divisors are."""

BLOCKS = {"f16": 8_000_009, "q8_0": 500_009, "q4_0": 900_001, "q4_1": 800_011, "q4_k": 110_017,
          "q5_k": 90_001, "q6_k": 80_021}  # fmt: skip
"""Blocks that are drawn, about 16 MB, and then repeated; odd, so that no two rows are the same."""


def locate(name: str) -> Path:
    """The file or folder of a model: a path, NAME:DTYPE, or a name that `pull` knows."""
    model, _, dtype = name.rpartition(":")
    if model and dtype in FLOAT16_FIELDS and not Path(name).exists():
        return random_gguf(model, dtype)
    return Path(name) if Path(name).exists() else Path(model_path(name))


def random_gguf(name: str, dtype: str) -> Path:
    """A GGUF of a catalogue model's geometry with random weights of storage `dtype`."""
    from onnxstream_nb.hub import cache_dir

    geometry = geometry_of(name)
    path = cache_dir() / "bench" / f"{name}-{dtype}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        write(unfinished, name, geometry, dtype)
        unfinished.replace(path)
    return path


def geometry_of(name: str) -> Mapping[str, Any]:
    """A catalogue model's geometry, from NAME or NAME@LAYERS."""
    from onnxstream_nb.hub import CATALOGUE

    base, _, layers = name.partition("@")
    entry = CATALOGUE.get(base)
    if entry is None or entry.geometry is None or (layers and not layers.isdigit()):
        raise SystemExit(f"{name}: no catalogue model whose geometry is known")
    return {**entry.geometry, **({"layers": int(layers)} if layers else {})}


def write(path: Path, name: str, geometry: Mapping[str, Any], dtype: str) -> None:
    """Write the file: norms are ones in float32, every matrix is of `dtype`."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"{name} {dtype} (random weights)")
    writer.add_vocab_size(geometry["vocab"])
    writer.add_context_length(geometry["context"])
    writer.add_embedding_length(geometry["hidden"])
    writer.add_block_count(geometry["layers"])
    writer.add_feed_forward_length(geometry["ffn"])
    writer.add_head_count(geometry["heads"])
    writer.add_head_count_kv(geometry["kv_heads"])
    writer.add_rope_dimension_count(geometry["head_dim"])
    writer.add_rope_freq_base(geometry["rope_theta"])
    writer.add_layer_norm_rms_eps(geometry["norm_epsilon"])
    writer.add_file_type(file_type(dtype))
    add_tokenizer(writer, geometry["vocab"])
    kind, block = quantisation(dtype), tile(dtype)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    tensors = shapes(geometry)
    for tensor, shape in tensors.items():
        plain = len(shape) == 1
        total = 4 * shape[0] if plain else shape[0] * shape[1] // size * nbytes
        stored = gguf.GGMLQuantizationType.F32 if plain else kind
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), total, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for i, shape in enumerate(tensors.values()):
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:  # each begins elsewhere: an engine may keep only one of two that are the same
            turned = np.roll(block, -7919 * i, axis=0)
            writer.write_tensor_data(np.resize(turned, shape[0] * shape[1] // size * nbytes))
    writer.close()


def quantisation(dtype: str) -> Any:
    """gguf's name of a dtype."""
    import gguf

    return gguf.GGMLQuantizationType[dtype.upper()]


def file_type(dtype: str) -> Any:
    """What a file mostly holds, for those who ask."""
    import gguf

    suffix = {"q4_k": "Q4_K_M", "q5_k": "Q5_K_M"}.get(dtype, dtype.upper())
    return gguf.LlamaFileType[f"MOSTLY_{suffix}"]


def shapes(geometry: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor -> its stored shape (N, K), or (D,)."""
    hidden, ffn, size = geometry["hidden"], geometry["ffn"], geometry["head_dim"]
    query, key = geometry["heads"] * size, geometry["kv_heads"] * size
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,), "attn_q": (query, hidden), "attn_k": (key, hidden),
        "attn_v": (key, hidden), "attn_output": (hidden, query), "ffn_norm": (hidden,),
        "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn),
    }  # fmt: skip
    result: dict[str, tuple[int, ...]] = {"token_embd.weight": (geometry["vocab"], hidden)}
    for i in range(geometry["layers"]):
        result |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    result["output_norm.weight"] = (hidden,)
    if not geometry["tied_embeddings"]:
        result["output.weight"] = (geometry["vocab"], hidden)
    return result


def tile(dtype: str) -> Bytes:
    """Valid random weights of about 16 MB, (blocks, bytes of one) uint8."""
    import gguf

    generator = np.random.default_rng(0)
    blocks, (_, nbytes) = BLOCKS[dtype], gguf.GGML_QUANT_SIZES[quantisation(dtype)]
    if dtype == "f16":
        values = generator.standard_normal(blocks, np.float32) * DEVIATION
        return values.astype(np.float16).view(np.uint8).reshape(blocks, nbytes)
    data = generator.integers(0, 256, (blocks, nbytes), dtype=np.uint8)
    factors = generator.uniform(0.5, 1.5, (blocks, 1))
    for offset, value in FLOAT16_FIELDS[dtype].items():
        data[:, offset : offset + 2] = (factors * value).astype(np.float16).view(np.uint8)
    return data


def add_tokenizer(writer: Any, vocabulary: int) -> None:
    """The default model's byte-pair tokenizer, cut to `vocabulary` tokens. They stand in the order
    in which they were merged, so the first of them are a tokenizer, too."""
    import gguf

    fields = gguf.GGUFReader(locate("smollm2-135m")).fields
    values = {k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")}
    tokens = values["tokenizer.ggml.tokens"][:vocabulary]
    if len(tokens) < vocabulary:
        raise SystemExit(f"the tokenizer has {len(tokens)} tokens, and {vocabulary} are needed")
    known = set(tokens)
    writer.add_tokenizer_model(values["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(values["tokenizer.ggml.pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(values["tokenizer.ggml.token_type"][:vocabulary])
    merges = values["tokenizer.ggml.merges"]
    writer.add_token_merges([m for m in merges if m.replace(" ", "") in known])
    writer.add_bos_token_id(values["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(values["tokenizer.ggml.eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(values["tokenizer.chat_template"])
