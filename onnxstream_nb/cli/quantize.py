"""The verb quantize: its flags as options of the step, and the summary at its end."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..progress import Report
from .convert import layers_kept, written
from .perplexity import read_text

if TYPE_CHECKING:
    from ..convert.quantisation.quantise import QuantiseOptions

ACTIVATIONS = ("dynamic", "static")
_WEIGHTS_ONLY = ("block", "matmul_nbits", "scales", "plain")
_CALIBRATING = ("awq", "gptq", "dynamic", "static")


def quantize(options: Mapping[str, Any]) -> int:
    """Write a quantised model, and print what was written."""
    _check_flags(options)
    from ..convert.quantisation.quantise import quantise

    def how(model: Path, report: Report) -> tuple[dict[str, Any], dict[str, Any]]:
        asked = asked_for(options, model)
        step = partial(quantise, options=asked, report=report)
        return {"steps": (step,)}, {"method": asked.method, "dtype": asked.dtype}

    return written(options, how)


def _check_flags(options: Mapping[str, Any]) -> None:
    method = options["method"]
    for name in _WEIGHTS_ONLY if method in ACTIVATIONS else ():
        if options[name] not in (None, False):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is for weights alone, and --method {method} has none of it")
    if method in ACTIVATIONS and options["dtype"] == "int4":
        raise UsageError(f"--method {method} has 8 bits: leave out --dtype int4")
    for name in ("calibration", "tokens") if method not in _CALIBRATING else ():
        if options[name] is not None:
            raise UsageError(f"--method {method} is not calibrated: leave out --{name}")
    for name in ("range_data", "percentile") if method != "static" else ():
        if options[name] is not None:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is for --method static, not for {method}")


def asked_for(options: Mapping[str, Any], model: Path) -> QuantiseOptions:
    """The options of the step. Raises UsageError for a calibration text that cannot be read."""
    from ..convert.quantisation.quantise import DEFAULT_BLOCK, QuantiseOptions
    from ..tokenizer import load_tokenizer

    given: dict[str, Any] = {}
    path = options["calibration"]
    if path and (Path(path).is_dir() or path.endswith(".npz")):
        given["feeds"] = Path(path)
    elif path:
        text = read_text(path, "--calibration")
        given |= {"text": text, "source": path, "tokenizer": load_tokenizer(model)}
    if options["tokens"] is not None:
        given["tokens"] = options["tokens"]
    if options["range_data"]:
        given["range_data"] = Path(options["range_data"])
    if options["percentile"] is not None:
        given["percentile"] = options["percentile"]
    return QuantiseOptions(
        dtype=options["dtype"] or ("int8" if options["method"] in ACTIVATIONS else "int4"),
        method=options["method"],
        block=DEFAULT_BLOCK if options["block"] is None else options["block"],
        asymmetric=options["asymmetric"],
        keep=layers_kept(options),
        search=not options["plain"],
        matmul_nbits=options["matmul_nbits"],
        scales=options["scales"] or "float16",
        **given,
    )
