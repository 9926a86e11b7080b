"""Reads the config.json of a language model strictly, as a `DecoderConfig`."""

from __future__ import annotations

from pathlib import Path

from ..errors import UnsupportedError
from .architectures import ARCHITECTURES, Activation, Architecture
from .decoder_config import DecoderConfig
from .hf_fields import Fields
from .hf_layers import read_layers

_SIZES = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
})  # fmt: skip
_ACTIVATIONS = ("hidden_act", "hidden_activation")
_OTHER_READ = frozenset({
    "architectures", "model_type", *_ACTIVATIONS, "tie_word_embeddings", "rope_theta",
    "rope_scaling", "rope_parameters", "eos_token_id",
})  # fmt: skip
_NEUTRAL = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "attention_dropout", "attn_implementation", "auto_map", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "do_sample", "dtype", "embd_pdrop", "hidden_dropout",
    "initializer_range", "is_llama_config", "max_length", "max_new_tokens", "max_sequence_length",
    "min_length", "model_max_length", "name_or_path", "num_return_sequences", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "repetition_penalty", "resid_pdrop",
    "return_dict", "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "transformers.js_config", "transformers_version", "unk_token_id",
    "unsloth_fixed", "unsloth_version", "use_cache",
})  # fmt: skip
"""Fields about training, sampling or the library; they do not change a model's logits."""


def read_config(folder: Path) -> DecoderConfig:
    """The hyper-parameters in `folder`/config.json.

    Raises UnsupportedError, naming the field, for any field that is neither read here nor known to
    be neutral (unless it is null, false or empty), ModelError for a missing or malformed one.
    """
    path = folder / "config.json"
    name, kind = _architecture(Fields(path))
    fields = Fields(path, kind.defaults)
    _check_known(fields, kind, name)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", hidden // heads)
    context = fields.integer("max_position_embeddings")
    layers = read_layers(fields, kind, head_dim, context)
    return DecoderConfig(
        path=path,
        architecture=name.removesuffix("ForCausalLM").lower(),
        kind=kind,
        name=folder.resolve().name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        context_length=min(layer.rotary.limit or context for layer in layers),
        epsilon=fields.number(_epsilon(kind)),
        layers=layers,
        activation=_activation(fields, kind),
        biases=_biases(fields, kind),
        fused=kind.fused,
        shifted=kind.shifted,
        query_size=fields.number("query_pre_attn_scalar", head_dim),
        attention_softcap=fields.optional("attn_logit_softcapping"),
        logit_softcap=fields.optional("final_logit_softcapping"),
        tied=fields.flag("tie_word_embeddings"),
        eos_token_ids=_eos_token_ids(folder, fields),
    )


def _architecture(fields: Fields) -> tuple[str, Architecture]:
    names = fields.values.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{fields.path}: architecture {name!r} is not supported "
            f"(supported: {', '.join(ARCHITECTURES)})"
        )
    return name, ARCHITECTURES[name]


def _epsilon(kind: Architecture) -> str:
    return "layer_norm_eps" if kind.layer_norm else "rms_norm_eps"


def _check_known(fields: Fields, kind: Architecture, name: str) -> None:
    known = _SIZES | _OTHER_READ | _NEUTRAL | kind.fields | {_epsilon(kind)}
    for field, value in fields.explicit.items():
        empty = value is False or (isinstance(value, str | list | dict) and not value)
        neutral = field in kind.neutral and kind.neutral[field] == value
        copied = field in kind.copies and fields.values.get(kind.copies[field]) == value
        if not (field in known or empty or neutral or copied):
            raise UnsupportedError(
                f"{fields.path}: the field '{field}' = {value!r} is not known for {name} and may "
                "change the results"
            )


def _activation(fields: Fields, kind: Architecture) -> Activation:
    """What the fields name, of which there may be two."""
    named = [name for name in _ACTIVATIONS if name in fields.explicit]
    for name in named:
        if fields.explicit[name] not in kind.activations:
            raise UnsupportedError(
                f"{fields.path}: {name} = {fields.explicit[name]!r} is not supported "
                f"(supported: {', '.join(kind.activations)})"
            )
    found = {kind.activations[fields.explicit[name]] for name in named}
    return found.pop() if found else kind.activation


def _biases(fields: Fields, kind: Architecture) -> frozenset[str]:
    attention = {"qkv", "output"} if fields.flag("attention_bias") else set()
    queries = {"qkv"} if fields.flag("use_qkv_bias") else set()
    return kind.biases | attention | queries | ({"mlp"} if fields.flag("mlp_bias") else set())


def _eos_token_ids(folder: Path, fields: Fields) -> tuple[int, ...]:
    """The ids that end a reply, by config.json and, where there is one, generation_config.json."""
    found: list[int] = []
    sources = [fields]
    if (folder / "generation_config.json").is_file():
        sources.append(Fields(folder / "generation_config.json"))
    for source in sources:
        ids = source.values.get("eos_token_id", [])
        ids = ids if isinstance(ids, list) else [ids]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise source.error("eos_token_id", "an id or a list of ids")
        found += ids
    return tuple(dict.fromkeys(found))
