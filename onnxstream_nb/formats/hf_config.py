"""Reads the config.json of Llama-family models strictly, as a `LlamaConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError, UnsupportedError
from . import llama
from .rope import Rotary, rotary
from .safetensors_header import read_object

_SIZES = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
})  # fmt: skip
_OTHER_READ = frozenset({
    "architectures", "model_type", "hidden_act", "rms_norm_eps", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "eos_token_id",
})  # fmt: skip
_NEUTRAL = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "attention_dropout", "attn_implementation", "bos_token_id", "chunk_size_feed_forward",
    "do_sample", "dtype", "embd_pdrop", "hidden_dropout", "initializer_range", "is_llama_config",
    "max_length", "max_new_tokens", "max_sequence_length", "min_length", "model_max_length",
    "name_or_path", "num_return_sequences", "output_attentions", "output_hidden_states",
    "pad_token_id", "pretraining_tp", "repetition_penalty", "resid_pdrop", "return_dict",
    "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_cache",
})  # fmt: skip
"""Fields about training, sampling or the library; they do not change a model's logits."""

_WINDOWS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What an architecture adds to the common Llama, and the fields it reads for that.

    `window` is that of a config.json which does not mention one; a `window_flag` must be true for
    any window to count.
    """

    fields: frozenset[str] = frozenset()
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    window_flag: str = ""


_ARCHITECTURES: Mapping[str, _Architecture] = {
    "LlamaForCausalLM": _Architecture(frozenset({"attention_bias", "mlp_bias"})),
    "MistralForCausalLM": _Architecture(frozenset({"sliding_window"}), window=4096),
    "Qwen2ForCausalLM": _Architecture(
        _WINDOWS, qkv_bias=True, window=4096, window_flag="use_sliding_window"
    ),
    "Qwen3ForCausalLM": _Architecture(
        _WINDOWS | {"attention_bias"},
        qk_norm=True, window=4096, window_flag="use_sliding_window",
    ),
}  # fmt: skip


class _Fields:
    """A JSON file's fields, each checked for type as it is read. `values` lacks those that are
    null; `given` names them too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        everything = read_object(path)
        self.given = everything.keys()
        self.values = {k: v for k, v in everything.items() if v is not None}

    def error(self, name: str, wanted: str) -> ModelError:
        if name not in self.values:
            return ModelError(f"{self.path}: the field '{name}' is missing")
        return ModelError(f"{self.path}: {name} = {self.values[name]!r} is not {wanted}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.error(name, "a positive integer")
        return value

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if not isinstance(value, int | float) or not 0 < value < 1e12:
            raise self.error(name, "a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return value


def read_config(folder: Path) -> llama.LlamaConfig:
    """The hyper-parameters in `folder`/config.json.

    Raises UnsupportedError, naming the field, for any field that is neither read here nor known to
    be neutral (unless it is null, false or empty), ModelError for a missing or malformed one.
    """
    fields = _Fields(folder / "config.json")
    name, architecture = _architecture(fields)
    _check_known(fields, architecture, name)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", hidden // heads)
    context = fields.integer("max_position_embeddings")
    layers = llama.check_layers(fields.path, fields.integer("num_hidden_layers"))
    attention_bias = fields.flag("attention_bias")
    return llama.LlamaConfig(
        path=fields.path,
        architecture=name.removesuffix("ForCausalLM").lower(),
        name=folder.resolve().name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        context_length=context,
        epsilon=fields.number("rms_norm_eps"),
        rotary=_rotary(fields, head_dim, context),
        windows=_windows(fields, architecture, layers, context),
        qkv_bias=architecture.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias"),
        qk_norm=architecture.qk_norm,
        tied=fields.flag("tie_word_embeddings"),
        eos_token_ids=_eos_token_ids(folder, fields),
    )


def _architecture(fields: _Fields) -> tuple[str, _Architecture]:
    names = fields.values.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise UnsupportedError(
            f"{fields.path}: architecture {name!r} is not supported "
            f"(supported: {', '.join(_ARCHITECTURES)})"
        )
    return name, _ARCHITECTURES[name]


def _check_known(fields: _Fields, architecture: _Architecture, name: str) -> None:
    known = _SIZES | _OTHER_READ | _NEUTRAL | architecture.fields
    for field, value in fields.values.items():
        empty = value is False or (isinstance(value, str | list | dict) and not value)
        if field not in known and not empty:
            raise UnsupportedError(
                f"{fields.path}: the field '{field}' = {value!r} is not known for {name} and may "
                "change the results"
            )
    activation = fields.values.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedError(
            f"{fields.path}: hidden_act = {activation!r} is not supported (supported: silu)"
        )


def _rotary(fields: _Fields, head_dim: int, context: int) -> Rotary:
    """Rotary parameters, today in `rope_parameters`, formerly in `rope_theta`, `rope_scaling`."""
    if head_dim % 2:
        raise ModelError(f"{fields.path}: the head size {head_dim} is odd")
    parameters: dict[str, Any] = {}
    if "rope_theta" in fields.values:
        parameters["rope_theta"] = fields.values["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        for key, value in fields.mapping(name).items():
            if parameters.setdefault(key, value) != value:
                raise ModelError(
                    f"{fields.path}: {name}.{key} = {value!r} contradicts {parameters[key]!r} "
                    "given elsewhere in the file"
                )
    return rotary(parameters, head_dim, context, f"{fields.path}: rope_parameters")


def _windows(
    fields: _Fields, architecture: _Architecture, layers: int, context: int
) -> tuple[int | None, ...]:
    """Each layer's window; None where there is none, or it holds the whole context."""
    window = architecture.window
    if "sliding_window" in fields.given:
        window = fields.integer("sliding_window") if "sliding_window" in fields.values else None
    flag = architecture.window_flag
    if not architecture.fields & {"sliding_window"} or (flag and not fields.flag(flag)):
        window = None
    kinds = fields.values.get("layer_types", _default_layer_types(fields, window, flag, layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.error("layer_types", f"a list of {layers} layer types")
    sizes: dict[str, int | None] = {"full_attention": None}
    if window is not None:
        sizes["sliding_attention"] = window if window < context else None
    for kind in kinds:
        if kind not in sizes:
            raise UnsupportedError(
                f"{fields.path}: layer_types: {kind!r} is not supported with sliding_window = "
                f"{window} (supported: {', '.join(sizes)})"
            )
    return tuple(sizes[kind] for kind in kinds)


def _default_layer_types(fields: _Fields, window: int | None, flag: str, layers: int) -> list[str]:
    """Where config.json lists no types: all layers slide, or with a flag those from
    max_window_layers on."""
    first = 0
    if flag:
        first = fields.values.get("max_window_layers", 28)
        if not isinstance(first, int) or first < 0:
            raise fields.error("max_window_layers", "a number of layers")
    full = layers if window is None else min(first, layers)
    return ["full_attention"] * full + ["sliding_attention"] * (layers - full)


def _eos_token_ids(folder: Path, fields: _Fields) -> tuple[int, ...]:
    """The ids that end a reply, by config.json and, where there is one, generation_config.json."""
    found: list[int] = []
    sources = [fields]
    if (folder / "generation_config.json").is_file():
        sources.append(_Fields(folder / "generation_config.json"))
    for source in sources:
        ids = source.values.get("eos_token_id", [])
        ids = ids if isinstance(ids, list) else [ids]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise source.error("eos_token_id", "an id or a list of ids")
        found += ids
    return tuple(dict.fromkeys(found))
