"""What each way to quantise costs: bytes of weights, perplexity, KL divergence, decode speed.

    python bench/quantise.py --text BOOK.txt [MODEL] [--tokens 4096] [--calibrate 8192]
    python bench/quantise.py --text BOOK.txt --kinds          (one kind of matrix at a time)

Every row is written by `quantize` from the same float32 model and read by `perplexity` beside it.
The text's first half is measured on, its second half calibrated by. Rows of the same block and the
same integers are of the same size.

The default model comes as Q4_1: its weights lie on a grid of 16 steps for every 32, each with a
minimum of its own. Asymmetric int4 in blocks of 32 finds that grid again and tells nothing of any
method; so the rows are symmetric, whose steps are others, or have blocks of several such grids.
The row "as it came" is the file itself, against which all others are therefore measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import engine, parser, report
from weights import locate

DEFAULT = "smollm2-135m"


@dataclass(frozen=True)
class Row:
    """A way to store the model: its title, and the flags of the verb that writes it."""

    title: str
    verb: str = ""
    flags: tuple[str, ...] = ()
    calibrated: bool = False


def _int4(method: str, *flags: str, title: str = "") -> Row:
    shown = " ".join(flag.removeprefix("--") for flag in flags)
    calibrated = method in ("awq", "gptq")
    name = f"int4 {title or method} {shown}".strip()
    return Row(name, "quantize", ("--method", method, *flags), calibrated)


ROWS: Sequence[Row] = (
    Row("fp16", "convert", ("--dtype", "fp16")),
    Row("int8", "quantize", ("--dtype", "int8")),
    *(
        row
        for shape in (("--block", "32"), ("--block", "128"), ("--block", "128", "--asymmetric"))
        for row in (
            _int4("rtn", *shape, "--plain"),
            _int4("rtn", *shape, title="rtn, scales searched"),
            _int4("awq", *shape),
            _int4("gptq", *shape),
        )
    ),
    _int4("gptq", "--block", "32", "--keep", "*=int4", title="gptq, nothing kept but the table,"),
    Row("as it came"),
)
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def kinds() -> Iterator[Row]:
    """All matrices but those of one kind in float16."""
    for kind in KINDS:
        flags = ("--keep", f"*{kind}*=int4", "--keep", "*=fp16")
        yield Row(f"{kind} alone in int4", "quantize", flags)


def measured(
    row: Row, folder: Path, reference: Path, halves: Sequence[Path], given: argparse.Namespace
) -> dict[str, Any]:
    """Write one row's model, read the text with it, and generate."""
    path, written = locate(given.models[0]), {}
    if row.verb:
        path = folder / "model"
        flags = [*row.flags, "--overwrite", "--json"]
        if row.calibrated:
            flags += ["--calibration", str(halves[1]), "--tokens", str(given.calibrate)]
        written = _json(row.verb, str(reference), "-o", str(path), *flags)
    threads = ["--threads", str(given.threads)] if given.threads else []
    read = _json(
        "perplexity", str(path), "--text", str(halves[0]), "--tokens", str(given.tokens),
        "--reference", str(reference), "--precision", "exact", *threads,
    )  # fmt: skip
    speed = _json("bench", str(path), "-p", "0", "-n", "64", "-r", str(given.runs), *threads)
    return {
        "title": row.title, "flags": list(row.flags),
        "weight_bytes": written.get("weight_bytes") or stored_bytes(path),
        "seconds_to_write": written.get("seconds"),
        "perplexity": read["perplexity"], **read["reference"],
        "reference_perplexity": read["reference"]["perplexity"],
        "tokens_per_s": speed["tests"][0]["avg_ts"], "samples": speed["tests"][0]["samples_ts"],
    } | {"perplexity": read["perplexity"]}  # fmt: skip


def _json(*arguments: str) -> dict[str, Any]:
    flags = () if "--json" in arguments else ("--json",)
    found: dict[str, Any] = json.loads(engine(*arguments, *flags).output)
    return found


def stored_bytes(path: Path) -> int:
    """Bytes of a model's weights in its file."""
    from onnxstream_nb.llm import declared

    return declared(path)[1]


@contextmanager
def prepared(given: argparse.Namespace) -> Iterator[tuple[Path, Path, list[Path]]]:
    """A folder for what is written, the model in float32, and the halves of the text."""
    folder = Path(tempfile.mkdtemp(prefix="quantise-"))
    try:
        text = Path(given.text).read_text("utf-8")
        halves = [folder / "measured.txt", folder / "calibration.txt"]
        halves[0].write_text(text[: len(text) // 2], "utf-8")
        halves[1].write_text(text[len(text) // 2 :], "utf-8")
        reference = folder / "reference"
        source = str(locate(given.models[0]))
        engine("convert", source, "-o", str(reference), "--dtype", "fp32")
        yield folder, reference, halves
    finally:
        shutil.rmtree(folder)


def line(case: Mapping[str, Any]) -> list[str]:
    return [
        case["title"], f"{case['weight_bytes'] / 1e6:.1f}", f"{case['perplexity']:.3f}",
        f"{case['kl_mean']:.4f} ± {case['kl_error']:.4f}", f"{case['same_best']:.2%}",
        f"{case['tokens_per_s']:.1f}",
    ]  # fmt: skip


def main() -> None:
    options = parser(__doc__, [DEFAULT])
    options.add_argument("--text", required=True, help="a book: half is measured, half calibrates")
    options.add_argument("--tokens", type=int, default=4096, help="of the text that are read")
    options.add_argument("--calibrate", type=int, default=8192, help="tokens of calibration")
    options.add_argument("--kinds", action="store_true", help="one kind of matrix at a time")
    options.add_argument("--only", default="", help="rows whose title contains this")
    given = options.parse_args()
    rows = [row for row in (kinds() if given.kinds else ROWS) if given.only in row.title]
    if not rows:
        options.error(f"--only {given.only}: no row is called so")
    with prepared(given) as (folder, reference, halves):
        cases = [measured(row, folder, reference, halves, given) for row in rows]
    titles = ("stored as", "MB", "perplexity", "KL, nats a token", "same best", "tokens/s")
    document = {"tokens": given.tokens, "calibrated_by": given.calibrate, "cases": cases}
    report(titles, [line(case) for case in cases], document)


if __name__ == "__main__":
    main()
