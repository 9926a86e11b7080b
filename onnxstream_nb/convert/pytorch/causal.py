"""A causal language model of transformers as something to export: explicit past and present.

Dims: T tokens now, P tokens before them; keys and values (1, H, P, D) of each layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ModelError, UnsupportedError
from .exporters import Case, Subject, quiet, reason

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

ATTENTION = {"opset14": ("eager",), "opset23": ("sdpa", "eager")}
"""How attention is to be computed for each exporter, the best first: sdpa is one node in opset 23,
and more than eager below it."""

_STEPS = (7, 1, 3)  # tokens of the runs that are compared, each after all before it
_EXAMPLE = (3, 5)  # tokens now and before: sizes that an exporter cannot take for fixed ones


def load(folder: Path) -> Any:
    """The model of a Hugging Face folder in float32, in evaluation.

    Raises ModelError for a folder that transformers cannot load.
    """
    import transformers

    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: no config.json; give a Hugging Face folder, or a hub repository as "
            "owner/name (a GGUF or .onnx file needs no export: see convert)"
        )
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), dtype="float32", attn_implementation="eager", local_files_only=True
            )
    except Exception as error:  # any: the libraries beneath have errors of their own
        raise ModelError(
            f"{folder}: transformers cannot load it as a causal language model: {reason(error)}"
        ) from error
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    return model.eval()


def subject(model: Any, attention: str, seed: int = 0) -> Subject | None:
    """The model with explicit keys and values and its results for a few ids, with and without a
    past; None when it cannot compute attention so."""
    with quiet():
        if not _set_attention(model, attention):
            return None
    causal = _wrapped(model)
    past = _empty_past(causal, model)
    names = tuple(f"pkv{i}" for i in range(len(past)))
    presents = tuple(f"o{name}" for name in names)
    axes: dict[str, dict[int, str]] = {
        "input_ids": {1: "tokens"}, "attention_mask": {1: "total"}, "position_ids": {1: "tokens"},
        "logits": {1: "tokens"},
    }  # fmt: skip
    axes |= {name: {2: "past"} for name in names} | {name: {2: "total"} for name in presents}
    whole = ("input_ids", "attention_mask", "position_ids", *names)
    with quiet():
        cases = tuple(_cases(causal, past, whole, ("logits", *presents), seed))
    return Subject(causal, _example(past), whole, ("logits", *presents), axes, cases)


def metadata(model: Any) -> dict[str, Any]:
    """What a graph says about the model beside its operators, as the loaders of files do."""
    config = model.config.get_text_config()
    end = model.generation_config.eos_token_id if model.generation_config else None
    end = config.eos_token_id if end is None else end
    known = {
        "architecture": (config.architectures or [type(model).__name__])[0],
        "context_length": getattr(config, "max_position_embeddings", None),
        "vocab_size": config.vocab_size,
        "eos_token_ids": end if isinstance(end, list) else [] if end is None else [end],
    }
    return {key: value for key, value in known.items() if value is not None}


def _set_attention(model: Any, attention: str) -> bool:
    """Whether the model computes attention in that way now. Experts, where there are any, are
    computed side by side: taking only those that were chosen cannot be traced."""
    try:
        model.set_attn_implementation(attention)
    except ValueError:  # transformers' way of saying that the architecture has none
        return False
    if getattr(model, "_can_set_experts_implementation", bool)():
        model.set_experts_implementation("batched_mm")
    return True


def _wrapped(model: Any) -> torch.nn.Module:
    import torch
    from transformers import DynamicCache

    class Causal(torch.nn.Module):  # type: ignore[misc]
        """(ids, mask, positions, past keys and values) -> (logits, present ones), as tuples."""

        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            """The cache keeps every position, also where layers look back a window only: the
            window is in the masks."""
            ids, mask, positions, *past = values
            out = self.module(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
            )  # fmt: skip
            layers = out.past_key_values.layers
            return (out.logits, *(t for layer in layers for t in (layer.keys, layer.values)))

    return Causal().eval()


def _empty_past(causal: Any, model: Any) -> list[Array]:
    """Keys and values (1, H, 0, D) of each layer, as a run without any gives them."""
    import torch
    from transformers import DynamicCache

    ids = torch.ones((1, 2), dtype=torch.int64)
    refused = (
        f"{type(model).__name__}: its state between tokens is not keys and values of each layer, "
        "which is what an exported language model carries from one token to the next"
    )
    try:
        with quiet(), torch.no_grad():
            out = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
    except Exception as error:  # any: the model's own code, which may need a cache of its own kind
        raise UnsupportedError(f"{refused} ({reason(error)})") from error
    layers = getattr(out.past_key_values, "layers", ()) if "past_key_values" in out else ()
    tensors = [getattr(layer, kind, None) for layer in layers for kind in ("keys", "values")]
    known = [t for t in tensors if t is not None and t.ndim == 4 and t.shape[2] == 2]
    if not known or len(known) != len(tensors):
        raise UnsupportedError(refused)
    return [np.zeros((1, t.shape[1], 0, t.shape[3]), np.float32) for t in known]


def _feeds(ids: Array, past: list[Array]) -> list[Array]:
    before, now = past[0].shape[2], len(ids)
    positions = np.arange(before, before + now)[None]
    return [ids[None], np.ones((1, before + now), np.int64), positions, *past]


def _cases(
    causal: Any, past: list[Array], names: tuple[str, ...], outputs: tuple[str, ...], seed: int
) -> Iterator[Case]:
    """Runs over random ids, one after the other, each with the keys and values of those before."""
    import torch

    vocabulary = causal.module.config.get_text_config().vocab_size
    random = np.random.default_rng(seed)
    for count in _STEPS:
        ids = random.integers(0, vocabulary, count)
        feeds = _feeds(ids, past)
        with torch.no_grad():
            results = [t.numpy() for t in causal(*(torch.from_numpy(f) for f in feeds))]
        yield Case(dict(zip(names, feeds, strict=True)), dict(zip(outputs, results, strict=True)))
        past = results[1:]


def _example(past: list[Array]) -> tuple[torch.Tensor, ...]:
    """Inputs to trace the model with."""
    import torch

    now, before = _EXAMPLE
    filled = [np.zeros((*p.shape[:2], before, p.shape[3]), np.float32) for p in past]
    return tuple(torch.from_numpy(f) for f in _feeds(np.arange(1, now + 1), filled))
