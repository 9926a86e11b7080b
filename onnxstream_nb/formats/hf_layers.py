"""What a config.json says of each layer: its window, and by which frequencies it rotates."""

from __future__ import annotations

from typing import Any

from ..errors import ModelError, UnsupportedError
from .architectures import Architecture
from .decoder_config import Layer, check_layers
from .hf_fields import Fields
from .rope import Rotary, rotary

FULL, SLIDING = "full_attention", "sliding_attention"


def read_layers(
    fields: Fields, kind: Architecture, head_dim: int, context: int
) -> tuple[Layer, ...]:
    """The layers in order; a window that holds the whole `context` is none."""
    count = check_layers(fields.path, fields.integer("num_hidden_layers"))
    window = _window(fields, kind)
    rotaries = _rotaries(fields, kind, head_dim, context)
    windows: dict[str, int | None] = {FULL: None}
    if window is not None:
        windows[SLIDING] = window if window < context else None
    kinds = _layer_types(fields, window, count, windows)
    return tuple(Layer(rotaries[k], windows[k]) for k in kinds)


def _window(fields: Fields, kind: Architecture) -> int | None:
    """The window of layers that have one; None too where a field use_sliding_window is not true."""
    flagged = "use_sliding_window" in kind.defaults
    if "sliding_window" not in fields.values:
        return None
    if flagged and not fields.flag("use_sliding_window"):
        return None
    return fields.integer("sliding_window")


def _layer_types(
    fields: Fields, window: int | None, count: int, known: dict[str, int | None]
) -> list[str]:
    kinds = fields.values.get("layer_types", _default_layer_types(fields, window, count))
    if not isinstance(kinds, list) or len(kinds) != count:
        raise fields.error("layer_types", f"a list of {count} layer types")
    for kind in kinds:
        if kind not in known:
            raise UnsupportedError(
                f"{fields.path}: layer_types: {kind!r} is not supported with sliding_window = "
                f"{window} (supported: {', '.join(known)})"
            )
    return kinds


def _default_layer_types(fields: Fields, window: int | None, count: int) -> list[str]:
    """Where config.json lists no types: of every sliding_window_pattern layers the last is full, or
    all slide from max_window_layers on."""
    if "sliding_window_pattern" in fields.values:
        pattern = fields.integer("sliding_window_pattern")
        slides = [(i + 1) % pattern != 0 for i in range(count)]
    else:
        first = fields.values.get("max_window_layers", 0)
        if not isinstance(first, int) or first < 0:
            raise fields.error("max_window_layers", "a number of layers")
        slides = [i >= first for i in range(count)]
    return [SLIDING if s and window is not None else FULL for s in slides]


def _rotaries(fields: Fields, kind: Architecture, head_dim: int, context: int) -> dict[str, Rotary]:
    """Layer type -> its rotation."""
    if head_dim % 2:
        raise ModelError(f"{fields.path}: the head size {head_dim} is odd")
    where = f"{fields.path}: rope_parameters"
    found = {}
    for layer_type, given in _parameters(fields, kind).items():
        parameters = {"rope_theta": kind.defaults.get("rope_theta"), **given}
        dim = _rotated_size(fields, kind, parameters, head_dim)
        found[layer_type] = rotary(parameters, dim, context, where)
    return found


def _parameters(fields: Fields, kind: Architecture) -> dict[str, dict[str, Any]]:
    """Rotary parameters by layer type, today all in `rope_parameters`, formerly in `rope_theta`,
    `rope_scaling` and, of layers with a window, `rope_local_base_freq`."""
    older, today = _theta(fields, "rope_theta"), fields.mapping("rope_parameters")
    scaling = ("rope_scaling", fields.mapping("rope_scaling"))
    if not kind.has_local_rope:
        both = _merged(fields, older, scaling, ("rope_parameters", today))
        return {FULL: both, SLIDING: both}
    for name, value in today.items():
        if name not in (FULL, SLIDING) or not isinstance(value, dict):
            raise UnsupportedError(
                f"{fields.path}: rope_parameters: field '{name}' = {value!r} is not known; it "
                f"should hold an object for each of {FULL} and {SLIDING}"
            )
    full, local = (("rope_parameters", today.get(name, {})) for name in (FULL, SLIDING))
    theta = {"rope_theta": kind.defaults["rope_local_base_freq"]}
    return {
        FULL: _merged(fields, older, scaling, full),
        SLIDING: {**theta, **_merged(fields, _theta(fields, "rope_local_base_freq"), local)},
    }


def _theta(fields: Fields, name: str) -> tuple[str, dict[str, Any]]:
    return name, {"rope_theta": fields.explicit[name]} if name in fields.explicit else {}


def _merged(fields: Fields, *sources: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """What several fields say of the same rotation, which must agree."""
    parameters: dict[str, Any] = {}
    for name, values in sources:
        for key, value in values.items():
            if parameters.setdefault(key, value) != value:
                raise ModelError(
                    f"{fields.path}: {name}.{key} = {value!r} contradicts {parameters[key]!r} "
                    "given elsewhere in the file"
                )
    return parameters


def _rotated_size(
    fields: Fields, kind: Architecture, parameters: dict[str, Any], head_dim: int
) -> int:
    """How much of a head rotates, by a field that is taken from the parameters; so is that of the
    context that a stretched model was trained with."""
    if "original_max_position_embeddings" in kind.fields and "long_factor" in parameters:
        trained = fields.integer("original_max_position_embeddings")
        parameters.setdefault("original_max_position_embeddings", trained)
    if "partial_rotary_factor" not in kind.fields:
        return head_dim
    default = fields.values.get("partial_rotary_factor", 1.0)
    factor = parameters.pop("partial_rotary_factor", default)
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    dim = int(head_dim * factor) if is_number and 0 < factor <= 1 else 0
    if dim < 2 or dim % 2:
        raise ModelError(
            f"{fields.path}: partial_rotary_factor = {factor!r} of the head size {head_dim} is no "
            "even number of elements"
        )
    return dim
