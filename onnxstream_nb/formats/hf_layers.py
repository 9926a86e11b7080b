"""What a config.json says of each layer: its window, and by which frequencies it rotates."""

from __future__ import annotations

from typing import Any

from ..errors import ModelError, UnsupportedError
from .architectures import Architecture
from .decoder_config import Layer, check_layers
from .hf_fields import Fields
from .rope import Rotary, rotary

FULL, SLIDING = "full_attention", "sliding_attention"


def read_layers(fields: Fields, kind: Architecture, head_dim: int, context: int) -> list[Layer]:
    """The layers in order; a window that holds the whole `context` is none."""
    count = check_layers(fields.path, fields.integer("num_hidden_layers"))
    window = _window(fields, kind)
    rotaries = _rotaries(fields, kind, head_dim, context)
    windows: dict[str, int | None] = {FULL: None}
    if window is not None:
        windows[SLIDING] = window if window < context else None
    return [Layer(rotaries[k], windows[k]) for k in _layer_types(fields, window, count, windows)]


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
    parameters = _parameters(fields)
    where = f"{fields.path}: rope_parameters"
    both = rotary(parameters, head_dim, context, where)
    return {FULL: both, SLIDING: both}


def _parameters(fields: Fields) -> dict[str, Any]:
    """Rotary parameters, today in `rope_parameters`, formerly in `rope_theta`, `rope_scaling`."""
    parameters: dict[str, Any] = {}
    if "rope_theta" in fields.explicit:
        parameters["rope_theta"] = fields.explicit["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        for key, value in fields.mapping(name).items():
            if parameters.setdefault(key, value) != value:
                raise ModelError(
                    f"{fields.path}: {name}.{key} = {value!r} contradicts {parameters[key]!r} "
                    "given elsewhere in the file"
                )
    return parameters
