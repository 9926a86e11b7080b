"""Hugging Face folders against a NumPy Llama, and folders that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from llama_fixtures import hf_config, random_weights, write_hf
from llama_oracle import Array, Tiny, close, logits, run_in_steps

from onnxstream_nb.errors import ModelError, OnnxstreamError
from onnxstream_nb.formats.safetensors import INDEX, read

IDS = [1, 5, 9, 63, 0, 7, 7, 30, 22, 11]
STEPS = [6, 1, 3]
YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 64}
YARN_FREQUENCIES = np.array([1.0, 0.0625, 0.0025, 0.00025])  # by transformers 5.23
YARN_ATTENTION = 1.138629436111989


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


# -- models


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_model_computes_what_its_weights_say(folder: Path, architecture: str, dtype: str) -> None:
    tiny = Tiny(architecture)
    weights = write_hf(folder, tiny, dtype)
    graph = read(folder)
    close(run_in_steps(graph, IDS, STEPS), logits(tiny, weights, IDS))
    ref = graph.initializers["model.layers.0.mlp.down_proj.weight"]
    wanted = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    assert (ref.dtype, ref.encoding, ref.shape, ref.transposed) == (
        "float32",
        wanted,
        (64, 32),
        True,
    )
    assert graph.metadata == {
        "architecture": architecture,
        "name": "model",
        "context_length": 128,
        "vocab_size": 64,
        "eos_token_ids": [2],
    }


@pytest.mark.parametrize(
    "tiny",
    [
        Tiny(tied=True),
        Tiny(attention_bias=True, mlp_bias=True),
        Tiny("qwen3", attention_bias=True),
        Tiny("mistral", window=3),
        Tiny("mistral", window=128),
        Tiny(heads=6, kv_heads=1, head_dim=10, hidden=36, vocab=67, intermediate=7),
    ],
    ids=["tied", "biases", "qwen3 biases", "window", "window = context", "odd sizes"],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_variants(folder: Path, tiny: Tiny, shards: int) -> None:
    weights = write_hf(folder, tiny, shards=shards)
    graph = read(folder)
    close(run_in_steps(graph, IDS, STEPS), logits(tiny, weights, IDS))
    files = {ref.source for ref in graph.initializers.values() if isinstance(ref.source, Path)}
    assert files == set(folder.glob("*.safetensors"))


def test_tied_head_shares_the_embedding_s_bytes(folder: Path) -> None:
    tiny = Tiny(tied=True)
    weights = random_weights(tiny)
    held = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    for stored in (weights, held):  # some checkpoints store the matrix twice all the same
        write_hf(folder, tiny, weights=stored)
        graph = read(folder)
        embedding = graph.initializers["model.embed_tokens.weight"]
        head = graph.initializers["lm_head.weight"]
        assert head.key == embedding.key
        assert (head.shape, head.transposed) == ((32, 64), True)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_parameters_in_either_spelling(folder: Path, kind: str, older: bool) -> None:
    tiny = Tiny("qwen2")
    scaling = {"factor": 4.0} if kind == "linear" else YARN
    if older:
        config = hf_config(tiny, rope_scaling={"type": kind, **scaling})
    else:
        parameters = {"rope_type": kind, "rope_theta": tiny.theta, **scaling}
        config = hf_config(tiny, rope_parameters=parameters, rope_theta=None)
    weights = write_hf(folder, tiny, config=config)
    frequencies = tiny.frequencies / 4 if kind == "linear" else YARN_FREQUENCIES
    factor = 1.0 if kind == "linear" else YARN_ATTENTION
    wanted = logits(tiny, weights, IDS, frequencies=frequencies, attention_factor=factor)
    close(run_in_steps(read(folder), IDS, STEPS), wanted)


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("mistral", {}, [None, None]),
        ("mistral", {"sliding_window": 5}, [5, 5]),
        ("mistral", {"max_position_embeddings": 9000}, [4096, 4096]),  # the default of the class
        ("qwen2", {"sliding_window": 5, "max_window_layers": 0}, [None, None]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5}, [None, None]),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
            [None, 5],
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            [5, None],
        ),
    ],
)
def test_windows_per_layer(
    folder: Path, architecture: str, changes: dict[str, Any], windows: list[int | None]
) -> None:
    write_hf(folder, Tiny(architecture), config=hf_config(Tiny(architecture), **changes))
    masks = [node.inputs[3] for node in read(folder).nodes if node.op_type == "Attention"]
    assert masks == [f"mask.sliding_{w}" if w else "" for w in windows]


def test_mistral_with_a_null_window_has_none(folder: Path) -> None:
    config = hf_config(Tiny("mistral"), max_position_embeddings=9000)
    write_hf(folder, Tiny("mistral"), config={**config, "sliding_window": None})
    assert not any(node.op_type == "Range" for node in read(folder).nodes)


def test_defaults_of_absent_fields(folder: Path) -> None:
    tiny = Tiny(kv_heads=4)
    absent = dict.fromkeys(
        ("head_dim", "num_key_value_heads", "rope_theta", "hidden_act", "tie_word_embeddings")
    )
    weights = write_hf(folder, tiny, config=hf_config(tiny, **absent))
    close(run_in_steps(read(folder), IDS, STEPS), logits(tiny, weights, IDS))


def test_neutral_fields_are_allowed(folder: Path) -> None:
    config = {
        **hf_config(Tiny()),
        "transformers_version": "4.42.3",
        "use_cache": True,
        "initializer_range": 0.04,
        "attention_dropout": 0.1,
        "pretraining_tp": 1,
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "some_new_flag": False,
        "some_new_list": [],
    }
    write_hf(folder, Tiny(), config=config)
    assert read(folder).metadata["architecture"] == "llama"


def test_end_of_text_ids_of_both_files(folder: Path) -> None:
    write_hf(folder, Tiny(), config=hf_config(Tiny(), eos_token_id=[5, 6]))
    (folder / "generation_config.json").write_text('{"eos_token_id": [6, 9], "top_p": 0.9}')
    assert read(folder).metadata["eos_token_ids"] == [5, 6, 9]
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ModelError, match="generation_config.json: eos_token_id = '</s>' is not"):
        read(folder)


def test_unused_buffers_of_old_checkpoints_are_skipped(folder: Path) -> None:
    weights = random_weights(Tiny())
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    write_hf(folder, Tiny(), weights=weights)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in read(folder).initializers


def test_hub_cache_layout_of_links(tmp_path: Path) -> None:
    write_hf(tmp_path / "plain", Tiny(), shards=2)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    weights = random_weights(Tiny())
    close(run_in_steps(read(snapshot), IDS, STEPS), logits(Tiny(), weights, IDS))


# -- config.json that is refused


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown number": ({"logit_scale": 0.5}, "'logit_scale' = 0.5 is not known for Llama"),
    "unknown zero": ({"residual_multiplier": 0}, "'residual_multiplier' = 0 is not known"),
    "unknown object": ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
    "another's field": ({"sliding_window": 5}, "'sliding_window' = 5 is not known for Llama"),
    "architecture": ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supp"),
    "architectures": ({"architectures": ["A", "B"]}, r"\['A', 'B'\] is not supported"),
    "no architecture": ({"architectures": None}, "architecture None is not supported"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    "rope type": ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic' is not supp"),
    "rope field": (
        {"rope_scaling": {"type": "linear", "factor": 2, "odd": 3}},
        "rope_parameters: field 'odd' = 3",
    ),
    "rope per layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters: field 'full_attention'",
    ),
    "rope contradiction": (
        {"rope_parameters": {"rope_theta": 5e5}},
        r"rope_parameters.rope_theta = 500000.0 contradicts 10000.0",
    ),
    "rope is no object": ({"rope_scaling": "linear"}, "rope_scaling = 'linear' is not an object"),
    "no epsilon": ({"rms_norm_eps": None}, "the field 'rms_norm_eps' is missing"),
    "no size": ({"hidden_size": None}, "the field 'hidden_size' is missing"),
    "text for a number": ({"hidden_size": "32"}, "hidden_size = '32' is not a positive integer"),
    "truth for a number": ({"vocab_size": True}, "vocab_size = True is not a positive integer"),
    "number for truth": ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1 is not true or"),
    "layers": ({"num_hidden_layers": 10**6}, "1000000 layers are out of range"),
    "heads": ({"num_attention_heads": 3}, "3 attention heads are no multiple of 2"),
    "odd head": ({"head_dim": 7}, "the head size 7 is odd"),
    "eos": ({"eos_token_id": "</s>"}, "eos_token_id = '</s>' is not an id"),
    "too few layers": ({"num_hidden_layers": 1}, r"'model\.layers\.1\..*is not part of a model"),
    "too many layers": ({"num_hidden_layers": 3}, r"'model\.layers\.2\..*is missing"),
    "vocabulary": ({"vocab_size": 65}, r"embed_tokens.weight' has shape \[64, 32\].*\[65, 32\]"),
    "bias": ({"attention_bias": True}, r"q_proj\.bias' is missing"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_is_refused(folder: Path, case: str) -> None:
    changes, message = CONFIGS[case]
    write_hf(folder, Tiny(), config=hf_config(Tiny(), **changes))
    with pytest.raises(OnnxstreamError, match=message) as caught:
        read(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, r"is not a list of 2 layer types"),
        ({"layer_types": ["chunked_attention"] * 2}, "'chunked_attention' is not supported"),
        ({"layer_types": ["sliding_attention"] * 2}, "'sliding_attention' is not supported with"),
        ({"use_sliding_window": 1}, "use_sliding_window = 1 is not true or false"),
        ({"max_window_layers": "x"}, "max_window_layers = 'x' is not a number of layers"),
        ({"mlp_bias": True}, "'mlp_bias' = True is not known for Qwen3"),
    ],
)
def test_window_fields_that_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    write_hf(folder, Tiny("qwen3"), config=hf_config(Tiny("qwen3"), **changes))
    with pytest.raises(OnnxstreamError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "the JSON is not an object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": 1, "a": 2}', "a key appears twice"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
    ],
    ids=["empty", "list", "deep", "twice", "long number"],
)
def test_config_that_is_no_object(folder: Path, text: str, message: str) -> None:
    write_hf(folder, Tiny())
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=f"config.json: .*{message}"):
        read(folder)


# -- weight files that are refused


def test_missing_files_are_named(folder: Path) -> None:
    write_hf(folder, Tiny())
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="config.json: no such file"):
        read(folder)
    write_hf(folder, Tiny())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds neither model.safetensors nor"):
        read(folder)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("missing.safetensors", "'missing.safetensors' is missing"),
        ("../outside.safetensors", "outside the model's folder"),
        ("/etc/hostname", "outside the model's folder"),
        ("sub\\..\\..\\outside.safetensors", "outside the model's folder"),
        ("link.safetensors", "outside the model's folder"),
        ("a\0b", "outside the model's folder"),
        (5, "weight_map does not map tensor names to file names"),
    ],
)
def test_shards_stay_in_the_folder(folder: Path, shard: str | int, message: str) -> None:
    write_hf(folder, Tiny(), shards=2)
    outside = folder.parent / "outside.safetensors"
    safetensors.numpy.save_file(random_weights(Tiny()), outside)
    (folder / "link.safetensors").symlink_to(outside)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        read(folder)


def test_index_and_shards_that_disagree(folder: Path) -> None:
    write_hf(folder, Tiny(), shards=2)
    index = json.loads((folder / INDEX).read_text())
    files = set(index["weight_map"].values())
    current = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = (files - {current}).pop()
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="'model.norm.weight' is missing, although"):
        read(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(ModelError, match="weight_map does not map"):
        read(folder)


def test_tensors_that_are_refused(folder: Path) -> None:
    def refused(changes: dict[str, Array], message: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        write_hf(folder, Tiny())
        weights = {**random_weights(Tiny()), **changes}
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        with pytest.raises(OnnxstreamError, match=message) as caught:
            read(folder)
        assert str(folder) in str(caught.value)

    norm = "model.norm.weight"
    refused({norm: np.ones(32, np.int8)}, f"'{norm}' has dtype I8, which is not supported")
    refused({norm: np.ones(32, np.float64)}, f"'{norm}' has dtype F64.*F32, F16, BF16")
    refused({norm: np.ones(31, np.float32)}, rf"'{norm}' has shape \[31\].*\[32\]")
    refused({norm: np.ones((1, 32), np.float32)}, rf"'{norm}' has shape \[1, 32\]")
    refused({"model.extra": np.ones(3, np.float32)}, "'model.extra' is not part of a model")
