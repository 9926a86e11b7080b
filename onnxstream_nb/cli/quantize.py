"""The verb quantize: its flags as options of the step, and the summary at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..progress import of_download
from .convert import facts, layers_kept, summary
from .perplexity import read_text

if TYPE_CHECKING:
    from ..convert.quantise import QuantiseOptions

ACTIVATIONS = ("dynamic", "static")
_WEIGHTS_ONLY = ("block", "matmul_nbits", "scales", "plain")
_CALIBRATING = ("awq", "gptq", "dynamic", "static")


def quantize(options: Mapping[str, Any]) -> int:
    """Write a quantised model, and print what was written."""
    _check_flags(options)
    from .. import hub, ui
    from ..convert.convert import convert
    from ..convert.folder import check_out
    from ..convert.quantise import quantise

    out = Path(options["out"]).expanduser()
    check_out(out, overwrite=options["overwrite"])  # before anything is downloaded
    with ui.progress() as report:
        found = hub.resolve(options["model"], progress=of_download(report))
        asked = asked_for(options, found.path)
        written = convert(
            found.path, out, steps=(partial(quantise, options=asked, report=report),),
            overwrite=options["overwrite"], report=report,
        )  # fmt: skip
    document = {"model": found.name, "method": asked.method, "dtype": asked.dtype, **facts(written)}
    print(json.dumps(document, ensure_ascii=False) if options["json"] else summary(document))
    return 0


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
    from ..convert.quantise import DEFAULT_BLOCK, QuantiseOptions
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
