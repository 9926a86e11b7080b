"""GGUF models against a NumPy Llama, in an independent ONNX engine, and models that are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_fixtures import ENCODINGS, K_QUANT, random_weights, write_gguf
from llama_oracle import Array, Tiny, close, dense, logits, run_in_steps

from onnxstream_nb.errors import ModelError, OnnxstreamError, UnsupportedError
from onnxstream_nb.formats.gguf import header, read

IDS = [1, 5, 9, 63, 0, 7, 7, 30, 22, 11]
STEPS = [6, 1, 3]
Extra = Callable[[gguf.GGUFWriter], None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_model_computes_what_its_weights_say(path: Path, architecture: str, tied: bool) -> None:
    tiny = Tiny(architecture, tied=tied)
    weights = write_gguf(path, tiny, "F16")
    graph = read(path)
    close(run_in_steps(graph, IDS, STEPS), logits(tiny, weights, IDS))
    assert graph.metadata["architecture"] == architecture
    assert graph.metadata["context_length"] == tiny.context
    assert graph.metadata["vocab_size"] == tiny.vocab
    embedding, head = graph.initializers["token_embd.weight"], graph.nodes[-1].inputs[1]
    assert (graph.initializers[head].key == embedding.key) is tied


@pytest.mark.parametrize(
    "tiny",
    [
        Tiny(heads=4, kv_heads=4, head_dim=8),
        Tiny(heads=6, kv_heads=1, head_dim=10, hidden=36, vocab=67, intermediate=7),
        Tiny(attention_bias=True, mlp_bias=True),
        Tiny(window=3),
        Tiny(window=1),
        Tiny(window=128),
    ],
    ids=["no groups", "odd sizes", "biases", "window of 3", "window of 1", "window = context"],
)
def test_variants_of_llama(path: Path, tiny: Tiny) -> None:
    weights = write_gguf(path, tiny)
    graph = read(path)
    close(run_in_steps(graph, IDS, STEPS), logits(tiny, weights, IDS))
    masked = tiny.window is not None and tiny.window < tiny.context
    attentions = [node for node in graph.nodes if node.op_type == "Attention"]
    assert len(attentions) == tiny.layers
    assert all((node.attributes["is_causal"] == 0) is masked for node in attentions)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_each_encoding(path: Path, encoding: str) -> None:
    weights = write_gguf(path, K_QUANT, encoding)
    graph = read(path)
    query = graph.initializers["blk.0.attn_q.weight"]
    assert query.encoding == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(
        encoding, encoding.lower()
    )
    assert (query.dtype, query.shape, query.source) == ("float32", (256, 256), path)
    close(run_in_steps(graph, IDS[:5], [4, 1]), logits(K_QUANT, weights, IDS[:5]))


def test_version_2_is_read_like_3(path: Path) -> None:
    write_gguf(path, Tiny())
    data = bytearray(path.read_bytes())
    graph = read(path)
    data[4] = 2
    path.write_bytes(data)
    assert read(path) == graph


def field(name: str, value: Any) -> Extra:
    """Adds one metadata field of the type that the value suggests."""

    def extra(writer: gguf.GGUFWriter) -> None:
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
                 str: writer.add_string, list: writer.add_array}  # fmt: skip
        kinds[type(value)](name, value)

    return extra


def fields(*extras: Extra) -> Extra:
    def extra(writer: gguf.GGUFWriter) -> None:
        for item in extras:
            item(writer)

    return extra


def test_linear_rope_scaling_and_its_older_spelling(path: Path) -> None:
    wanted = Tiny().frequencies / 4
    for extra in (
        fields(field("llama.rope.scaling.type", "linear"), field("llama.rope.scaling.factor", 4.0)),
        field("llama.rope.scaling.factor", 4.0),
        field("llama.rope.scale_linear", 4.0),
    ):
        weights = write_gguf(path, Tiny(), extra=extra)
        close(
            run_in_steps(read(path), IDS, STEPS),
            logits(Tiny(), weights, IDS, frequencies=wanted),
        )


def test_scaling_type_none_ignores_the_factor(path: Path) -> None:
    extra = fields(
        field("llama.rope.scaling.type", "none"), field("llama.rope.scaling.factor", 4.0)
    )
    weights = write_gguf(path, Tiny(), extra=extra)
    close(run_in_steps(read(path), IDS, STEPS), logits(Tiny(), weights, IDS))


def test_yarn_rope_scaling(path: Path) -> None:
    # as transformers 5.23 computes them for head_dim 8, theta 10000
    frequencies, attention_factor = np.array([1.0, 0.0625, 0.0025, 0.00025]), 1.138629436111989
    extra = fields(
        field("qwen2.rope.scaling.type", "yarn"),
        field("qwen2.rope.scaling.factor", 4.0),
        field("qwen2.rope.scaling.original_context_length", 64),
        field("qwen2.rope.scaling.attn_factor", 0.5),
    )
    weights = write_gguf(path, Tiny("qwen2"), extra=extra)
    wanted = logits(
        Tiny("qwen2"), weights, IDS, frequencies=frequencies, attention_factor=attention_factor / 2
    )
    close(run_in_steps(read(path), IDS, STEPS), wanted)


FACTORS = np.array([1.0, 1.5, 4.0, 8.0], np.float32)


def test_rope_factors_of_llama3(path: Path) -> None:
    weights = write_gguf(
        path, Tiny(), extra=lambda writer: writer.add_tensor("rope_freqs.weight", FACTORS)
    )
    wanted = logits(Tiny(), weights, IDS, frequencies=Tiny().frequencies / FACTORS)
    close(run_in_steps(read(path), IDS, STEPS), wanted)


def test_partial_rotation(path: Path) -> None:
    """Rotating only the first 4 of 8 dims is rotating all with the other frequencies at zero."""
    extra = field("qwen2.rope.dimension_count", 4)
    tiny = Tiny("qwen2")
    weights = write_gguf(path, tiny, extra=extra, skip=frozenset({"rope.dimension_count"}))
    # halves (0..3, 4..7) rotate (0, 4), (1, 5), ...; a partial rotation rotates (0, 2), (1, 3)
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    moved = {}
    for name, value in weights.items():
        if "q_proj" in name or "k_proj" in name:
            heads = value.reshape(-1, 8, *value.shape[1:])
            value = heads[:, np.argsort(np.argsort(order))].reshape(value.shape)
        moved[name] = value
    frequencies = np.array([1.0, 0.01, 0.0, 0.0])
    wanted = logits(tiny, moved, IDS, frequencies=frequencies)
    close(run_in_steps(read(path), IDS, STEPS), wanted)


def test_end_of_text_ids_and_name(path: Path) -> None:
    extra = fields(
        field("tokenizer.ggml.eos_token_id", 2),
        field("tokenizer.ggml.eot_token_id", 7),
        field("general.name", "Tiny"),
    )
    write_gguf(path, Tiny(), extra=extra)
    assert read(path).metadata["eos_token_ids"] == [2, 7]
    assert read(path).metadata["name"] == "Tiny"


def test_equal_values_per_layer_count_as_one(path: Path) -> None:
    extra = field("llama.attention.head_count_kv", [2, 2])
    weights = write_gguf(path, Tiny(), extra=extra, skip=frozenset({"attention.head_count_kv"}))
    close(run_in_steps(read(path), IDS, STEPS), logits(Tiny(), weights, IDS))


# -- models in several files


def split(path: Path, count: int = 2) -> list[Path]:
    """Split a GGUF of Tiny() as llama.cpp does: all metadata in the first file."""
    whole = gguf.GGUFReader(path)
    paths = [path.with_name(f"m-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    for number, part in enumerate(paths):

        def extra(writer: gguf.GGUFWriter, number: int = number) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", count)
            writer.add_int32("split.tensors.count", len(whole.tensors))

        mine = {t.name for t in whole.tensors[number::count]}
        others = frozenset(t.name for t in whole.tensors) - mine
        write_gguf(part, Tiny(), extra=extra, skip=others)
    return paths


def test_split_model(path: Path) -> None:
    weights = write_gguf(path, Tiny())
    first, _ = split(path)
    graph = read(first)
    close(run_in_steps(graph, IDS, STEPS), logits(Tiny(), weights, IDS))
    assert len({ref.source for ref in graph.initializers.values()} & set(split(path))) == 2


def test_split_model_that_is_incomplete(path: Path) -> None:
    write_gguf(path, Tiny())
    first, second = split(path)
    with pytest.raises(ModelError, match="split over 2 files; open the first one"):
        read(second)
    data = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match=f"{second.name}: holds tensors that another part"):
        read(first)
    second.unlink()
    with pytest.raises(ModelError, match=f"{second.name}: this part of a split model is missing"):
        read(first)
    second.write_bytes(data)
    write_gguf(second, Tiny(), skip=frozenset(header(first).tensors) | {"blk.0.attn_q.weight"})
    with pytest.raises(ModelError, match="all parts hold 20 tensors, not 21"):
        read(first)


# -- models that are refused


@pytest.mark.parametrize(
    "name", ["blk.1.ffn_down.weight", "token_embd.weight", "output_norm.weight"]
)
def test_missing_tensor_is_named(path: Path, name: str) -> None:
    write_gguf(path, Tiny(), skip=frozenset({name}))
    with pytest.raises(ModelError, match=f"{path}.*'{name}' is missing"):
        read(path)


def test_bias_that_qwen2_needs(path: Path) -> None:
    write_gguf(path, Tiny("qwen2"), skip=frozenset({"blk.1.attn_k.bias"}))
    with pytest.raises(ModelError, match=r"'blk\.1\.attn_k\.bias' is missing"):
        read(path)


def test_wrong_shape_is_named(path: Path) -> None:
    weights = random_weights(Tiny())
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:-1]
    write_gguf(path, Tiny(), weights=weights)
    message = rf"{path}: tensor 'blk\.1\.ffn_up\.weight' has shape \[63, 32\].*\[64, 32\]"
    with pytest.raises(ModelError, match=message):
        read(path)


def test_tensor_that_no_known_model_has(path: Path) -> None:
    write_gguf(
        path,
        Tiny(),
        extra=lambda writer: writer.add_tensor("blk.0.attn_sub_norm.weight", FACTORS),
    )
    with pytest.raises(UnsupportedError, match=r"'blk\.0\.attn_sub_norm\.weight' is not part of"):
        read(path)


def test_other_architecture(path: Path) -> None:
    write_gguf(path, replace(Tiny(), architecture="mamba"))
    with pytest.raises(UnsupportedError, match="'mamba' is not supported .*llama, qwen2, qwen3"):
        read(path)


CHANGES: dict[str, tuple[str, Any, str]] = {
    "experts": ("expert_count", 8, "mixture-of-experts"),
    "unknown": ("logit_scale", 0.5, r"llama\.logit_scale = 0\.5 is not known"),
    "encoder": ("attention.causal", False, r"attention\.causal is false"),
    "scaling": ("rope.scaling.type", "dynamic", "'dynamic' is not supported"),
    "longrope": ("rope.scaling.type", "longrope", r"'rope_factors_short\.weight'.*is missing"),
    "value length": ("attention.value_length", 4, "differs from attention.key_length"),
    "heads": ("attention.head_count", 3, "3 attention heads are no multiple of 2"),
    "no heads": ("attention.head_count", 0, r"attention\.head_count = 0 is not a positive"),
    "text": ("block_count", "2", "block_count = '2' is not a positive integer"),
    "layers": ("block_count", 2**31 - 1, "2147483647 layers are out of range"),
    "differs": ("attention.head_count_kv", [2, 1], "head_count_kv differs between layers"),
    "epsilon": ("attention.layer_norm_rms_epsilon", 0.0, "epsilon = 0.0 is not a positive number"),
    "odd rotation": ("rope.dimension_count", 3, "dimension_count = 3 must be even"),
    "wide rotation": ("rope.dimension_count", 10, "dimension_count = 10 must be even and at most"),
    "context": ("context_length", True, "context_length = True is not a positive integer"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_metadata_that_is_refused(path: Path, case: str) -> None:
    name, value, message = CHANGES[case]
    write_gguf(path, Tiny(), extra=field(f"llama.{name}", value), skip=frozenset({name}))
    with pytest.raises(OnnxstreamError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["block_count", "context_length", "attention.head_count"])
def test_metadata_that_is_missing(path: Path, name: str) -> None:
    write_gguf(path, Tiny(), skip=frozenset({name}))
    with pytest.raises(ModelError, match=f"llama.{name} = None is not a positive integer"):
        read(path)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (FACTORS[:3], r"must hold 4 F32 values, not \[3\] of F32"),
        (FACTORS.astype(np.float16), r"must hold 4 F32 values, not \[4\] of F16"),
        (-FACTORS, "not positive"),
    ],
)
def test_rope_factors_that_are_refused(path: Path, factors: Array, message: str) -> None:
    write_gguf(path, Tiny(), extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    with pytest.raises(ModelError, match=f"'rope_freqs.weight'.*{message}"):
        read(path)


def test_weights_point_into_the_file(path: Path) -> None:
    weights = write_gguf(path, Tiny("qwen3"), "Q8_0")
    graph = read(path)
    for name, ref in graph.initializers.items():
        if isinstance(ref.source, Path):
            assert ref.name == name
            assert ref.source == path
    up = graph.initializers["blk.1.ffn_up.weight"]
    np.testing.assert_array_equal(dense(up), weights["model.layers.1.mlp.up_proj.weight"].T)
