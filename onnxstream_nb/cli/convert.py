"""The verb convert: its flags as steps, and the summary at its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import device
from ..device import format_size
from ..errors import UsageError
from ..progress import Report, of_download

if TYPE_CHECKING:
    from ..convert.convert import Step, Written

ROUNDED = ("int8", "int4")
_ROUNDING = ("block", "asymmetric", "keep", "matmul_nbits")


How = Callable[[Path, Report], tuple[dict[str, Any], dict[str, Any]]]
"""From the source and what is told of the work: arguments of `convert`, more facts to print."""


def convert(options: Mapping[str, Any]) -> int:
    """Write a model in another format or type, and print what was written."""
    _check_flags(options)
    from ..convert.convert import UINT8
    from ..convert.draft import FLOATS

    dtype = UINT8 if _is_uint8(options) else FLOATS.get(options["dtype"])
    return written(
        options,
        lambda path, report: (
            {"to": options["to"], "dtype": dtype, "steps": steps(options, report)}, {},
        ),
    )  # fmt: skip


def written(options: Mapping[str, Any], how: How) -> int:
    """Find the model, convert it, and print what that gave; the exit code."""
    from .. import hub, ui
    from ..convert.convert import convert as run
    from ..convert.folder import check_out

    out = Path(options["out"]).expanduser()
    check_out(out, overwrite=options["overwrite"])  # before anything is downloaded
    with ui.progress() as report:
        found = hub.resolve(options["model"], progress=of_download(report))
        arguments, more = how(found.path, report)
        done = run(found.path, out, overwrite=options["overwrite"], report=report, **arguments)
    document = {"model": found.name, **more, **facts(done)}
    print(json.dumps(document, ensure_ascii=False) if options["json"] else summary(document))
    return 0


def _check_flags(options: Mapping[str, Any]) -> None:
    given = [name for name in _ROUNDING if options[name] not in (None, False, ())]
    rounded = options["dtype"] in ROUNDED
    if given and not rounded:
        flag = given[0].replace("_", "-")
        raise UsageError(f"--{flag} is for --dtype {' or '.join(ROUNDED)}: give one of them")
    if rounded and options["to"] == "onnxstream" and (given or not _is_uint8(options)):
        flag = given[0].replace("_", "-") if given else f"dtype {options['dtype']}"
        raise UsageError(
            f"--{flag}: OnnxStream stores no weights in blocks; give fp32 or fp16, or int8 alone"
        )


def _is_uint8(options: Mapping[str, Any]) -> bool:
    """Whether all weights are to be rounded as OnnxStream's exporter does."""
    return bool(options["to"] == "onnxstream" and options["dtype"] == "int8")


def steps(options: Mapping[str, Any], report: Report) -> tuple[Step, ...]:
    """What is done to the model before it is written."""
    if options["dtype"] not in ROUNDED or _is_uint8(options):
        return ()
    from ..convert.quantisation.quantise import DEFAULT_BLOCK, QuantiseOptions, quantise

    asked = QuantiseOptions(
        dtype=options["dtype"],
        block=DEFAULT_BLOCK if options["block"] is None else options["block"],
        asymmetric=options["asymmetric"],
        keep=layers_kept(options),
        matmul_nbits=options["matmul_nbits"],
    )
    return (partial(quantise, options=asked, report=report),)


def layers_kept(options: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What --keep says, as pairs of a pattern and a type."""
    return tuple(_pair(text) for text in options["keep"] or ())


def _pair(text: str) -> tuple[str, str]:
    pattern, separator, dtype = text.rpartition("=")
    if not separator or not pattern:
        raise UsageError(f"--keep {text}: write PATTERN=DTYPE, as in *down_proj*=int8")
    return pattern, dtype


def facts(done: Written) -> dict[str, Any]:
    """What was written, as JSON's types."""
    return {
        "path": str(done.path),
        "to": done.kind,
        "files": done.files,
        "size_bytes": done.size_bytes,
        "weight_bytes": done.weight_bytes,
        "source_weight_bytes": done.source_bytes,
        "seconds": round(done.seconds, 3),
        "mb_per_s": round(done.size_bytes / done.seconds / 1e6, 1),
        "peak_rss_mb": round(device.peak_rss() / 1e6, 1),
        "note": done.note,
    }


def summary(document: Mapping[str, Any]) -> str:
    """The facts as lines of text."""
    d = document
    files = sorted(d["files"], key=lambda name: -d["files"][name])
    named = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
    lines = [
        f"written    {d['path']} ({d['to']})",
        f"files      {len(files)}: {named}",
        f"size       {format_size(d['size_bytes'])}, of which the weights take"
        f" {format_size(d['weight_bytes'])} ({format_size(d['source_weight_bytes'])} before)",
        f"time       {d['seconds']:.1f} s, {d['mb_per_s']:.0f} MB/s;"
        f" peak memory {d['peak_rss_mb']:.0f} MB",
    ]
    return "\n".join([*lines, f"note       {d['note']}"] if d["note"] else lines)
